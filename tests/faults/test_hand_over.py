"""What the protocol's model leaves out: capture started anew and rings made anew while the lanes
change places, through every short schedule of who moves; readers of the journal that are lapped or
started again. Feed, seat, store, ring and account are the real ones."""

import itertools
from collections.abc import Iterator

import pytest

from common import frames, slots
from common.config import Camera
from common.errors import FencedError, RingFullError
from common.frames import Ring, Shape, generations
from common.paths import Paths
from common.states import Policy
from common.store import Store
from services.inference.feed import Feed
from services.inference.seat import Seat

CAMERA = "belt"
SIZES = (8, 16)
FRAMES = 7


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "JOURNAL", 16)
    monkeypatch.setattr(frames, "ENTRY_BYTES", 64)
    monkeypatch.setattr(frames, "RESULT_BYTES", 24)


class Capture:
    """Writes FRAMES frames; the process is started again after the second, the picture's size
    changes after the third, and back after the fifth."""

    def __init__(self, paths: Paths, policy: Policy) -> None:
        self._paths, self._policy = paths, policy
        self._todo = ["frame", "frame", "start", "frame", "resize", "frame", "frame", "resize"]
        self._todo += ["frame", "start", "frame"]
        self._size = 0
        self._ring = self._attach()

    def _attach(self) -> Ring:
        shape = Shape(SIZES[self._size % 2], 1, 1, 2, self._policy)
        return Ring.attach(self._paths.rings, self._paths.accounts, CAMERA, shape)

    def step(self) -> None:
        if not self._todo:
            return
        what = self._todo[0]
        if what == "frame":
            try:
                self._ring.begin()
            except RingFullError:
                return  # a file is paused
            self._ring.publish(1, 1)
        else:
            self._ring.close()
            self._size += what == "resize"
            self._ring = self._attach()
        self._todo.pop(0)

    @property
    def done(self) -> bool:
        return not self._todo

    def close(self) -> None:
        self._ring.close()


class Lane:
    """Takes a frame in one step and decides it in the next: it may be replaced in between."""

    def __init__(self, paths: Paths, name: str, policy: Policy) -> None:
        self.seat = Seat.__new__(Seat)
        self.seat.lane = name
        self.seat.store = Store(paths, "main", 2, "boot 1")
        self.seat.record = self.seat.store.commit(lambda record: slots.start(record, name))
        mine = self.seat.record.lanes[name]
        self.seat.slot, self.seat.run = mine.slot, mine.run
        camera = Camera(source="virtual", policy=policy)
        self.feed = Feed(CAMERA, camera, paths, self.seat.raise_fence)
        self._job: tuple[int, int] | None = None
        self.published: list[bytes] = []

    def step(self) -> None:
        feed, seat = self.feed, self.seat
        seat.refresh()
        if seat.live:
            feed.refresh(seat.record.epoch)
        elif feed.ring is not None and feed.ring.fence != feed.epoch:
            feed.release()
        if self._job is None:
            sequence = feed.next_sequence
            if sequence is not None and feed.take(sequence) is not None:
                self._job = sequence, feed.hold
            return
        (sequence, hold), self._job = self._job, None
        if feed.ring is None or hold != feed.hold:
            feed.put_back(sequence, hold)
            return
        result = sequence.to_bytes(8, "little") + feed.epoch.to_bytes(8, "little")
        try:
            feed.decide(sequence, hold, seat.run, 0, "inferred", result)
        except FencedError:
            return
        self.published.append(result)


def decided(paths: Paths) -> Iterator[tuple[int, int, bytes]]:
    """Every decision on the camera: sequence, epoch, result."""
    for generation in generations(paths.rings, CAMERA):
        with Ring.open(paths.rings, paths.accounts, CAMERA, generation) as ring:
            for sequence in range(ring.base + 1, ring.decided + 1):
                if entry := ring.entry(sequence):
                    yield entry.sequence, entry.epoch, entry.result


def clear(paths: Paths) -> None:
    for folder in (paths.rings, paths.accounts, paths.models("main")):
        for path in folder.glob("*"):
            if path.is_file():
                path.unlink()


SCHEDULES = [
    (word, at)
    for word in itertools.product("abc", repeat=5)
    if set(word) == set("abc")
    for at in (3, 12)
]


@pytest.mark.parametrize("policy", [Policy.LATEST, Policy.EVERY])
def test_rings_made_anew_while_lanes_change_places(paths: Paths, policy: Policy) -> None:
    for word, at in SCHEDULES:
        run(paths, policy, word, at)
        clear(paths)


def run(paths: Paths, policy: Policy, word: tuple[str, ...], at: int) -> None:
    capture = Capture(paths, policy)
    a, b = Lane(paths, "a", policy), Lane(paths, "b", policy)
    movers: dict[str, Lane | Capture] = {"a": a, "b": b, "c": capture}
    for step in range(120):
        if step == at:
            b.seat.store.commit(lambda record: slots.take_over(record, "b", "planned"))
        movers[word[step % len(word)]].step()
    assert capture.done
    capture.close()
    found = list(decided(paths))
    sequences = [sequence for sequence, _, _ in found]
    if policy is Policy.EVERY:
        assert sequences == list(range(1, FRAMES + 1)), (word, at)
    else:
        assert sequences == sorted(set(sequences)), (word, at)
        assert sequences[-1] == FRAMES
    epochs = [epoch for _, epoch, _ in found]
    assert epochs == sorted(epochs), (word, at)
    assert epochs[-1] == b.seat.record.epoch
    assert {result for _, _, result in found} == {*a.published, *b.published}
    assert len(found) == len(a.published) + len(b.published)
    newest = generations(paths.rings, CAMERA)[-1]
    with Ring.open(paths.rings, paths.accounts, CAMERA, newest) as ring:
        account = ring.account()
    assert account.balanced
    assert (account.captured, account.in_flight) == (FRAMES, 0)
    assert account.inferred == len(found)


def test_a_reader_that_is_lapped_knows_how_many_it_missed(paths: Paths) -> None:
    shape = Shape(8, 1, 1, 2, Policy.EVERY)
    with Ring.create(paths.rings, paths.accounts, CAMERA, shape) as ring:
        decide(ring, 40)
        cursor = 3
        there = [n for n in range(cursor + 1, ring.decided + 1) if ring.entry(n) is not None]
        assert there == list(range(40 - frames.JOURNAL + 1, 41))
        missed = ring.decided - frames.JOURNAL - cursor
        assert missed == ring.decided - cursor - len(there) == 21
        assert [read(ring, n) for n in there] == there


def test_a_reader_that_is_started_again_finds_the_same(paths: Paths) -> None:
    shape = Shape(8, 1, 1, 2, Policy.EVERY)
    with Ring.create(paths.rings, paths.accounts, CAMERA, shape) as ring:
        decide(ring, 10)
        first = [ring.entry(n) for n in range(1, 11)]
        with Ring.open(paths.rings, paths.accounts, CAMERA, 1) as again:
            assert [again.entry(n) for n in range(1, 11)] == first
        decide(ring, 5)
        assert [ring.entry(n) for n in range(1, 11)] == first
        assert ring.entry(16) is None


def decide(ring: Ring, count: int) -> None:
    for _ in range(count):
        ring.begin()
        sequence = ring.publish(1, 1)
        ring.decide(sequence, 0, 1, 0, "inferred", sequence.to_bytes(8, "little"))


def read(ring: Ring, sequence: int) -> int:
    entry = ring.entry(sequence)
    assert entry is not None
    return int.from_bytes(entry.result, "little")
