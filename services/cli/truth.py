"""Precision and recall of results against the ground truth of the virtual camera."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.engine.matching import match
from common.geometry import Box
from common.messages import Item, TruthItem

EDGE = 0.01  # share of width and height
_PENDING = 512  # frames of which one half is awaited
_WINDOW = 1000  # the newest frames count
_KNOWN = 256  # frames whose truth is kept for whoever shows them


def compare(items: Sequence[Item], truth: Sequence[TruthItem], seen: Box) -> tuple[int, int, int]:
    """How many items are right, how many count, how many things are true.

    What is cut by the edge of what is seen of the full picture may be no truth, too little of it
    being visible; so an item there that finds none counts neither way. Truth beyond does not count.
    """
    whole = [one for one in truth if _margin(one.box, seen) >= 0]
    right, wrong = match(items, whole)
    cut = sum(item.box is not None and _margin(item.box, seen) < EDGE for item in wrong)
    return right, len(items) - cut, len(whole)


def _margin(box: Box, seen: Box) -> float:
    """From a box to the nearest edge, as a share of width or height; negative beyond it."""
    width, height = seen[2] - seen[0], seen[3] - seen[1]
    return min(
        (box[0] - seen[0]) / width, (seen[2] - box[2]) / width,
        (box[1] - seen[1]) / height, (seen[3] - box[3]) / height,
    )  # fmt: skip


@dataclass
class Score:
    """Joins results and truth by ring and sequence, whichever comes first."""

    seen: Box  # what the picture shows of the full one
    _counts: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _truth: dict[tuple[int, int], Sequence[TruthItem]] = field(default_factory=dict)
    _items: dict[tuple[int, int], Sequence[Item]] = field(default_factory=dict)
    known: dict[tuple[int, int], Sequence[TruthItem]] = field(default_factory=dict)

    def add_truth(self, frame: tuple[int, int], truth: Sequence[TruthItem]) -> None:
        self._truth[frame] = self.known[frame] = truth
        self._join(frame)

    def add_items(self, frame: tuple[int, int], items: Sequence[Item]) -> None:
        self._items[frame] = items
        self._join(frame)

    def _join(self, frame: tuple[int, int]) -> None:
        if frame in self._truth and frame in self._items:
            truth, items = self._truth.pop(frame), self._items.pop(frame)
            self._counts.append(compare(items, truth, self.seen))
        for kept, most in ((self._truth, _PENDING), (self._items, _PENDING), (self.known, _KNOWN)):
            while len(kept) > most:
                del kept[next(iter(kept))]

    @property
    def frames(self) -> int:
        return len(self._counts)

    @property
    def precision(self) -> float | None:
        """Right of what was reported; None where nothing was."""
        return self._share(1)

    @property
    def recall(self) -> float | None:
        """Reported of what is there; None where nothing is."""
        return self._share(2)

    def _share(self, of: int) -> float | None:
        whole = sum(count[of] for count in self._counts)
        return sum(count[0] for count in self._counts) / whole if whole else None
