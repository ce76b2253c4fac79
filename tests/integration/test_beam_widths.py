"""Beam widths per level through the real services, against a naive search over the checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.local.stack import LocalStack
from atspeed.v1 import recommendation_pb2 as pb
from tests.bundles import TestBundle, random_history, write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.naive_search import LogProb, naive_beam_search, naive_exact_sample
from tests.oracles.naive_trie import NaiveTrie, Path
from tests.serving import Client, ids

CODES = (9, 8, 6, 5)
WIDTHS = [[1, 30], [4, 2, 25], [2, 12, 7, 20], [20, 1, 1, 20], [20]]
HISTORIES = range(3)
K = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("widths") / "bundle", random_catalogue(250, CODES, seed=6))


@pytest.fixture(scope="module")
def client(made: TestBundle) -> Iterator[Client]:
    """With plans that no timing and no earlier request decides: then equal requests have equal replies to the last bit."""
    flags: dict[str, dict[str, object]] = {
        "target": {"threads": 1},
        "draft": {"threads": 1},
        "orchestrator": {"planner": "fixed", "target-prefetch": False, "draft-timeout-seconds": 30},
    }
    with LocalStack(made.root, flags=flags) as stack, Client(stack.address) as client:
        yield client


@pytest.fixture(scope="module")
def naive(made: TestBundle) -> NaiveTrie:
    catalogue = made.bundle.catalogue()
    return NaiveTrie({catalogue.id_of(n): tuple(catalogue.codes[n].tolist()) for n in range(catalogue.items)}, CODES)


def log_probabilities(made: TestBundle, naive: NaiveTrie, history: list[str]) -> LogProb:
    """Log-probabilities of the checkpoint after a history's prompt, one prefix at a time and without a cache."""
    entry, catalogue = made.bundle.manifest.target, made.bundle.catalogue()
    prompt = prompt_tokens(catalogue, entry, catalogue.find(history).tolist()).tolist()
    first = np.cumsum([0, *CODES])
    told: dict[Path, torch.Tensor] = {}

    def logp(path: Path, code: int) -> float:
        if path not in told:
            tokens = [*prompt, *(entry.code_tokens[first[level] + above] for level, above in enumerate(path))]
            with torch.inference_mode():
                logits = made.target(torch.tensor([tokens])).logits[0, -1]
            told[path] = torch.log_softmax(logits.double(), dim=-1)
        return float(told[path][entry.code_tokens[first[len(path)] + code]])

    return logp


def expected_items(naive: NaiveTrie, leaves: list[tuple[Path, float]]) -> tuple[list[str], list[float]]:
    listed = [(item, score) for path, score in leaves for item in naive.items_of(path)][:K]
    return [item for item, _ in listed], [score for _, score in listed]


@pytest.mark.parametrize("seed", HISTORIES)
def test_lists_are_those_of_the_naive_search(client: Client, made: TestBundle, naive: NaiveTrie, seed: int) -> None:
    """Target-only, strict and tolerance 0; the narrow levels leave other items than one width of 20 does."""
    history = random_history(made.bundle.catalogue(), 6, seed)
    logp, lists = log_probabilities(made, naive, history), set()
    for widths in WIDTHS:
        items, scores = expected_items(naive, naive_beam_search(naive, logp, widths, lambda _: True)[-1])
        lists.add(tuple(items))
        for mode in (pb.MODE_TARGET_ONLY, pb.MODE_STRICT, pb.MODE_TOLERANCE):
            reply = client.recommend(history, k=K, beam_widths=widths, mode=mode)
            assert ids(reply) == items
            assert [item.score for item in reply.items] == pytest.approx(scores, abs=1e-3)
            assert (reply.exactness.exact, reply.degraded) == (True, False)
            assert (reply.beam_width, list(reply.beam_widths)) == (max(widths), widths if len(widths) > 1 else [])
    assert len(lists) > 1


def test_plans_for_widths_per_level_save_passes(client: Client, made: TestBundle) -> None:
    histories = [random_history(made.bundle.catalogue(), 6, seed) for seed in range(8)]
    replies = [client.recommend(history, k=5, beam_widths=[3, 4, 5]) for history in histories]
    assert any(reply.statistics.nodes_used for reply in replies)
    assert min(reply.statistics.target_passes for reply in replies) < len(CODES)


@pytest.mark.parametrize("seed", HISTORIES)
def test_exact_samples_are_those_of_the_naive_search(
    client: Client, made: TestBundle, naive: NaiveTrie, seed: int
) -> None:
    catalogue = made.bundle.catalogue()
    history = random_history(catalogue, 6, seed)
    logp = log_probabilities(made, naive, history)

    def noise(path: Path) -> float:
        return float(gumbel(seed, Stream.GUMBEL, catalogue.trie.path_hash(np.array([naive.id_of[path]])))[0])

    for widths in ([20, 30], [25, 21, 40, 20]):
        leaves = naive_exact_sample(naive, logp, widths, lambda _: True, 0.8, noise)
        fields = {"mode": pb.MODE_EXACT_SAMPLING, "seed": seed, "temperature": 0.8}
        assert ids(client.recommend(history, k=K, beam_widths=widths, **fields)) == expected_items(naive, leaves)[0]


@pytest.mark.parametrize("mode", pb.Mode.values())
def test_equal_widths_are_one_beam_width(client: Client, made: TestBundle, mode: pb.Mode.ValueType) -> None:
    """Replies without statistics are equal byte for byte, but for their id."""
    history, sampled = random_history(made.bundle.catalogue(), 6, 1), mode >= pb.MODE_RELAXED_SAMPLING
    fields: dict[str, Any] = {"mode": mode, "k": K, "reply_options": pb.ReplyOptions(omit_statistics=True)}
    fields |= {"seed": 4} if sampled else {}
    _, single = (
        client.recommend(history, beam_width=25, **fields) for _ in range(2)
    )  # the first fills the prefix cache
    for widths in ([25], [25, 25], [25] * len(CODES)):
        reply = client.recommend(history, beam_widths=widths, **fields)
        assert reply.recommendation_id != single.recommendation_id
        reply.recommendation_id = single.recommendation_id
        assert reply.SerializeToString(deterministic=True) == single.SerializeToString(deterministic=True)
