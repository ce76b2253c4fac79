"""Generated stubs of the public contract."""
