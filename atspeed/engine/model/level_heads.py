"""A decoder with heads: one pass over the prompt scores the codes of all levels.

The decoder's graph gives the state after the prompt as one more output. The graph of a level reads this state and the code
columns of paths, and gives the logits of the level's codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.manifest import MANIFEST
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import (
    Decoder,
    RuntimeOptions,
    TensorSpec,
    check_contract,
    graph_specs,
    open_session,
    run_bound,
)


def head_file(level: int) -> str:
    """Return the file of a level's head, beside the decoder's; the second level is 1."""
    return f"head{level}.onnx"


def head_inputs(level: int, state_size: int) -> dict[str, TensorSpec]:
    """Return the inputs of the head of a level. Its paths have `level` codes."""
    return {"state": TensorSpec("float32", (state_size,)), "path": TensorSpec("int64", ("nodes", level))}


def head_outputs(codes: int) -> dict[str, TensorSpec]:
    """Return the outputs of the head of a level with this number of codes."""
    return {"logits": TensorSpec("float32", ("nodes", codes)), "log_normalizer": TensorSpec("float32", ("nodes",))}


class LevelHeadsDecoder(Decoder):
    """A decoder and the heads of its levels. Threads may share it, as they may a `Decoder`.

    Raises BundleError like `Decoder`, and when a head does not fit the decoder.

    Args:
        path: the decoder's .onnx file.
        options: the options of onnxruntime, for all graphs.
        files: the content of the decoder's files; read from `path` if None.
        heads: the content of the heads' files, from the second level on.

    Attributes:
        codes: the number of codes of each head.
    """

    def __init__(
        self, path: Path, options: RuntimeOptions, files: ModelFiles | None, heads: Sequence[ModelFiles]
    ) -> None:
        super().__init__(path, options, files)
        if not self.state_size:
            raise BundleError(f"{path}: output state: missing, but the bundle has heads that read it")
        self._heads = [open_session(head, options) for head in heads]
        self.codes = []
        for level, (head, session) in enumerate(zip(heads, self._heads, strict=True), start=1):
            inputs, outputs = graph_specs(session)
            logits = outputs.get("logits")
            codes = (logits.fixed[-1] if logits and logits.axes else None) or 0
            check_contract(head.path, "input", inputs, head_inputs(level, self.state_size))
            check_contract(head.path, "output", outputs, head_outputs(codes))
            self.codes.append(codes)

    def check_codes(self, sizes: Sequence[int]) -> None:
        """Raise BundleError unless the heads are of these numbers of codes, of the second level and further ones."""
        if self.codes != list(sizes):
            raise BundleError(f"{MANIFEST}: draft.heads: of {self.codes} codes, but the catalogue has {list(sizes)}")

    def check_finite(self, sizes: Sequence[int]) -> None:
        """Score paths with each code above each head. Raises BundleError naming a head whose scores are not finite.

        sizes: the number of codes of each level.
        """
        offset, state = np.cumsum([0, *sizes]), np.ones(self.state_size, dtype=np.float32)
        for level in range(1, len(sizes)):
            row = np.arange(max(sizes[:level]))[:, None]
            scores = self.score(state, offset[:level] + row % np.asarray(sizes[:level]))
            if not all(np.isfinite(one).all() for one in scores):
                raise BundleError(f"{self.path.parent / head_file(level)}: nan or inf in its scores")

    def score(self, state: Float32, path: Int64) -> tuple[Float32, Float32]:
        """Score the codes below paths of one length: (logits float32 [n, codes], log_normalizer float32 [n]).

        Args:
            state: float32 [state_size], that of the root.
            path: int64 [n, level], the code columns of each path from the root down.
        """
        count, level = path.shape
        logits = np.empty((count, self.codes[level - 1]), dtype=np.float32)
        log_normalizer = np.empty(count, dtype=np.float32)
        run_bound(
            self._heads[level - 1],
            {"state": np.ascontiguousarray(state), "path": np.ascontiguousarray(path)},
            {"logits": logits, "log_normalizer": log_normalizer},
        )
        return logits, log_normalizer
