"""Bundles: the manifest, labels, digest, fall-back; and what is read from the files themselves."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.engine.bundle import MANIFEST, Bundle, open_bundle
from common.engine.facts import read_facts, read_labels
from common.engine.model import Model
from common.errors import ModelError
from tests import onnx_files

GOOD = """\
name = "parts"
version = "1.2.0"
release = 7
task = "classification"

[[variants]]
runtime = "onnxruntime"
file = "m.onnx"

[input]
resize = "stretch"
colour = "rgb"
scale = 255

[decoder]
kind = "classification"
labels = "labels.txt"
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    onnx_files.classifier(folder / "m.onnx")
    (folder / "labels.txt").write_text("good\nscratch\ndent\n")
    (folder / MANIFEST).write_text(GOOD)
    return folder


def change(folder: Path, old: str, new: str) -> None:
    assert old in GOOD
    (folder / MANIFEST).write_text(GOOD.replace(old, new))


def test_a_good_bundle(bundle: Path) -> None:
    model = Model.load(open_bundle(bundle))
    assert (model.name, model.version, model.release) == ("parts", "1.2.0", 7)
    assert model.task == "classification"
    assert model.labels == ("good", "scratch", "dent")
    assert model.runtime.startswith("onnxruntime 1.")
    assert model.fallback_reason == ""
    model.warm_up()
    blue = np.full((20, 30, 3), (255, 0, 0), np.uint8)
    items = model.decode(model.infer(0), model.prepare(blue, 0))
    assert {item.label for item in items} <= {"good", "scratch", "dent"}
    model.close()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("release = 7", "release = -1", "release = -1: Expected `int` >= 0"),
        ("release = 7", "release = '7'", "release = '7': Expected `int`, got `str`"),
        ("release = 7\n", "", "missing required field `release`"),
        ('colour = "rgb"', 'colour = "RGB"', "input.colour = 'RGB': Invalid enum value 'RGB'"),
        ('colour = "rgb"', 'color = "rgb"', "input: Object contains unknown field `color`"),
        ("scale = 255", "scale = 'px'", "input.scale = 'px': Expected `float | array"),
        ("scale = 255", "scale = []", "input.scale: Expected `array` of length >= 1"),
        ("scale = 255", "pad = 300", "input.pad = 300: Expected `int` <= 255"),
        ('kind = "cl', 'kind = "no cl', "decoder: kind = 'no classification': expected one of "),
        ('labels = "labels.txt"', "score = 40", "decoder.score = 40: Expected `float` <= 1.0"),
        (
            'runtime = "onnx',
            'runtime = "x',
            "variants.runtime = 'xruntime': expected one of litert",
        ),
        ("[[variants]]", "[variants]", "variants: Expected `array`, got `object`"),
        ("m.onnx", "n.onnx", "n.onnx: can't be read: No such file or directory"),
        ("m.onnx", "/etc/m.onnx", "file '/etc/m.onnx' lies outside the bundle"),
        ("m.onnx", "../m.onnx", "file '../m.onnx' lies outside the bundle; expected one inside"),
        ("m.onnx", "labels.txt", "runtime onnxruntime reads .onnx files, not 'labels.txt'"),
        ("labels.txt", "names.txt", "names.txt: labels can't be read: No such file"),
        ('"1.2.0"', "1.2.0", "manifest.toml: is no TOML"),
        ("release = 7", "release = 7\nconfidence = [1]", "confidence: Expected `array` of length"),
        (
            "release = 7",
            "release = 7\nconfidence = [0, 0, 0, 0, 0, 0, 0, 0.5, 0.3, 0.3]",
            "confidence: the shares make 1.1 together; expected 1",
        ),
        (
            "release = 7",
            "release = 7\nconfidence = [0, 0, 0, 0, 0, 0, 0, 0, 2, -1]",
            "confidence[9] = -1: Expected `float` >= 0.0",
        ),
        ("release = 7", "release = 7\nlimits.score_shift = 2", "score_shift = 2: Expected `float`"),
        (
            '"classification"\n\n',
            '"detection"\n\n',
            "decoder classification does classification, but",
        ),
    ],
)
def test_wrong_manifests(bundle: Path, old: str, new: str, says: str) -> None:
    change(bundle, old, new)
    with pytest.raises(ModelError) as error:
        Model.load(open_bundle(bundle))
    assert says in str(error.value)
    assert str(bundle) in str(error.value)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no manifest.toml; expected a bundle folder, or a"):
        open_bundle(tmp_path)


