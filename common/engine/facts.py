"""What a model file says of itself, read without loading a runtime, and whether it is whole.

TFLite is a FlatBuffer (`TFL3` at byte 4), described by tensorflow's `schema.fbs`; its metadata by
tflite-support's `metadata_schema.fbs`, with label files in a ZIP appended to the file. ONNX is a
Protocol Buffer, described by `onnx.proto`. Only the few fields needed are read; field numbers are
those of the schemas.
"""

import ast
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from common.engine.binary import Table, fields
from common.engine.preprocess import Colour, Resize
from common.errors import ModelError

EDGETPU_OPERATOR = "edgetpu-custom-op"
SSD_OPERATOR = "TFLite_Detection_PostProcess"
SSD_ROLES = ("boxes", "classes", "scores", "count")  # the order of that operator's outputs
_MOST_LABELS = 10_000_000  # bytes
UNUSED_LABELS = frozenset({"", "???", "n/a"})

_FORMATS = {".tflite": "tflite", ".onnx": "onnx"}
_NAMES = {"tflite": "a TFLite model", "onnx": "an ONNX model"}


@dataclass
class Facts:
    """What the file itself settles; None where it says nothing."""

    format: str  # "tflite" or "onnx"
    labels: tuple[str, ...] | None = None
    decoder: str | None = None
    activation: str | None = None  # what turns the last tensor into scores: "none" if they are
    colour: Colour | None = None
    resize: Resize | None = None
    mean: list[float] | None = None
    scale: list[float] | None = None
    size: tuple[int, int] | None = None  # height, width
    custom_operators: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)  # output tensor -> boxes, classes, ...


def read_facts(path: Path) -> Facts:
    """Check that `path` is a whole model of the type its name says, and read what it tells.

    Raises:
        ModelError: the file is missing, empty, damaged or of another type.
    """
    kind = _FORMATS.get(path.suffix)
    if kind is None:
        raise ModelError(f"{path}: expected a file named .onnx or .tflite, or a bundle folder")
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path}: is empty; expected {_NAMES[kind]}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _identify(data)
            if found != kind:
                raise ModelError(f"{path}: is {_NAMES.get(found, found)}, not {_NAMES[kind]}")
            try:
                return _tflite(data, path) if kind == "tflite" else _onnx(data, path)
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ModelError(
                    f"{path}: is cut short or damaged ({size} bytes, {error}); "
                    f"expected a whole {_NAMES[kind][2:].strip()}"
                ) from error
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error


def read_labels(text: str, where: str) -> tuple[str, ...]:
    """Labels by class index. Either a plain line a class, or `INDEX NAME` on every line.

    Raises:
        ModelError: no label, or indices that are used twice.
    """
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ModelError(f"{where}: has no labels; expected one a line")
    indexed = [re.fullmatch(r"(\d+)\s*[:\s]\s*(\S.*)", line) for line in lines]
    if not all(indexed):
        return tuple(lines)
    names: dict[int, str] = {}
    for match in indexed:
        if match is not None:
            index = int(match[1])
            if index in names or index > 1_000_000:
                raise ModelError(f"{where}: class index {index} is used twice or out of range")
            names[index] = match[2]
    return tuple(names.get(index, "???") for index in range(max(names) + 1))


def _identify(data: mmap.mmap) -> str:
    """The type of a file by its first bytes; `onnx` (which has no mark) where none is known."""
    head = data[:512]
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head[4:8] == b"TFL3":
        return "tflite"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that failed?)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (run `git lfs pull` where it came from)"
    for mark, name in (
        (b"<?xml", "an XML file (an OpenVINO model?)"),
        (b"PK\x03\x04", "a ZIP file (a PyTorch or Keras model?)"),
        (b"\x89HDF", "an HDF5 file (a Keras model?)"),
        (b"\x1f\x8b", "a gzip file"),
        (b"{", "a JSON file"),
    ):
        if head.startswith(mark):
            return name
    if head[:1] == b"\x08" and len(head) > 2:  # field 1, ir_version, a varint: always written first
        return "onnx"
    if set(head) <= set(range(32, 127)) | {9, 10, 13}:
        return "a text file"
    return "of an unknown type"


# --- TFLite ------------------------------------------------------------------------------------

_SOFTMAX, _LOGISTIC = 25, 14
_PASS_THROUGH = {22, 43, 6, 114}  # RESHAPE, SQUEEZE, DEQUANTIZE, QUANTIZE: scores stay scores


def _tflite(data: mmap.mmap, path: Path) -> Facts:
    model = Table.root(data)
    for buffer in model.tables(4):  # a cut file most often lacks weights
        start, count = buffer.span(0)
        if start + count > len(data):
            raise IndexError(f"weights reach to byte {start + count}")
    codes = [
        (max(code.number(0, "b"), code.number(3, "i")), code.text(1)) for code in model.tables(1)
    ]
    graph = model.tables(2)[0]
    tensors, outputs = graph.tables(0), graph.numbers(2, "i")
    facts = Facts("tflite", custom_operators=tuple(sorted({name for _, name in codes if name})))
    producers: dict[int, tuple[int, str, list[int], list[int]]] = {}
    for operator in graph.tables(3):
        code, custom = codes[operator.number(0, "I")]
        made = operator.numbers(2, "i")
        for tensor in made:
            producers[tensor] = (code, custom, operator.numbers(1, "i"), made)
        if custom == SSD_OPERATOR and set(made) <= set(outputs):
            facts.decoder = "ssd"
            facts.roles = {
                tensors[t].text(3): role for t, role in zip(made, SSD_ROLES, strict=False)
            }
    if len(outputs) == 1:
        last = producers.pop(outputs[0], None)
        while last is not None and last[0] in _PASS_THROUGH:
            last = producers.pop(last[2][0], None)  # pop: a damaged graph may be a circle
        if last is not None and last[0] in (_SOFTMAX, _LOGISTIC):
            facts.activation = "none"
    for entry in model.tables(6):
        if entry.text(0) == "TFLITE_METADATA":
            start, count = model.tables(4)[entry.number(1, "I")].span(0)
            _tflite_metadata(data[start : start + count], facts)
    facts.labels = _packed_labels(data, path)
    return facts


