"""Reference samples: what is refused in them, how answers count, and the self-test on them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from common.engine import samples
from common.engine.bundle import MANIFEST, Bundle, open_bundle
from common.engine.model import Model
from common.engine.samples import Expected, Sample, SelfTest, load_samples, percentile, self_test
from common.errors import ModelError
from common.messages import Item
from common.paths import PROJECT
from services.capture.scene import Scene
from tests import onnx_files

CLASSIFIER = onnx_files.manifest("colours", "1", 1) + 'labels = "labels.txt"\n'


def write_samples(bundle: Path, answers: Any) -> None:
    (bundle / "samples").mkdir(exist_ok=True)
    (bundle / "samples/samples.json").write_text(json.dumps(answers))


def picture(path: Path, value: int = 255) -> Path:
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), np.full((24, 32, 3), value, np.uint8))
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A classifier that says blue of what is bright."""
    folder = tmp_path / "colours"
    folder.mkdir()
    onnx_files.classifier(folder / "m.onnx")
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    (folder / MANIFEST).write_text(CLASSIFIER)
    return folder


def limited(bundle: Path, **limits: float) -> None:
    lines = "".join(f"{name} = {value}\n" for name, value in limits.items())
    (bundle / MANIFEST).write_text(f"{CLASSIFIER}[limits]\n{lines}")


def outcome(bundle: Path, **options: Any) -> SelfTest:
    opened = open_bundle(bundle)
    model = Model.load(opened)
    try:
        return self_test(model, opened, **options)
    finally:
        model.close()


def test_no_samples_is_no_accuracy(bundle: Path) -> None:
    assert load_samples(open_bundle(bundle)) == []
    result = outcome(bundle)
    assert (result.accuracy, result.samples, result.refused) == (None, 0, "")
    assert result.latency_p99_ms is not None
    limited(bundle, accuracy=0.5)
    assert outcome(bundle).refused == "limits.accuracy = 0.5, but the bundle has no samples"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("[", "samples.json: .*expected \\["),
        ({}, "samples.json: Expected `array`"),
        ([{"file": "a.png"}], "missing required field `items`"),
        ([{"file": "a.png", "items": [], "note": 1}], "unknown field `note`"),
        ([{"file": "a.png", "items": [{"label": "red", "box": [1, 2]}]}], "box"),
        ([{"file": "a.png", "items": [{"label": "red", "score": 2}]}], "score"),
        ([{"file": "a.png", "items": [{"label": "pink"}]}], "'pink': expected one of red, green"),
        ([{"file": "b.png", "items": []}], "'b.png' is not there"),
        ([{"file": "/etc/a.png", "items": []}], "outside the folder"),
        ([{"file": "../../a.png", "items": []}], "outside the folder"),
        ([{"file": "samples.json", "items": []}], "expected one of .png"),
    ],
)
def test_samples_that_are_refused(bundle: Path, answers: Any, words: str) -> None:
    write_samples(bundle, answers)
    picture(bundle / "samples/a.png")
    if answers == "[":
        (bundle / "samples/samples.json").write_text(answers)
    with pytest.raises(ModelError, match=words):
        load_samples(open_bundle(bundle))
    assert outcome(bundle).refused


def test_a_folder_without_answers_is_refused(bundle: Path) -> None:
    (bundle / "samples").mkdir()
    with pytest.raises(ModelError, match=r"samples\.json: can't be read: No such file"):
        load_samples(open_bundle(bundle))


def test_a_damaged_picture_is_refused(bundle: Path) -> None:
    write_samples(bundle, [{"file": "a.png", "items": [{"label": "red"}]}])
    file = picture(bundle / "samples/a.png")
    file.write_bytes(file.read_bytes()[:20])
    (sample,) = load_samples(open_bundle(bundle))  # decoded when it is needed
    with pytest.raises(ModelError, match=r"a\.png: the sample is no whole picture"):
        sample.picture()
    assert "no whole picture" in outcome(bundle).refused
    file.write_bytes(b"")
    assert "no whole picture" in outcome(bundle).refused


