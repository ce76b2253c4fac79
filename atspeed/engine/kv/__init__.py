"""Keys and values of prompts: tiers, blocks, erasure."""
