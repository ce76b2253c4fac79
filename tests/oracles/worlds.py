"""Small catalogues, tables in place of models, and fakes of the target and the draft that the beam loop talks to."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from atspeed.engine.arrays import Float32, Float64, Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.model.tree_session import Found, PassProgram
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, Perturbation, ScoringRule, best_children, codes_normalizer
from atspeed.engine.search.trie import Pruning, Trie
from tests.oracles.naive_search import NaiveModel
from tests.oracles.naive_trie import NaiveTrie, Path

Result = TypeVar("Result")
Choice = Callable[[Int64], npt.NDArray[np.bool_]]
"""Which of some inner nodes a fake draft plans."""

# Anything that UTF-8 can spell, but for NUL, which the catalogue refuses at the end of an id.
item_ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6)

# One width for all levels, and one per level; more widths than levels too.
beam_widths = st.lists(st.integers(1, 8), min_size=1, max_size=4).map(lambda widths: BeamWidths.of(*widths))


def run_now(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that never waits, such as a search over these fakes.

    `asyncio.run` takes a millisecond for an event loop, and more to print the result for a signal handler.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("Result", end.value)
    raise AssertionError("the coroutine waits")


def run_steps(steps: PassProgram[Found], evaluate: Callable[[Int64], Evaluation]) -> Found:
    """Return the result of a TreeEvaluator's steps, with every pass looked up."""
    try:
        nodes = next(steps)
        while True:
            nodes = steps.send(evaluate(nodes))
    except StopIteration as end:
        return cast("Found", end.value)


@st.composite
def naive_tries(draw: st.DrawFn, levels: Sequence[int] = (1, 2, 3, 4), max_items: int = 12) -> NaiveTrie:
    """Random catalogues: narrow codebooks, so that items share paths and prefixes; some with a single-child chain.

    In some of them paths end early. Where one is the beginning of another, its items are left out.
    """
    depth = draw(st.sampled_from(list(levels)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=depth, max_size=depth))
    paths = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    items = draw(st.dictionaries(item_ids, paths, min_size=1, max_size=max_items))
    if draw(st.booleans()):
        ends = draw(st.lists(st.integers(1, depth), min_size=len(items), max_size=len(items)))
        cut = {item: path[:end] for (item, path), end in zip(items.items(), ends, strict=True)}
        whole = [path for path in cut.values() if not any(_begins(path, other) for other in cut.values())]
        items = {item: (*path, *[-1] * (depth - len(path))) for item, path in cut.items() if path in whole}
    return NaiveTrie(items, sizes)


def _begins(path: Path, other: Path) -> bool:
    return len(path) < len(other) and other[: len(path)] == path


def build(naive: NaiveTrie) -> Catalogue:
    """The catalogue of a naive trie's items."""
    codes = np.array(list(naive.items.values())).reshape(len(naive.items), naive.levels)
    return Catalogue.build(list(naive.items), codes, naive.codebook_sizes)


