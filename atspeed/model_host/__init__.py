"""A model in a service: loading, passes, health, settings."""
