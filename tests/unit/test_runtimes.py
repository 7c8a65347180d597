"""Runtimes beside each other: the same decisions on the same real models, the same manners."""

import importlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from common.engine import runtimes
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.runtimes import KEPT, CannotRunError, Options, Runtime
from common.errors import AcceleratorLostError, EngineError
from common.messages import Item
from services.cli import engines
from services.inference.engines import Engines
from tests import onnx_files

MOBILENET: dict[str, Any] = {"kind": "classification", "resize": "stretch", "colour": "rgb"}
MOBILENET |= {"mean": 127.5, "scale": 127.5, "labels": "imagenet_1001.txt"}
YOLOX: dict[str, Any] = {
    "kind": "yolox",
    "resize": "letterbox-top-left",
    "colour": "bgr",
    "scale": 1,
}
YOLOX |= {"scale": 1, "score": 0.3, "labels": "coco_80.txt"}
PADIM: dict[str, Any] = {"kind": "anomaly", "resize": "stretch", "colour": "rgb", "scale": 255}
PADIM |= {"threshold": 22.732, "minimum": 6.0, "maximum": 59.0}
# What the file doesn't say, and each file with each runtime: how far its scores may be from those
# of the first. The IR has weights of 16 bits.
TWINS: list[tuple[dict[str, Any], list[tuple[str, str, float]]]] = [
    (
        MOBILENET,
        [
            ("onnxruntime", "onnx/mobilenet_v1_0.25_224_fp32.onnx", 0),
            ("openvino", "onnx/mobilenet_v1_0.25_224_fp32.onnx", 1e-5),
            ("openvino", "openvino/mobilenet_v1_0.25_224.xml", 0.015),
            ("litert", "tflite/mobilenet_v1_0.25_224_1_metadata_1.tflite", 1e-5),
            ("openvino", "tflite/mobilenet_v1_0.25_224_1_metadata_1.tflite", 1e-5),
        ],
    ),
    (
        {},
        [
            ("litert", "tflite/mobilenet_v2_1.0_224_quant.tflite", 0),
            ("openvino", "tflite/mobilenet_v2_1.0_224_quant.tflite", 0.05),
        ],
    ),
    (
        YOLOX,
        [
            ("onnxruntime", "onnx/yolox_nano.onnx", 0),
            ("openvino", "onnx/yolox_nano.onnx", 1e-4),
            ("litert", "tflite/yolox_nano_float16_quantize.tflite", 0.01),
            ("openvino", "tflite/yolox_nano_float16_quantize.tflite", 0.01),
        ],
    ),
    (
        PADIM,
        [
            ("onnxruntime", "onnx/bsd_padim.onnx", 0),
            ("openvino", "onnx/bsd_padim.onnx", 1e-5),
            ("openvino", "openvino/bsd_padim.xml", 0.01),
        ],
    ),
]


def load(runtime: str, path: Path, *shape: int, **options: Any) -> tuple[Runtime, Sequence[Any]]:
    engine = runtimes.load(runtime, path, Options(**options))
    return engine, engine.allocate(shape or (1, 3, 8, 8))


def judge(model: Model, picture: NDArray[np.uint8]) -> list[Item]:
    geometry = model.prepare(picture, 0)
    return model.decode(model.infer(0), geometry)


@pytest.mark.parametrize(("flags", "twins"), TWINS, ids=["float", "quantised", "yolox", "padim"])
def test_twins_decide_alike(
    shared_data: Path, flags: dict[str, Any], twins: list[tuple[str, str, float]]
) -> None:
    if labels := flags.get("labels"):
        flags = flags | {"labels": shared_data / "labels" / labels}
    which = "bsd/pitting/*" if flags.get("kind") == "anomaly" else "classify/[bcps]*"
    pictures = [cv2.imread(str(path)) for path in sorted((shared_data / "images").glob(which))[:12]]
    expected: list[list[Item]] = []
    for runtime, file, tolerance in twins:
        model = Model.load(open_bundle(shared_data / "models" / file, **flags), runtime=runtime)
        assert model.runtime.startswith(runtime)
        decided = [judge(model, np.asarray(picture, np.uint8)) for picture in pictures]
        model.close()
        expected = expected or decided
        for mine, others in zip(decided, expected, strict=True):
            if model.task == "classification":
                mine, others = mine[:1], others[:1]
            assert len(mine) == len(others)
            for one, other in zip(mine, others, strict=True):
                assert one.label == other.label
                assert one.score == pytest.approx(other.score, abs=tolerance)
                assert (one.box or ()) == pytest.approx(other.box or (), abs=1.5)
    assert sum(map(len, expected)) >= 5


