"""scripts/import: from a bare model file to a bundle, on the real models of the shared data."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from common.archive import unpack
from common.engine import samples
from common.engine.bundle import Decoder, Input, open_bundle
from common.engine.model import Model
from common.messages import Item
from scripts import importer
from scripts.bundle_maker import arguments
from services.cli.flags import add_flags, overrides

WHO = ("--name", "real", "--version", "1.0", "--release", "3")
IDENTITY = {"--name", "--version", "--release"}
FLOATS = {"--colour", "--resize", "--scale"}
CAT, PARROT, BOWLS = "classify/cat.bmp", "classify/parrot.jpg", "coco/000000062554.jpg"
YOLOX = "--decoder yolox --colour bgr --resize letterbox-top-left --scale 1 --score 0.3"
PADIM = "--decoder anomaly --colour rgb --resize stretch --scale 255 --threshold 22.732"
CLASSES = "--decoder classification --colour rgb --resize stretch"
PITTED = "bsd/pitting/01_200906073239_462500_045_crop_2.jpg"

# The file; what it says, in part; what it has to be told beside the bundle's name, version and
# release; with what it is told; a picture, and what it sees there: the expected results' label, or
# index where it has no labels, and score.
REAL: list[tuple[str, str, set[str], str, str, tuple[str | int, float]]] = [
    (
        "onnx/yolox_nano_v8layout.onnx",
        "its metadata_props: labels 80, person to toothbrush; size (416, 416); colour rgb",
        set(), "", CAT, ("cat", 0.743),
    ),
    (
        "tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite",
        "its operator TFLite_Detection_PostProcess: decoder ssd",
        set(), "", CAT, ("cat", 0.719),
    ),
    (
        "tflite/mobilenet_v1_0.25_224_1_metadata_1.tflite",
        "its TFLite metadata: colour rgb; resize stretch; mean [127.5]; scale [127.5]; decoder cl",
        set(), "", PARROT, ("macaw", 0.893),
    ),
    (
        "tflite/mobilenet_v2_1.0_224_quant.tflite",
        "imagenet_labels.txt packed into it: labels 1001, background to toilet tissue",
        set(), "", PARROT, ("macaw", 0.996),
    ),
    (
        "edgetpu/mobilenet_v1_0.25_128_quant.tflite",
        "its graph: activation none",
        set(), "", PARROT, ("macaw", 0.828),
    ),
    (
        "tflite/apple_classifier_mnv2_quant.tflite",
        "no names of classes: --labels FILE gives them",
        {"--colour", "--resize", "--decoder"},
        CLASSES + " --labels apple_labels.txt",
        "classify/apple_rotten_1.png", ("rotten_apple", 0.98),
    ),
    (
        "tflite/vww_96_int8.tflite",
        "its graph: activation none",
        {"--colour", "--resize", "--decoder"}, CLASSES, PARROT, (0, 0.957),
    ),
    (
        "tflite/yolox_nano_float16_quantize.tflite",
        "  nothing",
        {*FLOATS, "--decoder"}, YOLOX + " --labels coco_80.txt", CAT, ("cat", 0.737),
    ),
    (
        "onnx/yolox_nano.onnx",
        "  nothing",
        {*FLOATS, "--decoder"}, YOLOX + " --labels coco_80.txt", CAT, ("cat", 0.737),
    ),
    (
        "onnx/mobilenet_v1_0.25_224_fp32.onnx",
        "its graph: activation none",
        {*FLOATS, "--decoder"},
        CLASSES + " --mean 127.5 --scale 127.5 --labels imagenet_1001.txt",
        PARROT, ("macaw", 0.893),
    ),
    (
        "onnx/mobilenet_v2_quant.onnx",
        "classification (then also --activation)",
        {*FLOATS, "--decoder"},
        CLASSES + " --activation softmax --mean 123.675,116.28,103.53 --scale 58.395,57.12,57.375"
        " --labels imagenet_1000.txt",
        PARROT, ("macaw", 0.342),
    ),
    (
        "onnx/pcb_patch_cnn_int8.onnx",
        "its graph: activation none",
        {"--resize", "--scale", "--decoder"},
        "--decoder classification --resize stretch --scale 255 --labels pcb_patch_7.txt",
        "", (0, 0),
    ),
    (
        "onnx/version-RFB-320.onnx",
        "ultraface",
        {*FLOATS, "--decoder"},
        "--decoder ultraface --colour rgb --resize stretch --mean 127 --scale 128 --score 0.7",
        "classify/face.jpg", (0, 1.0),
    ),
    (
        "onnx/bsd_padim.onnx",
        "those that can: anomaly (then also --threshold, --minimum, --maximum)\n",
        {*FLOATS, "--decoder"}, PADIM + " --minimum 6 --maximum 106", PITTED, ("anomaly", -1),
    ),
    (
        "openvino/bsd_padim.xml",
        "  output anomaly_map [1, 1, 240, 576] float32",
        {*FLOATS, "--decoder"}, PADIM + " --minimum 6 --maximum 106", PITTED, ("anomaly", -1),
    ),
    (
        "openvino/mobilenet_v1_0.25_224.xml",
        "its graph: activation none",
        {*FLOATS, "--decoder"},
        CLASSES + " --mean 127.5 --scale 127.5 --labels imagenet_1001.txt",
        PARROT, ("macaw", 0.889),
    ),
    (
        "openvino/person-detection-retail-0013.xml",
        "its operator DetectionOutput: decoder detection-output",
        FLOATS, "--colour bgr --resize stretch --scale 1 --score 0.5",
        "", (1, -1),
    ),
]  # fmt: skip


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Its exit status, called in an empty folder; models are hardly timed."""
    monkeypatch.setattr(samples, "TIMED", 1)
    monkeypatch.setattr(samples, "TIMED_S", 0.0)
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> int:
        argv = ["import", *map(str, words), "--out", "b.tar"]
        monkeypatch.setattr(sys, "argv", argv)
        return importer.main()

    return call


