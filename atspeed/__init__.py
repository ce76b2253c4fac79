"""Speculative beam decoding for generative recommendation: everything but the three services."""
