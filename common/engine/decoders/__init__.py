"""Decoders: from a model's outputs to items. A row each; a layout none knows is refused at load.

To add one: a module with `build(outputs, settings) -> Decode`, and a row here.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from common.engine.facts import UNUSED_LABELS
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError, UnsaidError
from common.messages import Item

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Decode = Callable[[Sequence[Array], Geometry], list[Item]]

Task = Literal["classification", "detection", "anomaly"]
ANOMALY = "anomaly"  # the one label of that task


@dataclass(frozen=True)
class Row:
    module: str
    task: Task = "detection"
    takes: tuple[str, ...] = ()  # those of `OPTIONS` that the manifest may give
    knows: dict[str, Any] = field(default_factory=dict)  # what they are where it does not
    with_input: bool = False  # it gets the model's input too, behind the outputs


# Of the manifest's [decoder]: what some kinds ask, others know, and the rest have no use for.
OPTIONS = (
    "activation", "boxes", "normalised", "objectness", "background", "columns", "anchors",
    "threshold", "pixel_threshold", "minimum", "maximum", "error",
)  # fmt: skip
_RANGE = ("threshold", "minimum", "maximum")
_CANDIDATES = "common.engine.decoders.candidates"
_NMS = "common.engine.decoders.nms"
_SCORES = {"activation": "none", "objectness": False}
_YOLO = _SCORES | {"boxes": "xywh", "normalised": False}

DECODERS = {
    "anomaly": Row("common.engine.decoders.anomaly", "anomaly", takes=(*_RANGE, "pixel_threshold")),
    "classification": Row(
        "common.engine.decoders.classification", "classification", takes=("activation",)
    ),
    "reconstruction": Row(
        "common.engine.decoders.reconstruction",
        "anomaly",
        takes=(*_RANGE, "error"),
        knows={"error": "squared"},
        with_input=True,
    ),
    "ssd": Row(_NMS, knows={"boxes": "yxyx", "normalised": True}),
    "nms": Row(_NMS, takes=("boxes", "normalised", "columns")),
    "detection-output": Row(
        _NMS,
        knows={
            "columns": ("image", "class", "score", "x1", "y1", "x2", "y2"),
            "normalised": True,
        },
    ),
    "ssd-anchors": Row(
        _CANDIDATES,
        takes=("boxes", "anchors", "activation", "background"),
        knows={"background": True, "objectness": False},
    ),
    "ultraface": Row(
        _CANDIDATES,
        knows=_SCORES | {"boxes": "xyxy", "normalised": True, "background": True},
    ),
    "yolo": Row(
        _CANDIDATES,
        takes=("boxes", "normalised", "objectness", "activation"),
        knows={"activation": "none"},
    ),
    "yolov5": Row(_CANDIDATES, takes=("normalised",), knows=_YOLO | {"objectness": True}),
    "yolov7": Row(_CANDIDATES, takes=("normalised",), knows=_YOLO | {"objectness": True}),
    "yolov8": Row(_CANDIDATES, takes=("normalised",), knows=_YOLO),
    "yolo-nas": Row(_CANDIDATES, takes=("normalised",), knows=_YOLO | {"boxes": "xyxy"}),
    "yolox": Row(_CANDIDATES, knows=_YOLO | {"boxes": "grid", "objectness": True}),
}


@dataclass(frozen=True)
class Settings:
    """What a decoder needs beside the outputs. `where` begins its error messages."""

    where: str
    labels: tuple[str, ...] | None
    activation: str | None
    score: float
    iou: float
    max_items: int
    height: int  # of the model's input
    width: int
    roles: dict[str, str]  # output name -> boxes, classes, scores, count; from the file's graph
    threshold: float | None = None  # from here on: see `bundle.Decoder`
    pixel_threshold: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    error: str | None = None
    boxes: str | None = None  # "grid" is YOLOX's
    normalised: bool | None = None
    objectness: bool | None = None
    background: bool | None = None
    columns: Sequence[str] | None = None
    anchors: Any = None  # decoders.anchors.Anchors
    folder: Path = Path()  # of the bundle
    kind: str = ""  # a key of `DECODERS`

    def label(self, index: int) -> str:
        """The class's name, or its index where it has none."""
        if self.labels is not None and 0 <= index < len(self.labels):
            name = self.labels[index]
            if name not in UNUSED_LABELS:
                return name
        return str(index)

    def check_classes(self, count: int) -> None:
        """Raises ModelError unless there is a label for each of `count` classes."""
        if self.labels is not None and len(self.labels) != count:
            raise ModelError(
                f"{self.where}: has {count} classes but {len(self.labels)} labels "
                f"({self.labels[0]!r} to {self.labels[-1]!r}); expected a label for each class"
            )


class _Module(Protocol):
    def build(self, outputs: Sequence[Tensor], settings: Settings) -> Decode: ...


def build(kind: str, outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """The decoder `kind` for these outputs.

    Raises:
        ModelError: the outputs are not laid out as that decoder knows them, or there is not a
            label for each class.
    """
    row = DECODERS[kind]
    known = {key: value for key, value in row.knows.items() if getattr(settings, key) is None}
    module = cast(_Module, importlib.import_module(row.module))
    return module.build(outputs, replace(settings, kind=kind, **known))


def refuse(kind: str, outputs: Sequence[Tensor], settings: Settings, expected: str) -> ModelError:
    shapes = ", ".join(str(output) for output in outputs)
    return ModelError(
        f"{settings.where}: decoder {kind} can't read the outputs {shapes}; expected {expected} "
        f"(decoders: {', '.join(DECODERS)})"
    )


def ask(settings: Settings, what: str, key: str, values: str) -> UnsaidError:
    return UnsaidError(
        f"{settings.where}: decoder {settings.kind}: nothing tells {what}; give `{key}` in "
        f"[decoder] of the manifest, or --{key}: {values}",
        {f"--{key}": f"{what} (--{key}: {values})"},
    )


def real(tensor: Tensor, values: Array) -> Floats:
    """Dequantised values: (stored - zero point) * scale."""
    if tensor.quantisation is None:
        return values.astype(np.float32, copy=False)
    scale, zero = tensor.quantisation
    return (values.astype(np.float32) - np.float32(zero)) * np.float32(scale)


def check_finite(values: Floats, where: str) -> None:
    """Raises EngineError: a model whose numbers are no numbers has seen nothing at all."""
    if not np.isfinite(values).all():
        raise EngineError(f"{where}: the outputs hold NaN or infinity; the frame was not judged")
