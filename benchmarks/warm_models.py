"""A bundle's models in this process, each with the tree of one prompt kept from search to search.

A node's evaluation depends on the prompt and the path alone, so many searches for one user can share it. What a search
would have asked of a cold model is counted by the loop and the drafter; only what no search before it asked is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from draft_service.drafter import Drafter, PlanOrder
from engine.beams import Beams
from engine.bundle import Bundle, ModelEntry, Role
from engine.catalogue import Catalogue
from engine.cost import PassCost
from engine.decoder import Decoder, RuntimeOptions, load_decoder
from engine.kv_cache import NO_OWNER, KvLayout, MemoryKvCache
from engine.plan import Plan
from engine.prefix_cache import PrefixCache
from engine.scoring import Children, Evaluation, ScoringRule
from engine.tree_evaluator import Found, OpenTree, Selection, Steps, TreeEvaluator
from engine.trie import ROOT, Int64, Pruning, Trie

TEMPERATURE = 1.0
_BLOCK_TOKENS = 16
_CACHE_BYTES = 64 * 2**20


class WarmEvaluator(TreeEvaluator):
    """A TreeEvaluator that goes on with the tree it has for as long as the prompt is the same, and computes no node twice.

    For requests that exclude nothing and sample, if they do, at temperature 1: then the one evaluation serves them all.
    Perturbed requests get all children instead of the best; which of them they draw is the same.
    """

    _tree: OpenTree | None = None
    _known: dict[int, Children]

    async def open(self, prompt: Int64, *, tenant: str = "", owner: bytes = NO_OWNER) -> OpenTree:
        """The tree at hand, or a new one for another prompt."""
        if self._tree is None or not np.array_equal(self._tree.tokens.prompt, prompt):
            if self._tree is not None:
                super().end(self._tree)
            self._tree, self._known = await super().open(prompt, tenant=tenant, owner=owner), {}
        return self._tree

    def end(self, tree: OpenTree) -> None:
        """Keep it: the next search may be for the same prompt."""

    async def follow(self, tree: OpenTree, steps: Steps[Found], selection: Selection) -> tuple[Found, PassCost]:
        """As TreeEvaluator's, but a pass computes only what is not known yet, with the ancestors and the root."""
        if tree is not self._tree or not selection.pruning.is_none:
            raise ValueError("a warm tree serves one prompt at a time, and nothing excluded")
        if selection.perturbation and selection.perturbation.temperature != TEMPERATURE:
            raise ValueError(f"a warm tree knows probabilities at temperature {TEMPERATURE} only")
        everything = Selection(Pruning.none(), limit=max(self.trie.codebook_sizes))
        limit = None if selection.perturbation else selection.limit
        return await super().follow(tree, self._steps_of_unknown(steps, limit), everything)

    def _steps_of_unknown(self, steps: Steps[Found], limit: int | None) -> Steps[Found]:
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

    evaluator: WarmEvaluator
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
    order: PlanOrder
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
) -> WarmEvaluator:
    """A model over a catalogue, without a prompt yet. Close it."""
    return WarmEvaluator(decoder, entry, catalogue.trie, rule, _layout(entry), cache)


def prompt_tokens(catalogue: Catalogue, entry: ModelEntry, history: Sequence[int]) -> Int64:
    """A model's prompt for a history of item indices, as serving builds it; [prompt]."""
    window = np.asarray(history, dtype=np.int64)[entry.prompt.window_start(len(history)) :]
    columns = catalogue.codes[window] + catalogue.trie.codebook_offset
    return entry.prompt.tokens(list(np.asarray(entry.code_tokens, dtype=np.int64)[columns]))


def _layout(entry: ModelEntry) -> KvLayout:
    return KvLayout(entry.layers, entry.kv_heads, entry.head_dim, entry.kv_dtype, block_tokens=_BLOCK_TOKENS)


def _first(children: Children, limit: int | None) -> Children:
    return Children(children.node[:limit], children.logp[:limit], children.log_mass)
