"""Capacity: from a rate and a p99 to replicas, memory and Redis."""
