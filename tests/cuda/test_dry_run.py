"""The dry run itself: what it counts, its small devices, its faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from atspeed.engine.errors import BundleError
from tests.cuda.dry_run import bare, counted, device_bytes, device_of, failing
from tests.cuda.passes import second, tree_pass
from tests.cuda.shapes import TINY, open_shape, write_shape

ROWS, WIDTH = 4, 8


def product_session(**options: str) -> onnxruntime.InferenceSession:
    """A session with a product of matrices, and one of elements."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Mul", ["xw", "x"], ["y"])],
        "product",
        [value("x", TensorProto.FLOAT, [ROWS, WIDTH]), value("w", TensorProto.FLOAT, [WIDTH, WIDTH])],
        [value("y", TensorProto.FLOAT, [ROWS, WIDTH])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=[("CUDAExecutionProvider", {"use_tf32": "0", **options})]
    )


FEEDS = {"x": np.ones((ROWS, WIDTH), np.float32), "w": np.ones((WIDTH, WIDTH), np.float32)}


def bound(session: onnxruntime.InferenceSession) -> Any:
    """A binding with everything on the device, and what must live as long as it."""
    binding = session.io_binding()
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for array in FEEDS.values()]
    for name, array in zip(FEEDS, kept, strict=True):
        binding.bind_ortvalue_input(name, array)
    kept.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type([ROWS, WIDTH], np.float32, "cuda", 0))
    binding.bind_ortvalue_output("y", kept[-1])
    return binding, kept


def test_kernels_and_copies_of_a_run() -> None:
    session = product_session()
    made = second(lambda: session.run(None, FEEDS))
    assert made.kernels["cublasSgemm float32 m=8 n=4 k=8 batch=1"] == 1
    assert made.of("OP_Mul<float") == 1
    assert made.launches == 2
    assert [copy.bytes for copy in made.to_device] == [4 * ROWS * WIDTH, 4 * WIDTH * WIDTH]
    assert [copy.bytes for copy in made.to_host] == [4 * ROWS * WIDTH]
    assert not made.on_device


def test_what_is_copied_to_the_device_is_what_comes_back() -> None:
    sent = np.arange(1000, dtype=np.float32)
    with counted() as made:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(sent, "cuda", 0)
        returned = value.numpy()
    assert np.array_equal(returned, sent)
    assert len(made.to_device) == len(made.to_host) == 1


def test_bound_memory_is_not_copied_and_a_captured_graph_is_one_launch() -> None:
    session = product_session(enable_cuda_graph="1")
    binding, _kept = bound(session)
    with counted() as first:
        session.run_with_iobinding(binding)
    assert first.captures == [2]
    with counted() as replayed:
        session.run_with_iobinding(binding)
    assert replayed.replays == [2]
    assert replayed.launches == 1
    assert not replayed.kernels
    assert not replayed.copies
    assert replayed.synchronisations.total() == 1


def test_a_model_that_does_not_fit_is_refused_by_the_device(tmp_path: Path) -> None:
    path = write_shape(tmp_path, TINY, "float16")
    with device_of(memory=4 << 20), pytest.raises(BundleError, match="memory"):
        open_shape(path)
    before = device_bytes()
    decoder = open_shape(path)
    assert device_bytes() - before > path.with_name("model.onnx.data").stat().st_size
    tree_pass(decoder, 0, 8)


@pytest.mark.parametrize("function", ["cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_device_that_breaks_in_mid_pass_fails_the_pass(function: str, tmp_path: Path) -> None:
    decoder = open_shape(write_shape(tmp_path, TINY, "float16"))
    tree_pass(decoder, 0, 8)
    with failing(function, after=1), pytest.raises(Exception, match=r"(?i)cuda|illegal"):
        tree_pass(decoder, 0, 8)
    tree_pass(decoder, 0, 8)


def test_a_host_that_touches_device_memory_dies(tmp_path: Path) -> None:
    script = tmp_path / "touch.py"
    script.write_text(
        "import ctypes, numpy, onnxruntime\n"
        "from tests.cuda import dry_run\n"
        "dry_run.load()\n"
        "value = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.zeros(8), 'cuda', 0)\n"
        "ctypes.string_at(value.data_ptr(), 8)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, script], env={"PYTHONPATH": str(root)}, capture_output=True, check=False)
    assert done.returncode == -11, done.stderr.decode()


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void onnxruntime::cuda::_GatherKernel<short>(long, onnxruntime::cuda::DivMod<int>)", "_GatherKernel"),
        (
            "void onnxruntime::contrib::cuda::(anonymous namespace)::UnfusedSoftmaxKernel<__half, 256>(int)",
            "UnfusedSoftmaxKernel",
        ),
        ("cublasGemmEx float16 m=8 n=4 k=8 batch=1", "cublasGemmEx"),
        ("cudnnReduceTensor", "cudnnReduceTensor"),
    ],
)
def test_bare_names(kernel: str, name: str) -> None:
    assert bare(kernel) == name
