"""Choice of how much to draft for each request, learned from earlier ones."""
