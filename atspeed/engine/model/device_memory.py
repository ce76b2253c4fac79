"""Keys and values of open sessions in pages on the model's device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, cast

import structlog

from atspeed.engine.arrays import Int64
from atspeed.engine.kv.memory_cache import KvLayout
from atspeed.engine.kv.page_pool import PagePool
from atspeed.engine.kv.prefix_cache import CachedPrefix, PrefixCache
from atspeed.engine.model.device_decoder import DeviceDecoder
from atspeed.engine.model.device_pass import PagedInput
from atspeed.engine.model.device_selection import RowSelection
from atspeed.engine.model.device_selector import DeviceSelector
from atspeed.engine.model.kv_memory import PassResult
from atspeed.engine.model.prompt_kv import PromptKv
from atspeed.engine.model.token_tree import PagedTree, PathPass, TreePass
from atspeed.engine.model.tree_session import ProgramRun, TreeSession

# Prompts whose blocks are copied to the host at the same time; those of one more are not kept there. Chosen, not measured.
_MAX_COPIES = 8

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class DeviceMemory:
    """A KvMemory in pages of a device's pool (see there). Evaluators of the same weights share the pool.

    A prompt's whole blocks are pages that requests share: a prefix that is on the device is held and not copied. After a first
    pass the new blocks go to the host in background tasks, and the prefix cache stores them there.

    Attributes:
        dropped_copies: prompts whose blocks were not copied to the host, because too many were under way.
    """

    def __init__(
        self,
        decoder: DeviceDecoder,
        selector: DeviceSelector,
        prompts: PromptKv,
        layout: KvLayout,
        cache: PrefixCache,
    ) -> None:
        self._decoder = decoder
        self._selector = selector
        self._prompts = prompts
        self._cache = cache
        self._pool: PagePool = decoder.pages
        self._page_tokens = layout.block_tokens
        self._lock = threading.Lock()
        self._held = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.dropped_copies = 0

    @property
    def limit_bytes(self) -> int:
        """Return the bytes of the pool."""
        return self._pool.limit_bytes

    @property
    def used_bytes(self) -> int:
        """Return the bytes of pages that open sessions hold; a shared page counts once for each of them."""
        return self._held * self._pool.page_bytes

    def tree(self, prompt: Int64) -> PagedTree:
        """Return the token tree of a prompt, int64 [prompt], without memory."""
        return PagedTree(prompt, self._decoder.empty_kv(0))

    async def lookup(self, prompt: Int64, keys: Sequence[bytes]) -> CachedPrefix:
        """Return what the prefix cache holds of a prompt, int64 [prompt]; its pages on the device are held."""
        found = await self._prompts.lookup(prompt, keys)
        self._count(len(found.pages))
        return found

    def reserve(self, tree: TreeSession, tokens: int) -> None:
        """Take the pages that a tree of so many tokens lacks."""
        missing = -(-tokens // self._page_tokens) - len(tree.pages)
        if missing > 0:
            growing, owned = tree.tokens.length > 0, len(tree.pages)
            tree.pages += self._pool.reserve(missing, growing=growing, owned=owned)
            self._count(missing)

    def begin(self, tree: TreeSession) -> None:
        """Copy the cached blocks of the host into the tree's pages, before its first pass.

        Those of a measurement are not copied: it stands for a prefix that is on the device.
        """
        if tree.tokens.length:
            return
        known = tree.known_blocks
        if tree.cached_blocks and not tree.synthetic:
            self._decoder.write_pages(tree.pages[known - len(tree.cached_blocks) : known], tree.cached_blocks)
        tree.tokens.length = min(known * self._page_tokens, len(tree.tokens.prompt) - 1)

    def run(self, passes: Sequence[tuple[ProgramRun, TreePass]]) -> list[PassResult]:
        """Make one pass over trees of any lengths, each by its own slots, and select on the device where it can."""
        inputs = [self._input(run.tree, cast("PathPass", step)) for run, step in passes]
        rows = [RowSelection(run.nodes, run.selection) for run, _ in passes]
        if self._selector.can_select(rows):
            return [*self._decoder.run_and_select(inputs, self._selector, rows)]
        return [*self._decoder.run(inputs)]

    def keep_prompt(self, tree: TreeSession) -> None:
        """Note which of the prompt's blocks no cache had."""
        tree.new_from = tree.known_blocks

    def remember(self, tree: TreeSession) -> None:
        """Share the prompt's pages with later requests, and begin to copy the new ones to the host."""
        start, tree.new_from = tree.new_from, None
        if start is None or not tree.pages:
            return
        keys = self._cache.keepable(tree.keys)
        self._pool.put_chain(keys, tree.pages[: len(keys)])
        if start >= len(keys) or not self._cache.keeps_on_host:
            return
        if len(self._tasks) >= _MAX_COPIES:
            self.dropped_copies += 1
            return
        pages = tree.pages[start : len(keys)]
        self._pool.hold(pages)
        self._in_background(self._copy_out(keys, pages), "kv-copy-out")

    def release(self, tree: TreeSession) -> None:
        """Release the tree's pages. Those of an erased user are overwritten in the background."""
        pages, tree.pages = tree.pages, []
        self._pool.release(pages)
        self._count(-len(pages))
        if self._pool.unclean:
            self._in_background(self._pool.clean(), "kv-clean")

    async def close(self) -> None:
        """Wait for the background tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _input(self, tree: TreeSession, step: PathPass) -> PagedInput:
        return PagedInput(step, self._decoder.slots(tree.pages, tree.tokens.length + len(step.tokens)))

    async def _copy_out(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Copy held pages to the host, and hand them to the prefix cache as the last blocks of a chain."""
        try:
            blocks = await asyncio.to_thread(self._decoder.read_pages, pages)
        finally:
            self._pool.release(pages)
        self._prompts.remember(keys, blocks)

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)  # the event loop's own references are weak
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("device_kv_task_failed", task=task.get_name(), exc_info=error)

    def _count(self, pages: int) -> None:
        with self._lock:
            self._held += pages
