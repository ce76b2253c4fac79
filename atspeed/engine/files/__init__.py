"""Files: atomic writes, lines, JSON."""