def test_overrides_take_the_manifest_s_place(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a\nb\nc\n")
    opened = open_bundle(bundle, labels=tmp_path / "other.txt", colour="bgr", score=None)
    assert opened.labels == ("a", "b", "c")
    assert opened.manifest.input.colour == "bgr"
    assert opened.manifest.input.scale == 255
    with pytest.raises(ModelError, match=r"decoder.score = 1.5: Expected `float` <= 1.0"):
        open_bundle(bundle, score=1.5)


def test_digest_is_of_names_and_bytes(bundle: Path) -> None:
    def digest() -> str:
        return open_bundle(bundle).sha256

    first = digest()
    assert first == digest()
    assert Model.load(open_bundle(bundle)).slot == first[:12]
    (bundle / "note.txt").write_text("x")
    assert digest() != first
    (bundle / "note.txt").unlink()
    assert digest() == first
    copy = bundle.parent / "elsewhere"
    shutil.copytree(bundle, copy)
    assert open_bundle(copy).sha256 == first
    change(bundle, "release = 7", "release = 8")
    assert digest() != first
    plain = hashlib.sha256()
    for name in ("labels.txt", "m.onnx", "manifest.toml"):
        data = (copy / name).read_bytes()
        plain.update(name.encode() + b"\0" + str(len(data)).encode() + b"\0" + data)
    assert plain.hexdigest() == first


# --- fall-back ---------------------------------------------------------------------------------

TWO = """\
name = "birds"
version = "1"
release = 1

[[variants]]
runtime = "{}"
file = "{}"

[[variants]]
runtime = "litert"
file = "cpu.tflite"
"""


@pytest.fixture
def two(shared_data: Path, tmp_path: Path) -> Path:
    """A bundle for an Edge TPU, and what it was compiled from for a CPU."""
    real = shared_data / "models/edgetpu"
    shutil.copy(real / "mobilenet_v1_0.25_128_quant.tflite", tmp_path / "cpu.tflite")
    shutil.copy(real / "mobilenet_v1_0.25_128_quant_edgetpu.tflite", tmp_path / "tpu.tflite")
    (tmp_path / MANIFEST).write_text(TWO.format("litert", "tpu.tflite"))
    return tmp_path


def test_falls_back_from_a_file_that_can_t_run_here(two: Path) -> None:
    model = Model.load(open_bundle(two))
    assert "tpu.tflite: is compiled for an Edge TPU" in model.fallback_reason
    model.warm_up()


def absent(monkeypatch: pytest.MonkeyPatch, module: str, ours: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, ours, raising=False)


def test_falls_back_from_a_runtime_that_is_not_installed(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_files.classifier(two / "m.onnx")
    (two / MANIFEST).write_text(TWO.format("onnxruntime", "m.onnx"))
    absent(monkeypatch, "onnxruntime", "common.engine.runtimes.ort")
    model = Model.load(open_bundle(two))
    assert model.fallback_reason.startswith("m.onnx: runtime onnxruntime is not installed")
    assert "install the extra `onnx`" in model.fallback_reason
    assert model.runtime.startswith("litert")
    with pytest.raises(ModelError, match="runtime onnxruntime is not installed"):
        Model.load(open_bundle(two), runtime="onnxruntime")


def test_without_any_runtime(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "ai_edge_litert.interpreter", "common.engine.runtimes.litert")
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", None)
    with pytest.raises(ModelError, match="install the extra `litert`"):
        Model.load(open_bundle(two))


def test_a_runtime_that_has_no_variant(bundle: Path) -> None:
    with pytest.raises(ModelError, match="no variant for runtime litert; it has onnxruntime"):
        Model.load(open_bundle(bundle), runtime="litert")


def test_a_broken_variant_is_no_reason_to_fall_back(two: Path) -> None:
    (two / "tpu.tflite").write_bytes(b"")
    with pytest.raises(ModelError, match=r"tpu.tflite: is empty"):
        open_bundle(two)


# --- what files say ----------------------------------------------------------------------------


def test_metadata_of_tflite(shared_data: Path) -> None:
    facts = read_facts(shared_data / "models/tflite/mobilenet_v1_0.25_224_1_metadata_1.tflite")
    assert facts.labels is not None
    assert facts.labels[:2] == ("background", "tench")
    assert len(facts.labels) == 1001
    assert (facts.mean, facts.scale) == ([127.5], [127.5])
    assert (facts.colour, facts.resize) == ("rgb", "stretch")
    assert (facts.decoder, facts.activation) == ("classification", "none")


def test_roles_of_ssd_come_from_its_graph(shared_data: Path) -> None:
    name = "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    facts = read_facts(shared_data / "models/tflite" / name)
    assert facts.decoder == "ssd"
    assert facts.roles["TFLite_Detection_PostProcess:2"] == "scores"
    assert facts.labels is not None
    assert facts.labels[11] == "???"


def test_metadata_of_ultralytics(shared_data: Path, tmp_path: Path) -> None:
    facts = read_facts(shared_data / "models/onnx/yolox_nano_v8layout.onnx")
    assert facts.labels is not None
    assert (len(facts.labels), facts.labels[79]) == (80, "toothbrush")
    assert (facts.decoder, facts.resize, facts.colour) == ("yolov8", "letterbox", "rgb")
    assert facts.size == (416, 416)
    bad = {"names": "{0: 'a', 2: 'b'}", "stride": "32", "imgsz": "[8, 8]", "task": "detect"}
    path = onnx_files.classifier(tmp_path / "m.onnx", metadata=bad)
    with pytest.raises(ModelError, match="`names` or `imgsz` can't be read"):
        read_facts(path)
    bad["names"] = "__import__('os').abort()"
    onnx_files.classifier(path, metadata=bad)
    with pytest.raises(ModelError, match="`names` in its metadata_props can't be read"):
        read_facts(path)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("mobilenet_v1_0.25_224_fp32.onnx", "none"),
        ("pcb_patch_cnn_int8.onnx", "none"),  # through the operators of quantisation
        ("mobilenet_v2_quant.onnx", None),
        ("yolox_nano.onnx", None),
    ],
)
def test_a_graph_that_ends_in_softmax_gives_scores(
    shared_data: Path, name: str, activation: str | None
) -> None:
    assert read_facts(shared_data / "models/onnx" / name).activation == activation


