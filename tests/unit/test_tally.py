"""What a lane counts: frames that showed something, offered and decided, and the scores on them."""

import time

from common.messages import Item, Result, Stages
from common.states import Sight, Validity
from services.inference.tally import Tally


def result(sequence: int, validity: str = Validity.VALID, camera: str = "belt") -> Result:
    stages = Stages(0, 0, 0, 0, 0, 0)
    return Result(camera, 1, sequence, 1, validity, 0, 0, "", "", 1, "", "", (), stages)


def counted(tally: Tally) -> tuple[int, int, int, int]:
    return tally.offered, tally.shown, tally.inferred, tally.valid


def test_skipped_frames_count_as_offered_and_blind_ones_nowhere() -> None:
    tally, items = Tally(), [Item("nut", 0.95, 0), Item("nut", 1.0, 0), Item("bolt", 0.41, 1)]
    tally.add(result(1000), 1, Sight.CLEAR, items)  # what came before waited for another lane
    assert counted(tally) == (1, 1, 1, 1)
    tally.add(result(1003), 1, Sight.CLEAR, [])
    assert counted(tally) == (4, 2, 2, 2)
    before = time.monotonic_ns()
    assert 0 < tally.shown_ns < before
    for sequence in range(1004, 1100):
        tally.add(result(sequence, Validity.NOT_INFERRED), 1, Sight.DARK, [])
    assert (counted(tally), tally.shown_ns < before) == ((4, 2, 2, 2), True)
    tally.add(result(1101), 1, Sight.CLEAR, [])
    assert counted(tally) == (6, 3, 3, 3)
    tally.add(result(7, camera="other"), 1, Sight.CLEAR, [])
    tally.add(result(2000), 2, Sight.CLEAR, [])  # the right to decide was taken anew
    assert counted(tally) == (8, 5, 5, 5)
    assert tally.scores == (0, 0, 0, 0, 1, 0, 0, 0, 0, 2)


def test_what_is_valid_and_whose_scores_count() -> None:
    """Without an accelerator nothing is said of the model: neither ill nor by the CPU's scores."""
    tally, items = Tally(), [Item("nut", 0.05, 0)]
    for sequence, validity in enumerate(Validity, start=1):
        tally.add(result(sequence, validity), 1, Sight.CLEAR, items)
    assert counted(tally) == (5, 5, 4, 2)  # stale and failed are not valid
    assert tally.scores[0] == 2  # valid, stale
