"""Keys and values are used by those alone for whom they hold: never after a change of weights, number format, tokenizer or
catalogue, never by another tenant or user, and by all processes that serve the same.

Real target processes that share one Redis are asked for the same histories, as each world spells them. Every answer is compared
with the checkpoint's own, and what came from a cache with what had been computed for exactly this prompt in exactly this world.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import redis
import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.engine.bundle.manifest import read_manifest, write_manifest
from atspeed.engine.search.trie import ROOT
from atspeed.local.redis_server import LocalRedis
from atspeed.local.stack import ServiceProcess
from atspeed.rpc import wire
from atspeed.v1 import target_pb2
from tests.bundles import SPECIALS, TestBundle, random_history, write_bundle
from tests.serving import LEVELS, WINDOW, EvaluateStream, models, until

BLOCK = LEVELS  # tokens: an item's
USER_KEYS = (b"", b"owner--a", b"owner--b")
# A random model's scores go down to -30; float16 rounds them that much, keys and values of another prompt change them by several.
TOLERANCE = {"float32": 1e-3, "float16": 2.0}
Logp = npt.NDArray[np.float32]


@dataclass(frozen=True)
class World:
    """Configuration that decides keys and values. replicas: its services. model: the checkpoint that it was exported from."""

    bundle: Bundle
    model: PreTrainedModel
    replicas: Sequence[grpc.Channel]
    tenant: str = ""
    catalogue: Catalogue = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "catalogue", self.bundle.catalogue())

    def prompt(self, history: Sequence[str]) -> npt.NDArray[np.int64]:
        """A history as this world's target reads it."""
        entry, columns = self.bundle.manifest.target, self.catalogue.trie.codebook_offset
        items = self.catalogue.codes[self.catalogue.find(history)] + columns
        return entry.prompt.tokens(list(np.array(entry.code_tokens)[items]))

    def truth(self, prompt: npt.NDArray[np.int64]) -> Logp:
        """Log-probabilities of the first codes, ascending, by the checkpoint, in the order of its export."""
        trie = self.catalogue.trie
        tokens = SPECIALS + np.arange(trie.columns)
        with torch.no_grad():
            logp = self.model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].log_softmax(-1)
        return np.asarray(logp.numpy()[tokens[trie.column(trie.children(ROOT))]])

    def blocks(self, prompt: npt.NDArray[np.int64], user_key: bytes) -> list[tuple[object, ...]]:
        """Inputs of each whole block of a prompt. A catalogue and a tokenizer count by their tokens alone."""
        target = self.bundle.manifest.target
        same = (target.fingerprint, target.kv_dtype, self.tenant, user_key)
        return [(*same, prompt[: end + BLOCK].tobytes()) for end in range(0, len(prompt) - BLOCK, BLOCK)]


@dataclass(frozen=True)
class Answer:
    """Evaluation of the root. logp: as `World.truth`. cached: prompt tokens that were not computed."""

    logp: Logp
    cached: int


def asked(world: World, replica: grpc.Channel, prompt: npt.NDArray[np.int64], user_key: bytes) -> Answer:
    version = world.bundle.manifest.model_version("target")
    start = target_pb2.EvaluateStart(
        model_version=version, prompt=wire.to_array(prompt), tenant=world.tenant, user_key=user_key
    )
    with EvaluateStream(replica) as stream:
        reply = stream.ask(target_pb2.EvaluateRequest(start=start, nodes=wire.to_array(np.zeros(1, dtype=np.int32))))
    evaluation, cost = reply.evaluation, reply.statistics
    child = wire.vector(evaluation.child, "child", "int32")
    logp = wire.vector(evaluation.logp, "logp", "float32")[np.argsort(child)].astype(np.float32)
    return Answer(logp, sum(cost.cached_tokens.values()))


def other_tokenizer(made: TestBundle, root: Path) -> Bundle:
    """The same models, files and all, that read the codes as other tokens."""
    copy = update_catalogue(made.bundle, root, {}, []).root
    manifest = read_manifest(copy)
    tokens = tuple(reversed(manifest.target.code_tokens))
    write_manifest(
        copy, manifest.model_copy(update={"target": manifest.target.model_copy(update={"code_tokens": tokens})})
    )
    return Bundle(copy)


def other_catalogue(made: TestBundle, root: Path) -> Bundle:
    """The same models and items, of which every third has another code path."""
    catalogue, rng = made.bundle.catalogue(), np.random.default_rng(0)
    moved = [catalogue.id_of(item) for item in range(0, catalogue.items, 3)]
    sizes = catalogue.trie.codebook_sizes
    paths = {item: tuple(int(rng.integers(size)) for size in sizes) for item in moved}
    return update_catalogue(made.bundle, root, paths, moved)


