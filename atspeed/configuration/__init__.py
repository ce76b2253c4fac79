"""Settings: one declaration for flag, environment variable and documentation."""
