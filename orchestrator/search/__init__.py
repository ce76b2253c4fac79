"""The search itself: beam search over a memo, and what is accepted of what was drafted."""
