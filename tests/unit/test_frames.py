"""The frame ring on real files: both policies, the journal, the fence, attempts, re-creation."""

import fcntl
import os

import pytest

from common.errors import FencedError, RingError, RingFullError
from common.frames import JOURNAL, RESULT_BYTES, Ring, Shape, generations, remove_drained
from common.paths import Paths
from common.states import Policy

LATEST = Shape(16, 8, slots=4)
EVERY = Shape(16, 8, slots=4, policy=Policy.EVERY)
LARGER = Shape(32, 8, slots=4, policy=Policy.EVERY)


def attach(paths: Paths, shape: Shape) -> Ring:
    return Ring.attach(paths.rings, paths.accounts, "belt", shape)


def opened(paths: Paths, generation: int) -> Ring:
    return Ring.open(paths.rings, paths.accounts, "belt", generation, writable=True)


def write(ring: Ring, count: int = 1) -> None:
    for _ in range(count):
        slot = ring.begin()
        slot[:] = bytes([(ring.written + 1) % 251]) * ring.shape.picture_bytes
        ring.publish(captured_ns=10 * ring.written, filled_ns=10 * ring.written + 5)


def decide(
    ring: Ring, sequence: int, epoch: int = 0, kind: str = "inferred", torn: int = 0
) -> None:
    ring.decide(sequence, epoch, run=7, slot=9, kind=kind, result=b"r%d" % sequence, torn=torn)


def counts(ring: Ring) -> dict[str, int]:
    account = ring.account()
    assert account.balanced
    return {name: count for name, count in vars(account).items() if count}


def everything(ring: Ring, paths: Paths) -> tuple[bytes, bytes]:
    return ring.path.read_bytes(), (paths.accounts / "belt").read_bytes()


# -- pixels --------------------------------------------------------------------------------------


def test_latest_overwrites_and_a_reader_can_tell(paths: Paths) -> None:
    ring = attach(paths, LATEST)
    write(ring, 3)
    view = ring.pixels(2)
    assert view is not None
    assert bytes(view) == b"\2" * LATEST.picture_bytes
    assert ring.times(2) == (10, 15)
    assert ring.intact(2)
    write(ring, 2)
    assert ring.intact(2)
    slot = ring.begin()  # of frame 6, which lies where 2 was
    assert not ring.intact(2)
    assert ring.pixels(2) is None
    slot[:1] = b"\xff"
    assert view[0] == 255  # the very bytes: nothing is copied
    assert ring.pixels(6) is None
    ring.publish(0, 0)
    assert ring.intact(6)


@pytest.mark.parametrize("sequence", [-1, 0, 1, 5])
def test_frames_that_are_not_there(paths: Paths, sequence: int) -> None:
    ring = attach(paths, LATEST)
    assert ring.pixels(sequence) is None
    assert ring.entry(sequence) is None
    with pytest.raises(FencedError, match=f"frame {sequence} "):
        decide(ring, sequence)