def test_damaged_labels_packed_into_a_model(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    shutil.copy(shared_data / "models/tflite/vww_96_int8.tflite", path)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("labels.txt", "person_not\nperson\n")
    flags: dict[str, Any] = {"kind": "classification", "colour": "rgb", "resize": "stretch"}
    assert Model.load(open_bundle(path, **flags)).labels == ("person_not", "person")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"person_not\n", b"person_now\n"))
    with pytest.raises(ModelError, match="the label files packed into it are damaged"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a\nb\n", ("a", "b")),
        ("\ufeffa\r\nb c\r\n\r\n\n", ("a", "b c")),
        ("0 fresh\n1 rotten\n", ("fresh", "rotten")),
        ("0: a\n2:  c d\n", ("a", "???", "c d")),
        ("person\n???\nn/a\n7 up\n", ("person", "???", "n/a", "7 up")),
        ("1 b\n0 #4\n", ("#4", "b")),
        ("a\na\n", ("a", "a")),
    ],
)
def test_label_files(text: str, labels: tuple[str, ...]) -> None:
    assert read_labels(text, "l.txt") == labels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no labels; expected one a line"),
        ("\n \n", "has no labels"),
        ("0 a\n0 b\n", "class index 0 is used twice"),
        ("99999999 a\n", "index 99999999 is used twice or out of range"),
        ("9" * 5000 + " a\n", "out of range"),
        ("a\n\nc\n", r"line 2 of 3 is empty; expected the name of a class, or \?\?\? for one"),
        ("# COCO\na\n", "line 1 of 2 is a comment"),
    ],
)
def test_wrong_label_files(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=f"^l.txt: .*{says}"):
        read_labels(text, "l.txt")


def test_opening_needs_no_runtime(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert isinstance(opened, Bundle)
    assert [facts.format for facts in opened.facts] == ["onnx"]
