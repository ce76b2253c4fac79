"""Speculative beam search: the loop, its memo, the verification policies."""
