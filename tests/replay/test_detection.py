"""The shared data's detectors of persons and faces see what is expected there; and mean average
precision of all its detectors by COCO's own tool, ours against that of the expected results.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.messages import Item
from tests.replay.test_engine_models import (
    enlarged,
    load,
    pil_resize,
    read,
    see,
    unmatched,
)

__all__ = ["load"]  # a fixture
PERSON = "openvino/person-detection-retail-0013.xml"


@pytest.fixture(scope="module")
def person(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its DetectionOutput is told by its file."""
    pytest.importorskip("openvino")
    labels = tmp_path_factory.mktemp("labels") / "labels.txt"
    labels.write_text("???\nperson\n")
    path = shared_data / "models" / PERSON
    return Model.load(
        open_bundle(
            path, labels=labels, resize="stretch", colour="bgr", scale=1, score=0.5
        ),
        runtime="openvino",
    )  # fmt: skip


@pytest.fixture
def look(shared_data: Path, load: Any, request: pytest.FixtureRequest) -> Any:
    """Items of a model on a picture of the shared data."""

    def look(name: str, path: str) -> list[Item]:
        model = request.getfixturevalue("person") if name == PERSON else load(name)
        picture = read(shared_data / path)
        if "ssd" not in name:
            return see(model, picture)
        height, width = picture.shape[:2]
        return [
            enlarged(item, width / 300, height / 300)
            for item in see(model, pil_resize(picture, 300, 300))
        ]

    return look


def truth(shared_data: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(shared_data / "images/coco/instances.json"))


def precision(coco: Any, found: dict[str, list[Any]], only: str | None) -> tuple[float, float]:
    """AP at IoU 0.50 to 0.95, and at 0.50, of (label, score, corners) by the file's name."""
    images = {image["file_name"]: image["id"] for image in coco.loadImgs(coco.getImgIds())}
    classes = {entry["name"]: entry["id"] for entry in coco.loadCats(coco.getCatIds())}
    rows = [
        {
            "image_id": images[Path(path).name], "category_id": classes[label], "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        for path, boxes in found.items()
        for label, score, (x1, y1, x2, y2) in boxes
        if label in classes  # of the 80, those that are in these pictures
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(coco, coco.loadRes(rows), "bbox")
        if only is not None:
            judge.params.catIds = [classes[only]]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


@pytest.mark.parametrize(
    ("name", "ap50"),
    [
        ("tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite", 0.304),
        ("onnx/yolox_nano.onnx", 0.429),
        ("tflite/yolox_nano_float16_quantize.tflite", 0.429),
        ("onnx/yolox_nano_v8layout.onnx", 0.436),
        (PERSON, 0.332),
    ],
)
def test_mean_average_precision(shared_data: Path, look: Any, name: str, ap50: float) -> None:
    """As good as the expected detections are, within what near-threshold ones weigh."""
    expected = json.loads((shared_data / "expected/detections.json").read_text())
    wanted = expected[name if name == PERSON else name.split("/")[1]]["images"]
    wanted = {path: boxes for path, boxes in wanted.items() if "coco" in path}
    ours = {
        path: [(item.label, item.score, item.box) for item in look(name, path)] for path in wanted
    }
    coco, only = truth(shared_data), "person" if name == PERSON else None
    reached, aimed = precision(coco, ours, only), precision(coco, wanted, only)
    assert reached == pytest.approx(aimed, abs=0.01)
    assert reached[1] == pytest.approx(ap50, abs=0.01)


def test_persons(shared_data: Path, look: Any) -> None:
    """Detections, and true and false positives as COCO's boxes tell them, of the README's table."""
    expected = json.loads((shared_data / "expected/detections.json").read_text())[PERSON]["images"]
    coco = truth(shared_data)
    images = {image["file_name"]: image["id"] for image in coco.loadImgs(coco.getImgIds())}
    right = wrong = missed = 0
    for path, boxes in expected.items():
        items = look(PERSON, path)
        height, width = read(shared_data / path).shape[:2]
        for score in unmatched(items, boxes, (width, height), "person"):
            assert score < 0.52, (path, items)
        if Path(path).name not in images:
            continue
        left = [
            annotation["bbox"]
            for annotation in coco.loadAnns(coco.getAnnIds(images[Path(path).name], [1]))
            if not annotation["iscrowd"]
        ]
        for item in items:
            best = max(left, key=lambda box: over(item, box), default=None)
            if best is not None and over(item, best) >= 0.5:
                left.remove(best)
                right += 1
            else:
                wrong += 1
        missed += len(left)
    assert (right, wrong, missed) == (12, 4, 20)


def over(item: Item, box: list[float]) -> float:
    """Intersection over union with x, y, width, height."""
    assert item.box is not None
    x1, y1, x2, y2 = item.box
    x, y, w, h = box
    inner = max(0, min(x2, x + w) - max(x1, x)) * max(0, min(y2, y + h) - max(y1, y))
    return inner / ((x2 - x1) * (y2 - y1) + w * h - inner)


def test_faces(shared_data: Path, tmp_path: Path) -> None:
    """UltraFace: two outputs, its background before the one class, suppression outside."""
    (tmp_path / "labels.txt").write_text("face\n")
    model = Model.load(
        open_bundle(
            shared_data / "models/onnx/version-RFB-320.onnx", labels=tmp_path / "labels.txt",
            kind="ultraface", resize="stretch", colour="rgb", mean=127, scale=128,
            score=0.7, iou=0.3,
        )
    )  # fmt: skip
    expected = json.loads((shared_data / "expected/faces_rfb320.json").read_text())
    assert sum(map(len, expected.values())) == 5
    for path, faces in expected.items():
        picture = read(shared_data / path)
        items = see(model, picture)
        assert unmatched(items, faces, picture.shape[1::-1], "") == [], (path, items)
    model.close()
