"""What files say of themselves: metadata as the exporters write it, and files that mean harm.

Texts are those of Ultralytics' exporter (str() of a dict, json.dumps, yaml.safe_dump), Anomalib's
and OpenVINO's; a TFLite file with metadata is made here, by the schemas' field numbers.
"""

import json
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from common.engine.bundle import open_bundle
from common.engine.facts import MOST_TEXT, Facts, read_facts
from common.engine.model import Model
from common.errors import ModelError, UnsaidError
from scripts.importer import told
from tests import onnx_files

NAMES = {0: "person", 1: "it's", 2: "a: b", 3: "ü {b}", 4: 'say "x"', 5: "no", 6: "True", 7: "1"}
YOLO: dict[str, Any] = {
    "description": "Ultralytics YOLOv8n model trained on coco.yaml", "version": "8.3.0",
    "license": "AGPL-3.0 (https://ultralytics.com/license)", "stride": 32, "task": "detect",
    "batch": 1, "imgsz": [320, 416], "names": NAMES, "args": {"half": False, "nms": None},
}  # fmt: skip
YAML = """\
description: Ultralytics YOLOv8n model trained on /usr/src/app/ultralytics/datasets/coco.yaml
  and more
date: '2024-01-01T10:00:00'
license: AGPL-3.0 License (https://ultralytics.com/license)
stride: 32
task: detect
batch: 1
imgsz:
- 320
- 416
names:
  0: person
  1: it's
  2: 'a: b'
  3: ü {b}
  4: say "x"
  5: 'no'
  6: 'True'
  7: '1'
args:
  batch: 1
channels: 3
"""


def packed(path: Path, files: dict[str, Any], data: bytes) -> Path:
    """A TFLite file with others in a ZIP behind it."""
    path.write_bytes(data)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as pack:
        for name, text in files.items():
            pack.writestr(name, text)
    return path


def ir(path: Path, info: str = "", layers: str = "", weights: int = 8) -> Path:
    """An OpenVINO file of a Parameter, a Const, and what else there is."""
    path.with_suffix(".bin").write_bytes(bytes(weights))
    path.write_text(f"""<?xml version="1.0"?>
<net name="made" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1">
<data shape="?,3,1..64,32" element_type="u8"/>
<output><port id="0" precision="U8" names="image,x"><dim>-1</dim></port></output></layer>
<layer id="1" name="c" type="Const" version="opset1">
<data element_type="f32" shape="2" offset="0" size="8"/>
<output><port id="0" precision="FP32"><dim>2</dim></port></output></layer>
{layers}
<layer id="9" name="y/sink_port_0" type="Result" version="opset1">
<input><port id="0" precision="FP16"><dim>1</dim><dim>-1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="9" to-port="0"/></edges>
<rt_info><Runtime_version value="2026.4"/><model_info>{info}</model_info></rt_info></net>""")
    return path


def info(**values: str) -> str:
    return "".join(f'<{key} value="{value}" />' for key, value in values.items())


# --- Ultralytics -------------------------------------------------------------------------------


def check_yolo(facts: Facts, where: str) -> None:
    assert facts.labels == tuple(NAMES.values())
    assert (facts.decoder, facts.resize, facts.colour) == ("yolov8", "letterbox", "rgb")
    assert (facts.size, facts.scale, facts.pad) == ((320, 416), [255.0], 114)
    assert {facts.said[name] for name in ("labels", "decoder", "size")} == {where}
    assert f"  {where}: labels 8, person to 1; size (320, 416)" in "\n".join(told(facts))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.json", json.dumps(YOLO, indent=2)),
        ("metadata.json", json.dumps(YOLO, ensure_ascii=False)),
        ("temp_meta.txt", str(YOLO)),
        ("temp_meta.txt", str(YOLO | {"imgsz": (320, 416)})),
        ("meta.txt", str(YOLO | {"names": list(NAMES.values())})),
    ],
)
def test_ultralytics_in_tflite(shared_data: Path, tmp_path: Path, name: str, text: str) -> None:
    data = (shared_data / "models/tflite/vww_96_int8.tflite").read_bytes()
    facts = read_facts(packed(tmp_path / "m.tflite", {name: text}, data))
    check_yolo(facts, f"{name} packed into it")
    assert facts.normalised  # as that exporter's boxes are, in this format alone


