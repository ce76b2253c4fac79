"""Routes of Envoy for the files of the console.

Envoy reads the files when it starts and answers with them itself. The page may load nothing but these files and call nothing but
the paths of this Envoy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

FOLDER = Path(__file__).parent / "console"
"""Folder of the page's files."""
_TYPES: Final = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_FILTERS: Final = "type.googleapis.com/envoy.config.route.v3.FilterConfig"


def console_routes(folder: Path) -> list[dict[str, Any]]:
    """Return a route for each file of the page. folder: that of the files, as Envoy sees it."""
    files = sorted(path.name for path in FOLDER.iterdir() if path.suffix in _TYPES)
    return [
        {"match": {"path": "/console"}, "redirect": {"path_redirect": "/console/"}, **untranscoded()},
        *(_file(folder, name, "" if name == "index.html" else name) for name in files),
    ]


def _file(folder: Path, name: str, shown: str) -> dict[str, Any]:
    headers = {"content-type": _TYPES[Path(name).suffix], **_HEADERS}
    added = [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in headers.items()
    ]
    return {
        "match": {"path": f"/console/{shown}"},
        "direct_response": {"status": 200, "body": {"filename": str(folder / name)}},
        "response_headers_to_add": added,
        **untranscoded(),
    }


def untranscoded() -> dict[str, Any]:
    """Return the setting without which the transcoder looks for a method of this path and finds none."""
    disabled = {"@type": _FILTERS, "disabled": True}
    return {"typed_per_filter_config": {"envoy.filters.http.grpc_json_transcoder": disabled}}
