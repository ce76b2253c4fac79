"""Bundles in service: snapshots, release tracks, shadow checks."""
