"""Naive reference implementations: dictionaries, lists and loops, no code shared with what they check."""
