"""Which of the things a model reports are the ones expected: by label and overlap. No numpy here.

Greedy, best score first, each takes the free thing of its label that it overlaps most, as PASCAL
VOC counts (Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010, section 4.2).
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from common.messages import Item

IOU = 0.5  # the least overlap that counts

Box = tuple[float, float, float, float]


class Thing(Protocol):
    """What may be there: `messages.Item`, `messages.TruthItem`, an expected answer."""

    @property
    def label(self) -> str: ...
    @property
    def box(self) -> Box | None: ...


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union


T = TypeVar("T", bound=Thing)


def pair(items: Sequence[Item], things: Sequence[T]) -> tuple[list[tuple[Item, T]], list[Item]]:
    """Items with the things that they are, and items that are none; those without a box are left
    out."""
    free = list(things)
    pairs, wrong = [], []
    placed = [item for item in items if item.box is not None]
    for item in sorted(placed, key=lambda item: -item.score):
        assert item.box is not None
        overlaps = [
            (iou(item.box, thing.box), i)
            for i, thing in enumerate(free)
            if thing.label == item.label and thing.box is not None
        ]
        best, i = max(overlaps, default=(0.0, 0))
        if best >= IOU:
            pairs.append((item, free.pop(i)))
        else:
            wrong.append(item)
    return pairs, wrong


def match(items: Sequence[Item], things: Sequence[Thing]) -> tuple[int, list[Item]]:
    """How many items are right, and those that are not; items without a box count neither way."""
    pairs, wrong = pair(items, things)
    return len(pairs), wrong
