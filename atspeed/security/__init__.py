"""TLS, bearer tokens and scopes."""
