"""The keys and values of prompts, between the prefix cache and token trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.manifest import EncoderEntry, ModelEntry
from atspeed.engine.kv.memory_cache import KvLayout, block_keys, copy_blocks, namespace
from atspeed.engine.kv.prefix_cache import CachedPrefix, PrefixCache
from atspeed.engine.model.device_decoder import ModelDecoder
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.model.token_tree import TokenTree, TreePass
from atspeed.engine.model.tree_session import TreeSession
from atspeed.engine.search.trie import Trie


class PromptKv:
    """The prompts of a decoder. Any whole blocks at the beginning of a prompt can come from the cache."""

    def __init__(self, decoder: ModelDecoder, entry: ModelEntry, layout: KvLayout, cache: PrefixCache) -> None:
        self._decoder = decoder
        self._entry = entry
        self._layout = layout
        self._cache = cache

    def tree(self, prompt: Int64) -> TokenTree:
        """Return the token tree of a prompt, int64 [prompt], without memory."""
        return TokenTree(prompt, self._decoder.empty_kv(0))

    def filler(self, tokens: int) -> Int64:
        """Return a prompt for measurements, with so many tokens besides the one that evaluates the root."""
        return np.full(tokens + 1, self._entry.prompt.sample()[0], dtype=np.int64)

    def keys(self, prompt: Int64, tenant: str, user_key: bytes) -> list[bytes]:
        """Return the block keys of a prompt's whole blocks."""
        prefix, step = self._entry.prompt.shared_prefix, self._layout.block_tokens
        # Tokens at the beginning that are the template's and not the user's: a value of the user is the user's.
        shared = len(prefix) if tuple(prompt[: len(prefix)].tolist()) == prefix else 0
        return block_keys(self._namespace(tenant), prompt, step, user_key, template_tokens=shared)

    async def lookup(self, prompt: Int64, keys: Sequence[bytes]) -> CachedPrefix:
        """Return what the cache holds. The last prompt token is always computed: its logits evaluate the root."""
        return await self._cache.lookup(keys[: (len(prompt) - 1) // self._layout.block_tokens])

    def fill(self, session: TreeSession) -> None:
        """Fill the cached blocks into a tree, before its first pass."""
        session.tokens.fill_prefix(session.cached_blocks)

    def new_blocks(self, session: TreeSession) -> list[KvArray]:
        """Copy the prompt's whole blocks that were computed since the last call, and that no cache had."""
        done = session.known_blocks + len(session.new_blocks)
        computed = min(len(session.keys), session.tokens.length // self._layout.block_tokens)
        return copy_blocks(self._layout, session.tokens.kv, done, computed)

    def remember(self, keys: Sequence[bytes], new: Sequence[KvArray]) -> None:
        """Hand new blocks to the cache."""
        self._cache.remember(keys, new)

    def _namespace(self, tenant: str) -> bytes:
        return namespace(self._entry.fingerprint, self._layout, tenant)


class EncodedPromptKv(PromptKv):
    """The prompts of an encoder-decoder model.

    Each row of an encoder depends on the whole prompt. So the chain of block keys starts from all of its tokens, and only all
    of its blocks together are a hit. The last block is padded with zeros.
    """

    def __init__(
        self, decoder: EncoderDecoder, entry: ModelEntry, encoder: EncoderEntry, layout: KvLayout, cache: PrefixCache
    ) -> None:
        super().__init__(decoder, entry, layout, cache)
        self._encode = decoder.encode
        self._start = encoder.decoder_start

    def tree(self, prompt: Int64) -> TokenTree:
        """Return the token tree: the encoder's tokens, then the one that the decoder begins with."""
        return EncodedTree(np.append(prompt, self._start), self._decoder.empty_kv(0))

    def filler(self, tokens: int) -> Int64:
        """Return a prompt for measurements. The decoder's first token evaluates the root."""
        return super().filler(max(0, tokens - 1))

    def keys(self, prompt: Int64, tenant: str, user_key: bytes) -> list[bytes]:
        """Return the block keys of a prompt, the padded last block included. All belong to the user."""
        chain = self._namespace(tenant) + np.ascontiguousarray(prompt, dtype="<i8").tobytes()
        step = self._layout.block_tokens
        return block_keys(chain, np.append(prompt, np.zeros(-len(prompt) % step, dtype=np.int64)), step, user_key)

    async def lookup(self, prompt: Int64, keys: Sequence[bytes]) -> CachedPrefix:
        """Return all blocks, or none."""
        found = await self._cache.lookup(keys)
        tokens, padding = dict(found.tokens_by_tier), -len(prompt) % self._layout.block_tokens
        if len(found.blocks) < len(keys):
            return CachedPrefix((), dict.fromkeys(tokens, 0))
        last = max(tier for tier, name in enumerate(tokens) if tokens[name])  # it supplied the padded block
        tokens[list(tokens)[last]] -= padding
        return CachedPrefix(found.blocks, tokens)

    def fill(self, session: TreeSession) -> None:
        """Fill the cached blocks into a tree, or let the encoder read the prompt. Blocks of a part are of no use."""
        super().fill(session)
        tree = session.tokens
        encoded = len(tree.prompt) - 1
        if tree.length < encoded:
            self._encode(tree.prompt[:encoded], tree.kv[:, :, :encoded])
            tree.length = encoded
            session.lookup_stats = replace(session.lookup_stats, new_tokens=encoded)

    def new_blocks(self, session: TreeSession) -> list[KvArray]:
        """Copy the prompt's blocks, unless they came from the cache."""
        if session.cached_blocks:
            return []
        encoded, layout = len(session.tokens.prompt) - 1, self._layout
        padded = np.zeros(
            (layout.layers, 2, len(session.keys) * layout.block_tokens, layout.kv_heads, layout.head_dim),
            dtype=layout.dtype,
        )
        rows = min(encoded, padded.shape[2])  # none for a synthetic tree, which has no keys
        padded[:, :, :rows] = session.tokens.kv[:, :, :rows]
        return copy_blocks(layout, padded, 0, len(session.keys))


class EncodedTree(TokenTree):
    """A token tree whose prompt is read by an encoder, but for the last token. Positions count from that token."""

    def plan_pass(self, trie: Trie, nodes: Int64, code_tokens: Int64) -> TreePass:
        """Return the pass of the decoder; see `TokenTree.plan_pass`."""
        step = super().plan_pass(trie, nodes, code_tokens)
        return replace(step, positions=step.positions - (len(self.prompt) - 1))


def prompt_kv(decoder: ModelDecoder, entry: ModelEntry, layout: KvLayout, cache: PrefixCache) -> PromptKv:
    """Return the prompts of a model."""
    if entry.encoder is None:
        return PromptKv(decoder, entry, layout, cache)
    if not isinstance(decoder, EncoderDecoder):
        raise TypeError(f"{entry.path}: its encoder is not loaded")
    return EncodedPromptKv(decoder, entry, entry.encoder, layout, cache)