def test_ultralytics_in_onnx(tmp_path: Path) -> None:
    said = {key: str(value) for key, value in YOLO.items()}
    check_yolo(
        read_facts(onnx_files.classifier(tmp_path / "m.onnx", metadata=said)),
        "its metadata_props",
    )
    said["task"] = "segment"
    onnx_files.classifier(tmp_path / "m.onnx", metadata=said)
    with pytest.raises(ModelError, match="says task 'segment'; expected detect or classify"):
        read_facts(tmp_path / "m.onnx")
    classes = said | {"task": "classify"}
    facts = read_facts(onnx_files.classifier(tmp_path / "m.onnx", metadata=classes))
    assert (facts.decoder, facts.activation, facts.resize) == ("classification", "none", None)
    for more in ({"end2end": "True"}, {"args": "{'half': False, 'nms': True}"}):
        chosen = {key: str(value) for key, value in YOLO.items()} | more
        facts = read_facts(onnx_files.classifier(tmp_path / "m.onnx", metadata=chosen))
        assert (facts.decoder, facts.normalised) == ("nms", False)
        assert facts.columns == ("x1", "y1", "x2", "y2", "score", "class")
    older = {"stride": "32", "names": "['a', 'b']"}  # YOLOv5's own exporter
    facts = read_facts(onnx_files.classifier(tmp_path / "m.onnx", metadata=older))
    assert (facts.decoder, facts.labels, facts.size) == ("yolov5", ("a", "b"), None)


def test_ultralytics_with_boxes_that_are_final(tmp_path: Path) -> None:
    """YOLOv10, or nms=True: rows in pixels of the input, padded with zeros."""
    said = {key: str(value) for key, value in YOLO.items()} | {"end2end": "True"}
    rows = np.zeros((1, 3, 6), np.float32)
    rows[0, 0] = [48, 40, 368, 280, 0.9, 3]
    path = onnx_files.save(
        tmp_path / "m.onnx", [("Identity", ["rows"], ["y"], {})], (1, 3, 6),
        input=(1, 3, 320, 416), constants={"rows": rows}, metadata=said,
    )  # fmt: skip
    model = Model.load(open_bundle(path))
    geometry = model.prepare(np.zeros((640, 832, 3), np.uint8), 0)
    (item,) = model.decode(model.infer(0), geometry)
    assert (item.label, item.box) == ("ü {b}", (96.0, 80.0, 736.0, 560.0))
    model.close()


def test_ultralytics_beside_openvino(tmp_path: Path) -> None:
    """Its YAML has the names as they are; model_info has them without spaces, but the IoU."""
    said = info(
        model_type="YOLO", reverse_input_channels="True", pad_value="114", scale_values="255",
        iou_threshold="0.7", labels="person it's a:_b", resize_type="fit_to_window_letterbox",
    )  # fmt: skip
    path = ir(tmp_path / "m.xml", said)
    (tmp_path / "metadata.yaml").write_text(YAML)
    facts = read_facts(path)
    check_yolo(facts, "metadata.yaml beside it")
    assert (facts.iou, facts.said["iou"]) == (0.7, "its model_info")
    assert facts.beside == ("m.bin", "metadata.yaml")
    (tmp_path / "metadata.yaml").write_text(YAML.replace("  batch: 1", "  nms: true"))
    assert read_facts(path).decoder == "nms"
    (tmp_path / "metadata.yaml").write_text(YAML.replace("task: detect", "task: pose"))
    with pytest.raises(ModelError, match=r"metadata.yaml beside it says task 'pose'"):
        read_facts(path)
    (tmp_path / "metadata.yaml").write_text(YAML.replace("  5: 'no'", "  5: 'no\n    yes'"))
    with pytest.raises(ModelError, match=r"metadata.yaml: `5: 'no` can't be read; expected INDEX"):
        read_facts(path)
    (tmp_path / "metadata.yaml").write_text(YAML.replace("  5: 'no'\n", ""))
    with pytest.raises(ModelError, match=r"can't be read from metadata.yaml beside it"):
        read_facts(path)
    (tmp_path / "metadata.yaml").write_text("of: something else\n")
    assert read_facts(path).labels == ("person", "it's", "a:_b")


# --- OpenVINO ----------------------------------------------------------------------------------


