"""The real anomaly models of the shared data decide as verified on them.

A vibration model takes no picture, so that no camera can feed one: there the runtime and the
decoder are tested, with windows of a recording written into the model's input.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from common.engine import decoders, runtimes
from common.engine.bundle import Bundle, open_bundle
from common.engine.decoders import Settings
from common.engine.model import Model
from common.engine.preprocess import Geometry
from common.engine.samples import self_test
from common.errors import ModelError
from common.messages import Item

PADIM = "models/onnx/bsd_padim.onnx"
PADIM_IR = "models/openvino/bsd_padim.xml"
THRESHOLD, MINIMUM, MAXIMUM = 22.732, 6.0, 59.0
FLAGS: dict[str, Any] = {
    "kind": "anomaly", "colour": "rgb", "resize": "stretch", "scale": 255,
    "threshold": THRESHOLD, "minimum": MINIMUM, "maximum": MAXIMUM,
}  # fmt: skip
MANIFEST = f"""\
name = "surface"
version = "1"
release = 1
task = "anomaly"
[[variants]]
runtime = "onnxruntime"
file = "bsd_padim.onnx"
[input]
colour = "rgb"
resize = "stretch"
scale = 255
[decoder]
kind = "anomaly"
threshold = {THRESHOLD}
minimum = {MINIMUM}
maximum = {MAXIMUM}
[limits]
accuracy = 0.8
"""


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def pil_resize(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """PIL's BILINEAR, a triangle as wide as the reduction: columns, then rows, rounded between."""
    for size in (width, height):
        picture = picture.swapaxes(0, 1)
        flat = picture.reshape(len(picture), -1).astype(np.float32)
        ratio = len(flat) / size
        at = ((np.arange(size) + 0.5) * ratio)[:, None]
        near = np.floor(at - ratio).astype(int) + np.arange(int(2 * ratio) + 2)
        weights = np.clip(1 - np.abs(near + 0.5 - at) / ratio, 0, None)
        weights *= (near >= 0) & (near < len(flat))
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        near = near.clip(0, len(flat) - 1)
        made = sum(weights[:, [k]] * flat[near[:, k]] for k in range(near.shape[1]))
        picture = np.floor(made + 0.5).astype(np.uint8).reshape(size, *picture.shape[1:])
    return picture


def area_under_curve(anomalous: list[float], normal: list[float]) -> float:
    """How often an anomalous one scores above a normal one."""
    return float(np.mean([[a > n for n in normal] for a in anomalous]))


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, Any]:
    scores = json.loads((shared_data / "expected/bsd_padim_scores.json").read_text())
    return {path: row for path, row in scores.items() if "train" not in path}


@pytest.fixture(scope="module")
def resized(shared_data: Path, expected: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    return {path: pil_resize(read(shared_data / path), 576, 240) for path in expected}


@pytest.mark.parametrize(
    ("name", "runtime", "column"),
    [(PADIM, "onnxruntime", "onnx"), (PADIM_IR, "openvino", "openvino_fp16")],
)
def test_pitting(
    shared_data: Path,
    expected: dict[str, Any],
    resized: dict[str, NDArray[np.uint8]],
    name: str,
    runtime: str,
    column: str,
) -> None:
    """40 of 50 pitted surfaces are found at 22.732, and 4 of 50 good ones flagged."""
    model = Model.load(open_bundle(shared_data / name, **FLAGS), runtime=runtime)
    assert (model.task, model.labels) == ("anomaly", ("anomaly",))
    scores: dict[str, list[float]] = {"pitting": [], "good": []}
    found = {"pitting": 0, "good": 0}
    for path, row in expected.items():
        score = row[column]
        geometry = model.prepare(resized[path], 0)
        outputs = model.infer(0)
        items = model.decode(outputs, geometry)
        raw = outputs[1].item()
        assert raw == pytest.approx(score, abs=0.3)  # decoders of JPEG differ by a level
        assert bool(items) == (score >= THRESHOLD), path
        if items:
            scaled = (raw - THRESHOLD) / (MAXIMUM - MINIMUM) + 0.5
            assert items[0] == Item("anomaly", min(scaled, 1.0), 0)
        kind = path.split("/")[2]
        scores[kind].append(raw)
        found[kind] += bool(items)
    assert (len(scores["pitting"]), len(scores["good"])) == (50, 50)
    assert found == {"pitting": 40, "good": 4}
    assert area_under_curve(scores["pitting"], scores["good"]) == pytest.approx(0.936, abs=0.002)


def test_regions_are_where_the_pitting_is(shared_data: Path, expected: dict[str, Any]) -> None:
    """With our own resize, on the whole picture. The map is smoother than the score, so that its
    threshold is lower."""
    model = Model.load(open_bundle(shared_data / PADIM, **FLAGS, pixel_threshold=18.0))
    truth = json.loads((shared_data / "images/bsd/annotations.json").read_text())
    found = right = 0
    for path in expected:
        if "pitting" not in path:
            continue
        picture = read(shared_data / path)
        geometry = model.prepare(picture, 0)
        items = model.decode(model.infer(0), geometry)
        boxes = [item.box for item in items if item.box is not None]
        assert np.array(boxes).max(initial=0) <= picture.shape[1]
        found += bool(items)
        right += any(
            x1 < x + width and x < x2 and y1 < y + height and y < y2
            for x, y, width, height in truth[path.removeprefix("images/bsd/")]["boxes"]
            for x1, y1, x2, y2 in boxes
        )
    assert (found, right) == (40, 35)


def test_the_threshold_is_asked_for(shared_data: Path) -> None:
    flags = FLAGS | {"threshold": None}
    with pytest.raises(ModelError, match="nothing tells which scores are anomalous; give the s"):
        Model.load(open_bundle(shared_data / PADIM, **flags))


@pytest.fixture
def surface(shared_data: Path, tmp_path: Path, expected: dict[str, Any]) -> Path:
    """A bundle with ten good and ten pitted surfaces as samples."""
    folder = tmp_path / "surface"
    (folder / "samples").mkdir(parents=True)
    shutil.copy(shared_data / PADIM, folder)
    (folder / "manifest.toml").write_text(MANIFEST)
    rows = []
    for kind in ("good", "pitting"):
        for path in [path for path in expected if kind in path][::5]:
            shutil.copy(shared_data / path, folder / "samples")
            answer = [{"label": "anomaly"}] if kind == "pitting" else []
            rows.append({"file": Path(path).name, "items": answer})
    (folder / "samples/samples.json").write_text(json.dumps(rows))
    return folder


def test_an_anomaly_bundle_proves_itself(surface: Path) -> None:
    bundle = open_bundle(surface)
    model = Model.load(bundle)
    passed = self_test(model, bundle)
    assert (passed.samples, passed.refused) == (20, "")
    assert passed.accuracy is not None
    assert 0.8 <= passed.accuracy < 1.0
    # Everything flagged is half of it right; the other half are good surfaces.
    flagging = Model.load(decided(bundle, threshold=0.0))
    failed = self_test(flagging, bundle)
    assert failed.accuracy == 0.5
    assert failed.refused == "accuracy 0.500 on 20 samples, wanted 0.8"


def decided(bundle: Bundle, **changes: Any) -> Bundle:
    import msgspec

    decoder = msgspec.structs.replace(bundle.manifest.decoder, **changes)
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, decoder=decoder))


