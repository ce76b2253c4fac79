"""Benchmarks of a served system: each prints a table and writes a result file."""
