"""The decoder on its own: the contract it enforces, and the caller's memory it works in."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, Spin, graph_inputs, graph_outputs
from atspeed.training.export import export_decoder
from tests.bundles import random_model

VOCAB, COLUMNS = 40, 30
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 12


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_decoder(random_model("llama", VOCAB, seed=1), folder, code_tokens=range(10, 40))
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def decoder(model_path: Path) -> Decoder:
    return Decoder(model_path, RuntimeOptions())


@dataclass(frozen=True)
class Pass:
    """The arguments of Decoder.run."""

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]
    past: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    new_kv: npt.NDArray[Any]

    def on(self, decoder: Decoder) -> tuple[npt.NDArray[np.float32], ...]:
        return decoder.run(self.tokens, self.positions, self.visible, self.past, self.rows, self.new_kv)


def chain(decoder: Decoder, length: int, cached: int = 0, kv: npt.NDArray[Any] | None = None) -> Pass:
    """A chain of tokens, the first `cached` of which are in `kv` already."""
    kv = decoder.empty_kv(length) if kv is None else kv
    tokens = np.random.default_rng(0).integers(0, VOCAB, length)
    visible = np.tri(length, dtype=bool)[cached:]
    new = np.arange(cached, length)
    return Pass(tokens[cached:], new, visible, kv[:, :, :cached], new - cached, kv[:, :, cached:length])


def test_reads_its_shape_from_the_graph(decoder: Decoder) -> None:
    assert (decoder.layers, decoder.kv_heads, decoder.head_dim) == (LAYERS, KV_HEADS, HEAD_DIM)
    assert decoder.columns == COLUMNS
    assert decoder.dtype == np.float32
    assert decoder.empty_kv(7).shape == (LAYERS, 2, 7, KV_HEADS, HEAD_DIM)


def test_the_contract_has_these_names_and_axes() -> None:
    """Exported bundles outlive the code that wrote them: a change here needs a new bundle format version."""
    inputs = {name: str(spec) for name, spec in graph_inputs(1, 2, 8, "float16").items()}
    outputs = {name: str(spec) for name, spec in graph_outputs(1, 2, 8, "float16", 30).items()}
    assert inputs == {
        "input_ids": "int64[batch, new]",
        "position_ids": "int64[batch, new]",
        "attn_bias": "float16[batch, 1, new, past+new]",
        "past_key.0": "float16[batch, past, 2, 8]",
        "past_value.0": "float16[batch, past, 2, 8]",
        "out_index": "int64[rows]",
    }
    assert outputs == {
        "code_logits": "float32[rows, 30]",
        "log_normalizer": "float32[rows]",
        "new_key.0": "float16[batch, new, 2, 8]",
        "new_value.0": "float16[batch, new, 2, 8]",
    }


@pytest.mark.parametrize("cached", [0, 1, 9, 19])
def test_cached_prefix_changes_no_result(decoder: Decoder, cached: int) -> None:
    """The logits are the same, and so are keys and values, which are written behind the prefix in the same buffer."""
    whole, resumed = decoder.empty_kv(20), decoder.empty_kv(30)
    expected = chain(decoder, 20, kv=whole).on(decoder)
    resumed[:] = np.nan
    if cached:
        chain(decoder, cached, kv=resumed).on(decoder)
    logits, log_normalizer = chain(decoder, 20, cached, kv=resumed).on(decoder)
    np.testing.assert_allclose(logits, expected[0][cached:], atol=1e-5)
    np.testing.assert_allclose(log_normalizer, expected[1][cached:], atol=1e-5)
    np.testing.assert_allclose(resumed[:, :, :20], whole, atol=1e-5)
    assert np.isnan(resumed[:, :, 20:]).all(), "wrote behind the new tokens"


def test_logits_are_those_of_the_requested_rows(decoder: Decoder) -> None:
    everything = chain(decoder, 12)
    logits, log_normalizer = everything.on(decoder)
    for rows in (np.array([3]), np.array([11, 0, 5]), np.array([], dtype=np.int64)):
        some_logits, some_normalizer = replace(everything, rows=rows).on(decoder)
        assert some_logits.shape == (len(rows), COLUMNS)
        np.testing.assert_allclose(some_logits, logits[rows], atol=1e-5)
        np.testing.assert_allclose(some_normalizer, log_normalizer[rows], atol=1e-5)


def test_a_pass_without_rows_still_fills_the_cache(decoder: Decoder) -> None:
    expected, step = chain(decoder, 6), chain(decoder, 6)
    expected.on(decoder)
    replace(step, rows=np.array([], dtype=np.int64)).on(decoder)
    np.testing.assert_array_equal(step.new_kv, expected.new_kv)


def test_other_integer_types_and_strided_views_are_taken(decoder: Decoder) -> None:
    step = chain(decoder, 8)
    expected, _ = step.on(decoder)
    odd = replace(
        step,
        tokens=np.repeat(step.tokens, 2)[::2],
        positions=step.positions.astype(np.int32),
        visible=np.asfortranarray(step.visible),
        rows=step.rows.astype(np.int32),
    )
    np.testing.assert_array_equal(odd.on(decoder)[0], expected)


def test_masked_tokens_have_no_effect(decoder: Decoder) -> None:
    step = chain(decoder, 10, cached=4)
    step.past[:] = np.random.default_rng(1).standard_normal(step.past.shape)
    step.visible[:, 2] = False
    expected, _ = step.on(decoder)
    step.past[:, :, 2] = 1e3
    np.testing.assert_array_equal(step.on(decoder)[0], expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: {"past": np.zeros(p.past.shape, np.float16)}, "past"),
        (lambda p: {"past": p.past[:, :, :, :1]}, "past"),
        (lambda p: {"past": np.zeros((LAYERS, 2, KV_HEADS, 4, HEAD_DIM), np.float32).swapaxes(2, 3)}, "past"),
        (lambda p: {"new_kv": p.new_kv[:, :, 1:]}, "new_kv"),
        (lambda p: {"new_kv": np.zeros((LAYERS, 2, 12, KV_HEADS, HEAD_DIM), np.float32)[:, :, ::2]}, "new_kv"),
        (lambda p: {"positions": p.positions[1:]}, "positions"),
        (lambda p: {"visible": p.visible[:, 1:]}, "visible"),
    ],
)
def test_refuses_arrays_of_another_shape_or_layout(
    decoder: Decoder, change: Callable[[Pass], dict[str, Any]], named: str
) -> None:
    """The bindings are raw pointers: a wrong layout would read or write foreign memory."""
    step = chain(decoder, 10, cached=4)
    with pytest.raises(ValueError, match=named):
        replace(step, **change(step)).on(decoder)


def test_passes_of_several_threads_do_not_mix(decoder: Decoder) -> None:
    expected, _ = chain(decoder, 16).on(decoder)
    wrong: list[int] = []

    def passes() -> None:
        for _ in range(20):
            found, _ = chain(decoder, 16).on(decoder)
            wrong.append(int(not np.allclose(found, expected, atol=1e-5)))

    threads = [threading.Thread(target=passes) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wrong), sum(wrong)) == (80, 0)


@pytest.mark.parametrize("spin", ["never", "brief", "always"])
def test_spinning_does_not_change_results(decoder: Decoder, model_path: Path, spin: Spin) -> None:
    other = Decoder(model_path, RuntimeOptions(intra_op_threads=2, spin=spin))
    np.testing.assert_allclose(chain(other, 9).on(other)[0], chain(decoder, 9).on(decoder)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_precisions_run_on_the_cpu(decoder: Decoder, tmp_path: Path, dtype: Any) -> None:
    export_decoder(
        random_model("llama", VOCAB, seed=1, initializer_range=0.1),
        tmp_path,
        code_tokens=range(10, 40),
        precision=dtype,
    )
    narrow = Decoder(tmp_path / "model.onnx", RuntimeOptions())
    assert narrow.empty_kv(1).dtype == np.dtype("float16" if dtype == "float16" else "float32")
    logits, log_normalizer = chain(narrow, 9, cached=0).on(narrow)
    assert logits.dtype == log_normalizer.dtype == np.float32
    assert np.isfinite(logits).all()


def tampered(model_path: Path, tamper: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the graph beside the original, so that it finds the same weights."""
    model = onnx.load(model_path, load_external_data=False)
    tamper(model)
    path = model_path.with_name("tampered.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "tokens"
    for node in model.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]


