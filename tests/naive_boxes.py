"""Box decoding written out slowly, a box at a time, to hold the real one to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.engine.decoders import Settings
from common.engine.preprocess import Geometry, Tensor
from common.messages import Item

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2
WHOLE = Geometry(SIDE, SIDE, 1.0, 1.0, 0, 0)
LABELS = ("scratch", "dent", "stain")
FLOAT = np.dtype(np.float32)


def wanted(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "where": "m.onnx", "labels": LABELS, "activation": None, "score": 0.4, "iou": 0.45,
        "max_items": 100, "height": SIDE, "width": SIDE, "roles": {},
    }  # fmt: skip
    return Settings(**values | changes)


def floats(*shapes: tuple[int, ...], names: Sequence[str] = "abcd") -> list[Tensor]:
    return [Tensor(name, shape, FLOAT) for name, shape in zip(names, shapes, strict=False)]


def naive_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inner = width * height
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def naive_suppress(found: list[tuple[float, int, list[float]]], iou: float) -> list[Any]:
    """Greedy, a class at a time, best first; `found` is (score, class, corners)."""
    kept: list[tuple[float, int, list[float]]] = []
    for score, index, box in sorted(found, key=lambda one: -one[0]):
        rivals = [other for _, other_index, other in kept if other_index == index]
        if all(naive_overlap(box, other) <= iou for other in rivals):
            kept.append((score, index, box))
    return kept


def same(items: list[Item], kept: list[Any], width: int = SIDE, height: int = SIDE) -> None:
    """The naive list, clipped to the picture, without what lies outside."""
    inside = []
    for score, index, box in kept:
        clipped = np.clip(box, 0, [width, height] * 2)
        if clipped[2] - clipped[0] >= 0.1 and clipped[3] - clipped[1] >= 0.1:
            inside.append((score, index, clipped))
    assert [item.index for item in items] == [index for _, index, _ in inside]
    for item, (score, index, box) in zip(items, inside, strict=True):
        assert item.label == LABELS[index]
        assert item.score == pytest.approx(score, abs=1e-5)
        assert item.box == pytest.approx(tuple(box), abs=1e-3)
