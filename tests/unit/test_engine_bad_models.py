"""Every model that can't be used is refused in a line that says what, where, and what would be
right. All files are real: cut, replaced, or made with operators nobody has.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.engine.bundle import open_bundle
from common.engine.facts import read_facts
from common.engine.model import Model
from common.errors import ModelError
from tests import onnx_files

SSD = "tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
VWW = "tflite/vww_96_int8.tflite"
YOLOX = "onnx/yolox_nano.onnx"
V8 = "onnx/yolox_nano_v8layout.onnx"
CLASSES = {"kind": "classification", "colour": "rgb", "resize": "stretch", "scale": 1}
Make = Callable[[Path, Path], Path]  # from the folder of real models and an empty one


def bytes_in(name: str, content: bytes) -> Make:
    def make(models: Path, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def cut(name: str, share: float) -> Make:
    def make(models: Path, folder: Path) -> Path:
        data = (models / name).read_bytes()
        return bytes_in("cut" + Path(name).suffix, data[: int(len(data) * share)])(models, folder)

    return make


def copied(name: str, to: str) -> Make:
    def make(models: Path, folder: Path) -> Path:
        return Path(shutil.copy(models / name, folder / to))

    return make


def replaced(name: str, old: bytes, new: bytes) -> Make:
    assert len(old) == len(new)

    def make(models: Path, folder: Path) -> Path:
        data = (models / name).read_bytes()
        assert old in data
        return bytes_in("changed.tflite", data.replace(old, new))(models, folder)

    return make


def as_is(name: str) -> Make:
    return lambda models, folder: models / name


def made(*nodes: Any, **changes: Any) -> Make:
    def make(models: Path, folder: Path) -> Path:
        return onnx_files.save(folder / "made.onnx", nodes, (1, 3, 8, 8), **changes)

    return make


HTML = b"\n<!DOCTYPE html>\n<html><body>404: Not Found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3660092\n"

TABLE: list[tuple[str, Make, dict[str, Any], str]] = [
    # what is wrong, the file, flags, what has to be said
    ("absent", as_is("nothing.onnx"), {}, "nothing.onnx: can't be read: No such file"),
    ("empty onnx", bytes_in("m.onnx", b""), {}, "m.onnx: is empty; expected an ONNX model"),
    ("empty tflite", bytes_in("m.tflite", b""), {}, "m.tflite: is empty; expected a TFLite model"),
    ("html onnx", bytes_in("m.onnx", HTML), {}, "m.onnx: is an HTML page (a download that"),
    ("html tflite", bytes_in("m.tflite", HTML), {}, "not a TFLite model"),
    ("pointer onnx", bytes_in("m.onnx", POINTER), {}, "is a git-lfs pointer (run `git lfs pull`"),
    ("pointer tflite", bytes_in("m.tflite", POINTER), {}, "is a git-lfs pointer"),
    ("text", bytes_in("m.onnx", b"not a model"), {}, "is a text file, not an ONNX model"),
    ("noise", bytes_in("m.tflite", bytes(range(100, 200))), {}, "is of an unknown type, not a TF"),
    ("tflite as onnx", copied(VWW, "m.onnx"), {}, "is a TFLite model, not an ONNX model"),
    ("onnx as tflite", copied(YOLOX, "m.tflite"), {}, "is an ONNX model, not a TFLite model"),
    ("other suffix", copied(YOLOX, "m.pt"), {}, "m.pt: expected a file named .onnx, .tflite or"),
    ("zip", bytes_in("m.onnx", b"PK\x03\x04rest"), {}, "is a ZIP file (a PyTorch or Keras model?)"),
    ("onnx cut to 1 %", cut(YOLOX, 0.01), {}, "cut.onnx: is cut short or damaged (36600 bytes"),
    ("onnx cut to 50 %", cut(YOLOX, 0.5), {}, "expected a whole ONNX model"),
    ("onnx cut to 99 %", cut(YOLOX, 0.99), {}, "is cut short or damaged"),
    ("tflite cut to 1 %", cut(VWW, 0.01), {}, "cut.tflite: is cut short or damaged (3332 bytes"),
    ("tflite cut to 50 %", cut(VWW, 0.5), {}, "expected a whole TFLite model"),
    ("tflite cut to 99 %", cut(VWW, 0.99), {}, "is cut short or damaged"),
    ("ssd cut to 60 %", cut(SSD, 0.6), {}, "is cut short or damaged"),
    (
        "Edge TPU on a CPU",
        as_is("edgetpu/mobilenet_v1_0.25_128_quant_edgetpu.tflite"),
        {},
        "is compiled for an Edge TPU (operator edgetpu-custom-op) and can't run on a CPU; use the",
    ),
    (
        "Edge TPU, co-compiled",
        as_is("edgetpu/classifier_edgetpu.tflite"),
        {},
        "is compiled for an Edge TPU",
    ),
    (
        "custom operator, tflite",
        replaced(SSD, b"TFLite_Detection_PostProcess", b"TFLite_Detection_PostProcesX"),
        {"kind": "ssd"},
        "LiteRT can't run it: Encountered unresolved custom op: TFLite_Detection_PostProcesX",
    ),
    (
        "custom operator, onnx",
        made(("Warp", ["x"], ["y"], {"domain": "my.ops"}), domains=["my.ops"]),
        {},
        "made.onnx: ONNX Runtime can't load it: Fatal error: my.ops:Warp",
    ),
    (
        "unknown operator, onnx",
        made(("Warp", ["x"], ["y"], {})),
        {},
        "made.onnx: ONNX Runtime can't load it: This is an invalid model. In Node",
    ),
    (
        "a vector, no picture",
        as_is("onnx/fan_low_raw_ae.onnx"),
        {},
        "input window [-1, 200, 3] float32 doesn't show where its channels are; give `layout` in",
    ),
    (
        "a batch",
        made(("Relu", ["x"], ["y"], {}), input=(4, 3, 8, 8)),
        {},
        "input x [4, 3, 8, 8] float32 takes no single picture",
    ),
    (
        "an unsupported type",
        made(("Cast", ["x"], ["y"], {"to": 1}), type=6, output_type=1),
        {},
        "input x [1, 3, 8, 8] int32: expected uint8, int8, float16 or float32",
    ),
    (
        "an open size",
        made(("Relu", ["x"], ["y"], {}), input=(1, 3, "h", "w")),
        CLASSES,
        "the file doesn't say its input's size (`size` = [height, width] in [input], or --size",
    ),
    (
        "a size that can't be",
        made(
            ("Reshape", ["x", "flat"], ["y"], {}),
            input=(1, 3, "h", "w"),
            constants={"flat": np.array([1, 192])},
        ),
        CLASSES | {"size": [9, 9]},
        "made.onnx: ONNX Runtime can't run it: Non-zero status code returned while running Reshape",
    ),
    (
        "channels on both sides",
        made(("Relu", ["x"], ["y"], {}), input=(1, 3, 8, 3)),
        {},
        "doesn't show where its channels are; give `layout` in [input], or --layout: nchw or nhwc",
    ),
    ("size", as_is(V8), {"size": [320, 320]}, "is 416 high and 416 wide, but the manifest says"),
    (
        "grey for colour",
        as_is(V8),
        {"colour": "grey"},
        "of 3 channels, but colour 'grey'; expected",
    ),
    (
        "colour for grey",
        as_is("onnx/pcb_patch_cnn_fp32.onnx"),
        {"colour": "rgb", "scale": 255, "resize": "stretch", "kind": "classification"},
        "has an input of 1 channel, but colour 'rgb'; expected grey",
    ),
    ("mean of two", as_is(V8), {"mean": [1.0, 2.0]}, "mean = [1.0, 2.0]: expected one value, or 3"),
    (
        "scale to multiply with",
        as_is(V8),
        {"scale": 0.00390625},
        "values are divided by it, (pixel - mean) / scale, expected at least 0.02; for 0.00390625"
        " give 256",
    ),
    (
        "decoder for other outputs",
        as_is(SSD),
        {"kind": "yolox"},
        "decoder yolox can't read the outputs TFLite_Detection_PostProcess [1, 10, 4] float32",
    ),
    (
        "YOLOX read as YOLOv8",
        as_is(YOLOX),
        CLASSES | {"kind": "yolov8", "labels": "coco_80.txt"},
        "has 81 classes but 80 labels ('person' to 'toothbrush'); expected a label for each class",
    ),
    ("labels", as_is(V8), {"labels": "coco_90.txt"}, "has 80 classes but 90 labels"),
    ("labels, classes", as_is(VWW), CLASSES | {"labels": "coco_80.txt"}, "2 classes but 80 labels"),
    (
        "activation for boxes",
        as_is(V8),
        {"activation": "softmax"},
        "decoder yolov8 has no use for `activation` of [decoder]; expected normalised",
    ),
    (
        "nothing is said",
        as_is(YOLOX),
        {},
        "the file doesn't say the order of its colours (`colour` in [input], or --colour rgb or "
        "bgr); nor how a picture is brought to the input's size (`resize` in [input], or --resize "
        "letterbox, letterbox-top-left or stretch); nor the range of its values",
    ),
    (
        "probabilities or logits",
        as_is("onnx/mobilenet_v2_quant.onnx"),
        CLASSES,
        "nothing tells whether output [1, 1000] float32 holds probabilities; give `activation`",
    ),
]


@pytest.mark.parametrize(
    ("make", "flags", "says"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_refused(
    shared_data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    make: Make,
    flags: dict[str, Any],
    says: str,
) -> None:
    path = make(shared_data / "models", tmp_path)
    if "labels" in flags:
        flags = flags | {"labels": shared_data / "labels" / flags["labels"]}
    with pytest.raises(ModelError) as error:
        Model.load(open_bundle(path, **flags))
    message = str(error.value)
    assert says in message
    assert path.name in message
    assert "\n" not in message
    noise = capfd.readouterr().err.replace(
        "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", ""
    )
    assert not noise.strip()


def test_two_inputs(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    path = onnx_files.classifier(tmp_path / "two.onnx")
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("size", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=r"two.onnx: has 2 inputs \(x, size\); expected one"):
        Model.load(open_bundle(path))


def test_any_cut_of_a_model_is_refused_and_none_crashes(shared_data: Path, tmp_path: Path) -> None:
    """Wherever a download stops; the labels packed behind a TFLite model are no part of it."""
    for name in ("tflite/fan_low_model.tflite", "onnx/pcb_patch_cnn_int8.onnx"):
        data = (shared_data / "models" / name).read_bytes()
        path = tmp_path / ("cut" + Path(name).suffix)
        for size in range(0, len(data) - 16, max(1, len(data) // 150)):
            path.write_bytes(data[:size])
            with pytest.raises(ModelError):
                open_bundle(path)


@pytest.mark.parametrize(
    "name",
    ["tflite/fan_low_model.tflite", "onnx/pcb_patch_cnn_int8.onnx", "tflite/vww_96_int8.tflite"],
)
def test_a_damaged_model_is_refused_or_read_and_nothing_else(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    data = (shared_data / "models" / name).read_bytes()
    path = tmp_path / ("bad" + Path(name).suffix)
    dice = random.Random(7)
    refused = 0
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(8):
            near = dice.choice((40, 2000, len(data)))
            changed[dice.randrange(min(near, len(data)))] = dice.choice(
                (0, 255, dice.randrange(256))
            )
        path.write_bytes(changed)
        try:
            read_facts(path)
        except ModelError:
            refused += 1
    assert refused > 20