def add_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, ["rows", 48]))
    model.graph.node.append(onnx.helper.make_node("Identity", ["log_normalizer"], ["hidden"]))


def free_the_heads(model: onnx.ModelProto) -> None:
    model.graph.input[-2].type.tensor_type.shape.dim[2].dim_param = "heads"


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (drop_output, "output new_value.1: missing"),
        (rename_input, "input input_ids: missing|input tokens: not one that a decoder has"),
        (add_output, "output hidden: not one that a decoder has"),
        (free_the_heads, "input past_value.1: float32.*expected float32"),
    ],
)
def test_refuses_another_graph(model_path: Path, tamper: Callable[[onnx.ModelProto], None], named: str) -> None:
    with pytest.raises(BundleError, match=rf"tampered\.onnx: ({named})"):
        Decoder(tampered(model_path, tamper), RuntimeOptions())


def test_refuses_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    (tmp_path / "neg.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"neg\.onnx: input past_key\.0"):
        Decoder(tmp_path / "neg.onnx", RuntimeOptions())


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_refuses_a_file_that_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Decoder(path, RuntimeOptions())


def test_cuda_never_falls_back_to_cpu_silently(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime itself only warns, and then a GPU service answers at a CPU's pace."""
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    cuda = RuntimeOptions(provider="cuda")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(BundleError, match="provider cuda"):
            Decoder(model_path, cuda)

    def session_without_cuda(
        path: str, options: ort.SessionOptions, providers: list[tuple[str, dict[str, str]]]
    ) -> ort.InferenceSession:
        name, given = providers[0]
        assert (name, given["use_tf32"]) == ("CUDAExecutionProvider", "0"), "float32 must be float32 there too"
        return real_session(path, options, providers=["CPUExecutionProvider"])

    real_session = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session_without_cuda)
    with pytest.raises(BundleError, match="provider cuda: it is installed but cannot be used"):
        Decoder(model_path, cuda)


def test_a_tensor_too_large_for_memory_is_loaded_from_a_private_copy(
    decoder: Decoder, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime takes tensors above 2 GiB from files alone; here it refuses all that are in memory."""
    real_session = ort.InferenceSession

    def session_of_files_alone(model: str | bytes, *arguments: Any, **options: Any) -> ort.InferenceSession:
        if isinstance(model, bytes):
            raise RuntimeError("exceeds the 2147483648 byte limit for embedded initializer data")  # noqa: TRY004
        return real_session(model, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", session_of_files_alone)
    with pytest.raises(BundleError, match="2147483648 byte limit"):
        Decoder(model_path, RuntimeOptions())
    monkeypatch.setattr("atspeed.engine.model.decoder._LARGEST_TENSOR", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copied = Decoder(model_path, RuntimeOptions())
    assert not list(tmp_path.iterdir())
    for mine, its in zip(chain(copied, 9).on(copied), chain(decoder, 9).on(decoder), strict=True):
        np.testing.assert_array_equal(mine, its)
