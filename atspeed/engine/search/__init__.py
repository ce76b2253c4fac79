"""Beam search on the trie: nodes, beams, plans, scores."""