@pytest.fixture(scope="module")
def worlds(
    catalogue: Catalogue, redis_server: LocalRedis, log_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, World]]:
    """One, its like in another process, and those that differ from it in one thing. Other weights are served by a process that
    has one memory for both, as in a rollout; all others have nothing but Redis.
    """
    folder = tmp_path_factory.mktemp("worlds")
    plain = write_bundle(folder / "plain", catalogue, max_items=WINDOW)
    retrained = write_bundle(folder / "retrained", catalogue, max_items=WINDOW, seed=1)
    halved = write_bundle(folder / "halved", catalogue, max_items=WINDOW, precision="float16")
    respelled = other_tokenizer(plain, folder / "respelled")
    updated_catalogue = other_catalogue(plain, folder / "updated_catalogue")
    alone: dict[str, object] = {"kv-memory-mb": 0}
    served: dict[str, dict[str, object]] = {
        "plain": {"bundle": plain.root, **alone},
        "both": {"bundle": plain.root, "canary-bundle": retrained.root},
        "halved": {"bundle": halved.root, **alone},
        "respelled": {"bundle": respelled.root, **alone},
        "updated_catalogue": {"bundle": updated_catalogue.root, **alone},
    }
    common = {
        "redis-url": redis_server.url,
        "redis-timeout-seconds": 10,
        "kv-redis": "always",
        "kv-block-tokens": BLOCK,
        "warm-up-seconds": 0,
        "threads": 1,
    }
    with ExitStack() as cleanup:
        channels = {}
        for name, flags in served.items():
            service = ServiceProcess("target_service", common | flags, log_folder / f"cross-{name}.log")
            service.start()
            cleanup.callback(service.stop)
            channels[name] = cleanup.enter_context(models(service.address))
        twice = [channels["plain"], channels["both"]]
        yield {
            "plain": World(plain.bundle, plain.target, twice),
            "tenant": World(plain.bundle, plain.target, twice, tenant="other"),
            "weights": World(retrained.bundle, retrained.target, [channels["both"]]),
            "dtype": World(halved.bundle, plain.target, [channels["halved"]]),
            "tokenizer": World(respelled, plain.target, [channels["respelled"]]),
            "catalogue": World(updated_catalogue, plain.target, [channels["updated_catalogue"]]),
        }


class Trials:
    """Asks, and checks each answer. computed: by block, which replicas have computed it for somebody.

    found: prompts of which something was cached. foreign: those all of which was, and only other processes had computed it.
    """

    def __init__(self, worlds: Mapping[str, World]) -> None:
        self.worlds = worlds
        self._computed: dict[tuple[object, ...], set[int]] = {}
        self._truths: dict[tuple[int, bytes], Logp] = {}
        self.found = self.foreign = 0

    def ask(self, name: str, history: Sequence[str], user_key: bytes, number: int) -> None:
        """By one of the world's replicas."""
        world = self.worlds[name]
        replica = number % len(world.replicas)
        prompt = world.prompt(history)
        answer = asked(world, world.replicas[replica], prompt, user_key)
        blocks = world.blocks(prompt, user_key)
        usable = next((at for at, block in enumerate(blocks) if block not in self._computed), len(blocks))
        assert answer.cached <= usable * BLOCK, f"{name}: {answer.cached} tokens of {usable} blocks"
        np.testing.assert_allclose(answer.logp, self._truth(world, prompt), atol=self._tolerance(world), rtol=0)
        place = id(world.replicas[replica])
        self.found += answer.cached > 0
        self.foreign += answer.cached == len(blocks) * BLOCK and place not in self._computed[blocks[-1]]
        for block in blocks:
            self._computed.setdefault(block, set()).add(place)

    def _tolerance(self, world: World) -> float:
        return TOLERANCE[world.bundle.manifest.target.precision]

    def _truth(self, world: World, prompt: npt.NDArray[np.int64]) -> Logp:
        key = (id(world.model), prompt.tobytes())
        if key not in self._truths:
            self._truths[key] = world.truth(prompt)
        return self._truths[key]


@pytest.fixture(scope="module")
def trials(worlds: Mapping[str, World]) -> Trials:
    """One process serves all tests, since its memory is kept between them."""
    return Trials(worlds)


AGAIN = 7
ROUNDS = [(0, 4), *(pytest.param(seed, 40, marks=pytest.mark.long) for seed in range(1, 11))]


@pytest.mark.parametrize(("seed", "rounds"), ROUNDS)
def test_nothing_is_found_that_was_computed_for_another(
    redis_url: str, trials: Trials, catalogue: Catalogue, seed: int, rounds: int
) -> None:
    """In each round every world is asked for one new history, for every user, in any order, and some are asked again: 25 trials,
    10,000 in the ten long runs.
    """
    source = random.Random(seed)
    combinations = [(name, user_key) for name in trials.worlds for user_key in USER_KEYS]
    assert len(combinations) + AGAIN == 25
    before = trials.found
    for number in range(rounds):
        history = random_history(catalogue, 2 + number % (WINDOW - 1), seed=1000 * seed + number)
        order = source.sample(combinations, len(combinations))
        for turn, (name, user_key) in enumerate([*order, *source.sample(order, AGAIN)]):
            trials.ask(name, history, user_key, number + turn)
    # Whoever is asked again finds what there was, unless it is still being written.
    assert trials.found - before >= rounds * AGAIN / 2


@pytest.mark.parametrize("first", [0, 1])
def test_what_one_process_computed_another_of_the_same_world_finds(
    redis_url: str, trials: Trials, catalogue: Catalogue, first: int
) -> None:
    """All of it, by keys that both make from the prompt alone."""
    history, before = random_history(catalogue, WINDOW, seed=10**6 + first), trials.foreign
    trials.ask("plain", history, b"", first)
    with redis.Redis.from_url(redis_url) as store:
        until(lambda: len(store.keys("kv:*")) >= WINDOW)
    trials.ask("plain", history, b"", 1 - first)
    assert trials.foreign == before + 1
