"""What serves a request: snapshots of a bundle, release tracks, shadow checks."""
