"""An exported decoder: one pass over a token tree, with the caller's key/value memory read and written in place.

The graph's contract stands in `graph_inputs` and `graph_outputs`: `atspeed.training.export` writes by it, `Decoder` checks by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from atspeed.engine.arrays import Bools, Float32, Int64, KvArray
from atspeed.engine.bundle.manifest import MANIFEST, Bundle, Role
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError

Provider = Literal["cpu", "cuda"]
Spin = Literal["never", "brief", "always"]

_LARGEST_TENSOR = 2**31  # bytes of one that onnxruntime takes from memory

# onnxruntime's names and options, by preference.
_Providers: TypeAlias = list[tuple[str, dict[str, str]]]
_PROVIDERS: dict[Provider, _Providers] = {
    "cpu": [("CPUExecutionProvider", {})],
    # TF32, the default, keeps 10 bits of a float32's mantissa: results would be 1e-3 off and depend on a pass's shape.
    # Shape arithmetic stays on the CPU even then.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})],
}
_SPIN_SETTINGS: dict[Spin, dict[str, str]] = {
    "never": {"session.intra_op.allow_spinning": "0"},
    "brief": {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "50"},
    "always": {"session.intra_op.allow_spinning": "1"},
}


@dataclass(frozen=True)
class RuntimeOptions:
    """How a model runs on this machine.

    intra_op_threads: threads of one pass, the caller's included; never ONNX Runtime's default of all cores.
    spin: what those threads do while they wait. "brief" spins 50 microseconds, longer than the gaps within a pass, then
    sleeps. "always" is onnxruntime's default, many milliseconds: a pass, and every other process on the same cores, takes
    several times as long as soon as there are fewer free cores than threads.
    """

    provider: Provider = "cpu"
    intra_op_threads: int = 1
    spin: Spin = "brief"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph: element type, and for every axis its name or its fixed size."""

    dtype: str
    axes: tuple[str | int, ...]

    @property
    def fixed(self) -> tuple[int | None, ...]:
        """The axes with None where the size is free."""
        return tuple(axis if isinstance(axis, int) else None for axis in self.axes)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.axes))}]"


def graph_inputs(layers: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, TensorSpec]:
    """The inputs of a decoder that computes in `dtype`, in order."""
    past = TensorSpec(dtype, ("batch", "past", kv_heads, head_dim))
    return {
        "input_ids": TensorSpec("int64", ("batch", "new")),
        "position_ids": TensorSpec("int64", ("batch", "new")),
        "attn_bias": TensorSpec(dtype, ("batch", 1, "new", "past+new")),
        **{name: past for names in kv_names("past", layers) for name in names},
        "out_index": TensorSpec("int64", ("rows",)),
    }


def graph_outputs(layers: int, kv_heads: int, head_dim: int, dtype: str, columns: int) -> dict[str, TensorSpec]:
    """The outputs of a decoder with `columns` code tokens, in order."""
    new = TensorSpec(dtype, ("batch", "new", kv_heads, head_dim))
    return {
        "code_logits": TensorSpec("float32", ("rows", columns)),
        "log_normalizer": TensorSpec("float32", ("rows",)),
        **{name: new for names in kv_names("new", layers) for name in names},
    }


def kv_names(prefix: Literal["past", "new"], layers: int) -> list[tuple[str, str]]:
    """(key, value) tensor names of each layer."""
    return [(f"{prefix}_key.{layer}", f"{prefix}_value.{layer}") for layer in range(layers)]