def _tflite_metadata(data: bytes, facts: Facts) -> None:
    """Normalisation, colour and roles from a TFLITE_METADATA buffer (FlatBuffer, `M001`)."""
    for graph in Table.root(data).tables(3):
        inputs, outputs = graph.tables(2), graph.tables(3)
        for tensor in inputs[:1]:
            content = tensor.table(3)
            if content is not None and content.number(0, "B") == 2:  # ImageProperties
                image = content.table(1)
                space = image.number(0, "b") if image is not None else 0
                facts.colour = "rgb" if space == 1 else "grey" if space == 2 else None
                # The Task Library, whose format this is, resizes the whole picture.
                facts.resize = "stretch"
            for unit in tensor.tables(4):
                options = unit.table(1)
                if unit.number(0, "B") == 1 and options is not None:  # NormalizationOptions
                    facts.mean, facts.scale = options.floats(0), options.floats(1)
        if len(outputs) == 1 and facts.decoder is None:
            kinds = [file.number(2, "b") for file in outputs[0].tables(6)]
            if 2 in kinds:  # TENSOR_AXIS_LABELS: a label for each element, so: classes
                facts.decoder = "classification"


def _packed_labels(data: mmap.mmap, path: Path) -> tuple[str, ...] | None:
    """Labels of the one text file in the ZIP appended to `path`, if there is just one."""
    if data.rfind(b"PK\5\6", max(0, len(data) - (1 << 16))) < 0:  # the mark of a ZIP's end
        return None
    import zipfile  # here: most models have none, and it takes 0.7 MB
    import zlib

    try:
        with zipfile.ZipFile(path) as packed:
            names = [info for info in packed.infolist() if info.filename.endswith(".txt")]
            if len(names) != 1 or names[0].file_size > _MOST_LABELS:
                return None
            text = packed.read(names[0]).decode()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ModelError(f"{path}: the label files packed into it are damaged: {error}") from error
    return read_labels(text, f"{path}:{names[0].filename}")


# --- ONNX --------------------------------------------------------------------------------------

_ONNX_PASS_THROUGH = {
    b"DequantizeLinear", b"QuantizeLinear", b"Reshape", b"Squeeze", b"Flatten", b"Identity",
}  # fmt: skip


def _onnx(data: mmap.mmap, path: Path) -> Facts:
    facts, properties = Facts("onnx"), dict[str, str]()
    graph: tuple[int, int] | None = None
    for number, start, end in fields(data, 0, len(data)):
        if number == 7:
            graph = start, end
        elif number == 14:  # metadata_props
            pair = {key: data[a:b].decode() for key, a, b in fields(data, start, end)}
            properties[pair.get(1, "")] = pair.get(2, "")
    if graph is None:
        raise ModelError(f"{path}: has no graph; expected an ONNX model")
    if _softmax_last(data, *graph):
        facts.activation = "none"
    if {"names", "stride", "imgsz"} <= properties.keys():
        _ultralytics(properties, facts, path)
    return facts


def _softmax_last(data: mmap.mmap, start: int, end: int) -> bool:
    """Whether the graph's one output comes from a Softmax or Sigmoid."""
    outputs, producers = list[bytes](), dict[bytes, tuple[bytes, bytes]]()
    for number, a, b in fields(data, start, end):
        if number == 12:  # output: ValueInfoProto, its name is field 1
            outputs += [data[c:d] for key, c, d in fields(data, a, b) if key == 1]
        elif number == 1:  # node: inputs are field 1, outputs 2, op_type 4
            parts = [(key, data[c:d]) for key, c, d in fields(data, a, b) if key in (1, 2, 4)]
            kind = b"".join(text for key, text in parts if key == 4)
            source = next((text for key, text in parts if key == 1), b"")
            producers |= {text: (kind, source) for key, text in parts if key == 2}
    last = producers.pop(outputs[0], None) if len(outputs) == 1 else None
    while last is not None and last[0] in _ONNX_PASS_THROUGH:
        last = producers.pop(last[1], None)
    return last is not None and last[0] in (b"Softmax", b"Sigmoid")


def _ultralytics(properties: dict[str, str], facts: Facts, path: Path) -> None:
    """The metadata_props that Ultralytics' exporter writes: Python literals as text."""
    try:
        names, size = (ast.literal_eval(properties[key]) for key in ("names", "imgsz"))
        facts.labels = tuple(str(names[index]) for index in range(len(names)))
        height, width = size
        facts.size = int(height), int(width)
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: its metadata `names` or `imgsz` can't be read ({error}); expected "
            "{0: 'first', 1: 'second', ...} and [height, width]"
        ) from error
    if properties.get("task") == "detect":
        facts.decoder, facts.resize, facts.colour = "yolov8", "letterbox", "rgb"
        facts.mean, facts.scale = [0.0], [255.0]
