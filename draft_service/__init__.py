"""The draft service: makes plans with the draft model q."""
