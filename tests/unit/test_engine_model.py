"""A loaded model between two threads; what the runtimes promise beneath it."""

import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from common.engine import runtimes
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.runtimes import Options
from common.errors import EngineError, ModelError
from tests import onnx_files

FILES = [
    "tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite",
    "onnx/yolox_nano_v8layout.onnx",
]


@pytest.fixture(params=FILES, ids=["litert", "onnxruntime"])
def model(request: pytest.FixtureRequest, shared_data: Path) -> Model:
    bundle = open_bundle(shared_data / "models" / request.param, score=0.05)
    return Model.load(bundle, Options(threads=1))


@pytest.fixture
def pictures(shared_data: Path) -> list[NDArray[np.uint8]]:
    """Six photos of several sizes."""
    return [
        np.asarray(cv2.imread(str(path)), np.uint8)
        for path in sorted((shared_data / "images/coco").glob("*.jpg"))[:6]
    ]


def test_outputs_stay_while_the_other_buffer_is_inferred(
    model: Model, pictures: list[NDArray[np.uint8]]
) -> None:
    one, two = pictures[:2]
    model.prepare(one, 0)
    model.prepare(two, 1)
    first = model.infer(0)
    kept = [np.array(values) for values in first]
    second = model.infer(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(kept, second, strict=True))
    kept = [np.array(values) for values in second]
    model.infer(0)
    assert all(np.array_equal(a, b) for a, b in zip(second, kept, strict=True))


def test_preparing_while_inferring_changes_no_result(
    model: Model, pictures: list[NDArray[np.uint8]]
) -> None:
    """Results of a pipeline of two threads are those of one thread."""
    shown = pictures * 4
    expected = []
    for picture in shown:
        geometry = model.prepare(picture, 0)
        expected.append(model.decode(model.infer(0), geometry))
    assert all(expected)
    results: list[Any] = []
    ready = [threading.Semaphore(0), threading.Semaphore(0)]
    free = [threading.Semaphore(1), threading.Semaphore(1)]
    geometries: list[Any] = [None, None]

    def infer() -> None:
        for number in range(len(shown)):
            buffer = number % 2
            ready[buffer].acquire()
            results.append(model.decode(model.infer(buffer), geometries[buffer]))
            free[buffer].release()

    worker = threading.Thread(target=infer)
    worker.start()
    for number, picture in enumerate(shown):
        buffer = number % 2
        assert free[buffer].acquire(timeout=30)
        geometries[buffer] = model.prepare(picture, buffer)
        ready[buffer].release()
    worker.join(30)
    assert results == expected


def test_inferring_lets_other_threads_run(model: Model) -> None:
    """The interpreter's lock is free for the bulk of `infer`: another thread is seen working in the
    middle half of most runs, where it would stand still otherwise.
    """
    model.warm_up(1)
    spans: list[tuple[int, int]] = []

    def infer() -> None:
        for _ in range(15):
            begun = time.monotonic_ns()
            model.infer(0)
            spans.append((begun, time.monotonic_ns()))

    worker = threading.Thread(target=infer)
    worker.start()
    seen = []
    while worker.is_alive():
        seen.append(time.monotonic_ns())
    ticks = np.array(seen)
    alive = 0
    for begun, ended in spans:
        quarter = (ended - begun) // 4
        alive += bool(((ticks > begun + quarter) & (ticks < ended - quarter)).any())
    assert alive >= 8


def test_dynamic_batch_becomes_one(tmp_path: Path) -> None:
    path = onnx_files.save(
        tmp_path / "m.onnx",
        [("Relu", ["x"], ["y"], {})],
        ("batch", 3, 4, 4),
        input=("batch", 3, 4, 4),
    )
    engine = runtimes.load("onnxruntime", path, Options())
    assert engine.input.shape == (-1, 3, 4, 4)
    buffers = engine.allocate((1, 3, 4, 4))
    assert engine.outputs[0].shape == (1, 3, 4, 4)
    buffers[1][...] = 5
    assert (engine.infer(1)[0] == 5).all()
    assert (engine.infer(0)[0] == 0).all()
    engine.close()


