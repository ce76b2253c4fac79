"""An exported decoder in ONNX Runtime: one pass over token trees, KV in place.

`graph_inputs` and `graph_outputs` are the contract of the graph: `atspeed.training.export` writes it, `Decoder` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.arrays import Bools, Float32, Int64, KvArray
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError
from atspeed.engine.model.capture_lock import DEVICE
from atspeed.engine.model.graph_form import BLOCK_KEYS, ORDERED, GraphForm
from atspeed.engine.model.provider import Provider

Spin = Literal["never", "brief", "always"]

# Bytes of the largest tensor that onnxruntime takes from memory; a larger one is read from a private copy on disk.
_LARGEST_TENSOR = 2**31

_UNLIMITED = 2**31

# Names and options of onnxruntime's providers, by preference.
_Providers: TypeAlias = list[tuple[str, dict[str, str]]]
_PROVIDERS: dict[Provider, _Providers] = {
    "cpu": [("CPUExecutionProvider", {})],
    # TF32, the default, keeps 10 bits of a float32's mantissa: results are 1e-3 off and depend on the shape of a pass.
    # sdpa_kernel 2: attention is the kernel that takes a bias at any length, never one of cuDNN, which no other operator needs.
    # The CPU provider stays for shape arithmetic.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0", "sdpa_kernel": "2"}), ("CPUExecutionProvider", {})],
}
_SPIN_SETTINGS: dict[Spin, dict[str, str]] = {
    "never": {"session.intra_op.allow_spinning": "0"},
    "brief": {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "50"},
    "always": {"session.intra_op.allow_spinning": "1"},
}


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of onnxruntime on this machine.

    Attributes:
        provider: the hardware.
        intra_op_threads: threads of one pass, the caller's included; never onnxruntime's default of all cores.
        spin: the behaviour of waiting threads. "brief" spins 50 microseconds, longer than the gaps within a pass, then sleeps.
            "always" is onnxruntime's default, many milliseconds: with fewer free cores than threads, passes and other
            processes take several times as long.
    """

    provider: Provider = "cpu"
    intra_op_threads: int = 1
    spin: Spin = "brief"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph.

    Attributes:
        dtype: the element type.
        axes: the name or the fixed size of every axis.
    """

    dtype: str
    axes: tuple[str | int, ...]

    @property
    def fixed(self) -> tuple[int | None, ...]:
        """Return the sizes of the axes; None for a free size."""
        return tuple(axis if isinstance(axis, int) else None for axis in self.axes)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.axes))}]"


_BATCH_FIRST = GraphForm()


def graph_inputs(
    layers: int, kv_heads: int, head_dim: int, dtype: str, form: GraphForm = _BATCH_FIRST
) -> dict[str, TensorSpec]:
    """Return the inputs of a decoder that computes in `dtype`, in order."""
    past = TensorSpec(dtype, (*form.outer("batch", "past"), kv_heads, head_dim))
    node_bias = {"node_bias": TensorSpec(dtype, ("batch", 1, "new", "last"))} if form.node_bias else {}
    return {
        "input_ids": TensorSpec("int64", ("batch", "new")),
        "position_ids": TensorSpec("int64", ("batch", "new")),
        "attn_bias": TensorSpec(dtype, ("batch", 1, "new", "past+new")),
        **node_bias,
        **{name: past for names in kv_names("past", layers) for name in names},
        "out_index": TensorSpec("int64", ("rows",)),
    }


def graph_outputs(
    layers: int, kv_heads: int, head_dim: int, dtype: str, columns: int, form: GraphForm = _BATCH_FIRST, state: int = 0
) -> dict[str, TensorSpec]:
    """Return the outputs of a decoder with `columns` code tokens, in order. state: the size of the state; 0 without one."""
    new = TensorSpec(dtype, (*form.outer("batch", "new"), kv_heads, head_dim))
    return {
        "code_logits": TensorSpec("float32", ("rows", columns)),
        "log_normalizer": TensorSpec("float32", ("rows",)),
        **({"state": TensorSpec("float32", ("rows", state))} if state else {}),
        **{name: new for names in kv_names("new", layers) for name in names},
    }


def kv_names(prefix: Literal["past", "new", "cross"], layers: int) -> list[tuple[str, str]]:
    """Return the (key, value) tensor names of each layer."""
    return [(f"{prefix}_key.{layer}", f"{prefix}_value.{layer}") for layer in range(layers)]


class Decoder:
    """A loaded ONNX decoder. `run` may be called from any thread, and from several at once; it releases the GIL.

    Raises BundleError when the file cannot be loaded, when its graph breaks the contract, or when the provider is not available:
    a GPU service never falls back to the CPU silently.

    Args:
        path: the .onnx file.
        options: the options of onnxruntime.
        files: the content of the model's files; read from `path` if None. The session keeps a copy, so later changes of the
            files have no effect.

    Attributes:
        layers, kv_heads, head_dim, columns: the sizes of the graph; columns are code tokens.
        state_size: the size of the state that the heads of a draft read; 0 if the graph gives none.
        dtype: the number format of keys and values.
        form: the form of the graph.
        ordered: true if the graph says that its sums have one order, whatever else is in a pass.
        shared_keys: the most keys of a tree in a pass of several trees, padding included.
    """

    def __init__(self, path: Path, options: RuntimeOptions, files: ModelFiles | None = None) -> None:
        self.path = path
        self._session = open_session(files or ModelFiles.read(path), options)
        inputs, outputs = graph_specs(self._session)
        for kind, found, name, rank in (("input", inputs, "past_key.0", 4), ("output", outputs, "code_logits", 2)):
            if name not in found or len(found[name].axes) != rank or not isinstance(found[name].axes[-1], int):
                raise BundleError(f"{path}: {kind} {name}: missing, or its last axis has no fixed size")
        self.layers = sum(name.startswith("past_key.") for name in inputs)
        self.dtype = np.dtype(inputs["past_key.0"].dtype)
        past_shape = inputs["past_key.0"].fixed
        self.kv_dtype = self.dtype.name
        self.kv_heads = int(past_shape[2] or 0)
        self.head_dim = int(past_shape[3] or 0)
        self.columns = int(outputs["code_logits"].fixed[1] or 0)
        self.state_size = int(outputs["state"].fixed[-1] or 0) if "state" in outputs else 0
        shape = (self.layers, self.kv_heads, self.head_dim, self.dtype.name)
        self.form = GraphForm(inputs["past_key.0"].axes[1] == "batch", "node_bias" in inputs)
        self.ordered = self._session.get_modelmeta().custom_metadata_map.get(ORDERED) == "true"
        self.shared_keys = BLOCK_KEYS if self.ordered else _UNLIMITED
        check_contract(path, "input", inputs, graph_inputs(*shape, self.form))
        check_contract(path, "output", outputs, graph_outputs(*shape, self.columns, self.form, self.state_size))
        # The attention bias by visibility. The lowest finite number, not -inf, so that a masked score never makes a row NaN.
        self._bias = np.asarray([np.finfo(self.dtype).min, 0], dtype=self.dtype)

    def empty_kv(self, tokens: int) -> KvArray:
        """Return uninitialised KV [layers, 2, tokens, kv_heads, head_dim] in the model's dtype."""
        return np.empty((self.layers, 2, tokens, self.kv_heads, self.head_dim), dtype=self.dtype)

    def run(
        self,
        tokens: Int64,
        positions: Int64,
        visible: Bools,
        past: KvArray,
        rows: Int64,
        new_kv: KvArray,
        nodes: Bools | None = None,
    ) -> tuple[Float32, ...]:
        """Make one pass over one token tree: (code_logits float32 [M, C], log_normalizer float32 [M]).

        A graph that gives the state adds it: float32 [M, state_size].

        past[l, j] and new_kv[l, j] must be contiguous and must not overlap: two spans of one longer buffer qualify, and
        nothing is copied then. Raises ValueError, naming the argument, when a shape, dtype or layout is wrong.

        Args:
            tokens: int64 [S].
            positions: int64 [S].
            visible: the tree attention mask, bool [S, P + S]; every token attends to itself.
            past: KV of the cached tokens, [layers, 2, P, kv_heads, head_dim] in the model's dtype; P may be 0.
            rows: the tokens whose logits are wanted, int64 [M].
            new_kv: [layers, 2, S, kv_heads, head_dim]; it is overwritten with the KV of the new tokens.
            nodes: the cached and new tokens that are nodes, not prompt, bool [P + S]; None if there are none.
        """
        for name, kv in (("past", past), ("new_kv", new_kv)):
            if kv.ndim != 5:
                raise ValueError(f"{name}: has {kv.ndim} axes instead of 5")
        alone = nodes if nodes is None else nodes[None]
        past, new_kv = (self.form.with_batch(kv) for kv in (past, new_kv))
        return self.run_batch(tokens[None], positions[None], visible[None], past, rows, new_kv, alone)

    def batch_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Return the shape of the KV of several trees: [layers, 2, B, tokens, ...], or tokens before B if keys come first."""
        return (self.layers, 2, *self.form.outer(batch, tokens), self.kv_heads, self.head_dim)

    def run_batch(
        self,
        tokens: Int64,
        positions: Int64,
        visible: Bools,
        past: KvArray,
        rows: Int64,
        new_kv: KvArray,
        nodes: Bools | None = None,
    ) -> tuple[Float32, ...]:
        """Make one pass over several trees, padded to the same lengths. Every argument of `run` but `rows` has a batch axis B.

        The model reads masked KV too, so padding must be finite.

        Args:
            tokens: int64 [B, S].
            positions: int64 [B, S].
            visible: bool [B, S, P + S].
            past: as `batch_shape` has it for P tokens.
            rows: int64 [M], into the flattened B * S tokens.
            new_kv: as `batch_shape` has it for S tokens.
            nodes: bool [B, P + S].
        """
        (batch, count), cached = tokens.shape, past.shape[2 if self.form.keys_first else -3]
        self._check_kv("past", past, (batch, cached))
        self._check_kv("new_kv", new_kv, (batch, count))
        if positions.shape != (batch, count) or visible.shape != (batch, count, cached + count):
            raise ValueError(f"positions {positions.shape}, visible {visible.shape}: not of {cached} + {count} tokens")
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "position_ids": np.ascontiguousarray(positions, dtype=np.int64),
            **self.form.biases(self._bias, visible, nodes),
            "out_index": np.ascontiguousarray(rows, dtype=np.int64),
        }
        fetches: dict[str, npt.NDArray[Any]] = {
            "code_logits": np.empty((len(rows), self.columns), dtype=np.float32),
            "log_normalizer": np.empty(len(rows), dtype=np.float32),
        }
        if self.state_size:
            fetches["state"] = np.empty((len(rows), self.state_size), dtype=np.float32)
        found = tuple(fetches.values())
        feeds |= self._by_layer("past", past)
        fetches |= self._by_layer("new", new_kv)
        run_bound(self._session, feeds, fetches)
        return found

    def _by_layer(self, prefix: Literal["past", "new", "cross"], kv: KvArray) -> dict[str, KvArray]:
        names = kv_names(prefix, self.layers)
        return {name: kv[layer, j] for layer, pair in enumerate(names) for j, name in enumerate(pair)}

    def _check_kv(self, name: str, kv: KvArray, tokens: tuple[int, int]) -> None:
        expected = self.batch_shape(*tokens)
        if kv.shape != expected or kv.dtype != self.dtype:
            raise ValueError(f"{name}: {kv.dtype}{list(kv.shape)}, the model takes {self.dtype}{list(expected)}")
        if not kv[0, 0].flags.c_contiguous:
            raise ValueError(f"{name}: the tokens of a layer are not contiguous")


def open_session(
    files: ModelFiles, options: RuntimeOptions, more: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """Open a session on the options' provider. Raises BundleError when the file or the provider cannot be used.

    more: further options of the provider.
    """
    path = files.path
    check_provider(path, options.provider)
    (wanted, given), *others = _PROVIDERS[options.provider]
    try:
        with DEVICE.using():
            session = _session(files, options, [(wanted, given | dict(more or {})), *others])
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        weights = sum(map(len, files.weights.values())) / 2**20
        what = "it" if options.provider == "cpu" else f"its {weights:.0f} MiB of weights on the device"
        raise BundleError(f"{path}: onnxruntime cannot load {what}: {error}") from error
    # onnxruntime only warns when CUDA is installed but does not work, and uses the CPU.
    if session.get_providers()[0] != wanted:
        raise BundleError(f"{path}: provider {options.provider}: it is installed but cannot be used")
    return session


def check_provider(path: Path, provider: Provider) -> None:
    """Load a provider's libraries. Raises BundleError when this onnxruntime does not offer it."""
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the wheels that the extra `gpu` installs
    if _PROVIDERS[provider][0][0] not in ort.get_available_providers():
        raise BundleError(f"{path}: provider {provider}: this onnxruntime offers {ort.get_available_providers()}")


