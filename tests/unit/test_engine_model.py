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
    "onnx/yolox_nano_v8layout.onnx",
]
RUNTIMES = ["litert", "onnxruntime", "openvino"]


@pytest.fixture(params=zip(RUNTIMES, FILES, strict=True), ids=RUNTIMES)
def model(request: pytest.FixtureRequest, shared_data: Path) -> Model:
    runtime, file = request.param
    bundle = open_bundle(shared_data / "models" / file, score=0.05)
    return Model.load(bundle, Options(threads=1), runtime)


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


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_an_output_whose_size_depends_on_the_picture(tmp_path: Path, runtime: str) -> None:
    path = onnx_files.save(
        tmp_path / "m.onnx",
        [("NonZero", ["x"], ["places"], {}), ("Cast", ["places"], ["y"], {"to": 1})],
        (4, "found"),
    )
    engine = runtimes.load(runtime, path, Options())
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


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_inputs_beside_the_picture_hold_constants_and_a_state_begins_anew(
    tmp_path: Path, runtime: str
) -> None:
    path = two_inputs(tmp_path / "m.onnx")
    engine = runtimes.load(runtime, path, Options(constants=CONSTANTS))
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


# --- inputs ------------------------------------------------------------------------------------

SEEN = {"kind": "classification", "activation": "none", "resize": "stretch", "max_items": 3}
BLUE = np.full((4, 6, 3), (200, 40, 20), np.uint8)  # BGR
INPUTS: list[tuple[str, tuple[int | str, ...], int, dict[str, Any], list[float]]] = [
    # how the input looks: shape, type of ONNX; what is given; means of its channels, in order
    ("float16", (1, 3, 4, 6), 10, {"colour": "rgb", "scale": 255}, [20 / 255, 40 / 255, 200 / 255]),
    ("uint8", (1, 3, 4, 6), 2, {"colour": "rgb"}, [20, 40, 200]),
    ("int8", (1, 3, 4, 6), 3, {"colour": "bgr", "mean": 128, "scale": 1}, [72, -88, -108]),
    ("rank 3, planes", (3, 4, 6), 1, {"colour": "rgb", "scale": 1}, [20, 40, 200]),
    ("rank 3, pixels", (4, 6, 3), 2, {"colour": "bgr"}, [200, 40, 20]),
    ("open batch", ("n", 3, 4, 6), 1, {"colour": "bgr", "scale": 1}, [200, 40, 20]),
    (
        "open size",
        (1, "h", "w", 3),
        1,
        {"colour": "bgr", "scale": 1, "size": [4, 6]},
        [200, 40, 20],
    ),
    (
        "all open",
        ("n", "c", "h", "w"),
        1,
        {"colour": "rgb", "scale": 1, "size": [4, 6], "layout": "nchw"},
        [20, 40, 200],
    ),
]


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
@pytest.mark.parametrize(
    ("shape", "kind", "flags", "means"), [row[1:] for row in INPUTS], ids=[r[0] for r in INPUTS]
)
def test_inputs(
    tmp_path: Path,
    runtime: str,
    shape: tuple[Any, ...],
    kind: int,
    flags: dict[str, Any],
    means: list[float],
) -> None:
    """A picture of one colour, whose channels the model gives back: [3], the rest being 1."""
    planes = [at - len(shape) for at in range(len(shape)) if shape[at] not in (3, "c")]
    nodes: list[Any] = [
        ("Cast", ["x"], ["real"], {"to": 1}),
        ("ReduceMean", ["real"], ["mean"], {"axes": planes, "keepdims": 0}),
        ("Div", ["mean", "unit"], ["y"], {}),
    ]
    unit = {"unit": np.float32(1000.0)}
    path = onnx_files.save(tmp_path / "m.onnx", nodes, (3,), shape, kind, unit, output_type=1)
    model = Model.load(open_bundle(path, **SEEN | flags), runtime=runtime)
    for buffer in range(Model.BUFFERS):
        geometry = model.prepare(BLUE, buffer)
        (values,) = model.infer(buffer)
        assert values * 1000 == pytest.approx(means, abs=1e-3 if kind == 10 else 1e-4)
        if min(means) > 0:
            items = model.decode([values], geometry)
            assert [item.index for item in items] == np.argsort(means)[::-1].tolist()
    model.close()


