"""The Python client, the `atspeed` command line, and the services on one machine without Docker."""