def test_classification_counts_the_first_class(bundle: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(bundle / "samples" / name)
    rows = [
        {"file": "a.png", "items": [{"label": "blue"}, {"label": "red"}]},
        {"file": "b.png", "items": [{"label": "red"}, {"label": "blue"}]},
    ]
    write_samples(bundle, rows)
    assert outcome(bundle).accuracy == 0.5
    assert outcome(bundle).refused == ""
    limited(bundle, accuracy=0.9)
    assert outcome(bundle).refused == "accuracy 0.500 on 2 samples, wanted 0.9"
    limited(bundle, accuracy=0.5, latency_p99_ms=1000)
    assert outcome(bundle).refused == ""


def test_too_slow_is_refused(bundle: Path) -> None:
    limited(bundle, latency_p99_ms=1e-6)
    assert "inferences, wanted 1e-06 ms" in outcome(bundle).refused


def test_stopped_is_refused(bundle: Path) -> None:
    asked = iter([False] * 3)
    result = outcome(bundle, stop=lambda: next(asked, True))
    assert result.refused == "stopped before its end"
    assert outcome(bundle, stop=lambda: True).refused == "stopped before its end"


def test_nan_is_refused(bundle: Path) -> None:
    onnx_files.classifier(bundle / "m.onnx", weight=math.nan)
    assert "NaN" in outcome(bundle).refused


def factory(folder: Path, seeds: range) -> Bundle:
    """The factory bundle with samples that it answered itself."""
    shutil.copytree(PROJECT / "models/factory", folder)
    opened = open_bundle(folder)
    model = Model.load(opened)
    (folder / "samples").mkdir()
    rows = []
    for seed in seeds:
        shown, _ = Scene(seed=seed, defects=1.2).render(90)
        cv2.imwrite(str(folder / f"samples/{seed}.png"), shown)
        geometry = model.prepare(shown, 0)
        items = model.decode(model.infer(0), geometry)
        rows.append(
            {"file": f"{seed}.png", "items": [{"label": i.label, "box": i.box} for i in items]}
        )
    model.close()
    write_samples(folder, rows)
    return open_bundle(folder)


def test_the_factory_model_finds_what_it_found(tmp_path: Path) -> None:
    bundle = factory(tmp_path / "factory", range(4))
    result = outcome(bundle.path)
    assert result == SelfTest(1.0, result.latency_p99_ms, 4, "")
    # The same things elsewhere, or called otherwise, are not the same things.
    rows = json.loads((bundle.path / "samples/samples.json").read_text())
    for item in rows[0]["items"]:
        item["box"] = [side + 200 for side in item["box"]]
    write_samples(bundle.path, rows)
    accuracy = outcome(bundle.path).accuracy
    assert accuracy is not None
    assert 0 < accuracy < 1


BOX = (10.0, 10.0, 20.0, 20.0)


@pytest.mark.parametrize(
    ("found", "expected", "f1"),
    [
        ([], [], 1.0),
        ([], ["nut"], 0.0),
        (["nut"], [], 0.0),
        (["nut"], ["nut"], 1.0),
        (["nut", "nut"], ["nut"], 2 / 3),  # one thing is found once
        (["bolt"], ["nut"], 0.0),
        (["nut"], ["nut", "bolt"], 2 / 3),
    ],
)
def test_f1(found: list[str], expected: list[str], f1: float) -> None:
    items = [Item(label, 0.9, 0, BOX) for label in found]
    sample = Sample(Path("a.png"), tuple(Expected(label, BOX) for label in expected))
    assert samples.accuracy("detection", [items], [sample]) == pytest.approx(f1)


def test_percentile() -> None:
    assert percentile([], 99) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(100)), 99) == 98
    assert percentile(list(range(30)), 99) == 29
