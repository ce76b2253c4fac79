"""Real models on random weights, opened without services, and adapters that put them behind the beam loop's protocols."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, user_key_of
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.tier import KvTier, TierStatistics
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Trie
from draft_service.drafter import Drafter, DraftRequest
from tests.bundles import TestBundle
from tests.oracles.naive_trie import NaiveTrie

BLOCK_TOKENS = 4


@dataclass
class DictStore:
    """A KvTier in a dictionary."""

    name = "dictionary"

    blocks: dict[bytes, KvArray] = field(default_factory=dict)

    async def get_chain(self, keys: Sequence[bytes]) -> list[KvArray]:
        """The leading run that is present."""
        run = []
        for key in keys:
            if key not in self.blocks:
                break
            run.append(self.blocks[key])
        return run

    async def put(self, blocks: Mapping[bytes, KvArray]) -> None:
        """Keep them all."""
        self.blocks.update(blocks)

    async def erase(self, user_keys: Collection[bytes]) -> None:
        """Erase these users' blocks."""
        self.blocks = {key: block for key, block in self.blocks.items() if user_key_of(key) not in user_keys}

    @property
    def statistics(self) -> TierStatistics:
        """Return no counts."""
        return TierStatistics()

    @property
    def failures(self) -> int:
        """Return 0: it never fails."""
        return 0


@dataclass(frozen=True)
class Models:
    """A bundle's two decoders, loaded once, and its catalogue in both forms."""

    bundle: TestBundle
    catalogue: Catalogue
    naive: NaiveTrie
    decoders: dict[str, Decoder]

    @classmethod
    def load(cls, bundle: TestBundle) -> Models:
        """From a bundle on disk."""
        catalogue = bundle.bundle.catalogue()
        items = {catalogue.id_of(n): tuple(catalogue.codes[n].tolist()) for n in range(catalogue.items)}
        decoders = {
            "target": Decoder(bundle.bundle.model_path("target"), RuntimeOptions()),
            "draft": Decoder(bundle.bundle.model_path("draft"), RuntimeOptions()),
        }
        return cls(bundle, catalogue, NaiveTrie(items, catalogue.trie.codebook_sizes), decoders)

    @property
    def rule(self) -> ScoringRule:
        """The bundle's."""
        return self.bundle.bundle.manifest.scoring_rule

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in the target."""
        return self.decoders["target"].empty_kv(1).nbytes

    def evaluator(
        self,
        role: str,
        *,
        memory_blocks: int = 0,
        tier: KvTier | None = None,
        limits: BatchLimits | None = None,
        open_kv_bytes: int = 2**30,
    ) -> TreeEvaluator:
        """A fresh evaluator of one model, by default without any cache. Close it."""
        entry, decoder = self.bundle.bundle.manifest.models[role], self.decoders[role]
        layout = KvLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", BLOCK_TOKENS)
        cache = PrefixCache(layout, MemoryKvCache(memory_blocks * layout.block_bytes), [tier] if tier else [])
        trie, rule = self.catalogue.trie, self.rule
        return TreeEvaluator(decoder, entry, trie, rule, layout, cache, limits=limits, open_kv_bytes=open_kv_bytes)

    def prompt(self, items: int, seed: int) -> Int64:
        """The target's prompt of a random history."""
        entry = self.bundle.bundle.manifest.target
        chosen = np.random.default_rng(seed).integers(0, self.catalogue.items, items)
        return entry.prompt.tokens(self.catalogue.spelled_tokens(chosen, entry.code_tokens))


@dataclass
class ModelTarget:
    """A TreeEvaluator as the loop's target: adds the root to the first pass, and ancestors that were not evaluated yet."""

    evaluator: TreeEvaluator
    prompt: Int64
    selection: Selection
    passes: int = 0
    tree: TreeSession | None = None

    async def evaluate(self, nodes: Int64) -> Evaluation:
        """One pass."""
        asked = set(self.evaluator.trie.with_ancestors(nodes.tolist()).tolist())
        if self.tree is None:
            self.tree = await self.evaluator.open(self.prompt)
            asked.add(ROOT)
        self.passes += 1
        wanted = np.array(sorted(asked - self.tree.tokens.slots.keys()))
        return (await self.evaluator.evaluate(self.tree, wanted, self.selection))[0]


@dataclass
class ModelDraft:
    """A Drafter as the loop's draft. `order` is asked again with other beams. plans: what came of it."""

    drafter: Drafter
    trie: Trie
    order: DraftRequest
    plans: list[Plan] = field(default_factory=list)

    async def plan(self, below: Beams) -> Plan:
        """A plan below these beams, given in the order of their ids, as the orchestrator sends them."""
        beams = below.take(np.argsort(below.node))
        order = DraftRequest(**{**vars(self.order), "below": beams})
        plan = (await self.drafter.plan(order)).plan
        plan.check(self.trie, min(order.size.max_nodes, order.size.width * self.trie.levels))
        self.plans.append(plan)
        return plan