@pytest.mark.parametrize(
    ("name", "says", "missing", "flags", "picture", "wanted"), REAL, ids=[row[0] for row in REAL]
)
def test_real_models(
    shared_data: Path,
    call: Any,
    capsys: pytest.CaptureFixture[str],
    name: str,
    says: str,
    missing: set[str],
    flags: str,
    picture: str,
    wanted: tuple[str | int, float],
) -> None:
    model = shared_data / "models" / name
    assert call(model) == 1
    said = capsys.readouterr()
    assert says in said.out + said.err
    assert set(re.findall(r"^  (--[\w-]+) ", said.err, re.MULTILINE)) == IDENTITY | missing
    given = flags.split()
    if "--labels" in given:
        given[-1] = str(shared_data / "labels" / given[-1])
    shown = ("--picture", shared_data / "images" / picture) if picture else ()
    assert call(model, *WHO, *given, *shown) == 0
    out = capsys.readouterr().out
    assert "real 1.0 (release 3)" in out
    digest = unpack(Path("b.tar"), Path("unpacked"))
    opened = open_bundle(Path("unpacked"))
    assert digest == opened.sha256
    assert digest in out
    if picture:
        drawn = cv2.imread(f"{Path(picture).stem}.vigil.png")
        original = cv2.imread(str(shared_data / "images" / picture))
        assert drawn is not None
        assert original is not None
        assert (drawn != original).any()
        label, score = wanted
        if score < 0:  # an anomaly: that of the data, normalised, by another resize
            key = "onnx" if name.endswith("onnx") else "openvino_fp16"
            scores = json.loads((shared_data / "expected/bsd_padim_scores.json").read_text())
            score = (scores[f"images/{picture}"][key] - 22.732) / (106 - 6) + 0.5
        line = out.split(".vigil.png:\n")[1].split("\n")[0].split()
        assert line[1].rstrip(",") == str(label)
        assert float(line[0]) == pytest.approx(score, abs=0.05)
        return
    model_of_bundle = Model.load(opened)
    if "pcb" in name:
        patches = json.loads((shared_data / "expected/pcb_patches_int8.json").read_text())
        answers = {path: row[1:] for path, row in list(patches.items())[::9]}
        for path, (index, score) in answers.items():
            best = _see(model_of_bundle, shared_data / path)[0]
            assert best.index == index
            assert best.score == pytest.approx(score, abs=0.02)
    else:
        boxes = json.loads((shared_data / "expected/detections.json").read_text())
        images = boxes["openvino/person-detection-retail-0013.xml"]["images"]
        found = {path: _see(model_of_bundle, shared_data / path) for path in images}
        counts = [(len(found[path]), len(images[path])) for path in images]
        assert sum(there for _, there in counts) == 16
        assert all(abs(here - there) <= 1 for here, there in counts)
        assert {item.label for items in found.values() for item in items} == {"1"}


