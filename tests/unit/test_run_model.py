"""`vigil run-model` as a user calls it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.messages import Item
from services.cli.draw import draw
from services.cli.main import main


def test_a_file_whose_own_metadata_suffices(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shared_data / "models/onnx/yolox_nano_v8layout.onnx"
    pictures = [str(shared_data / "images/classify" / name) for name in ("cat.bmp", "parrot.jpg")]
    assert main(["run-model", str(model), *pictures, "--out", str(tmp_path / "seen")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in lines] == pictures
    cat = lines[0]["items"][0]
    assert (cat["label"], cat["index"]) == ("cat", 15)
    assert cat["score"] == pytest.approx(0.743, abs=0.02)
    assert cat["box"] == pytest.approx([30, 50, 393, 338], abs=3)
    assert (lines[0]["width"], lines[0]["height"]) == (512, 341)
    assert set(lines[0]["ms"]) == {"prepare", "infer", "decode"}
    assert all(value > 0 for value in lines[0]["ms"].values())
    assert lines[0]["runtime"].startswith("onnxruntime 1.")
    drawn, original = cv2.imread(lines[0]["drawn"]), cv2.imread(pictures[0])
    assert drawn is not None
    assert original is not None
    assert drawn.shape == original.shape
    changed = (drawn != original).any(2)
    assert changed[60:330, 30].all()  # the left side of the cat's box
    assert not changed[150:300, 100:300].any()  # the cat itself


def test_flags_supply_the_rest(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run-model", str(shared_data / "models/onnx/mobilenet_v2_quant.onnx"),
        str(shared_data / "images/classify/parrot.jpg"), "--out", str(tmp_path),
        "--decoder", "classification", "--activation", "softmax", "--colour", "rgb",
        "--resize", "stretch", "--mean", "123.675,116.28,103.53",
        "--scale", "58.395,57.12,57.375", "--score", "0.1",
        "--labels", str(shared_data / "labels/imagenet_1000.txt"),
    ]  # fmt: skip
    assert main(arguments) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert (items[0]["index"], items[0]["label"], items[0]["box"]) == (88, "macaw", None)
    assert all(item["score"] >= 0.1 for item in items)
    assert main(arguments[:5]) == 1
    error = capsys.readouterr().err
    assert "the file doesn't say the order of its colours" in error
    assert error.count("\n") == 1


def test_pictures_that_can_t_be_read_stop_nobody_else(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(shared_data / "models/tflite/mobilenet_v2_1.0_224_quant.tflite")
    good = str(shared_data / "images/classify/parrot.jpg")
    empty, text = tmp_path / "empty.png", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("no picture")
    bad = [str(path) for path in (tmp_path / "absent.png", empty, text, tmp_path)]
    assert main(["run-model", model, *bad, good, good, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["items"][0]["label"] for line in lines] == ["macaw", "macaw"]
    assert [Path(line["drawn"]).name for line in lines] == [
        "parrot.vigil.png",
        "parrot-2.vigil.png",
    ]
    errors = [line for line in said.err.splitlines() if line.startswith("vigil: ")]
    for path, says, error in zip(
        bad,
        ("No such file", "is empty", "is no picture, or damaged; expected", "Is a directory"),
        errors,
        strict=True,
    ):
        assert path in error
        assert says in error
    assert main(["run-model", model, bad[0], "--out", str(tmp_path)]) == 1


def test_nowhere_to_write(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(shared_data / "models/tflite/mobilenet_v2_1.0_224_quant.tflite")
    good = str(shared_data / "images/classify/parrot.jpg")
    (tmp_path / "file").touch()
    assert main(["run-model", model, good, "--out", str(tmp_path / "file")]) == 1
    assert "file: can't be made: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(4, 4), (60, 2000), (720, 1280)])
def test_drawing_never_fails_and_leaves_the_picture(size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 90, np.uint8)
    height, width = size
    items = [
        Item("a long label indeed", 0.9, 3, (0.0, 0.0, float(width), float(height))),
        Item("Kratzer ü", 0.5, 1, (width - 1.0, height - 1.0, float(width), float(height))),
        Item("plain", 0.4, 2),
    ]
    shown = draw(picture, items, "belt  valid  12 ms")
    assert shown.shape == picture.shape
    assert (shown != picture).any()
    assert (picture == 90).all()
    alarm = draw(picture, [], "belt  failed", alarm=True)
    assert tuple(alarm[0, 0]) == (40, 40, 200)