def _session(files: ModelFiles, options: RuntimeOptions, providers: _Providers) -> ort.InferenceSession:
    """Open a session from memory; from a private copy on disk when a tensor is too large for that."""
    settings = _session_options(options)
    # Never empty: with one file in memory, onnxruntime reads none from disk.
    memory = {files.path.name: files.graph, **files.weights}
    sizes = [len(content) for content in memory.values()]
    settings.add_external_initializers_from_files_in_memory(list(memory), list(memory.values()), sizes)
    try:
        return ort.InferenceSession(files.graph, settings, providers=providers)
    except Exception:
        if max(sizes) <= _LARGEST_TENSOR:
            raise
    with files.private_copy() as path:
        return ort.InferenceSession(str(path), _session_options(options), providers=providers)


def _session_options(options: RuntimeOptions) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.intra_op_threads
    settings.inter_op_num_threads = 1
    # A memory pattern is kept for every distinct input shape, and nearly every pass has its own shape.
    settings.enable_mem_pattern = False
    for key, value in _SPIN_SETTINGS[options.spin].items():
        settings.add_session_config_entry(key, value)
    return settings


def graph_specs(session: ort.InferenceSession) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Return a session's inputs and outputs by name."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return {arg.name: _spec(arg) for arg in inputs}, {arg.name: _spec(arg) for arg in outputs}


def _spec(arg: ort.NodeArg) -> TensorSpec:
    dtype = arg.type.removeprefix("tensor(").removesuffix(")")
    dtype = "float32" if dtype == "float" else dtype
    return TensorSpec(dtype, tuple(axis if isinstance(axis, int) else str(axis) for axis in arg.shape))


def check_contract(path: Path, kind: str, found: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> None:
    """Raise BundleError at the first name that is missing, unknown or of another type or shape."""
    for name in expected.keys() | found.keys():
        if name not in found:
            raise BundleError(f"{path}: {kind} {name}: missing")
        if name not in expected:
            raise BundleError(f"{path}: {kind} {name}: not one that a decoder has")
        if (found[name].dtype, found[name].fixed) != (expected[name].dtype, expected[name].fixed):
            raise BundleError(f"{path}: {kind} {name}: {found[name]}, expected {expected[name]}")


def run_bound(
    session: ort.InferenceSession,
    feeds: Mapping[str, npt.NDArray[Any]],
    fetches: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Run on the memory of the arrays, which are contiguous. On CUDA the same calls copy: feeds at binding, fetches later."""
    binding = session.io_binding()
    # Calls by device, type and pointer take longer, and a decoder has dozens of inputs and outputs.
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name, array in fetches.items():
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
