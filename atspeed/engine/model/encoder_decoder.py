"""A decoder with an encoder in ONNX Runtime: the encoder reads the prompt.

The encoder writes the keys and values of the decoder's cross-attention, one row per prompt token. In the KV of a token tree
they take the places that a prompt's keys and values take without an encoder; the decoder's own tokens follow them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atspeed.engine.arrays import Int64, KvArray
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.decoder import (
    Decoder,
    RuntimeOptions,
    TensorSpec,
    check_contract,
    graph_specs,
    kv_names,
    open_session,
    run_bound,
)

ENCODER_FILE = "encoder.onnx"


def encoder_outputs(layers: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the outputs of an encoder for a decoder of these sizes, in order."""
    rows = TensorSpec(dtype, ("tokens", kv_heads, head_dim))
    return {name: rows for names in kv_names("cross", layers) for name in names}


ENCODER_INPUTS = {"input_ids": TensorSpec("int64", ("tokens",))}


class EncoderDecoder(Decoder):
    """A decoder and the encoder of its prompts. Threads may share it, as they may a `Decoder`.

    Raises BundleError like `Decoder`, and when the encoder does not fit the decoder.

    Args:
        path: the decoder's .onnx file.
        options: the options of onnxruntime, for both graphs.
        files: the content of the decoder's files; read from `path` if None.
        encoder_files: the content of the encoder's files; read from ENCODER_FILE beside `path` if None.
    """

    def __init__(
        self,
        path: Path,
        options: RuntimeOptions,
        files: ModelFiles | None = None,
        encoder_files: ModelFiles | None = None,
    ) -> None:
        super().__init__(path, options, files)
        encoder = encoder_files or ModelFiles.read(path.with_name(ENCODER_FILE))
        self._encoder = open_session(encoder, options)
        inputs, outputs = graph_specs(self._encoder)
        shape = (self.layers, self.kv_heads, self.head_dim, self.dtype.name)
        check_contract(encoder.path, "input", inputs, ENCODER_INPUTS)
        check_contract(encoder.path, "output", outputs, encoder_outputs(*shape))

    def encode(self, tokens: Int64, kv: KvArray) -> None:
        """Read a prompt, int64 [P], and write the keys and values of cross-attention to `kv`.

        kv: [layers, 2, P, kv_heads, head_dim]; kv[l, j] must be contiguous. Raises ValueError, naming what is wrong.
        """
        self._check_kv("kv", kv[:, :, None], (1, len(tokens)))
        feeds = {"input_ids": np.ascontiguousarray(tokens, dtype=np.int64)}
        run_bound(self._encoder, feeds, self._by_layer("cross", kv))
