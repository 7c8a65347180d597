"""What a model file says of itself, read without loading a runtime, and whether it is whole.

A kind of file is a module in `formats`, with `read(data, path, facts)`, and a row here. What an
exporter writes, into the file or beside it, is read by `formats.exporters`.
"""

import importlib
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from common.engine.preprocess import Colour, Resize, Tensor
from common.errors import ModelError

EDGETPU_OPERATOR = "edgetpu-custom-op"
SSD_OPERATOR = "TFLite_Detection_PostProcess"
SSD_ROLES = ("boxes", "classes", "scores", "count")  # the order of that operator's outputs
MOST_TEXT = 10_000_000  # bytes of labels or metadata
UNUSED_LABELS = frozenset({"", "???", "n/a"})

_FORMATS = {
    ".tflite": ("tflite", "a TFLite model", "common.engine.formats.tflite"),
    ".onnx": ("onnx", "an ONNX model", "common.engine.formats.onnx"),
    ".xml": ("xml", "an OpenVINO model", "common.engine.formats.openvino"),
}
SUFFIXES = ".onnx, .tflite or .xml"


@dataclass
class Facts:
    """What the file itself settles; None where it says nothing."""

    format: str  # "tflite", "onnx" or "xml"
    labels: tuple[str, ...] | None = None
    decoder: str | None = None
    activation: str | None = None  # what turns the last tensor into scores: "none" if they are
    colour: Colour | None = None
    resize: Resize | None = None
    pad: int | None = None
    mean: list[float] | None = None
    scale: list[float] | None = None
    size: tuple[int, int] | None = None  # height, width
    score: float | None = None  # report nothing below
    iou: float | None = None
    normalised: bool | None = None  # whether boxes reach from 0 to 1, not in pixels
    columns: tuple[str, ...] | None = None  # of an output with a row a detection
    threshold: float | None = None  # from this score on an anomaly; the others see bundle.Decoder
    pixel_threshold: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    custom_operators: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)  # output tensor -> boxes, classes, ...
    inputs: tuple[Tensor, ...] = ()  # where they can be read without a runtime: OpenVINO
    outputs: tuple[Tensor, ...] = ()
    beside: tuple[str, ...] = ()  # files in its folder that belong to it
    notes: list[str] = field(default_factory=list)  # what it says that is not followed
    said: dict[str, str] = field(default_factory=dict)  # field -> where it was said

    def say(self, where: str, **found: Any) -> None:
        """Take what was not said before; None is nothing."""
        for name, value in found.items():
            if value is not None and name not in self.said:
                setattr(self, name, value)
                self.said[name] = where


class _Format(Protocol):
    def read(self, data: mmap.mmap, path: Path, facts: Facts) -> None: ...


def read_facts(path: Path) -> Facts:
    """Check that `path` is a whole model of the type its name says, and read what it tells.

    Raises:
        ModelError: the file is missing, empty, damaged or of another type.
    """
    if path.suffix not in _FORMATS:
        raise ModelError(f"{path}: expected a file named {SUFFIXES}, or a bundle folder")
    kind, name, module = _FORMATS[path.suffix]
    names = {kind: name for kind, name, _ in _FORMATS.values()}
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path}: is empty; expected {name}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _identify(data)
            if found != kind:
                raise ModelError(f"{path}: is {names.get(found, found)}, not {name}")
            facts = Facts(kind)
            try:
                cast(_Format, importlib.import_module(module)).read(data, path, facts)
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ModelError(
                    f"{path}: is cut short or damaged ({size} bytes, {error}); "
                    f"expected a whole {name[2:].strip()}"
                ) from error
            return facts
    except OSError as error:
        raise ModelError(f"{error.filename or path}: can't be read: {error.strerror}") from error


def read_text(path: Path, what: str) -> str:
    """A text file of people or exporters, UTF-8 with or without a mark.

    Raises:
        ModelError: it can't be read, is too large, or no such text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise ModelError(f"{path}: {what} are larger than {MOST_TEXT} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(f"{path}: {what} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: {what} are no UTF-8 text: {error}") from error


def read_labels(text: str, where: str) -> tuple[str, ...]:
    """Labels by class index. Either a plain line a class, or `INDEX NAME` on every line, in any
    order and with gaps. A class without a name is `???` or `n/a`; names may be used twice.

    An empty line is refused unless it is at the end, and so is a comment: either would move all
    later names by a class, which shows nowhere if the decoder doesn't know how many there are.

    Raises:
        ModelError: no label, an empty line or a comment, or indices that are used twice.
    """
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ModelError(f"{where}: has no labels; expected one a line")
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            raise ModelError(
                f"{where}: line {number} of {len(lines)} is {'a comment' if line else 'empty'}; "
                "expected the name of a class, or ??? for one without"
            )
    indexed = [re.fullmatch(r"(\d+)\s*[:\s]\s*(\S.*)", line) for line in lines]
    if not all(indexed):
        return tuple(lines)
    names: dict[int, str] = {}
    for match in indexed:
        if match is not None:
            index = int(match[1][:9])
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
    if text.startswith((b"<?xml", b"<net")):
        return "xml"
    for mark, name in (
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
