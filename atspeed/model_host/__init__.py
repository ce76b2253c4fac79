"""Hosts a model in a service: loading, passes, health, settings."""
