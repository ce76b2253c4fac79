"""Finished studies, outside of the product: `python -m research STUDY`."""