class Decoder:
    """A loaded ONNX decoder. `run` may be called from any thread, and from several at once; it releases the GIL.

    files: the model's, where they have been read already. The session has a copy of its own: what becomes of the files later
    changes nothing.
    Raises BundleError when the file cannot be loaded, when its graph is not the contract's, or when the provider asked for
    is not there: a GPU service never falls back to the CPU in silence.
    """

    def __init__(self, path: Path, options: RuntimeOptions, files: ModelFiles | None = None) -> None:
        self.path = path
        self._session = _open_session(files or ModelFiles.read(path), options)
        inputs = {arg.name: _spec(arg) for arg in self._session.get_inputs()}
        outputs = {arg.name: _spec(arg) for arg in self._session.get_outputs()}
        for kind, found, name, rank in (("input", inputs, "past_key.0", 4), ("output", outputs, "code_logits", 2)):
            if name not in found or len(found[name].axes) != rank or not isinstance(found[name].axes[-1], int):
                raise BundleError(f"{path}: {kind} {name}: missing, or its last axis has no fixed size")
        self.layers = sum(name.startswith("past_key.") for name in inputs)
        self.dtype = np.dtype(inputs["past_key.0"].dtype)
        self.kv_heads, self.head_dim = (int(axis or 0) for axis in inputs["past_key.0"].fixed[2:])
        self.columns = int(outputs["code_logits"].fixed[1] or 0)
        shape = (self.layers, self.kv_heads, self.head_dim, self.dtype.name)
        _check_contract(path, "input", inputs, graph_inputs(*shape))
        _check_contract(path, "output", outputs, graph_outputs(*shape, self.columns))
        # By visibility. The lowest finite number, not -inf: a masked score never turns a row into NaN.
        self._bias = np.asarray([np.finfo(self.dtype).min, 0], dtype=self.dtype)

    def empty_kv(self, tokens: int) -> KvArray:
        """Uninitialised keys and values of so many tokens, [layers, 2, tokens, kv_heads, head_dim] in the model's dtype."""
        return np.empty((self.layers, 2, tokens, self.kv_heads, self.head_dim), dtype=self.dtype)

    def run(
        self, tokens: Int64, positions: Int64, visible: Bools, past: KvArray, rows: Int64, new_kv: KvArray
    ) -> tuple[Float32, Float32]:
        """One pass over one token tree: (code_logits float32 [M, C], log_normalizer float32 [M]).

        tokens, positions: int64 [S]. visible: bool [S, P + S], what each token attends to, always itself too.
        past: [layers, 2, P, kv_heads, head_dim] in the model's dtype, P may be 0. rows: int64 [M], the tokens whose logits are
        wanted. new_kv: [layers, 2, S, kv_heads, head_dim], is overwritten with the new tokens' keys and values.

        past[l, j] and new_kv[l, j] must be contiguous and must not overlap: two spans of one longer buffer qualify, and
        nothing is copied then. Raises ValueError, naming the argument, when a shape, dtype or layout is wrong.
        """
        for name, kv in (("past", past), ("new_kv", new_kv)):
            if kv.ndim != 5:
                raise ValueError(f"{name}: has {kv.ndim} axes instead of 5")
        return self.run_batch(tokens[None], positions[None], visible[None], past[:, :, None], rows, new_kv[:, :, None])

    def run_batch(
        self, tokens: Int64, positions: Int64, visible: Bools, past: KvArray, rows: Int64, new_kv: KvArray
    ) -> tuple[Float32, Float32]:
        """`run` over several trees, padded to the same lengths: everything but `rows` has a batch axis B.

        tokens, positions: [B, S]. visible: [B, S, P + S]. past: [layers, 2, B, P, kv_heads, head_dim]; new_kv: [layers, 2, B, S,
        kv_heads, head_dim]. rows: int64 [M], into the flattened B x S tokens. What is masked is read all the same, so padding
        must be finite.
        """
        (batch, count), cached = tokens.shape, past.shape[-3]
        self._check_kv("past", past, (batch, cached))
        self._check_kv("new_kv", new_kv, (batch, count))
        if positions.shape != (batch, count) or visible.shape != (batch, count, cached + count):
            raise ValueError(f"positions {positions.shape}, visible {visible.shape}: not of {cached} + {count} tokens")
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "position_ids": np.ascontiguousarray(positions, dtype=np.int64),
            "attn_bias": self._bias.take(np.ascontiguousarray(visible).view(np.uint8))[:, None],
            "out_index": np.ascontiguousarray(rows, dtype=np.int64),
        }
        fetches: dict[str, npt.NDArray[Any]] = {
            "code_logits": np.empty((len(rows), self.columns), dtype=np.float32),
            "log_normalizer": np.empty(len(rows), dtype=np.float32),
        }
        feeds |= self._by_layer("past", past)
        fetches |= self._by_layer("new", new_kv)
        self._run_bound(feeds, fetches)
        return fetches["code_logits"], fetches["log_normalizer"]

    def _run_bound(self, feeds: Mapping[str, npt.NDArray[Any]], fetches: Mapping[str, npt.NDArray[Any]]) -> None:
        """Run on the arrays' own memory. On CUDA the same calls copy: feeds when they are bound, fetches after the pass."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            _bind(binding.bind_input, name, array)
        for name, array in fetches.items():
            _bind(binding.bind_output, name, array)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _by_layer(self, prefix: Literal["past", "new"], kv: KvArray) -> dict[str, KvArray]:
        names = kv_names(prefix, self.layers)
        return {name: kv[layer, j] for layer, pair in enumerate(names) for j, name in enumerate(pair)}

    def _check_kv(self, name: str, kv: KvArray, tokens: tuple[int, int]) -> None:
        expected = (self.layers, 2, *tokens, self.kv_heads, self.head_dim)
        if kv.shape != expected or kv.dtype != self.dtype:
            raise ValueError(f"{name}: {kv.dtype}{list(kv.shape)}, the model takes {self.dtype}{list(expected)}")
        if not kv[0, 0].flags.c_contiguous:
            raise ValueError(f"{name}: the tokens of a layer are not contiguous")


def load_decoder(bundle: Bundle, role: Role, options: RuntimeOptions, *, verified: bool = False) -> Decoder:
    """A bundle's decoder. verified: of the very bytes whose hashes stand in the manifest.

    Raises BundleError, naming the field, also when the graph is not what the manifest says of it, and
    when the provider cannot multiply in 8 bits: onnxruntime would go on with the CPU there, node by node.
    """
    if bundle.model(role).precision == "int8" and options.provider != "cpu":
        raise BundleError(
            f"{bundle.root}/{MANIFEST}: {role}.precision: int8 is for provider cpu, this is {options.provider}"
        )
    decoder = Decoder(bundle.model_path(role), options, bundle.model_files(role, verified=verified))
    check_decoder(bundle, role, decoder)
    return decoder


def check_decoder(bundle: Bundle, role: Role, decoder: Decoder) -> None:
    """Raise BundleError, naming the field, when the graph is not what the manifest says of it."""
    entry = bundle.model(role)
    columns = len(entry.code_tokens)
    for field, said, found in (
        ("layers", entry.layers, decoder.layers),
        ("kv_heads", entry.kv_heads, decoder.kv_heads),
        ("head_dim", entry.head_dim, decoder.head_dim),
        ("precision", entry.kv_dtype, decoder.dtype.name),
        ("code_tokens", f"{columns} code columns", f"{decoder.columns} code columns"),
    ):
        if said != found:
            raise BundleError(f"{bundle.root}/{MANIFEST}: {role}.{field}: {said}, but {entry.path} has {found}")


def _open_session(files: ModelFiles, options: RuntimeOptions) -> ort.InferenceSession:
    path, providers = files.path, _PROVIDERS[options.provider]
    wanted = providers[0][0]
    if options.provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the wheels that the extra `gpu` installs
    if wanted not in ort.get_available_providers():
        raise BundleError(
            f"{path}: provider {options.provider}: this onnxruntime offers {ort.get_available_providers()}"
        )
    try:
        session = _session(files, options, providers)
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        raise BundleError(f"{path}: onnxruntime cannot load it: {error}") from error
    # onnxruntime only warns when CUDA is installed but does not work, and goes on with the CPU.
    if session.get_providers()[0] != wanted:
        raise BundleError(f"{path}: provider {options.provider}: it is installed but cannot be used")
    return session


def _session(files: ModelFiles, options: RuntimeOptions, providers: _Providers) -> ort.InferenceSession:
    """A session over what was read: from memory, or from a copy on disk where onnxruntime takes a tensor from there alone."""
    settings = _session_options(options)
    # Never empty: given one file in memory, onnxruntime looks for none on disk.
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
    # A memory pattern is kept for every distinct input shape, and here nearly every pass has its own.
    settings.enable_mem_pattern = False
    for key, value in _SPIN_SETTINGS[options.spin].items():
        settings.add_session_config_entry(key, value)
    return settings


def _spec(arg: ort.NodeArg) -> TensorSpec:
    dtype = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}.get(arg.type, arg.type)
    return TensorSpec(dtype, tuple(axis if isinstance(axis, int) else str(axis) for axis in arg.shape))


def _check_contract(path: Path, kind: str, found: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> None:
    """Raise BundleError at the first name that is missing, unknown or of another type or shape."""
    for name in expected.keys() | found.keys():
        if name not in found:
            raise BundleError(f"{path}: {kind} {name}: missing")
        if name not in expected:
            raise BundleError(f"{path}: {kind} {name}: not one that a decoder has")
        if (found[name].dtype, found[name].fixed) != (expected[name].dtype, expected[name].fixed):
            raise BundleError(f"{path}: {kind} {name}: {found[name]}, expected {expected[name]}")


def _bind(bind: Callable[..., None], name: str, array: npt.NDArray[Any]) -> None:
    pointer = array.__array_interface__["data"][0]
    bind(name, "cpu", 0, array.dtype.type, array.shape, pointer)
