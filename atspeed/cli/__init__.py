"""The `atspeed` command."""
