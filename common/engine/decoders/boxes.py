"""What the box decoders share: the best candidates, non-maximum suppression, items."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from common.engine.decoders import Floats, Settings, ask, check_finite
from common.engine.preprocess import Geometry
from common.errors import EngineError
from common.messages import Item

MAX_CANDIDATES = 1000  # of highest score; more are never compared with each other
_FAR = 16384.0  # pixels; no input is as large
MIN_SIDE = 0.1  # picture pixels; less is left of a box only when it lies in the padding


def grid(height: int, width: int, strides: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Cell corners [N, 2] (x, y, in cells) and strides [N, 1] of YOLO's levels, finest first."""
    corners, sizes = [], []
    for stride in strides:
        y, x = np.mgrid[: height // stride, : width // stride]
        corners.append(np.stack([x.ravel(), y.ravel()], 1))
        sizes.append(np.full((x.size, 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def best_of(scores: Floats, least: float) -> NDArray[np.intp]:
    """Indices of the scores [N] from `least` up, best first, at most `MAX_CANDIDATES`."""
    found = np.flatnonzero(scores >= least)
    if len(found) > MAX_CANDIDATES:
        found = np.sort(found[np.argpartition(-scores[found], MAX_CANDIDATES)[:MAX_CANDIDATES]])
    return found[np.argsort(-scores[found], kind="stable")]


def suppress(
    boxes: Floats, scores: Floats, classes: NDArray[np.intp], settings: Settings
) -> NDArray[np.intp]:
    """Class-wise greedy non-maximum suppression.

    Args:
        boxes: [K, 4] x1, y1, x2, y2.
        scores: [K].
        classes: [K].

    Returns:
        Indices of the kept, by score, at most `settings.max_items`.
    """
    # OpenCV parts the classes by moving them beyond the largest coordinate: none may be negative,
    # nor so large that the others lose their digits.
    near = boxes.astype(np.float64).clip(-_FAR, _FAR)
    sized = np.concatenate([near[:, :2] + _FAR, near[:, 2:] - near[:, :2]], 1)
    kept = cv2.dnn.NMSBoxesBatched(  # lists: it reads arrays an element at a time, 8 times slower
        sized.tolist(), scores.tolist(), classes.tolist(), 0.0, settings.iou
    )
    return np.asarray(kept, np.intp)[: settings.max_items]


def corners(centres: Floats) -> Floats:
    """[K, 4] centre x, y, width, height to x1, y1, x2, y2."""
    half = centres[:, 2:] / 2
    return np.concatenate([centres[:, :2] - half, centres[:, :2] + half], 1)


def to_pixels(settings: Settings) -> Callable[[Floats], Floats]:
    """What brings numbers of boxes [K, 4] (x, y, x or width, y or height) to pixels of the input.

    Raises:
        ModelError: nothing says whether they are normalised. What it returns raises EngineError
            where that is plainly wrong: boxes would be reported at the wrong place, or not at all.
    """
    if settings.normalised is None:
        raise ask(
            settings,
            "the unit of its boxes",
            "normalised",
            "whether they reach from 0 to 1 over the input; else they are in its pixels",
        )
    normalised = settings.normalised
    size = np.array([settings.width, settings.height] * 2, np.float32)

    def scaled(boxes: Floats) -> Floats:
        check_finite(boxes, settings.where)
        most = float(np.abs(boxes).max(initial=0))
        if most > 0 and (most > 4) == normalised:
            raise EngineError(
                f"{settings.where}: boxes reach to {most:g}, but are taken for "
                f"{'normalised' if normalised else 'pixels'}; give normalised = "
                f"{str(not normalised).lower()} in [decoder]"
            )
        return boxes * size if normalised else boxes

    return scaled


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
