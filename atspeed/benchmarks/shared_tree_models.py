"""A bundle's models in this process, each with the tree of one prompt kept from search to search.

A node's evaluation depends on the prompt and the path alone, so many searches for one user can share it. What a search
would have asked of a cold model is counted by the loop and the drafter; only what no search before it asked is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Bundle, ModelEntry, Role
from atspeed.engine.kv.memory_cache import NO_USER_KEY, KvLayout, MemoryKvCache
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, load_decoder
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Found, PassProgram, Selection, TreeSession
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Children, Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Pruning, Trie
from draft_service.drafter import Drafter, DraftRequest

TEMPERATURE = 1.0
_BLOCK_TOKENS = 16
_CACHE_BYTES = 64 * 2**20


class SharedTreeEvaluator(TreeEvaluator):
    """A TreeEvaluator that goes on with the tree it has for as long as the prompt is the same, and computes no node twice.

    For requests that exclude nothing and sample, if they do, at temperature 1: then the one evaluation serves them all.
    Perturbed requests get all children instead of the best; which of them they draw is the same.
    """

    _tree: TreeSession | None = None
    _known: dict[int, Children]

    async def open(self, prompt: Int64, *, tenant: str = "", user_key: bytes = NO_USER_KEY) -> TreeSession:
        """The tree at hand, or a new one for another prompt."""
        if self._tree is None or not np.array_equal(self._tree.tokens.prompt, prompt):
            if self._tree is not None:
                super().end(self._tree)
            self._tree, self._known = await super().open(prompt, tenant=tenant, user_key=user_key), {}
        return self._tree

    def end(self, tree: TreeSession) -> None:
        """Keep it: the next search may be for the same prompt."""

    async def run_steps(
        self, tree: TreeSession, steps: PassProgram[Found], selection: Selection
    ) -> tuple[Found, PassStats]:
        """As TreeEvaluator's, but a pass computes only what is not known yet, with the ancestors and the root."""
        if tree is not self._tree or not selection.pruning.is_none:
            raise ValueError("a warm tree serves one prompt at a time, and nothing excluded")
        if selection.perturbation and selection.perturbation.temperature != TEMPERATURE:
            raise ValueError(f"a warm tree knows probabilities at temperature {TEMPERATURE} only")
        everything = Selection(Pruning.none(), limit=max(self.trie.codebook_sizes))
        limit = None if selection.perturbation else selection.limit
        return await super().run_steps(tree, self._steps_of_unknown(steps, limit), everything)

    def _steps_of_unknown(self, steps: PassProgram[Found], limit: int | None) -> PassProgram[Found]:
        """The same steps, which get at most `limit` children of a node; what is known already is not asked for."""
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
class WarmTarget:
    """The target of one search; see `beam_loop.Target`. pass_levels: the depth of the beams that each pass was made for."""

    evaluator: SharedTreeEvaluator
    prompt: Int64
    selection: Selection
    pass_levels: list[int] = field(default_factory=list)

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """One pass."""
        # The lowest id has the smallest depth, and a plan is always deeper than the beams that it hangs below.
        self.pass_levels.append(int(self.evaluator.trie.depth(nodes[:1])[0]))
        tree = await self.evaluator.open(self.prompt)
        evaluation, _ = await self.evaluator.evaluate(tree, nodes, self.selection)
        return evaluation


@dataclass
class WarmDraft:
    """The draft of one search; see `beam_loop.Draft`. `order` is asked again with other beams. passes: the draft's own."""

    drafter: Drafter
    trie: Trie
    order: DraftRequest
    passes: int = 0

    async def plan(self, below: Beams) -> Plan:
        """A plan below these beams, which the drafter gets in the order of their ids, as over the wire."""
        drafted = await self.drafter.plan(replace(self.order, below=below.take(np.argsort(below.node))))
        self.passes += drafted.passes
        plan = replace(drafted.plan, start=below)
        plan.check(self.trie, limit=min(self.order.size.max_nodes, self.order.size.width * self.trie.levels))
        return plan


def load_decoder_of(bundle: Bundle, role: Role, threads: int) -> Decoder:
    """A bundle's model on the CPU."""
    return load_decoder(bundle, role, RuntimeOptions(intra_op_threads=threads))


def prefix_cache(entry: ModelEntry) -> PrefixCache:
    """Memory for the prompts of some users."""
    return PrefixCache(_layout(entry), MemoryKvCache(_CACHE_BYTES))


def warm_evaluator(
    decoder: Decoder, entry: ModelEntry, catalogue: Catalogue, rule: ScoringRule, cache: PrefixCache
) -> SharedTreeEvaluator:
    """A model over a catalogue, without a prompt yet. Close it."""
    return SharedTreeEvaluator(decoder, entry, catalogue.trie, rule, _layout(entry), cache)


def prompt_tokens(catalogue: Catalogue, entry: ModelEntry, history: Sequence[int]) -> Int64:
    """A model's prompt for a history of item indices, as serving builds it; [prompt]."""
    window = np.asarray(history, dtype=np.int64)[entry.prompt.window_start(len(history)) :]
    columns = catalogue.codes[window] + catalogue.trie.codebook_offset
    return entry.prompt.tokens(list(np.asarray(entry.code_tokens, dtype=np.int64)[columns]))


def _layout(entry: ModelEntry) -> KvLayout:
    return KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=_BLOCK_TOKENS)


def _first(children: Children, limit: int | None) -> Children:
    return Children(children.node[:limit], children.logp[:limit], children.log_mass)