def test_what_openvino_lacks_the_next_variant_runs(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "models/onnx/mobilenet_v2_quant.onnx", tmp_path / "m.onnx")
    content = onnx_files.manifest("m", "1", 1)
    for old, new in (
        ("[[variants]]", '[[variants]]\nruntime = "openvino"\nfile = "m.onnx"\n[[variants]]'),
        ('kind = "class', 'activation = "softmax"\nkind = "class'),
    ):
        content = content.replace(old, new, 1)
    (tmp_path / "manifest.toml").write_text(content)
    model = Model.load(open_bundle(tmp_path))
    assert model.runtime.startswith("onnxruntime")
    assert re.fullmatch(
        r"\S+m.onnx: OpenVINO can't load it: No .* rule .*: com.microsoft.QLinearGlobal\w+",
        model.fallback_reason,
    )
    lane = Engines(open_bundle(tmp_path), Options(), None, tmp_path)
    lane.load()
    assert lane.degraded == model.fallback_reason  # which is in each result
    assert [code for code, _ in lane.notices] == ["model.fallback"]
    assert lane.retry() is None
    lane.close()
    model.close()
    ssd = "tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    with pytest.raises(CannotRunError, match=r"No translator found for TFLite_Detection_PostPro"):
        load("openvino", shared_data / "models" / ssd)


# -- manners that all have ----------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("type", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.UINT8, np.uint8)]
)
def test_inputs_of_other_types(tmp_path: Path, runtime: str, type: int, dtype: Any) -> None:
    nodes: list[Any] = [("Relu" if type == TensorProto.FLOAT16 else "Identity", ["x"], ["y"], {})]
    path = onnx_files.save(tmp_path / "m.onnx", nodes, (1, 3, 8, 8), type=type)
    engine, buffers = load(runtime, path)
    assert engine.input.dtype == engine.outputs[0].dtype == buffers[0].dtype == dtype
    buffers[1][...] = np.arange(192).reshape(1, 3, 8, 8)
    assert (engine.infer(1)[0] == buffers[1]).all()
    assert not engine.infer(0)[0].any()
    assert engine.infer(1)[0] is engine.infer(1)[0]  # nothing is made anew for each picture
    engine.close()


def test_states_begin_anew_with_each_frame(tmp_path: Path) -> None:
    ops = importlib.import_module("openvino.opset13")
    openvino = importlib.import_module("openvino")
    x = ops.parameter([1, 3, 8, 8], np.float32, name="x")
    before = ops.read_value(ops.constant(np.zeros((1, 3, 8, 8), np.float32)), "sum")
    total = ops.add(before, x)
    model = openvino.Model([ops.result(total)], [ops.assign(total, "sum")], [x], "m")
    openvino.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    engine, buffers = load("openvino", tmp_path / "m.xml")
    buffers[0][...] = 1
    assert [engine.infer(0)[0].max() for _ in range(3)] == [1, 1, 1]
    engine.close()
    engine, buffers = load("litert", adding(tmp_path / "m.tflite"), 1, 2)
    buffers[0][...] = 1
    assert [engine.infer(0)[0].tolist() for _ in range(3)] == [[[2]]] * 3
    engine.close()


def adding(path: Path) -> Path:
    """A TFLite model whose SVDF adds the sums of its two last inputs [1, 2]: one is its state."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    flatbuffers = importlib.import_module("flatbuffers")
    shapes = {"x": (1, 2), "feature": (1, 2), "time": (1, 2), "state": (1, 2), "y": (1, 1)}
    model, graph, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorT()
    model.buffers, graph.tensors = [schema.BufferT()], []
    for name, shape in shapes.items():
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.isVariable = name, list(shape), name == "state"
        tensor.buffer = len(model.buffers) if name in ("feature", "time") else 0
        graph.tensors.append(tensor)
        if tensor.buffer:
            model.buffers.append(schema.BufferT())
            model.buffers[-1].data = np.ones(shape, "<f4").view(np.uint8).reshape(-1)
    operator.inputs, operator.outputs = [0, 1, 2, -1, 3], [4]
    operator.builtinOptionsType = schema.BuiltinOptions.SVDFOptions
    operator.builtinOptions = schema.SVDFOptionsT()
    operator.builtinOptions.rank = 1
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.SVDF
    graph.inputs, graph.outputs, graph.operators = [0], [4], [operator]
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def test_a_failure_says_whose_it_is(tmp_path: Path) -> None:
    path = onnx_files.save(tmp_path / "m.onnx", [("Relu", ["x"], ["y"], {})], (1, 3, 8, 8))
    engine: Any = load("openvino", path)[0]

    def fail(**_: Any) -> None:
        raise RuntimeError("Exception from x.cpp:1:\n\nthe device is gone\n")

    engine._requests[0] = SimpleNamespace(infer=fail)
    with pytest.raises(
        EngineError, match=r"m\.onnx: openvino \S+ failed: the device is gone$"
    ) as it:
        engine.infer(0)
    assert not isinstance(it.value, AcceleratorLostError)
    engine._device = "GPU"
    with pytest.raises(AcceleratorLostError) as lost:
        engine.infer(0)
    assert lost.value.__context__ is None
    engine.close()


# -- devices that are not there -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "device", "reason"),
    [
        ("onnxruntime", "cuda", "no CUDAExecutionProvider; the package onnxruntime-gpu has it"),
        ("onnxruntime", "tensorrt", "no TensorrtExecutionProvider; the package onnxruntime-gpu"),
        ("onnxruntime", "openvino", "no OpenVINOExecutionProvider; the package onnxruntime-openv"),
        ("openvino", "NPU", "OpenVINO finds no NPU; it has CPU"),
        ("tensorrt", "cuda", "runtime tensorrt is not installed .*; install the extra `tensorrt`"),
    ],
)
def test_refused(tmp_path: Path, runtime: str, device: str, reason: str) -> None:
    if not {one.device: one for one in engines.engines() if one.runtime == runtime}[device].missing:
        pytest.skip(f"{runtime} may have {device} here")
    path = onnx_files.classifier(tmp_path / "m.onnx")
    with pytest.raises(CannotRunError, match=reason):
        load(runtime, path, device=device)


def test_a_provider_that_leaves_all_to_the_cpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's is in every build, and runs no ordinary operator."""
    ort = importlib.import_module("common.engine.runtimes.ort")
    path = onnx_files.classifier(tmp_path / "m.onnx")
    monkeypatch.setitem(ort._PROVIDERS, "cuda", ["AzureExecutionProvider"])
    with pytest.raises(CannotRunError, match=r"on the CPU, not on cuda: Azure.* has none of"):
        load("onnxruntime", path, device="cuda")
    monkeypatch.setitem(ort._PROVIDERS, "cuda", ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        ort.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(CannotRunError, match=r"on the CPU, not on cuda: CUDA.* finds no device"),
    ):
        load("onnxruntime", path, device="cuda")


