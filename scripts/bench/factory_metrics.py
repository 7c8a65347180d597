"""How the factory benchmark counts: right, wrong, missed, a class at a time.

A prediction is right if it overlaps a thing of its own class by an IoU of at least 0.5; best score
first, each takes the free thing it overlaps most. Things less than 60 % inside the picture are no
truth: a prediction of their class that covers them, or is covered by them, by half of itself
counts neither way.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.capture.scene import LABELS, VISIBLE, Thing, clip
from services.capture.sprite import Box

IOU = 0.5


@dataclass(frozen=True)
class Found:
    label: str
    score: float
    box: Box


@dataclass
class Count:
    right: int = 0
    wrong: int = 0
    missed: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.right + other.right, self.wrong + other.wrong, self.missed + other.missed)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)

    @property
    def f1(self) -> float:
        return 2 * self.right / max(1, 2 * self.right + self.wrong + self.missed)


def common(a: Box, b: Box) -> float:
    """Area of the intersection."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    both = common(a, b)
    return both / (area(a) + area(b) - both) if both else 0.0


def count(
    found: Sequence[Found], things: Iterable[Thing], size: tuple[int, int] = (640, 480)
) -> dict[str, Count]:
    """Counts by label of one picture of `size` (width, height)."""
    counts = {label: Count() for label in LABELS}
    there = [(thing.label, clip(thing.box, *size), thing.visible) for thing in things]
    free = [(label, box) for label, box, visible in there if visible >= VISIBLE]
    open_to_doubt = [(label, box) for label, box, visible in there if visible < VISIBLE]
    for item in sorted(found, key=lambda item: -item.score):
        same = [
            (iou(item.box, box), i) for i, (label, box) in enumerate(free) if label == item.label
        ]
        best, i = max(same, default=(0.0, -1))
        if best >= IOU:
            del free[i]
            counts[item.label].right += 1
        elif not any(
            label == item.label and common(item.box, box) >= 0.5 * min(area(item.box), area(box))
            for label, box in open_to_doubt
        ):
            counts[item.label].wrong += 1
    for label, _ in free:
        counts[label].missed += 1
    return counts
