"""gRPC clients of the draft service and the target service."""