def test_every_is_full_exactly_at_capacity(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    write(ring, 4)
    before = everything(ring, paths)
    with pytest.raises(RingFullError, match="belt: frame 1 is undecided"):
        ring.begin()
    assert everything(ring, paths) == before
    decide(ring, 1)
    write(ring)
    with pytest.raises(RingFullError, match="frame 2 "):
        ring.begin()
    assert [ring.intact(n) for n in range(1, 6)] == [False, True, True, True, True]
    ring.count_overrun()
    assert counts(ring) == {"captured": 6, "inferred": 1, "overrun": 1, "in_flight": 4}


def test_every_refuses_gaps_and_latest_counts_them(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    write(ring, 4)
    with pytest.raises(FencedError, match="frame 2 can't follow 0"):
        decide(ring, 2)
    ring.close()
    ring = Ring.attach(paths.rings, paths.accounts, "other", LATEST)
    write(ring, 9)
    decide(ring, 3)
    decide(ring, 8, kind="failed", torn=3)
    decide(ring, 9, kind="not_inferred", torn=2)  # more than were passed over: none was torn
    assert counts(ring) == {
        "captured": 9, "inferred": 1, "failed": 1, "not_inferred": 1, "skipped": 3, "torn": 3,
    }  # fmt: skip


# -- journal -------------------------------------------------------------------------------------


def test_journal_has_what_was_decided(paths: Paths) -> None:
    ring = attach(paths, LATEST)
    write(ring, 5)
    ring.raise_fence(3)
    decide(ring, 2, epoch=3)
    ring.decide(5, 3, 11, 12, "failed", b"")
    with Ring.open(paths.rings, paths.accounts, "belt", 1) as reader:
        two, five = reader.entry(2), reader.entry(5)
        assert two is not None
        assert five is not None
        assert (two.sequence, two.epoch, two.run, two.slot, two.result) == (2, 3, 7, 9, b"r2")
        assert (five.epoch, five.run, five.slot, five.result) == (3, 11, 12, b"")
        assert [reader.entry(n) for n in (0, 1, 3, 4, 6)] == [None] * 5


def test_journal_laps_after_its_length(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    for sequence in range(1, JOURNAL + 3):
        write(ring)
        decide(ring, sequence)
    kept = [n for n in range(JOURNAL + 3) if ring.entry(n)]
    assert kept == list(range(3, JOURNAL + 3))


def test_the_longest_result_fits_and_one_byte_more_changes_nothing(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    write(ring, 2)
    before = everything(ring, paths)
    with pytest.raises(RingError, match=f"a result of {RESULT_BYTES + 1} bytes; {RESULT_BYTES} "):
        ring.decide(1, 0, 0, 0, "inferred", bytes(RESULT_BYTES + 1))
    assert everything(ring, paths) == before
    longest = os.urandom(RESULT_BYTES)
    ring.decide(1, 0, 0, 0, "inferred", longest)
    decide(ring, 2)
    entry = ring.entry(1)
    assert entry is not None
    assert entry.result == longest


def test_an_entry_that_was_never_committed_is_gone_once_its_frame_is_skipped(paths: Paths) -> None:
    ring = attach(paths, LATEST)
    write(ring, 3)
    decide(ring, 2)
    ring._words[4 * 8] = 0  # as though the lane had been killed just before its last store
    assert ring.entry(2) is None
    decide(ring, 3)
    assert ring.entry(2) is None
    assert counts(ring) == {"captured": 3, "inferred": 1, "skipped": 2}


# -- who may decide ------------------------------------------------------------------------------


def test_fence_only_rises(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    ring.raise_fence(4)
    ring.raise_fence(4)
    with pytest.raises(FencedError, match="belt: fence is at epoch 4, not 3"):
        ring.raise_fence(3)
    assert ring.fence == 4


def test_refused_decisions_change_nothing(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    write(ring, 4)
    ring.raise_fence(2)
    decide(ring, 1, epoch=2)
    before = everything(ring, paths)
    for sequence, epoch in ((2, 1), (2, 3), (1, 2), (0, 2), (3, 2), (5, 2), (6, 2)):
        with pytest.raises(FencedError):
            decide(ring, sequence, epoch)
        assert everything(ring, paths) == before
    with pytest.raises(ValueError, match="not in tuple"):
        decide(ring, 2, 2, kind="guessed")
    assert everything(ring, paths) == before
    decide(ring, 2, epoch=2)  # and the lock is free


def test_deciding_waits_for_the_lock_and_reading_does_not(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    write(ring)
    other = os.open(paths.accounts / "belt", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    child = os.fork()
    if child == 0:
        with opened(paths, 1) as lane:
            decide(lane, 1)
        os._exit(0)
    write(ring, 3)
    assert ring.account().in_flight == 4
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert ring.decided == 0
    fcntl.flock(other, fcntl.LOCK_UN)
    os.close(other)
    assert os.waitpid(child, 0)[1] == 0
    assert ring.decided == 1


def test_attempts_count_per_frame(paths: Paths) -> None:
    ring = attach(paths, EVERY)
    assert [ring.attempt(1), ring.attempt(1)] == [1, 2]
    with opened(paths, 1) as successor:
        assert [successor.attempt(1), successor.attempt(2), successor.attempt(1)] == [3, 1, 1]


# -- restart and re-creation ---------------------------------------------------------------------


def test_capture_restarted_goes_on_in_the_same_ring(paths: Paths) -> None:
    with attach(paths, EVERY) as ring:
        write(ring, 2)
        decide(ring, 1)
        ring.begin()[:3] = b"\1\2\3"  # killed while it filled the slot
    with attach(paths, EVERY) as ring:
        assert (ring.generation, ring.written, ring.decided) == (1, 2, 1)
        assert ring.pixels(3) is None
        write(ring)
        assert counts(ring) == {"captured": 3, "inferred": 1, "in_flight": 2}
    assert generations(paths.rings, "belt") == [1]


def test_sequence_goes_on_and_every_is_drained_first(paths: Paths) -> None:
    first = attach(paths, EVERY)
    write(first, 3)
    decide(first, 1)
    second = attach(paths, LARGER)
    assert (second.generation, second.base, second.written, second.decided) == (2, 3, 3, 3)
    assert (first.successor, first.drained, second.successor) == (2, False, 0)
    write(second)
    assert second.written == 4
    remove_drained(paths.rings, paths.accounts, "belt")
    assert generations(paths.rings, "belt") == [1, 2]
    before = everything(second, paths)
    with pytest.raises(FencedError, match="belt: ring 1 is to be decided first"):
        decide(second, 4)
    assert everything(second, paths) == before
    assert counts(second) == {"captured": 4, "inferred": 1, "in_flight": 3}
    decide(first, 2)
    assert counts(second) == {"captured": 4, "inferred": 2, "in_flight": 2}
    decide(first, 3, kind="failed")
    assert first.drained
    remove_drained(paths.rings, paths.accounts, "belt")
    assert generations(paths.rings, "belt") == [2]
    decide(second, 4)
    assert counts(second) == {"captured": 4, "inferred": 3, "failed": 1}
    assert second.entry(3) is None
    entry = first.entry(3)  # who has it open can still read it
    assert entry is not None


def test_drained_rings_can_be_kept_for_readers_of_the_journal(paths: Paths) -> None:
    for number in range(5):
        ring = attach(paths, Shape(16 + 8 * number, 8, policy=Policy.EVERY))
        write(ring)
        decide(ring, ring.written)
    assert remove_drained(paths.rings, paths.accounts, "belt", keep=2)
    assert generations(paths.rings, "belt") == [3, 4, 5]
    with Ring.open(paths.rings, paths.accounts, "belt", 3) as kept:
        assert kept.entry(3) is not None
    assert not remove_drained(paths.rings, paths.accounts, "belt")
    assert generations(paths.rings, "belt") == [5]


def test_latest_moves_on_at_once(paths: Paths) -> None:
    first = attach(paths, LATEST)
    write(first, 5)
    decide(first, 2)
    second = attach(paths, Shape(32, 8))
    assert first.drained
    assert remove_drained(paths.rings, paths.accounts, "belt")  # what counts is told by the first
    decide(first, 3)  # was on its way; nothing is decided in the new ring yet
    write(second, 2)
    decide(second, 7)
    assert counts(second) == {"captured": 7, "inferred": 3, "skipped": 4}
    before = everything(first, paths)
    with pytest.raises(FencedError, match="frames of ring 2 are decided already"):
        decide(first, 4)
    assert everything(first, paths) == before
    assert not remove_drained(paths.rings, paths.accounts, "belt")
    assert generations(paths.rings, "belt") == [2]


def test_from_latest_to_every_the_frames_passed_over_are_skipped(paths: Paths) -> None:
    first = attach(paths, LATEST)
    write(first, 5)
    decide(first, 2)
    second = attach(paths, EVERY)
    write(second, 2)
    with pytest.raises(FencedError, match="frame 7 can't follow 5"):
        decide(second, 7)
    decide(second, 6)
    assert counts(second) == {"captured": 7, "inferred": 2, "skipped": 4, "in_flight": 1}


def test_frames_of_a_ring_removed_by_hand_are_skipped(paths: Paths) -> None:
    with attach(paths, EVERY) as first:
        write(first, 3)
        second = attach(paths, LARGER)
        first.path.unlink()
    write(second)
    decide(second, 4)
    assert counts(second) == {"captured": 4, "inferred": 1, "skipped": 3}


def test_all_rings_removed_by_hand_starts_afresh(paths: Paths) -> None:
    with attach(paths, LATEST) as ring:
        write(ring, 9)
        decide(ring, 8)
        decide(ring, 9)
        ring.path.unlink()
    ring = attach(paths, LATEST)
    assert counts(ring) == {}
    write(ring, 9)
    for sequence in (1, 4, 9):
        decide(ring, sequence)
        assert ring.account().in_flight == 9 - sequence
    assert counts(ring) == {"captured": 9, "inferred": 3, "skipped": 6}


def test_two_size_changes_in_a_row_drain_in_order(paths: Paths) -> None:
    rings = []
    for shape in (EVERY, LARGER, EVERY):
        rings.append(attach(paths, shape))
        write(rings[-1], 2)
    assert [ring.successor for ring in rings] == [2, 3, 0]
    order = [(2, 5, 2), (1, 3, 1), (0, 1, 0), (2, 5, 2), (1, 3, 1), (0, 2, 0), (2, 5, 2)]
    for ring, sequence, pending in order:
        if pending:
            with pytest.raises(FencedError, match=f"ring {pending} is to be decided first"):
                decide(rings[ring], sequence)
        else:
            decide(rings[ring], sequence)
    for ring, sequence in ((1, 3), (1, 4), (2, 5), (2, 6)):
        decide(rings[ring], sequence)
    assert counts(rings[-1]) == {"captured": 6, "inferred": 6}
