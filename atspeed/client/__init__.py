"""The Python client of the recommendation service."""
