"""TensorRT's module against a pretend TensorRT and a pretend CUDA: what becomes of engines, which
memory is given back. That the real ones understand its calls no machine here can show."""

import ctypes
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.engine import runtimes
from common.engine.runtimes import CannotRunError, Options
from common.errors import AcceleratorLostError
from tests import onnx_files

CUDA = r"""
#include <stdlib.h>
#include <string.h>
int held;
static int take(void **p, size_t n) { held++; return (*p = malloc(n)) ? 0 : 2; }
static int give(void *p) { held--; free(p); return 0; }
int cudaMalloc(void **p, size_t n) { return take(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return flags || take(p, n); }
int cudaStreamCreate(void **p) { return take(p, 1); }
int cudaFree(void *p) { return give(p); }
int cudaFreeHost(void *p) { return give(p); }
int cudaStreamDestroy(void *p) { return give(p); }
int cudaStreamSynchronize(void *p) { return getenv("FAKE_GONE") ? 719 : 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int way, void *stream) {
    memcpy(to, from, n);
    return way != 1 && way != 2;
}
int cudaGetDeviceProperties(char *p, int device) { strcpy(p, getenv("FAKE_GPU")); return device; }
const char *cudaGetErrorString(int status) { return "unspecified launch failure"; }
"""


class Engine:
    """y = 2 x, both [1, 3, 8, 8] float32, in the memory it is told of."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.create_execution_context = lambda: self
        self.get_tensor_name = ("x", "y").__getitem__
        self.get_tensor_dtype = lambda name: "float32"
        self.get_tensor_shape = lambda name: (1, 3, 8, 8)
        self.set_input_shape = lambda name, shape: shape == (1, 3, 8, 8)
        self.set_tensor_address = self.places.__setitem__

    def execute_async_v3(self, stream: int) -> bool:
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * 192).from_address(self.places[name]))
            for name in "xy"
        )
        y[:] = 2 * x
        return stream != 0


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pretend libraries; `built` counts the engines that were built."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("needs gcc")
    library = tmp_path / "libcudart.so"
    (tmp_path / "cudart.c").write_text(CUDA)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "cudart.c"], check=True)
    monkeypatch.setenv("FAKE_GPU", "Orin (nvgpu)")
    state = SimpleNamespace(built=0, library=ctypes.CDLL(str(library)))

    def build(network: Any, settings: Any) -> bytes:
        state.built += 1
        return b"plan"

    network = SimpleNamespace(
        num_inputs=1, get_input=lambda _: SimpleNamespace(name="x", shape=(-1, 3, 8, 8), dtype=0)
    )
    ignored = SimpleNamespace(
        set_shape=lambda *_: None, add_optimization_profile=lambda _: None, ERROR=0
    )
    fake: Any = SimpleNamespace(
        __version__="10.3.0",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Builder=lambda _: SimpleNamespace(
            create_network=lambda _: network,
            create_builder_config=lambda: ignored,
            create_optimization_profile=lambda: ignored,
            build_serialized_network=build,
        ),
        OnnxParser=lambda *_: SimpleNamespace(parse_from_file=lambda path: True),
        Runtime=lambda _: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: Engine() if plan == b"plan" else None
        ),
        nptype=lambda _: np.float32,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    name = runtimes.RUNTIMES["tensorrt"].module
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "_LIBRARIES", ("libnone.so", str(library)))
    yield state
    del sys.modules[name]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return onnx_files.save(tmp_path / "m.onnx", [("Relu", ["x"], ["y"], {})], (1, 3, 8, 8))


def start(model: Path, **options: Any) -> Any:
    engine: Any = runtimes.load("tensorrt", model, Options(**options))
    engine.allocate((1, 3, 8, 8))
    return engine


def test_runs_and_gives_all_memory_back(cuda: Any, model: Path) -> None:
    engine = start(model)
    assert engine.name == "tensorrt 10.3.0 on cuda"
    engine._buffers[0][...] = 1
    engine._buffers[1][...] = 2
    one, two = engine.infer(0)[0], engine.infer(1)[0]
    assert (one.shape, one.max(), one.min(), two.min()) == ((1, 3, 8, 8), 2, 2, 4)
    held = ctypes.c_int.in_dll(cuda.library, "held")
    assert held.value == 7  # two tensors on the device, two by two on the host, a stream
    engine.close()
    assert held.value == 0


def test_lost(cuda: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(model)
    monkeypatch.setenv("FAKE_GONE", "1")
    lost = r"m.onnx: tensorrt 10.3.0 on cuda failed: cudaStreamSynchronize: unspec.* \(719\)"
    with pytest.raises(AcceleratorLostError, match=lost) as it:
        engine.infer(0)
    assert it.value.__context__ is None
    engine.close()
    with pytest.raises(CannotRunError, match=r"TensorRT can't run it: .*failed"):
        start(model)


def test_an_engine_is_built_once_for_a_model_and_device(
    cuda: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "var/engines"
    for _ in range(3):
        start(model, cache=cache).close()
    (kept,) = cache.iterdir()
    assert kept.name.endswith("-Orin-nvgpu-10.3.0-1x3x8x8.engine")
    assert cuda.built == 1
    onnx_files.classifier(model)  # another model of that name
    start(model, cache=cache).close()
    assert cuda.built == 2
    monkeypatch.setenv("FAKE_GPU", "H200")
    start(model, cache=cache).close()
    start(model, cache=cache).close()
    assert (cuda.built, len(list(cache.iterdir()))) == (3, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is the engine , of another model, device or TensorRT"),
        (b"0123-H200-10.3.0.engine 01234567\nplan", "is the engine 0123-H200-10.3.0.engine, of an"),
        (None, "is damaged"),
    ],
)
def test_what_is_damaged_or_foreign_is_built_anew(
    cuda: Any,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    content: bytes | None,
    reason: str,
) -> None:
    start(model, cache=tmp_path / "engines").close()
    (kept,) = (tmp_path / "engines").iterdir()
    good = kept.read_bytes()
    kept.write_bytes(content if content is not None else good[:-1] + b"m")
    capfd.readouterr()
    for _ in range(2):
        start(model, cache=tmp_path / "engines").close()
    assert cuda.built == 2
    assert reason in capfd.readouterr().err
    assert kept.read_bytes() == good