def test_an_output_whose_size_depends_on_the_picture(tmp_path: Path) -> None:
    path = onnx_files.save(
        tmp_path / "m.onnx",
        [("NonZero", ["x"], ["places"], {}), ("Cast", ["places"], ["y"], {"to": 1})],
        (4, "found"),
    )
    engine = runtimes.load("onnxruntime", path, Options())
    buffers = engine.allocate((1, 3, 8, 8))
    buffers[0][0, 1, 2, 3] = 1
    buffers[1][0, 1, 2, 3:6] = 1
    one = engine.infer(0)[0]
    assert engine.infer(1)[0].shape == (4, 3)
    assert one.tolist() == [[0], [1], [2], [3]]
    engine.close()


@pytest.mark.parametrize("arena", [False, True])
def test_options_change_no_result(
    shared_data: Path, pictures: list[NDArray[np.uint8]], arena: bool
) -> None:
    path = shared_data / "models/onnx/yolox_nano_v8layout.onnx"
    outputs: list[NDArray[Any]] = []
    for options in (Options(), Options(threads=2, spinning=True, memory_arena=arena)):
        model = Model.load(open_bundle(path), options)
        model.prepare(pictures[0], 0)
        outputs.append(np.array(model.infer(0)[0]))
    assert np.allclose(outputs[0], outputs[1], atol=1e-3)


def test_warm_up_goes_through_all_steps_and_both_buffers(tmp_path: Path) -> None:
    """A model whose numbers are none shows it before the first frame."""
    path = onnx_files.classifier(tmp_path / "m.onnx", weight=np.nan)
    model = Model.load(
        open_bundle(path, kind="classification", colour="rgb", scale=1, resize="stretch")
    )
    with pytest.raises(EngineError, match="the frame was not judged"):
        model.warm_up(1)


def two_inputs(path: Path) -> Path:
    """Mean of each channel times `factor` [1, 3], plus a state [batch, 3] that grows with it."""
    import onnx
    from onnx import TensorProto, helper

    def info(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Mul", ["flat", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "state"], ["next"]),
        helper.make_node("Identity", ["next"], ["scores"]),
    ]
    inputs = [info("factor", 1, 3), info("x", 1, 3, 4, 4), info("state", "batch", 3)]
    outputs = [info("next", 1, 3), info("scores", 1, 3)]
    graph = helper.make_graph(nodes, "made", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


CONSTANTS: runtimes.Constants = {"factor": [1.0, 0.5, 0.25], "state": 0.0}


def test_inputs_beside_the_picture_hold_constants_and_a_state_begins_anew(tmp_path: Path) -> None:
    path = two_inputs(tmp_path / "m.onnx")
    engine = runtimes.load("onnxruntime", path, Options(constants=CONSTANTS))
    assert engine.input.name == "x"
    buffers = engine.allocate((1, 3, 4, 4))
    for value in (1, 2, 2):
        buffers[0][...] = value
        wanted = [[value, value / 2, value / 4]]
        assert [values.tolist() for values in engine.infer(0)] == [wanted, wanted]
    engine.close()


@pytest.mark.parametrize(
    ("constants", "says"),
    [
        ({}, r"has 3 inputs \(factor, x, state\); expected one, the picture's; give what each oth"),
        ({"state": 0.0}, r"has 2 inputs \(factor, x\); expected one"),
        (CONSTANTS | {"x": 0.0}, r"has 0 inputs \(\); expected one, the picture's"),
        (CONSTANTS | {"y": 0.0}, "has the inputs factor, x, state, but `constants` has .*, y"),
        (CONSTANTS | {"factor": [1.0]}, r"constant for input factor \[1, 3\] float32: cannot resh"),
    ],
)
def test_constants_that_do_not_fit(tmp_path: Path, constants: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Model.load(open_bundle(two_inputs(tmp_path / "m.onnx"), constants=constants))