def test_samples_of_an_anomaly_bundle_know_one_label(surface: Path) -> None:
    where = surface / "samples/samples.json"
    where.write_text(where.read_text().replace('"anomaly"', '"pitting"'))
    bundle = open_bundle(surface)
    refused = self_test(Model.load(bundle), bundle).refused
    assert "label 'pitting': expected one of anomaly" in refused


# --- reconstruction ----------------------------------------------------------------------------


def test_reconstruction_error_of_vibration(shared_data: Path) -> None:
    """fan_low_raw_ae.onnx, [batch, 200, 3] in g: the mean squared error verified on each file."""
    path = shared_data / "models/onnx/fan_low_raw_ae.onnx"
    rows = json.loads((shared_data / "expected/vibration_fan.json").read_text())
    judge = judging("onnxruntime", path, (1, 200, 3), 3e-5, 1e-3)
    anomalous = 0
    for name, row in rows.items():
        items = judge(np.loadtxt(shared_data / name, delimiter=",", ndmin=2))
        score = row["fan_low_raw_ae_mse"]
        assert bool(items) == (score > 3e-5), name
        for item in items:
            assert (item.score - 0.5) * 1e-3 + 3e-5 == pytest.approx(score, rel=0.01), name
            anomalous += 1
    assert (anomalous, len(rows)) == (40, 160)


def test_a_threshold_separates_the_fans(shared_data: Path) -> None:
    """fan_low_model.tflite, [1, 3] features: 5e-6 separates every file."""
    rows = json.loads((shared_data / "expected/vibration_fan.json").read_text())
    judge = judging(
        "litert", shared_data / "models/tflite/fan_low_model.tflite", (1, 3), 5e-6, 2e-3
    )
    for name, row in rows.items():
        assert bool(judge(row["features"])) == ("normal_low" not in name), name


@pytest.mark.parametrize("name", ["ad01_fp32", "ad01_int8"])
def test_reconstruction_error_of_sound(shared_data: Path, name: str) -> None:
    """The same score from floats and from what int8 stands for, over 640 values."""
    golden = {
        kind: np.load(shared_data / f"golden/ad01_{kind}.tflite.npz") for kind in ("fp32", "int8")
    }
    wanted = float(np.square(golden["fp32"]["output0"] - golden["fp32"]["input"]).mean())
    path = shared_data / f"models/tflite/{name}.tflite"
    judge = judging("litert", path, (1, 640), wanted, 10 * wanted)
    (item,) = judge(golden[name.removeprefix("ad01_")]["input"], slack=0.1 * wanted)
    assert (item.score - 0.5) * 10 == pytest.approx(0.1, abs=0.1)


def judging(
    runtime: str, path: Path, shape: tuple[int, ...], threshold: float, maximum: float
) -> Any:
    """Values into a model's input, through runtime and decoder."""
    engine = runtimes.load(runtime, path, runtimes.Options())
    buffers = engine.allocate(shape)
    tensors = [*engine.outputs, replace(engine.input, shape=shape)]

    def judge(values: Any, slack: float = 0.0) -> list[Item]:
        settings = Settings(
            where=path.name, labels=None, activation=None, score=0, iou=0, max_items=1, height=1,
            width=1, roles={}, threshold=threshold - slack, minimum=0, maximum=maximum,
        )  # fmt: skip
        decode = decoders.build("reconstruction", tensors, settings)
        buffers[0][0] = values
        return decode([*engine.infer(0), buffers[0]], Geometry(1, 1, 1, 1, 0, 0))

    return judge


def test_a_vibration_model_is_no_picture_model(shared_data: Path) -> None:
    flags = FLAGS | {"kind": "reconstruction"}
    with pytest.raises(ModelError, match=r"input window \[-1, 200, 3\] float32"):
        Model.load(open_bundle(shared_data / "models/onnx/fan_low_raw_ae.onnx", **flags))
