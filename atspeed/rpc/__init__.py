"""gRPC servers and clients: admission, errors, health, channels, arrays on the wire."""
