"""An issuer of JSON Web Tokens: real keys, a key set in a file or over HTTP, and tokens with any claims."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER, AUDIENCE = "https://login.example", "atspeed"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class TokenIssuer:
    """Keys by id, of three kinds, and tokens that they sign."""

    def __init__(self) -> None:
        self.private: dict[str, tuple[str, PrivateKey]] = {
            "rsa": ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
            "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
            "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
        }

    def key_set(self, *names: str) -> str:
        """The public keys of these names, by default of all, as a JSON Web Key Set."""
        keys = []
        for name in names or self.private:
            algorithm, private = self.private[name]
            public = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key()))
            keys.append({**public, "kid": name, "use": "sig", "alg": algorithm})
        return json.dumps({"keys": keys})

    def token(self, key: str = "ec", *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token that is valid but for the claims that are given; a claim of None is left out."""
        algorithm, private = self.private[key]
        return jwt.encode(valid_claims(**claims), private, algorithm, {"kid": key, **(headers or {})})


def valid_claims(**changed: Any) -> dict[str, Any]:
    """The claims of a valid token, but for the changed ones."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "shop", "exp": int(time.time()) + 600, "scope": "openid read"}
    return {name: value for name, value in (claims | changed).items() if value is not None}


@contextmanager
def served(answers: list[str], gate: threading.Event | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server whose answers are the first of `answers`, an empty one being an error; yields its URL and the asked paths.

    It is silent while `gate` is not set.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if gate is not None:
                gate.wait()
            self.send_response(200 if answers[0] else 503)
            self.end_headers()
            self.wfile.write(answers[0].encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/keys", asked
        finally:
            if gate is not None:
                gate.set()
            server.shutdown()