def test_shapes_of_openvino_s_files(shared_data: Path, tmp_path: Path) -> None:
    def tensors(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
        facts = read_facts(path)
        return [(t.name, t.shape, str(t.dtype)) for t in (*facts.inputs, *facts.outputs)]

    folder = shared_data / "models/openvino"
    assert tensors(folder / "bsd_padim.xml") == [
        ("image", (1, 3, 240, 576), "float32"),
        ("anomaly_map", (1, 1, 240, 576), "float32"),
        ("pred_score", (1,), "float32"),
    ]
    assert tensors(folder / "person-detection-retail-0013.xml") == [
        ("data", (1, 3, 320, 544), "float32"),
        ("detection_out", (1, 1, 200, 7), "float32"),
    ]
    assert tensors(ir(tmp_path / "m.xml")) == [
        ("image", (-1, 3, -1, 32), "uint8"),
        ("image", (1, -1), "float16"),
    ]


def test_as_openvino_writes_it(shared_data: Path, tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino")
    model = openvino.Core().read_model(shared_data / "models/onnx/bsd_padim.onnx")
    for key, value in {
        "labels": ["a_b", "c&<"], "scale_values": [255.0], "mean_values": [1.5, 2.0, 3.25],
        "reverse_input_channels": True, "iou_threshold": 0.7, "resize_type": "fit_to_window",
        "pad_value": 114,
    }.items():  # fmt: skip
        model.set_rt_info(value, ["model_info", key])
    openvino.save_model(model, tmp_path / "m.xml")
    facts = read_facts(tmp_path / "m.xml")
    assert (facts.labels, facts.iou, facts.pad) == (("a_b", "c&<"), 0.7, 114)
    assert (facts.scale, facts.mean) == ([255.0], [1.5, 2.0, 3.25])
    assert (facts.colour, facts.resize) == ("rgb", "letterbox-top-left")
    assert [str(tensor) for tensor in (*facts.inputs, *facts.outputs)] == [
        "image [-1, 3, 240, 576] float32",
        "anomaly_map [-1, 1, 240, 576] float32",
        "pred_score [-1] float32",
    ]


def test_model_info(tmp_path: Path) -> None:
    said = info(
        model_type="Classification", labels="good bad_one", mean_values="123.675 116.28 103.53",
        scale_values="58.395, 57.12, 57.375", resize_type="standard",
        reverse_input_channels="NO", confidence_threshold="0.35", multilabel="True",
    )  # fmt: skip
    facts = read_facts(ir(tmp_path / "m.xml", said))
    assert (facts.decoder, facts.labels) == ("classification", ("good", "bad_one"))
    assert (facts.mean, facts.scale) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert (facts.resize, facts.colour, facts.score) == ("stretch", "bgr", 0.35)
    assert set(facts.said.values()) == {"its model_info"}
    said = info(model_type="MaskRCNN", resize_type="crop", scale_values="255")
    facts = read_facts(ir(tmp_path / "m.xml", said))
    assert facts.notes == [
        "its model_info says model_type MaskRCNN: not followed",
        "its model_info says resize_type crop: not followed",
    ]
    assert (facts.decoder, facts.resize, facts.colour, facts.scale) == (None, None, None, [255.0])
    said = info(resize_type="fit_to_window", scale_values="255", embedded_processing="True")
    facts = read_facts(ir(tmp_path / "m.xml", said))  # in the graph already
    assert (facts.resize, facts.scale) == (None, None)
    facts = read_facts(ir(tmp_path / "m.xml", info(resize_type="fit_to_window")))
    assert (facts.resize, facts.pad) == ("letterbox-top-left", 0)  # Model API's default
    props = {"model_info model_type": "YOLOX", "model_info labels": "a b"}
    facts = read_facts(onnx_files.classifier(tmp_path / "m.onnx", metadata=props))
    assert (facts.decoder, facts.labels) == ("yolox", ("a", "b"))


# --- Anomalib ----------------------------------------------------------------------------------

ANOMALIB = {
    "task": "segmentation", "transform": {"__version__": "1.3.1", "transform": {
        "__class_fullname__": "Compose", "transforms": [
            {"__class_fullname__": "Resize", "height": 240, "width": 576, "interpolation": 1},
            {"__class_fullname__": "Normalize", "mean": [0.485, 0.456, 0.406],
             "std": [0.229, 0.224, 0.225], "max_pixel_value": 255.0},
            {"__class_fullname__": "transforms.CenterCrop", "height": 9},
            {"__class_fullname__": "ToTensorV2", "transpose_mask": False},
        ],
    }},
    "image_threshold": 22.732, "pixel_threshold": 20.5, "anomaly_maps.min": 1.0,
    "anomaly_maps.max": 99.0, "pred_scores.min": 6.0, "pred_scores.max": 106.0,
}  # fmt: skip
RANGE = (22.732, 20.5, 6.0, 106.0)


def limits(facts: Facts) -> tuple[float | None, ...]:
    assert facts.decoder == "anomaly"
    return facts.threshold, facts.pixel_threshold, facts.minimum, facts.maximum


def test_anomalib(tmp_path: Path) -> None:
    path = onnx_files.classifier(
        tmp_path / "m.onnx", metadata={key: str(value) for key, value in ANOMALIB.items()}
    )
    assert limits(read_facts(path)) == RANGE
    onnx_files.classifier(path)
    (tmp_path / "metadata.json").write_text(json.dumps(ANOMALIB, indent=4))
    assert limits(read_facts(path)) == RANGE
    assert limits(read_facts(ir(tmp_path / "m.xml"))) == RANGE
    assert read_facts(path).said["threshold"] == "metadata.json beside it"
    facts = read_facts(path)
    assert facts.beside == ("metadata.json",)
    assert (facts.resize, facts.colour) == (None, "rgb")
    assert facts.mean == pytest.approx([123.675, 116.28, 103.53])
    assert facts.scale == pytest.approx([58.395, 57.12, 57.375])
    assert facts.notes == ["metadata.json beside it says transform CenterCrop: not followed"]
    whole = json.dumps(ANOMALIB).replace("transforms.CenterCrop", "Resize")
    (tmp_path / "metadata.json").write_text(whole)
    assert read_facts(path).resize == "stretch"
    older = {"image_threshold": 0.5, "min": 0.25, "max": 2}
    (tmp_path / "metadata.json").write_text(json.dumps(older))
    assert limits(read_facts(path)) == (0.5, None, 0.25, 2.0)
    (tmp_path / "metadata.json").write_text('{"other": 1}')
    assert read_facts(path).beside == ()
    said = info(
        model_type="AnomalyDetection", image_threshold="0.5", pixel_threshold="0.4",
        normalization_scale="40", labels="Normal Anomaly",
    )  # fmt: skip
    facts = read_facts(ir(tmp_path / "m.xml", said))
    assert (limits(facts), facts.labels) == ((0.5, 0.4, 0.0, 40.0), None)


def test_a_model_decides_by_what_lies_beside_it(shared_data: Path, tmp_path: Path) -> None:
    for name in ("bsd_padim.xml", "bsd_padim.bin"):
        (tmp_path / name).symlink_to(shared_data / "models/openvino" / name)
    flags: dict[str, Any] = {"colour": "rgb", "resize": "stretch", "scale": 255, "mean": 0}
    with pytest.raises(UnsaidError, match=r"`kind` in .decoder"):
        Model.load(open_bundle(tmp_path / "bsd_padim.xml", **flags))
    before = open_bundle(tmp_path / "bsd_padim.xml").sha256
    (tmp_path / "metadata.json").write_text(json.dumps(ANOMALIB))
    bundle = open_bundle(tmp_path / "bsd_padim.xml", **flags)
    assert bundle.sha256 != before
    model = Model.load(bundle)
    assert model.task == "anomaly"
    geometry = model.prepare(np.zeros((240, 576, 3), np.uint8), 0)
    items = model.decode(model.infer(0), geometry)
    assert items
    assert min(item.score for item in items) >= 0.5
    model.close()


# --- TFLite ------------------------------------------------------------------------------------


class Table(dict[int, Any]):
    """A FlatBuffer table: field -> text, bytes, list, table, or (kind, number)."""


def flat(root: Table, mark: bytes) -> bytes:
    flatbuffers: Any = pytest.importorskip("flatbuffers")  # LiteRT needs it too
    builder, known = flatbuffers.Builder(0), dict[int, int]()

    def put(value: Any) -> int:  # the same object twice is one in the file
        if id(value) not in known:
            known[id(value)] = put_new(value)
        return known[id(value)]

    def put_new(value: Any) -> int:
        if isinstance(value, str):
            return int(builder.CreateString(value))
        if isinstance(value, bytes):
            return int(builder.CreateByteVector(value))
        if isinstance(value, list) and all(isinstance(entry, float) for entry in value) and value:
            return int(builder.CreateNumpyVector(np.array(value, np.float32)))
        if isinstance(value, list):
            offsets = [put(entry) for entry in value]
            builder.StartVector(4, len(offsets), 4)
            for offset in reversed(offsets):
                builder.PrependUOffsetTRelative(offset)
            return int(builder.EndVector())
        places = {key: put(entry) for key, entry in value.items() if not isinstance(entry, tuple)}
        builder.StartObject(max(value, default=0) + 1)
        for key, entry in value.items():
            if isinstance(entry, tuple):
                getattr(builder, f"Prepend{entry[0]}Slot")(key, entry[1], 0)
            else:
                builder.PrependUOffsetTRelativeSlot(key, places[key], 0)
        return int(builder.EndObject())

    builder.Finish(put(root), mark)
    return bytes(builder.Output())


def label_file(name: str, locale: str = "", kind: int = 2) -> Table:
    return Table({0: name, 2: ("Int8", kind), 3: locale})


def with_metadata(*files: Table, units: tuple[Table, ...] = ()) -> bytes:
    """A TFLite file of nothing but metadata, of a greyscale input and one output."""
    image = Table({3: Table({0: ("Uint8", 2), 1: Table({0: ("Int8", 2)})})})
    image[4] = [Table({0: ("Uint8", 1), 1: Table({0: [127.5], 1: [64.0]})})]
    output = Table({4: list(units), 6: list(files)})
    metadata = flat(Table({0: "made", 3: [Table({2: [image], 3: [output]})]}), b"M001")
    entry = Table({0: "TFLITE_METADATA", 1: ("Uint32", 1)})
    return flat(
        Table({1: [], 2: [Table({0: [], 3: []})], 4: [Table(), Table({0: metadata})], 6: [entry]}),
        b"TFL3",
    )


def test_tflite_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    threshold = Table({0: ("Uint8", 3), 1: Table({0: ("Float32", 0.25)})})
    calibration = label_file("scores.txt", kind=4)
    files = {"labels.txt": "good\nbad\n", "labels_de.txt": "gut\nschlecht\n", "scores.txt": "1,2,3"}
    data = with_metadata(
        label_file("labels_de.txt", "de"), label_file("labels.txt"), calibration,
        units=(threshold,),
    )  # fmt: skip
    facts = read_facts(packed(path, files, data))
    assert facts.labels == ("good", "bad")
    assert facts.said["labels"] == "labels.txt packed into it"
    assert (facts.colour, facts.resize, facts.decoder) == ("grey", "stretch", "classification")
    assert (facts.mean, facts.scale, facts.score) == ([127.5], [64.0], 0.25)
    assert facts.notes == ["its TFLite metadata calibrates scores: not applied"]
    only = packed(path, files, with_metadata(label_file("labels_de.txt", "de")))
    assert read_facts(only).labels == ("gut", "schlecht")
    both = label_file("labels.txt", "en"), label_file("labels_de.txt", "de")
    facts = read_facts(packed(path, files, with_metadata(*both)))
    assert facts.labels is None
    assert facts.notes == ["several files of labels are packed into it: labels.txt, labels_de.txt"]


def test_bytes_of_weights_that_look_like_a_zip_are_none(shared_data: Path, tmp_path: Path) -> None:
    data = (shared_data / "models/tflite/vww_96_int8.tflite").read_bytes()
    (tmp_path / "m.tflite").write_bytes(data + b"PK\5\6" + bytes(30))
    assert read_facts(tmp_path / "m.tflite").labels is None


# --- ONNX --------------------------------------------------------------------------------------


def test_weights_beside_onnx(tmp_path: Path) -> None:
    path = onnx_files.classifier(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    assert read_facts(path).beside == ("m.data",)
    model = onnx.load(str(path))
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"its weights are in m.data, which is not beside it"):
        read_facts(path)
    for location in ("../m.data", "/etc/m.data"):
        moved = onnx.ModelProto.FromString(model.SerializeToString())
        for tensor in moved.graph.initializer:
            onnx.external_data_helper.set_external_data(tensor, location)
            tensor.ClearField("raw_data")
        path.write_bytes(moved.SerializeToString())
        with pytest.raises(ModelError, match=f"its weights are in '{location}'; expected a file"):
            read_facts(path)


# --- files that mean harm ----------------------------------------------------------------------

Make = Callable[[Path], Path]  # in an empty folder
BOMB = "<!DOCTYPE net [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
    f"<!ENTITY {name} '{f'&{before};' * 10}'>"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def xml(text: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "m.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def made(**values: Any) -> Make:
    return lambda folder: ir(folder / "m.xml", **values)


def as_is(path: Path) -> None:
    pass


def zipped(change: Callable[[Path], None], name: str = "labels.txt", text: Any = "a\nb\n") -> Make:
    def make(folder: Path) -> Path:
        path = packed(folder / "m.tflite", {name: text}, with_metadata())
        change(path)
        return path

    return make


def patched(mark: bytes, at: int, value: bytes) -> Callable[[Path], None]:
    """Bytes at a distance from the last mark replaced."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        place = data.rindex(mark) + at
        data[place : place + len(value)] = value
        path.write_bytes(data)

    return change


def beside(name: str, text: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return ir(folder / "m.xml")

    return make


def lzma(folder: Path) -> Path:
    path = folder / "m.tflite"
    path.write_bytes(with_metadata())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as pack:
        pack.writestr("labels.txt", "a\n")
    return path


def shared_vectors(folder: Path) -> Path:
    """2,000 operators that are one and the same table, whose outputs are 20,000 numbers."""
    data = bytearray(
        flat(
            Table({
                1: [Table({3: ("Int32", 22)})],
                2: [Table({0: [], 2: bytes(4), 3: [Table({2: bytes(80_000)})] * 2_000})],
            }),
            b"TFL3",
        )
    )  # fmt: skip
    # A vector of bytes counts its bytes, one of numbers its numbers.
    place = data.index(struct.pack("<I", 80_000))
    data[place : place + 4] = struct.pack("<I", 20_000)
    path = folder / "m.tflite"
    path.write_bytes(data)
    return path


CONST = '<layer><data element_type="f32" offset="0" size="8"/></layer>'
NO_WEIGHTS = f"<net><layers>{CONST}</layers></net>"
HARM: list[tuple[str, Make, str]] = [
    ("a DTD", xml('<?xml version="1.0"?><!DOCTYPE net SYSTEM "x"><net/>'), "declares a document t"),
    ("entities", xml(f'<?xml version="1.0"?>{BOMB}]><net name="&i;"/>'), "declares a document"),
    (
        "a DTD in EBCDIC",
        xml(b'<?xml version="1.0" encoding="cp037"?>' + "<!DOCTYPE net []><net/>".encode("cp037")),
        "is cut short or damaged",
    ),
    ("UTF-16", xml('<?xml version="1.0" encoding="utf-16"?><net/>'.encode("utf-16")), "unknown"),
    ("deep", xml("<?xml version='1.0'?><net>" + "<a>" * 3_000_000), "<a> at level 65 is none of"),
    ("other XML", xml("<?xml version='1.0'?><svg/>"), "<svg> at level 1 is none of OpenVINO's"),
    ("no layers", xml("<net><layers/></net>"), "has no layers; expected an OpenVINO model"),
    ("large", xml(b"<net>" + bytes(32_000_000)), "has 32000005 bytes; expected at most 32000000"),
    ("no weights", xml(NO_WEIGHTS), "its weights are missing; expected m.bin beside it"),
    ("cut weights", made(weights=7), "m.bin: is cut short: 7 bytes; expected at least 8"),
    (
        "absurd weights",
        made(layers='<layer><data element_type="f32" offset="x" size="1"/></layer>'),
        "invalid literal for int",
    ),
    (
        "more digits than a number has",
        made(layers=f'<layer><data element_type="f32" offset="{"9" * 5000}" size="1"/></layer>'),
        "is cut short or damaged",
    ),
    ("scale", made(info=info(scale_values="a b c")), "scale_values in its model_info is 'a'; expe"),
    ("scales", made(info=info(scale_values="1 2 3 4")), "has 4 values; expected 1 or 3"),
    ("NaN", made(info=info(iou_threshold="nan")), "iou_threshold in its model_info is 'nan'; exp"),
    ("pad", made(info=info(pad_value="inf")), "pad_value in its model_info is 'inf'"),
    ("no JSON", beside("metadata.json", '{"image_threshold": 0.5'), "json beside it can't"),
    ("deep JSON", beside("metadata.json", "[" * 1_000_000), "json beside it can't be read"),
    (
        "a threshold that is none",
        beside("metadata.json", '{"image_threshold": [1]}'),
        "image_threshold in metadata.json beside it is [1]; expected a number",
    ),
    ("large JSON", beside("metadata.json", " " * (MOST_TEXT + 1)), "are larger than 10000000"),
    (
        "a ZIP that says less than it holds",
        zipped(patched(b"PK\1\2", 24, struct.pack("<I", 10)), text="a\n" * 50_000_000),
        "damaged: Bad CRC-32",
    ),
    (
        "a ZIP that says it holds much",
        zipped(patched(b"PK\1\2", 24, struct.pack("<I", 2_000_000_000))),
        "labels.txt packed into it is larger than 10000000 bytes",
    ),
    ("a ZIP by another method", lzma, "or compressed otherwise than by deflate"),
    ("a ZIP with a password", zipped(patched(b"PK\1\2", 8, b"\1\0")), "is encrypted"),
    (
        "a ZIP's table of contents",
        zipped(patched(b"PK\5\6", 12, struct.pack("<I", 3_000_000_000))),
        "more files are packed into it than can be",
    ),
    (
        "a ZIP's place",
        zipped(patched(b"PK\1\2", 42, struct.pack("<I", 3_000_000_000))),
        "files packed into it are damaged",
    ),
    ("labels that are no text", zipped(as_is, text=b"\xff\n"), "packed into it are damaged"),
    ("names that are no names", zipped(as_is, "meta.txt", "{'names': 3}"), "`names` or"),
    ("no literal", zipped(as_is, "meta.txt", "{'names': f()}"), "meta.txt packed into it"),
    ("a deep literal", zipped(as_is, "meta.txt", "(" * 100_000), "meta.txt packed into"),
    ("quotes that don't end", zipped(as_is, "meta.txt", "'" + r"\'" * 500_000), "meta.txt packed"),
    (
        "no size",
        zipped(as_is, "meta.txt", '{"names": {"0": "a"}, "imgsz": [Infinity, 1]}'),
        "OverflowError",
    ),
    ("no size at all", zipped(as_is, "meta.txt", str(YOLO | {"imgsz": [0, 1]})), "size (0, 1)"),
    ("an escape", zipped(as_is, "meta.txt", r"{'names': ['\x']}"), "meta.txt packed into"),
    ("shared vectors", shared_vectors, "vectors larger than the file"),
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "says"), [row[1:] for row in HARM], ids=[row[0] for row in HARM])
def test_harm(tmp_path: Path, make: Make, says: str) -> None:
    """One line, in bounded time and memory."""
    path = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as error:
            read_facts(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 100_000_000


def test_any_cut_of_openvino_s_files_is_refused(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "models/openvino/mobilenet_v1_0.25_224.xml"
    data, path = real.read_bytes(), tmp_path / "m.xml"
    path.with_suffix(".bin").symlink_to(real.with_suffix(".bin"))
    for size in range(0, len(data) - 16, len(data) // 40):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError):
            read_facts(path)


def test_damage_is_refused_or_read_and_nothing_else(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "models/openvino/mobilenet_v1_0.25_224.xml"
    (tmp_path / "m.bin").symlink_to(real.with_suffix(".bin"))
    packs = packed(
        tmp_path / "p.tflite", {"labels.txt": "a\nb\n", "metadata.json": json.dumps(YOLO)},
        with_metadata(label_file("labels.txt")),
    )  # fmt: skip
    dice, refused = random.Random(11), 0
    for name, data, rounds in (
        ("m.xml", real.read_bytes()[:4000] + real.read_bytes()[-1500:], 150),
        ("p.tflite", packs.read_bytes(), 400),
    ):
        for _ in range(rounds):
            changed = bytearray(data)
            for _ in range(dice.choice((1, 2, 6))):
                changed[dice.randrange(len(changed))] = dice.choice((0, 255, dice.randrange(256)))
            (tmp_path / name).write_bytes(changed)
            try:
                read_facts(tmp_path / name)
            except ModelError:
                refused += 1
    assert refused > 200
