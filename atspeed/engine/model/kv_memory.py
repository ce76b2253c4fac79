"""The contract between token trees and the memory of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from atspeed.engine.arrays import Int64
from atspeed.engine.errors import NoNumbersError
from atspeed.engine.kv.prefix_cache import CachedPrefix
from atspeed.engine.model.batch_decoder import TreeOutput
from atspeed.engine.model.token_tree import TokenTree, TreePass
from atspeed.engine.model.tree_session import ProgramRun, TreeSession
from atspeed.engine.search.scoring import Evaluation

PassResult: TypeAlias = TreeOutput | Evaluation | NoNumbersError
"""The scores of a tree's rows, or what was selected from them."""


class KvMemory(Protocol):
    """The memory of open sessions, and the passes over it.

    `HostMemory` holds one array per session; `DeviceMemory` holds pages of a pool on the model's device. The steps of a session:
    `lookup`, then `reserve` and `begin` before each pass, `run`, after each pass over the prompt `keep_prompt`, after the last of
    them or a cancellation `remember`, and `release` at its end. `begin`, `run` and `keep_prompt` are for the worker thread: they
    may copy keys and values. All others are for the event loop and copy none; `reserve` is for both.
    """

    @property
    def limit_bytes(self) -> int:
        """Return the limit of `used_bytes`."""

    @property
    def used_bytes(self) -> int:
        """Return the bytes that open sessions hold or have reserved."""

    def tree(self, prompt: Int64) -> TokenTree:
        """Return the token tree of a prompt, int64 [prompt], without memory."""

    async def lookup(self, prompt: Int64, keys: Sequence[bytes]) -> CachedPrefix:
        """Return what the prefix cache holds of a prompt, int64 [prompt], with these keys. `release` frees it."""

    def reserve(self, tree: TreeSession, tokens: int) -> None:
        """Reserve memory for a tree of so many tokens. Raises OverloadedError beyond the limit; the tree is unchanged then."""

    def begin(self, tree: TreeSession) -> None:
        """Give a tree its reserved memory, and before its first pass the cached blocks of its prompt."""

    def run(self, passes: Sequence[tuple[ProgramRun, TreePass]]) -> list[PassResult]:
        """Make one pass over one tree or more. The new tokens' keys and values follow those that the tree has.

        A device selects the children itself; a tree whose scores are no numbers has an error in place of its evaluation.
        Nothing is committed: a pass that failed can be repeated, alone or with others.
        """

    def keep_prompt(self, tree: TreeSession) -> None:
        """Prepare what `remember` keeps: called after each pass over the prompt whose scores are finite."""

    def remember(self, tree: TreeSession) -> None:
        """Hand the prompt's blocks that no cache had to the prefix cache, if `keep_prompt` was called since the last time."""

    def release(self, tree: TreeSession) -> None:
        """Free what a tree holds. No pass may use it any more."""

    async def close(self) -> None:
        """End the background work. Sessions have ended before."""
