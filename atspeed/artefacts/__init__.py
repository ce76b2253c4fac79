"""Bundles as artefacts: signatures, URLs, and the cache of fetched ones."""
