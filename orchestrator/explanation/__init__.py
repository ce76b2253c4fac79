"""Explanations of lists: the token tree, the time by stage, absent items."""
