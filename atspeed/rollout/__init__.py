"""Hot reload of bundles, and release tracks."""
