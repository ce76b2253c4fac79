"""Measurements and checks through the real services. Each prints a table and writes JSON that says where it comes from.

parity.py       our lists against Hugging Face `generate`       histories.py    whose lists: real users or random ones
lossless.py     strict against target-only, with exclusions     services.py     a bundle's services, asked about many users
"""
