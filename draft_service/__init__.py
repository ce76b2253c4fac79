"""The draft service: grows plans with the draft model q."""
