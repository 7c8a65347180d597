"""Decoders: from a model's outputs to items. A row each; a layout none knows is refused at load.

To add one: a module with `build(outputs, settings) -> Decode`, and a row here.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from common.engine.facts import UNUSED_LABELS
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError
from common.messages import Item

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Decode = Callable[[Sequence[Array], Geometry], list[Item]]

Task = Literal["classification", "detection", "anomaly"]


@dataclass(frozen=True)
class Row:
    module: str
    task: Task = "detection"


DECODERS = {
    "classification": Row("common.engine.decoders.classification", "classification"),
    "ssd": Row("common.engine.decoders.ssd"),
    "yolox": Row("common.engine.decoders.yolox"),
    "yolov8": Row("common.engine.decoders.yolov8"),
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
    return cast(_Module, importlib.import_module(DECODERS[kind].module)).build(outputs, settings)


def refuse(kind: str, outputs: Sequence[Tensor], settings: Settings, expected: str) -> ModelError:
    shapes = ", ".join(str(output) for output in outputs)
    return ModelError(
        f"{settings.where}: decoder {kind} can't read the outputs {shapes}; expected {expected} "
        f"(decoders: {', '.join(DECODERS)})"
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
