"""User keys: names of users in caches and logs that do not reveal the user."""

from __future__ import annotations

import hashlib
import json

from atspeed.engine.kv.memory_cache import USER_KEY_BYTES

# Items at the start of a history in a request that identify its user. Four items tell most users apart, and a longer prefix
# would make a user with a short history a new one after every event.
FIRST_ITEMS = 4


def user_cache_key(tenant: str, user_id: str) -> bytes:
    """Return the user key of a stored user: USER_KEY_BYTES bytes, equal in every process."""
    return digest("owner", tenant, user_id)


def digest(*parts: str) -> bytes:
    """Return a hash of texts, USER_KEY_BYTES bytes. It hides the texts; those who know them can compute it."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=USER_KEY_BYTES, person=b"atspeed-identity").digest()
