"""What the box decoders share: the best candidates, non-maximum suppression, items."""

import cv2
import numpy as np
from numpy.typing import NDArray

from common.engine.decoders import Floats, Settings, check_finite
from common.engine.preprocess import Geometry
from common.messages import Item

MAX_CANDIDATES = 1000  # of highest score; more are never compared with each other
MIN_SIDE = 0.1  # picture pixels; less is left of a box only when it lies in the padding


def grid(height: int, width: int, strides: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Cell corners [N, 2] (x, y, in cells) and strides [N, 1] of YOLO's levels, finest first."""
    corners, sizes = [], []
    for stride in strides:
        y, x = np.mgrid[: height // stride, : width // stride]
        corners.append(np.stack([x.ravel(), y.ravel()], 1))
        sizes.append(np.full((x.size, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def suppress(
    centres: Floats, scores: Floats, classes: NDArray[np.intp], settings: Settings
) -> NDArray[np.intp]:
    """Class-wise greedy non-maximum suppression.

    Args:
        centres: [K, 4] centre x, y, width, height.
        scores: [K].
        classes: [K].

    Returns:
        Indices of the kept, by score, at most `settings.max_items`.
    """
    best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
    boxes = centres[best]
    boxes[:, :2] -= boxes[:, 2:] / 2
    kept = cv2.dnn.NMSBoxesBatched(  # lists: it reads arrays an element at a time, 8 times slower
        boxes.tolist(), scores[best].tolist(), classes[best].tolist(), 0.0, settings.iou
    )
    return best[np.asarray(kept, np.intp)[: settings.max_items]]


def corners(centres: Floats) -> Floats:
    """[K, 4] centre x, y, width, height to x1, y1, x2, y2."""
    half = centres[:, 2:] / 2
    return np.concatenate([centres[:, :2] - half, centres[:, :2] + half], 1)


def to_items(
    boxes: Floats,
    scores: Floats,
    classes: NDArray[np.intp],
    geometry: Geometry,
    settings: Settings,
) -> list[Item]:
    """Items of boxes [K, 4] x1, y1, x2, y2 in the model's input, in the order they come."""
    check_finite(boxes, settings.where)
    placed = geometry.to_picture(boxes)
    sides = placed[:, 2:] - placed[:, :2]
    seen = sides.min(1) >= MIN_SIDE
    return [
        Item(settings.label(index), score, index, (x1, y1, x2, y2))
        for (x1, y1, x2, y2), score, index, inside in zip(
            placed.tolist(), scores.tolist(), classes.tolist(), seen.tolist(), strict=True
        )
        if inside
    ]
