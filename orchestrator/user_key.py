"""Names for users that do not show who they are: what model services and Redis know cached keys and values by."""

from __future__ import annotations

import hashlib
import json

from atspeed.engine.kv.memory_cache import USER_KEY_BYTES

FIRST_ITEMS = 4
"""Of a history that belongs to no stored user, so many items say whose it is: enough to tell most users apart."""


def user_cache_key(tenant: str, user_id: str) -> bytes:
    """A stored user's tag, USER_KEY_BYTES; equal in every process."""
    return digest("owner", tenant, user_id)


def digest(*parts: str) -> bytes:
    """A hash of these texts, USER_KEY_BYTES. Who has the texts can make it; it hides them from who only looks."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=USER_KEY_BYTES, person=b"atspeed-identity").digest()