@pytest.mark.parametrize("shape", [(1, 4, 6), ("n", 4, 6), (1, 1, 4, 6), (4, 6, 1)])
def test_grey_inputs(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    """[1, height, width] is the same whether the first is the batch or the channel."""
    path = onnx_files.save(tmp_path / "m.onnx", [("Identity", ["x"], ["y"], {})], shape, shape)
    flags = SEEN | {"colour": "grey", "scale": 1, "kind": "reconstruction", "activation": None}
    flags |= {"threshold": 0.5, "minimum": 0.0, "maximum": 1.0}
    model = Model.load(open_bundle(path, **flags), runtime="onnxruntime")
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    geometry = model.prepare(grey, 1)
    outputs = model.infer(1)
    assert outputs[0].ravel().tolist() == list(range(24))
    assert model.decode(outputs, geometry) == []  # rebuilt exactly
    outputs = [outputs[0] + 1, *outputs[1:]]
    assert [item.score for item in model.decode(outputs, geometry)] == [1.0]
    model.close()


@pytest.mark.parametrize(
    ("shape", "kind", "flags", "says"),
    [
        (("n", 20, 3), 1, {}, "doesn't show where its channels are; give `layout`"),
        (("n", 4, 6), 1, {}, "--colour rgb or bgr, or grey"),
        ((1, 640), 1, {}, "takes no single picture; expected .* or the same without the 1"),
        ((2, 4, 6), 1, {}, "doesn't show where its channels are"),
        ((2, 4, 6), 1, {"layout": "nchw"}, "as nchw has 2 channels, not 1 or 3"),
        ((1, 3, 4, 6), 3, {"colour": "rgb"}, "mean 128 and scale 1 for pixels less 128"),
        ((1, 3, 4, 6), 6, {}, "input x .* int32: expected uint8, int8, float16 or float32"),
    ],
)
def test_inputs_refused(
    tmp_path: Path, shape: tuple[Any, ...], kind: int, flags: dict[str, Any], says: str
) -> None:
    nodes: list[Any] = [("Cast", ["x"], ["y"], {"to": 1})]
    path = onnx_files.save(tmp_path / "m.onnx", nodes, shape, shape, kind, output_type=1)
    with pytest.raises(ModelError, match=says):
        Model.load(open_bundle(path, **SEEN | flags), runtime="onnxruntime")


# --- outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"kind": "classification", "threshold": 0.5}, "classification has no use for `threshold`"),
        ({"kind": "anomaly", "error": "absolute"}, "decoder anomaly has no use for `error`"),
        ({"kind": "anomaly", "labels": "m.txt"}, "anomaly has a label of its own, 'anomaly'"),
    ],
)
def test_what_a_decoder_does_not_read_is_refused(
    tmp_path: Path, flags: dict[str, Any], says: str
) -> None:
    path = onnx_files.classifier(tmp_path / "m.onnx")
    (tmp_path / "m.txt").write_text("good\nbad\n")
    if "labels" in flags:
        flags = flags | {"labels": tmp_path / "m.txt"}
    with pytest.raises(ModelError, match=says):
        Model.load(open_bundle(path, colour="rgb", scale=1, resize="stretch", **flags))


def test_the_outputs_to_be_read_are_named(tmp_path: Path) -> None:
    flags: dict[str, Any] = SEEN | {"colour": "bgr", "scale": 1000, "constants": CONSTANTS}
    path = two_inputs(tmp_path / "m.onnx")
    with pytest.raises(
        ModelError, match=r"can't read the outputs next .*, scores .*; expected one"
    ):
        Model.load(open_bundle(path, **flags))
    with pytest.raises(ModelError, match=r"names score, but it has next, scores"):
        Model.load(open_bundle(path, **flags, outputs=["score"]))
    bundle = open_bundle(path, **flags, outputs=["scores"])
    model = Model.load(bundle, runtime="onnxruntime")
    geometry = model.prepare(BLUE, 0)
    outputs = model.infer(0)
    assert len(outputs) == 2
    assert [item.index for item in model.decode(outputs, geometry)] == [0, 1, 2]


def logits(path: Path, values: list[float], shape: tuple[int, ...]) -> Path:
    """A model that says `values` of any picture."""
    nodes: list[Any] = [
        ("ReduceMean", ["x"], ["mean"], {"keepdims": 0}),
        ("Mul", ["mean", "zero"], ["none"], {}),
        ("Add", ["values", "none"], ["y"], {}),
    ]
    constants = {"zero": np.float32(0), "values": np.array(values, np.float32).reshape(shape)}
    return onnx_files.save(path, nodes, shape, constants=constants)


def said(path: Path, labels: str | None = None, **flags: Any) -> list[tuple[str, float, int]]:
    given: dict[str, Any] = SEEN | {"colour": "rgb", "scale": 1, "max_items": None} | flags
    if labels is not None:
        given["labels"] = path.with_suffix(".txt")
        given["labels"].write_text(labels)
    model = Model.load(open_bundle(path, **given), runtime="onnxruntime")
    geometry = model.prepare(BLUE, 0)
    items = model.decode(model.infer(0), geometry)
    return [(item.label, round(item.score, 3), item.index) for item in items]


@pytest.mark.parametrize("shape", [(1, 8), (8,), (1, 8, 1, 1)])
def test_classes_that_do_not_exclude_each_other(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """All that are likelier than not, or than asked; of classes that do, the best five."""
    path = logits(tmp_path / "m.onnx", [3, -1, 2, 1, 0.5, 0.4, 0.3, -4], shape)
    several = [("0", 0.953, 0), ("2", 0.881, 2), ("3", 0.731, 3)]
    several += [("4", 0.622, 4), ("5", 0.599, 5), ("6", 0.574, 6)]
    assert said(path, activation="sigmoid") == several
    assert said(path, activation="sigmoid", score=0.6) == several[:4]
    assert len(said(path, activation="sigmoid", score=0.0)) == 8
    assert [index for _, _, index in said(path, activation="softmax")] == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
def test_a_single_value(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """With one label how likely that is; with two how likely the second is, as Keras counts."""
    path = logits(tmp_path / "m.onnx", [2], shape)
    assert said(path, "defect", activation="sigmoid") == [("defect", 0.881, 0)]
    assert said(path, "good\ndefect", activation="sigmoid") == [("defect", 0.881, 1)]
    path = logits(tmp_path / "m.onnx", [0.25], shape)
    assert said(path, "defect") == []
    assert said(path, "defect", score=0.2) == [("defect", 0.25, 0)]
    assert said(path, "good\ndefect", score=0.2) == [("good", 0.75, 0), ("defect", 0.25, 1)]
    for labels in (None, "a\nb\nc"):
        with pytest.raises(ModelError, match="has a single value; expected one label, of what it"):
            said(path, labels)
    with pytest.raises(ModelError, match="'softmax' makes 1 of any single value; expected sigm"):
        said(path, "defect", activation="softmax")
