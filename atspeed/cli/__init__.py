"""The `atspeed` command line."""
