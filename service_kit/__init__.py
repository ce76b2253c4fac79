"""What the three servers and the client share: settings, errors, health, TLS, tokens, admission, channels, metrics.

`server.py` builds and runs a server out of them; a service brings its settings (`settings.py`) and its servicer.
"""
