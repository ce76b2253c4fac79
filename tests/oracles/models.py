"""Real models on random weights, opened without services, and adapters that put them behind the beam loop's protocols."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import Role
from atspeed.engine.kv.memory_cache import KvLayout, MemoryKvCache, user_key_of
from atspeed.engine.kv.prefix_cache import PrefixCache
from atspeed.engine.kv.tier import KvTier, TierStatistics
from atspeed.engine.model.batcher import BatchLimits
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.loading import load_decoder, load_device_decoder
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection, TreeSession
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan
from atspeed.engine.search.scoring import Evaluation, ScoringRule
from atspeed.engine.search.trie import ROOT, Trie
from draft_service.drafter import Drafter, DraftRequest
from tests.oracles.naive_trie import NaiveTrie

if TYPE_CHECKING:  # it imports torch, which unit tests do without
    from tests.bundles import TestBundle

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
    """A bundle's two decoders, loaded once, and its catalogue in both forms. options: of the decoders in pages."""

    bundle: TestBundle
    catalogue: Catalogue
    naive: NaiveTrie
    decoders: dict[str, Decoder]
    paged: bool = False
    options: RuntimeOptions = field(default_factory=RuntimeOptions)

    @classmethod
    def load(cls, bundle: TestBundle, *, paged: bool = False) -> Models:
        """From a bundle on disk. paged: evaluators with their device graph, each on a pool of its own."""
        catalogue = bundle.bundle.catalogue()
        items = {catalogue.id_of(n): tuple(catalogue.codes[n].tolist()) for n in range(catalogue.items)}
        decoders = {
            "target": load_decoder(bundle.bundle, "target", RuntimeOptions()),
            "draft": load_decoder(bundle.bundle, "draft", RuntimeOptions()),
        }
        return cls(bundle, catalogue, NaiveTrie(items, catalogue.trie.codebook_sizes), decoders, paged)

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
        entry, decoder = self.bundle.bundle.manifest.models[role], self._decoder(role, open_kv_bytes)
        layout = KvLayout(decoder.layers, decoder.kv_heads, decoder.head_dim, "float32", BLOCK_TOKENS)
        memory, pages = MemoryKvCache(memory_blocks * layout.block_bytes), None
        if isinstance(decoder, DeviceDecoder):
            pages = decoder.pages
        cache = PrefixCache(layout, memory, [tier] if tier else [], pages=pages)
        trie, rule = self.catalogue.trie, self.rule
        return TreeEvaluator(decoder, entry, trie, rule, layout, cache, limits=limits, open_kv_bytes=open_kv_bytes)

    def _decoder(self, role: str, pool_bytes: int) -> Decoder | DeviceDecoder:
        if not self.paged:
            return self.decoders[role]
        size = min(pool_bytes, 8 * 2**20)  # a pool is zeroed memory of its size
        loaded: Role = "target" if role == "target" else "draft"
        return load_device_decoder(self.bundle.bundle, loaded, self.options, page_tokens=BLOCK_TOKENS, pool_bytes=size)

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
