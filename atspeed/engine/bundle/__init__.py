"""The bundle on disk: manifest, catalogue, prompt template."""
