"""The `atspeed bench` commands."""
