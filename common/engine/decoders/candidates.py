"""Candidates of every place of the picture, of which few are anything: the choice is made here.

One output [1, N, 4 + C] or [1, N, 5 + C] (a box, perhaps an objectness, a score a class), or the
same turned, [1, 4 + C, N]; or boxes [1, N, 4] and scores [1, N, C]; or boxes, objectness [1, N, 1]
and scores. score = objectness * class. Boxes are as `boxes` and `normalised` of the manifest say:

- xyxy, xywh (x and y of the centre), as they are: YOLOv5 to v12, YOLO-NAS, EdgeYOLO, UltraFace;
- encoded against anchors: see `common.engine.decoders.anchors`;
- grid, as YOLOX leaves them (its `demo_utils.demo_postprocess`):
  centre = (offset + cell) * stride, size = exp(value) * stride.

YOLOs have one candidate a cell of their strides, or three (v5, v7) that come with an objectness:
that settles which dimension is N. What is still open the number of labels settles, and all of it
for a `yolo` of another N, such as RT-DETR's 300.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import cv2
import numpy as np
from numpy.typing import NDArray

from common.engine.decoders import (
    Array,
    Decode,
    Floats,
    Settings,
    ask,
    check_finite,
    nms,
    real,
    refuse,
)
from common.engine.decoders.anchors import make
from common.engine.decoders.boxes import best_of, corners, grid, suppress, to_items, to_pixels
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError
from common.messages import Item

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (8, 16))
_NAMES = (("reg", "box", "loc"), ("obj",), ("cls", "class", "score", "conf"))
_ULTRALYTICS = ("x1", "y1", "x2", "y2", "score", "class")  # of v10, and exports with nms=True


@dataclass(frozen=True)
class _Part:
    """Some columns of an output, a row a candidate."""

    place: int
    tensor: Tensor
    turned: bool = False
    start: int = 0
    stop: int | None = None

    def of(self, values: Sequence[Array]) -> Array:
        stored = values[self.place].reshape(self.tensor.shape[-2:])
        return (stored.T if self.turned else stored)[:, self.start : self.stop]


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    if any(len(output.shape) < 3 or set(output.shape[:-2]) != {1} for output in outputs):
        raise _refuse(outputs, settings)
    if len(outputs) == 1:
        shape = outputs[0].shape
        if settings.kind == "yolov8" and shape[-1] == 6 and not _counts(settings).keys() & {*shape}:
            return nms.build(outputs, replace(settings, columns=_ULTRALYTICS))
        box, thing, classes = _columns(outputs[0], settings)
    else:
        box, thing, classes = _split(outputs, settings)
    count = box.tensor.shape[-1 if box.turned else -2]
    place = _placing(count, outputs, settings)
    activation = settings.activation
    if activation is None:
        raise ask(
            settings,
            "whether scores are probabilities",
            "activation",
            "none if they are, sigmoid or softmax if they are logits",
        )
    first = 1 if settings.background else 0

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        stored = classes.of(values)
        if thing is not None:
            # A class is at most certain, so that objectness alone rules out nearly all.
            sure = real(thing.tensor, thing.of(values)[:, 0])
            _check_scores(sure, thing.tensor, settings)
            rows = np.flatnonzero(sure >= settings.score)
            stored = stored[rows]
        if activation == "softmax":
            stored = _softmax(real(classes.tensor, stored))
            scores = np.asarray(_best(stored[:, first:]), np.float32)
        else:  # neither changes which class is the best
            scores = real(classes.tensor, _best(stored[:, first:]))
            scores = _sigmoid(scores) if activation == "sigmoid" else scores
        _check_scores(scores, classes.tensor, settings)
        if thing is not None:
            # YOLOv7 does not train a single class's score (its models/experimental.py).
            alone = settings.kind == "yolov7" and stored.shape[1] == 1
            scores = sure[rows] if alone else scores * sure[rows]
        chosen = best_of(scores, settings.score)
        scores, indices = scores[chosen], stored[chosen, first:].argmax(1)
        if thing is not None:
            chosen = rows[chosen]
        boxes = place(real(box.tensor, box.of(values)[chosen]), chosen)
        check_finite(boxes, settings.where)
        kept = suppress(boxes, scores, indices, settings)
        return to_items(boxes[kept], scores[kept], indices[kept], geometry, settings)

    return decode


# --- which is which ----------------------------------------------------------------------------


def _counts(settings: Settings) -> dict[int, int]:
    """Candidates that a YOLO has at this size of input, and how many of them lie in a cell."""
    cells = [len(grid(settings.height, settings.width, strides)[0]) for strides in _STRIDES]
    return {count * per_cell: per_cell for count in cells for per_cell in (3, 1)}


def _refuse(outputs: Sequence[Tensor], settings: Settings) -> ModelError:
    two = "boxes [1, N, 4] and scores [1, N, C]"
    thing = {True: "5 + C", False: "4 + C", None: "4 + C or 5 + C"}[settings.objectness]
    cells = len(grid(settings.height, settings.width, _STRIDES[0])[0])
    more = "" if settings.boxes == "grid" else f" (or {3 * cells} with an objectness)"
    one = (
        f"one [1, N, {thing}], or turned, with N = {cells}{more} for an input of "
        f"{settings.width}x{settings.height}"
    )
    three = "boxes [1, N, 4], objectness [1, N, 1] and scores [1, N, C]"
    with_anchors = settings.kind in ("ssd-anchors", "ultraface")
    expected = two if with_anchors else f"{one}; or {three if settings.objectness else two}"
    return refuse(settings.kind, outputs, settings, expected)


def _columns(output: Tensor, settings: Settings) -> tuple[_Part, _Part | None, _Part]:
    """Box, objectness and classes of a single output."""
    counts, fitting = _counts(settings), []
    for turned in (False, True):
        count, width = output.shape[-2:][:: -1 if turned else 1]
        for thing in (0, 1):
            fits = counts.get(count) == 1 or (counts.get(count) == 3 and thing)
            if settings.kind == "yolo" and settings.labels is not None and count not in counts:
                fits = width - 4 - thing == len(settings.labels)
            if fits and settings.objectness in (None, bool(thing)) and width > 4 + thing:
                fitting.append((turned, thing, width - 4 - thing))
    if not fitting or settings.kind in ("ssd-anchors", "ultraface"):
        raise _refuse([output], settings)
    if len(fitting) > 1 and settings.labels is not None:
        known = len(settings.labels)
        fitting = [fit for fit in fitting if fit[2] == known] or fitting
    if len({turned for turned, _, _ in fitting}) > 1:
        raise _refuse([output], settings)
    if len(fitting) > 1 and settings.labels is None:
        raise ask(
            settings,
            f"how many columns of {output} are classes",
            "objectness",
            "whether a score that there is anything comes before them (or give `labels`)",
        )
    turned, thing, classes = fitting[0]
    settings.check_classes(classes)
    box, sure, score = (
        _Part(0, output, turned, *ends) for ends in ((0, 4), (4, 5), (4 + thing, None))
    )
    return box, sure if thing else None, score


def _split(outputs: Sequence[Tensor], settings: Settings) -> tuple[_Part, _Part | None, _Part]:
    """The same of several outputs: by shape, or by name where that leaves a choice."""
    thing = len(outputs) == 3
    widths, names = ((4, 1, None), _NAMES) if thing else ((4, None), _NAMES[::2])
    fitting = [
        order
        for order in permutations(range(len(outputs)))
        if len(order) == len(widths)
        and all(want in (None, outputs[i].shape[-1]) for want, i in zip(widths, order, strict=True))
    ]
    if len(fitting) > 1:
        fitting = [
            order
            for order in fitting
            if all(
                any(word in outputs[i].name.lower() for word in words)
                for words, i in zip(names, order, strict=True)
            )
        ]
    counts = {output.shape[-2] for output in outputs}
    if len(fitting) != 1 or len(counts) != 1 or settings.objectness not in (None, thing):
        raise _refuse(outputs, settings)
    parts = [_Part(i, outputs[i]) for i in fitting[0]]
    settings.check_classes(parts[-1].tensor.shape[-1] - (1 if settings.background else 0))
    return parts[0], parts[1] if thing else None, parts[-1]


# --- numbers -----------------------------------------------------------------------------------


def _placing(
    count: int, outputs: Sequence[Tensor], settings: Settings
) -> Callable[[Floats, NDArray[np.intp]], Floats]:
    """What turns boxes [K, 4] as the model gives them, which it may change, and the rows they are
    of into corners in pixels of the input.
    """
    kind, height, width = settings.boxes, settings.height, settings.width
    encoded = settings.kind == "ssd-anchors"
    if kind is None or (encoded and kind not in ("xywh", "yxhw")):
        raise ask(
            settings,
            "what the four numbers of a box are",
            "boxes",
            f"xywh or yxhw (centre and size){'' if encoded else ', xyxy or yxyx (corners)'}",
        )
    if kind == "grid":
        levels = [
            made for made in (grid(height, width, s) for s in _STRIDES) if len(made[0]) == count
        ]
        if not levels:
            raise _refuse(outputs, settings)
        cells, strides = levels[0]
        return lambda raw, rows: corners(
            _sized(raw, cells[rows] * strides[rows], np.repeat(strides[rows], 2, 1))
        )
    order = [1, 0, 3, 2] if kind.startswith("y") else [0, 1, 2, 3]
    if encoded:
        if settings.anchors is None:
            raise ask(
                settings, "its anchors", "anchors", "a table: file, or strides, scales, ratios"
            )
        anchors = make(settings.anchors, settings.folder, kind == "yxhw", height, width)
        if len(anchors) != count:
            raise ModelError(
                f"{settings.where}: has {count} boxes, but [decoder.anchors] makes {len(anchors)}"
            )
        factors = np.array(settings.anchors.factors, np.float32)
        return lambda raw, rows: corners(
            _sized((raw / factors)[:, order], anchors[rows, :2], anchors[rows, 2:])
        )
    pixels, centred = to_pixels(settings), kind.endswith(("wh", "hw"))

    def placed(raw: Floats, rows: NDArray[np.intp]) -> Floats:
        boxes = pixels(raw[:, order])
        return corners(boxes) if centred else boxes

    return placed


def _sized(raw: Floats, at: Floats, size: Floats) -> Floats:
    """Centre and size [K, 4] of encoded ones: at + raw * size, exp(raw) * size."""
    with np.errstate(over="ignore"):  # infinity is an error told later
        return np.concatenate([at + raw[:, :2] * size, np.exp(raw[:, 2:]) * size], 1)


def _best(scores: Array) -> Array:
    """The largest of each row. Along short rows numpy takes ten times as long as along columns,
    OpenCV's turning them included.
    """
    by_row = len(scores) > 0 and scores.strides[0] > scores.strides[1]
    columns: Array = cv2.transpose(scores) if by_row else scores.T  # type: ignore[arg-type]
    best: Array = columns.max(0)
    return best


def _check_scores(scores: Floats, tensor: Tensor, settings: Settings) -> None:
    check_finite(scores, settings.where)
    slack = max(0.01, tensor.quantisation[0] if tensor.quantisation else 0.0)
    if len(scores) and not (-slack <= scores.min() and scores.max() <= 1 + slack):
        raise EngineError(
            f"{settings.where}: scores reach from {scores.min():.3g} to {scores.max():.3g}, not 0 "
            f"to 1, after activation {settings.activation!r}; are these logits, or other columns?"
        )


def _softmax(logits: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # of infinity: NaN, which is told
        powers: Floats = np.exp(logits - logits.max(1, keepdims=True))
    powers /= powers.sum(1, keepdims=True)
    return powers


def _sigmoid(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):
        scores: Floats = np.reciprocal(1 + np.exp(-logits))
    return scores
