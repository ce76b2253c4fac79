"""Bundles whose files and folders are links, and items with the longest ids, in running services."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.item_ids import MAX_ID_BYTES
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import LocalStack
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.conftest import mended
from tests.layouts import LAYOUTS, Layout
from tests.serving import Client, ids

FLAGS: dict[str, dict[str, object]] = {"target": {"warm-up-seconds": 0}, "draft": {"warm-up-seconds": 0}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_of_links_updated_serves_the_new_item(tmp_path: Path, layout: Layout) -> None:
    """Links were once copied as they were, and their targets were missing in the new folder."""
    made = write_bundle(tmp_path / "plain", random_catalogue(40, (4, 4), seed=0))
    old = Bundle(layout(made.root, tmp_path / "linked"))
    new = update_catalogue(old, tmp_path / "new", {"new": (1, 2)}, [])
    for root in (old.root, new.root):
        with LocalStack(root, flags=FLAGS) as stack, Client(stack.address) as client:
            reply = client.recommend(["item-1", "item-2"], k=5)
            assert reply.versions.bundle == Bundle(root).manifest.version
            assert len(ids(reply)) == 5
            if root == new.root:
                assert ids(client.recommend(["new"], k=1, allowed_item_ids=["new"])) == ["new"]


def test_the_longest_id_is_good_wherever_an_item_is_named(tmp_path: Path, redis_server: LocalRedis) -> None:
    """A longer one was recommended, and the request was refused when it came back."""
    longest = ["é" * (MAX_ID_BYTES // 2 - 1) + end for end in ("aa", "bb", "é")]
    catalogue = Catalogue.build(longest, np.array([[0, 0], [0, 1], [1, 1]]), (2, 2))
    root = write_bundle(tmp_path, catalogue).root
    with LocalStack(root, redis_url=mended(redis_server), flags=FLAGS) as stack, Client(stack.address) as client:
        assert set(ids(client.recommend(longest, k=3))) == set(longest)
        assert ids(client.recommend(longest, k=3, excluded_item_ids=longest[1:])) == longest[:1]
        assert ids(client.recommend(longest, k=3, allowed_item_ids=longest[1:2])) == longest[1:2]
        client.record("alice", longest)
        assert client.history("alice") == longest
        with pytest.raises(grpc.RpcError, match=r"history\[0\].*at most 256"):
            client.recommend([f"{longest[0]}a"], k=1)
