"""Checks the standard OTEL_EXPORTER_OTLP_* variables at the start.

The exporter itself loses all spans for some bad values, and ends the process with a traceback for others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from atspeed.engine.host_names import is_host
from atspeed.errors import StartupError
from atspeed.rpc.addresses import target_uri


def check_otlp_variables() -> None:
    """Check the variables. Raises StartupError, which names the variable and does not quote its value."""
    for name, (usable, rule) in _RULES.items():
        for variable in (f"OTEL_EXPORTER_OTLP_{name}", f"OTEL_EXPORTER_OTLP_TRACES_{name}"):
            if variable in os.environ and not usable(os.environ[variable]):
                raise StartupError(f"{variable}: must be {rule}")


def _is_endpoint(text: str) -> bool:
    try:
        if not text.startswith(("http://", "https://")):
            return bool(target_uri(text))
        parts = urlsplit(text)
        return "@" not in parts.netloc and is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        return False


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _is_compression(text: str) -> bool:
    return text.strip().lower() == "gzip"


def _is_file(text: str) -> bool:
    return Path(text).is_file() and os.access(text, os.R_OK)


_RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "ENDPOINT": (_is_endpoint, "http://HOST:PORT, https://HOST:PORT or HOST:PORT"),
    "TIMEOUT": (_is_positive, "a number of seconds above 0"),
    "COMPRESSION": (_is_compression, "gzip, or not set"),
    "CERTIFICATE": (_is_file, "a file that can be read"),
    "CLIENT_CERTIFICATE": (_is_file, "a file that can be read"),
    "CLIENT_KEY": (_is_file, "a file that can be read"),
}
