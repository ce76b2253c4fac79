"""gRPC servers and clients: admission, statuses, health, channels, messages."""
