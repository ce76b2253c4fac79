"""How much to draft: decided for each request by what earlier ones showed (method, section 7)."""
