"""Keys and values of open sessions in host arrays: one array per session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from atspeed.engine.arrays import Int64
from atspeed.engine.kv.buffer_pool import BufferPool, capacity_for
from atspeed.engine.kv.prefix_cache import CachedPrefix
from atspeed.engine.model.batch_decoder import BatchDecoder, TreeInput
from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.kv_memory import PassResult
from atspeed.engine.model.prompt_kv import PromptKv
from atspeed.engine.model.token_tree import MaskedPass, TokenTree, TreePass
from atspeed.engine.model.tree_session import ProgramRun, TreeSession

# Nodes that fit beside a prompt and its first pass before the buffer grows. Chosen, not measured.
_NODE_ROOM = 128


class HostMemory:
    """A KvMemory in host arrays (see there).

    Attributes:
        buffers: the memory of the sessions, at most `limit_bytes`.
        batch_decoder: the model.
    """

    def __init__(self, decoder: Decoder, prompts: PromptKv, limit_bytes: int) -> None:
        self.buffers = BufferPool(decoder.empty_kv, limit_bytes)
        self.batch_decoder = BatchDecoder(decoder)
        self._prompts = prompts
        self._nothing = decoder.empty_kv(0)

    @property
    def limit_bytes(self) -> int:
        """Return the limit of `used_bytes`."""
        return self.buffers.limit_bytes

    @property
    def used_bytes(self) -> int:
        """Return the bytes that open sessions hold or have reserved."""
        return self.buffers.used_bytes

    def tree(self, prompt: Int64) -> TokenTree:
        """Return the token tree of a prompt, int64 [prompt], without memory."""
        return self._prompts.tree(prompt)

    async def lookup(self, prompt: Int64, keys: Sequence[bytes]) -> CachedPrefix:
        """Return what the prefix cache holds of a prompt, int64 [prompt]."""
        return await self._prompts.lookup(prompt, keys)

    def reserve(self, tree: TreeSession, tokens: int) -> None:
        """Reserve a buffer for so many tokens and `_NODE_ROOM` more at first, then half as much again."""
        if tokens <= tree.capacity:
            return
        grown = tree.capacity + tree.capacity // 2
        capacity = capacity_for(max(tokens, grown) if tree.capacity else tokens + _NODE_ROOM)
        self.buffers.reserve(capacity, growing=tree.capacity > 0)
        self._cancel_unused(tree)
        tree.capacity = capacity

    def begin(self, tree: TreeSession) -> None:
        """Move the tree into its reserved buffer, and fill in the cached blocks before its first pass."""
        if tree.tokens.kv.shape[2] < tree.capacity:
            outgrown = tree.tokens.move_to(self.buffers.take(tree.capacity))
            if outgrown.size:
                self.buffers.give_back(outgrown)
        if not tree.tokens.length:
            self._prompts.fill(tree)

    def run(self, passes: Sequence[tuple[ProgramRun, TreePass]]) -> list[PassResult]:
        """Make one pass over one tree or more, in their own buffers or in a padded copy."""
        return [*self.batch_decoder.run([_input(run.tree.tokens, step) for run, step in passes])]

    def keep_prompt(self, tree: TreeSession) -> None:
        """Copy the prompt's blocks that no cache had. A new list each time: the event loop may have taken the last one."""
        tree.new_blocks = [*tree.new_blocks, *self._prompts.new_blocks(tree)]

    def remember(self, tree: TreeSession) -> None:
        """Hand the copied blocks to the prefix cache."""
        blocks = tree.new_blocks
        tree.new_blocks = []
        if blocks:
            self._prompts.remember(tree.keys[: tree.known_blocks + len(blocks)], blocks)

    def release(self, tree: TreeSession) -> None:
        """Give the tree's buffer back to the pool."""
        self._cancel_unused(tree)
        held = tree.tokens.kv
        tree.tokens.kv = self._nothing
        if held.size:
            self.buffers.give_back(held)
        tree.capacity = 0

    async def close(self) -> None:
        """Do nothing: the prefix cache writes by itself."""

    def _cancel_unused(self, tree: TreeSession) -> None:
        """Cancel the reservation of a pass that never began."""
        if tree.capacity > tree.tokens.kv.shape[2]:
            self.buffers.cancel(tree.capacity)


def _input(tree: TokenTree, step: TreePass) -> TreeInput:
    end = tree.length + len(step.tokens)
    return TreeInput(cast("MaskedPass", step), tree.kv[:, :, : tree.length], tree.kv[:, :, tree.length : end])
