"""Estimates that decide how much to draft, and nodes proposed without a draft."""
