"""What a lane counts of the frames it decides, for the watchdog to judge its model by."""

import time
from collections.abc import Sequence

from common.messages import Item, Result
from common.states import Sight, Validity
from common.verdict import BINS, binned


class Tally:
    """Frames that showed nothing count nowhere: a blind camera is not the model's fault."""

    def __init__(self) -> None:
        self.offered = self.shown = self.inferred = self.valid = self.shown_ns = 0
        self._scores = [0] * BINS
        self._last: dict[str, tuple[int, int]] = {}  # by camera: hold, sequence

    @property
    def scores(self) -> tuple[int, ...]:
        return tuple(self._scores)

    def add(self, result: Result, hold: int, sight: Sight, items: Sequence[Item]) -> None:
        """A decision. What came before the first one of a hold waited for another lane."""
        known, last = self._last.get(result.camera, (0, 0))
        self._last[result.camera] = hold, result.sequence
        if sight is not Sight.CLEAR:
            return
        self.offered += result.sequence - last if known == hold else 1
        self.shown += 1
        self.shown_ns = time.monotonic_ns()
        self.inferred += result.validity != Validity.NOT_INFERRED
        self.valid += result.validity in (Validity.VALID, Validity.DEGRADED)
        if result.validity in (Validity.VALID, Validity.STALE):
            new = binned(item.score for item in items)
            self._scores = [a + b for a, b in zip(self._scores, new, strict=True)]
