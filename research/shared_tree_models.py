"""Models in this process whose token tree is shared by all searches for one prompt.

A node's evaluation depends only on the prompt and the path, so the searches for one user can share it. The loop and the drafter
count the passes that a cold model would make; only nodes that no earlier search evaluated are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ModelEntry, Role
from atspeed.engine.kv.memory_cache import NO_USER_KEY, KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.loading import load_decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Found, PassProgram, Selection, TreeSession
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Children, Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning, Trie
from draft_service.drafter import Drafter, DraftRequest

TEMPERATURE = 1.0  # of the sampling modes
_BLOCK_TOKENS = 16  # the default of the services
_CACHE_BYTES = 64 * 2**20  # holds the prompts of some users


class SharedTreeEvaluator(TreeEvaluator):
    """TreeEvaluator that keeps the tree while the prompt stays the same, and computes no node twice.

    It serves requests without exclusions, and samples at temperature 1 only, so that one evaluation is right for all of them.
    Perturbed requests get all children instead of the best, and draw the same ones from them.
    """

    _tree: TreeSession | None = None
    _known: dict[int, Children]

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = NO_USER_KEY) -> TreeSession:
        """Return the kept tree, or a new one for another prompt."""
        if self._tree is None or not np.array_equal(self._tree.tokens.prompt, prompt):
            if self._tree is not None:
                super().end(self._tree)
            self._tree = await super().open(prompt, tenant=tenant, user_key=user_key)
            self._known = {}
        return self._tree

    def end(self, tree: TreeSession) -> None:
        """Keep the tree: the next search may be for the same prompt."""

    async def run_steps(
        self, tree: TreeSession, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """Run the steps. A pass computes only nodes that are not known yet, with their ancestors and the root."""
        if tree is not self._tree or not selection.pruning.is_none:
            raise ValueError("a shared tree serves one prompt at a time, without exclusions")
        if selection.perturbation and selection.perturbation.temperature != TEMPERATURE:
            raise ValueError(f"a shared tree has probabilities at temperature {TEMPERATURE} only")
        everything = Selection(Pruning.none(), limit=max(self.trie.codebook_sizes))
        limit = None if selection.perturbation else selection.limit
        return await super().run_steps(tree, self._steps_of_unknown(steps, limit), everything)

    def _steps_of_unknown(self, steps: PassProgram[Found], limit: int | None) -> PassProgram[Found]:
        """Yield the steps without known nodes, and send them at most `limit` children of each node."""
        try:
            nodes = next(steps)
            while True:
                closed = [ROOT, *self.trie.with_ancestors(nodes.tolist()).tolist()]
                new = np.array([node for node in closed if node not in self._known], dtype=np.int64)
                if len(new):
                    self._known.update((yield new).items())
                wanted = {node: _first(self._known[node], limit) for node in nodes.tolist()}
                nodes = steps.send(Evaluation.of(wanted))
        except StopIteration as end:
            return cast("Found", end.value)


@dataclass
class SharedTreeTarget:
    """Target of one search; see `beam_loop.Target`. pass_levels: depth of the beams of each pass."""

    evaluator: SharedTreeEvaluator
    prompt: Int64
    selection: Selection
    pass_levels: list[int] = field(default_factory=list)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """Make one pass."""
        # The lowest id has the smallest depth, and a plan is always deeper than the beams that it hangs below.
        self.pass_levels.append(int(self.evaluator.trie.depth(nodes[:1])[0]))
        tree = await self.evaluator.open(self.prompt)
        evaluation, _ = await self.evaluator.evaluate(tree, nodes, self.selection)
        return evaluation


@dataclass
class SharedTreeDraft:
    """Draft of one search; see `beam_loop.Draft`. request: sent again with other beams. passes: passes of the draft."""

    drafter: Drafter
    trie: Trie
    request: DraftRequest
    passes: int = 0

    async def plan(self, below: Beams) -> Plan:
        """Return a plan below these beams. The drafter gets them in the order of their ids, as over the wire."""
        drafted = await self.drafter.plan(replace(self.request, below=below.take(np.argsort(below.node))))
        self.passes += drafted.passes
        plan = replace(drafted.plan, start=below)
        plan.check(self.trie, limit=min(self.request.size.max_nodes, self.request.size.width * self.trie.levels))
        return plan


def load_decoder_of(bundle: Bundle, role: Role, threads: int) -> Decoder:
    """Load a bundle's model on the CPU."""
    return load_decoder(bundle, role, RuntimeOptions(intra_op_threads=threads))


def prefix_cache(entry: ModelEntry) -> PrefixCache:
    """Return a prefix cache in memory."""
    return PrefixCache(kv_layout(entry), MemoryKvCache(_CACHE_BYTES))


def shared_evaluator(
    decoder: Decoder, entry: ModelEntry, catalogue: Catalogue, rule: ScoringRule, cache: PrefixCache
) -> SharedTreeEvaluator:
    """Return an evaluator of a model over a catalogue, without a prompt yet. The caller closes it."""
    return SharedTreeEvaluator(decoder, entry, catalogue.trie, rule, kv_layout(entry), cache)


def kv_layout(entry: ModelEntry) -> KvLayout:
    """Return the layout of a model's keys and values in these caches."""
    return KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=_BLOCK_TOKENS)


def _first(children: Children, limit: int | None) -> Children:
    return Children(children.node[:limit], children.logp[:limit], children.log_mass)
