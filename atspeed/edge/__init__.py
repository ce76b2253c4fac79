"""Envoy before the orchestrators: HTTP/JSON, gRPC-Web and gRPC on one port."""
