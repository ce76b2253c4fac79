"""The services, Redis and certificates on this machine, without Docker."""