@dataclass(frozen=True)
class World:
    """A catalogue and a model of it as a table: logits [nodes, C] with their log-normalizers [nodes], as if V > C.

    tokens: the token of each code column; equal tokens have equal logits. Empty: all are distinct.
    """

    naive: NaiveTrie
    catalogue: Catalogue
    rule: ScoringRule
    logits: Float32
    log_normalizer: Float32
    tokens: tuple[int, ...] = ()
    _evaluated: dict[tuple[bytes, int], Evaluation] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def random(cls, naive: NaiveTrie, rule: ScoringRule, seed: int, *, coarse: bool = False) -> World:
        """Normal logits, or coarse ones: then many scores are equal and the order of ties decides.

        Under rule `codes` levels share tokens.
        """
        rng, catalogue = np.random.default_rng(seed), build(naive)
        shape = (catalogue.trie.nodes, catalogue.trie.columns)
        logits = (rng.integers(-2, 3, shape) if coarse else rng.normal(size=shape) * 1.5).astype(np.float32)
        tokens = list(range(catalogue.trie.columns))
        if rule is ScoringRule.CODES:
            most = max(naive.codebook_sizes)
            tokens = [int(token) for size in naive.codebook_sizes for token in rng.permutation(most)[:size]]
            logits = logits[:, [tokens.index(token) for token in tokens]]
        log_normalizer = np.log(np.exp(logits.astype(np.float64)).sum(axis=1) + 1).astype(np.float32)
        log_normalizer = np.ceil(log_normalizer) if coarse else log_normalizer
        return cls(naive, catalogue, rule, logits, log_normalizer, tuple(tokens))

    @property
    def trie(self) -> Trie:
        """The array trie."""
        return self.catalogue.trie

    @property
    def model(self) -> NaiveModel:
        """The same table for the naive searches."""
        return NaiveModel(self.naive, self.logits, self.log_normalizer, self.rule, self._tokens)

    @property
    def _tokens(self) -> Sequence[int]:
        return self.tokens or range(self.trie.columns)

    def pruning(self, excluded: Sequence[str]) -> Pruning:
        """Without these items."""
        return self.catalogue.pruning(excluded=self.catalogue.find(excluded))

    def allowed(self, items: Sequence[str]) -> Pruning:
        """With these items only."""
        return self.catalogue.pruning(allowed=self.catalogue.find(items))

    def paths(self, nodes: Int64) -> list[Path]:
        """The naive trie's paths of some node ids."""
        return [self.naive.nodes[node] for node in nodes.tolist()]

    def evaluate(
        self, nodes: Int64, pruning: Pruning, limit: int, perturbation: Perturbation | None = None
    ) -> Evaluation:
        """Return the model's evaluation of some nodes. Laws ask the same thousands of times, so plain answers are kept."""
        key = (nodes.tobytes(), limit)
        plain = pruning.is_none and perturbation is None
        if plain and key in self._evaluated:
            return self._evaluated[key]
        log_normalizer: Float32 | Float64 = self.log_normalizer[nodes]
        if self.rule is ScoringRule.CODES:
            log_normalizer = codes_normalizer(self.logits[nodes], np.unique(self._tokens, return_index=True)[1])
        evaluation = best_children(
            self.trie,
            nodes,
            self.logits[nodes],
            log_normalizer,
            rule=self.rule,
            pruning=pruning,
            limit=limit,
            perturbation=perturbation,
        )
        if plain:
            self._evaluated[key] = evaluation
        return evaluation


@dataclass
class TableTarget:
    """The target of one request. asked: the nodes of every pass. max_children: None for all."""

    world: World
    pruning: Pruning
    max_children: int | None
    noise: Perturbation | None = None
    asked: list[list[int]] = field(default_factory=list)
    has_next_pass: ClassVar[bool] = False

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """One pass."""
        assert set(nodes.tolist()) <= set(self.world.naive.inner())
        self.asked.append(nodes.tolist())
        return self.world.evaluate(nodes, self.pruning, self.max_children or 1_000_000, self.noise)


@dataclass
class ScriptedDraft:
    """A draft that chooses from the inner nodes below the beams [n, ascending] those that a rule names.

    What hangs below a node that was left out is left out too, so that every plan is closed under ancestors.
    """

    trie: Trie
    choose: Choice

    async def plan(self, below: Beams) -> Plan:
        """The chosen ones."""
        inner = np.arange(1, int(self.trie.level_start[self.trie.levels]))
        chosen, kept = self.choose(inner), set(below.node.tolist())
        planned = []
        for node, wanted in zip(inner.tolist(), chosen.tolist(), strict=True):
            if wanted and int(self.trie.parent[node]) in kept:
                kept.add(node)
                planned.append(node)
        plan = Plan(below, np.asarray(planned, dtype=np.int64), np.zeros(len(planned)), np.zeros(len(planned)))
        plan.check(self.trie, limit=len(inner))
        return plan


def nothing(inner: Int64) -> npt.NDArray[np.bool_]:
    """Plans nothing."""
    return np.zeros(len(inner), dtype=bool)


def everything(inner: Int64) -> npt.NDArray[np.bool_]:
    """Plans everything."""
    return np.ones(len(inner), dtype=bool)


def only(nodes: set[int]) -> Choice:
    """Plans exactly these."""
    return lambda inner: np.isin(inner, sorted(nodes))


def at_random(seed: int, density: float) -> Choice:
    """Plans each node with a probability, drawn anew for every plan."""
    rng = np.random.default_rng(seed)
    return lambda inner: rng.random(len(inner)) < density
