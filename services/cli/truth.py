"""Precision and recall of results against the ground truth of the virtual camera."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.engine.matching import match
from common.messages import Item, TruthItem

EDGE = 0.01  # of width and height
_PENDING = 512  # frames of which one half is awaited
_WINDOW = 1000  # the newest frames count


def compare(
    items: Sequence[Item], truth: Sequence[TruthItem], size: tuple[int, int]
) -> tuple[int, int, int]:
    """How many items are right, how many count, how many things are true.

    What is cut by the picture's edge (`size`: width, height) may be no truth, too little of it
    being visible; so an item there that finds none counts neither way.
    """
    right, wrong = match(items, truth)
    cut = sum(_at_edge(item, size) for item in wrong)
    return right, len(items) - cut, len(truth)


def _at_edge(item: Item, size: tuple[int, int]) -> bool:
    assert item.box is not None
    x1, y1, x2, y2 = (side / size[i % 2] for i, side in enumerate(item.box))
    return min(x1, y1) < EDGE or max(x2, y2) > 1 - EDGE


@dataclass
class Score:
    """Joins results and truth by ring and sequence, whichever comes first."""

    size: tuple[int, int]
    _counts: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _truth: dict[tuple[int, int], Sequence[TruthItem]] = field(default_factory=dict)
    _items: dict[tuple[int, int], Sequence[Item]] = field(default_factory=dict)

    def add_truth(self, frame: tuple[int, int], truth: Sequence[TruthItem]) -> None:
        self._truth[frame] = truth
        self._join(frame)

    def add_items(self, frame: tuple[int, int], items: Sequence[Item]) -> None:
        self._items[frame] = items
        self._join(frame)

    def _join(self, frame: tuple[int, int]) -> None:
        if frame in self._truth and frame in self._items:
            truth, items = self._truth.pop(frame), self._items.pop(frame)
            self._counts.append(compare(items, truth, self.size))
        for pending in (self._truth, self._items):
            while len(pending) > _PENDING:
                del pending[next(iter(pending))]

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