def test_a_compiled_model_without_libedgetpu(shared_data: Path) -> None:
    if engines._known_library("libedgetpu.so.1"):
        pytest.skip("libedgetpu is installed")
    for name in ("mobilenet_v1_0.25_128_quant_edgetpu", "classifier_edgetpu"):
        path = shared_data / "models/edgetpu" / f"{name}.tflite"
        with pytest.raises(
            CannotRunError, match=r"is compiled for an Edge TPU \(operator edgetpu-"
        ):
            load("litert", path)
        with pytest.raises(CannotRunError, match=r"accelerator libedgetpu.so.1: .*cannot open"):
            load("litert", path, delegate="libedgetpu.so.1")
    path = shared_data / "models/edgetpu/mobilenet_v1_0.25_128_quant.tflite"
    with pytest.raises(CannotRunError, match=r"is not compiled for an Edge TPU .* on the CPU"):
        load("litert", path, delegate="libedgetpu.so.1")


def test_a_cache_is_bounded(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = onnx_files.classifier(tmp_path / "m.onnx")
    load("onnxruntime", path, cache=cache)[0].close()  # none yet
    cache.mkdir()
    for age in range(KEPT + 5):
        (cache / str(age)).touch()
        os.utime(cache / str(age), (1000 - age, 1000 - age))
    load("onnxruntime", path, cache=cache)[0].close()
    assert {int(path.name) for path in cache.iterdir()} == set(range(KEPT))


# -- vigil engines ------------------------------------------------------------------------------


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
    monkeypatch.setattr(engines, "_installed", lambda package: installed.get(package, ""))
    monkeypatch.setattr(engines, "ROOT", tmp_path)

    def said() -> dict[tuple[str, str], str]:
        return {(one.runtime, one.device): one.missing for one in engines.engines()}

    found = said()
    assert found["onnxruntime", "CPU"] == found["openvino", "CPU"] == ""
    assert found["litert", "CPU"] == "not installed: it comes with the extra `litert`"
    assert found["onnxruntime", "cuda"] == (
        "onnxruntime has no such device: install onnxruntime-gpu in its place; "
        "no such device is there"
    )
    assert found["litert", "libedgetpu.so.1"].endswith(
        "the linker knows no libedgetpu.so.1; no such device is there"
    )
    installed |= {"onnxruntime-gpu": "1.31.1", "ai-edge-litert": "2.3.0", "tensorrt": "10.1"}
    for name, content in {
        "dev/nvidia0": "", "etc/ld.so.cache": "x\0libedgetpu.so.1\0x",
        "sys/bus/usb/devices/1-1:1.0/modalias": "usb:v18D1p9302d0100dc00",
        "sys/class/drm/renderD128/device/vendor": "0x10de\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = said()
    here = [device for device, missing in found.items() if not missing]
    assert here == [
        ("litert", "CPU"), ("litert", "libedgetpu.so.1"), ("onnxruntime", "CPU"),
        ("onnxruntime", "cuda"), ("onnxruntime", "tensorrt"), ("openvino", "CPU"),
        ("tensorrt", "cuda"),
    ]  # fmt: skip
    (tmp_path / "sys/class/drm/renderD128/device/vendor").write_text("0x8086\n")
    assert said()["openvino", "GPU"] == ""