def _see(model: Model, path: Path) -> list[Item]:
    geometry = model.prepare(np.asarray(cv2.imread(str(path)), np.uint8), 0)
    return model.decode(model.infer(0), geometry)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("edgetpu/classifier_edgetpu.tflite", "  --cpu-variant FILE is a model to test it by"),
        ("edgetpu/mobilenet_v1_0.25_128_quant_edgetpu.tflite", "accelerator libedgetpu.so.1: "),
        ("tflite/ad01_fp32.tflite", "input_1 [-1, 640] float32 takes no single picture"),
        ("tflite/ad01_int8.tflite", "input_1 [-1, 640] int8 takes no single picture"),
        ("tflite/fan_low_model.tflite", "takes no single picture"),
        ("onnx/fan_low_raw_ae.onnx", "--layout    where its channels are"),
        ("onnx/nothing.onnx", "nothing.onnx: can't be read: No such file"),
    ],
)
def test_models_that_take_no_picture_as_they_are(
    shared_data: Path, call: Any, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    assert call(shared_data / "models" / name, *WHO) == 1
    error = capsys.readouterr().err
    assert "import: " in error
    assert says in error
    assert not Path("b.tar").exists()


def test_on_a_terminal_it_asks(
    shared_data: Path,
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One by one, again after an answer that can't be; and tells how to do the same at once."""
    answers = iter(["faces", "2", "x", "7", "rgb", "bent", "stretch", "128", "ultraface"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    model = shared_data / "models/onnx/version-RFB-320.onnx"
    assert call(model, "--mean", "127") == 0
    assert next(answers, None) is None
    said = capsys.readouterr()
    assert "argument --release: invalid int value: 'x'" in said.err
    assert "argument --resize: invalid choice: 'bent'" in said.err
    assert "faces 2 (release 7)" in said.out
    again = said.out.splitlines()[-1].removeprefix("the same again: scripts/import ").split()
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    before = Path("b.tar").read_bytes()
    assert call(*again) == 0
    assert Path("b.tar").read_bytes() == before


def test_nobody_answers(
    shared_data: Path,
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert call(shared_data / "models/onnx/yolox_nano_v8layout.onnx") == 1
    assert "the same again: scripts/import" in capsys.readouterr().out


def test_an_answer_that_was_wrong_shows_on_the_picture(
    shared_data: Path, call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shared_data / "models/onnx/mobilenet_v2_quant.onnx"
    picture = shared_data / "images" / PARROT
    flags = (CLASSES + " --scale 255 --activation none").split()
    assert call(model, *WHO, *flags, "--picture", picture) == 1
    error = capsys.readouterr().err
    assert error.startswith("import: mobilenet_v2_quant.onnx: scores reach from -5")
    assert "softmax is likely to be right" in error
    assert not Path("b.tar").exists()


def test_a_file_that_is_compiled_for_an_accelerator(
    shared_data: Path, call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its variant names the accelerator's library; what it was compiled from tests it here."""
    twin = shared_data / "models/edgetpu/mobilenet_v1_0.25_128_quant.tflite"
    compiled = twin.with_name("mobilenet_v1_0.25_128_quant_edgetpu.tflite")
    picture = shared_data / "images" / PARROT
    assert call(compiled, *WHO, "--cpu-variant", twin, "--picture", picture) == 0
    out = capsys.readouterr().out
    assert "  0.828 macaw" in out
    assert f"{compiled.name} on litert: not tested here: accelerator libedgetpu.so.1" in out
    unpack(Path("b.tar"), Path("unpacked"))
    variants = open_bundle(Path("unpacked")).manifest.variants
    assert [(variant.accelerator, variant.exclusive) for variant in variants] == [
        ("libedgetpu.so.1", True),
        ("", False),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [(79, "has 80 classes but 79 labels"), (81, "has 80 classes but 81 labels")],
)
def test_too_few_or_too_many_labels(
    shared_data: Path, call: Any, capsys: pytest.CaptureFixture[str], lines: int, says: str
) -> None:
    Path("l.txt").write_bytes(b"\xef\xbb\xbf" + b"same\r\n" * lines + b"\r\n")
    model = shared_data / "models/onnx/yolox_nano_v8layout.onnx"
    assert call(model, *WHO, "--labels", "l.txt") == 1
    assert says in capsys.readouterr().err
    Path("l.txt").write_bytes(b"\xef\xbb\xbf" + b"same\r\n" * 80)
    assert call(model, *WHO, "--labels", "l.txt") == 0


def test_samples_are_answered_and_weights_beside_come_along(
    shared_data: Path, call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pictures").mkdir()
    for name in ("parrot.jpg", "burger.jpg"):
        Path("pictures", name).write_bytes((shared_data / "images/classify" / name).read_bytes())
    row = next(row for row in REAL if row[0] == "openvino/mobilenet_v1_0.25_224.xml")
    flags = row[3].replace("imagenet", f"{shared_data}/labels/imagenet").split()
    model = shared_data / "models" / row[0]
    assert call(model, *WHO, *flags, "--samples", "pictures", "--accuracy", 0.9) == 0
    assert "accuracy 1.000 on 2 samples" in capsys.readouterr().out
    unpack(Path("b.tar"), Path("unpacked"))
    names = {path.name for path in Path("unpacked").iterdir()}
    assert names == {
        "manifest.toml", "labels.txt", "samples",
        "mobilenet_v1_0.25_224.xml", "mobilenet_v1_0.25_224.bin",
    }  # fmt: skip
    answers = samples.load_samples(open_bundle(Path("unpacked")))
    assert [sample.items[0].label for sample in answers] == ["cheeseburger", "macaw"]


def test_every_field_of_a_manifest_has_a_flag() -> None:
    parser = arguments("scripts/import", "", "")
    fields = (*msgspec.structs.fields(Input), *msgspec.structs.fields(Decoder))
    helps = {action.dest: action.help for action in parser._actions}
    assert [field.name for field in fields if not helps.get(field.name)] == []


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--size 320x416", {"size": [320, 416]}),
        ("--mean 1,2.5,3", {"mean": [1, 2.5, 3]}),
        ("--scale 255", {"scale": 255}),
        ("--outputs boxes", {"outputs": ["boxes"]}),
        ("--outputs a,b", {"outputs": ["a", "b"]}),
        ("--normalised true", {"normalised": True}),
        ("--decoder yolox", {"kind": "yolox"}),
        ("--max-items 7", {"max_items": 7}),
        ("--constants factor=[1.0,1.0]", {"constants": {"factor": [1.0, 1.0]}}),
    ],
)
def test_flags(words: str, value: dict[str, Any]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert overrides(parser.parse_args(words.split())) == value
