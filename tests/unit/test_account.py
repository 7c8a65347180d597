"""The account of every frame, held to a model of it over random lives of a camera."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.account import COUNTS, Account
from common.errors import FencedError, RingFullError
from common.frames import Ring, Shape, generations, remove_drained
from common.states import Policy

SHAPES = [
    Shape(16, 4, slots=2),
    Shape(32, 4, slots=3),
    Shape(16, 4, slots=2, policy=Policy.EVERY),
    Shape(32, 4, slots=3, policy=Policy.EVERY),
]
KINDS = ("inferred", "not_inferred", "failed")
STORES = 15  # of one decision: 7 of totals, 7 of the entry, then `decided`


class Died(BaseException):
    """Stands for SIGKILL: the stores made so far stay, the lock is free."""


class Mortal:
    """A memory of which the `left`-th store from now kills."""

    def __init__(self, view: Any, life: list[int]) -> None:
        self._view, self._life = view, life

    def __getitem__(self, at: Any) -> Any:
        return self._view[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        if self._life[0] == 0:
            raise Died
        self._life[0] -= 1
        self._view[at] = value


@dataclass
class Expected:
    """What one ring of the model is."""

    shape: Shape
    base: int
    written: int
    decided: int
    removed: bool = False


class Camera(RuleBasedStateMachine):
    """Capture, two lanes and a cleaner on one camera's files; `rings` is what they should be."""

    @initialize(shape=st.sampled_from(SHAPES))
    def start(self, shape: Shape) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="vigil-test-"))
        self.paths = self.folder / "rings", self.folder / "accounts"
        for path in self.paths:
            path.mkdir()
        self.counts: Counter[str] = Counter()
        self.overrun = 0
        self.last = 0
        self.epoch = 0
        self.results: dict[int, bytes] = {}
        self.rings: list[Expected] = []
        self.capture = Ring.attach(*self.paths, "belt", shape)
        self.rings.append(Expected(shape, 0, 0, 0))

    def teardown(self) -> None:
        if hasattr(self, "capture"):
            self.capture.close()
            shutil.rmtree(self.folder)

    # -- capture

    @rule(count=st.integers(1, 7))
    def frames(self, count: int) -> None:
        newest = self.rings[-1]
        for _ in range(count):
            full = newest.written - newest.decided >= newest.shape.slots
            if full and newest.shape.policy is Policy.EVERY:
                with pytest.raises(RingFullError):
                    self.capture.begin()
                self.capture.count_overrun()
                self.overrun += 1
            else:
                self.capture.begin()[:4] = b"1234"
                self.capture.publish(1, 2)
                newest.written += 1

    @rule(shape=st.sampled_from(SHAPES))
    def restart_capture(self, shape: Shape) -> None:
        self.capture.close()
        self.capture = Ring.attach(*self.paths, "belt", shape)
        if shape != self.rings[-1].shape:
            written = self.rings[-1].written
            self.rings.append(Expected(shape, written, written, written))
        assert self.capture.generation == len(self.rings)

    @rule()
    def clean_up(self) -> None:
        remove_drained(*self.paths, "belt")
        there = generations(self.paths[0], "belt")
        for number, ring in enumerate(self.rings, start=1):
            if not ring.removed and number not in there:
                assert number < len(self.rings)
                assert ring.shape.policy is Policy.LATEST or ring.decided == ring.written
                ring.removed = True
        assert there == [n for n, r in enumerate(self.rings, start=1) if not r.removed]

    # -- lanes

    @contextmanager
    def lane(self, number: int) -> Iterator[Ring]:
        with Ring.open(*self.paths, "belt", number, writable=True) as ring:
            yield ring

    def current(self) -> int:
        """The number of the ring to decide in: the oldest that is not drained."""
        for number, ring in enumerate(self.rings, start=1):
            newest = number == len(self.rings)
            every = ring.shape.policy is Policy.EVERY and ring.decided < ring.written
            if newest or (not ring.removed and every):
                return number
        raise AssertionError

    def choose(self, choice: int) -> int:
        """A frame that may be decided next in the current ring; 0 while there is none."""
        ring = self.rings[self.current() - 1]
        waiting = ring.written - ring.decided
        if not waiting:
            return 0
        every = ring.shape.policy is Policy.EVERY
        return ring.decided + 1 + (0 if every else choice % waiting)

    def committed(self, sequence: int, kind: str, torn: int, result: bytes) -> None:
        passed = sequence - self.last - 1
        self.counts[kind] += 1
        self.counts["torn"] += min(torn, passed)
        self.counts["skipped"] += passed - min(torn, passed)
        self.last = self.rings[self.current() - 1].decided = sequence
        self.results[sequence] = result

    @rule(choice=st.integers(0, 9), kind=st.sampled_from(KINDS), torn=st.integers(0, 3))
    def decide(self, choice: int, kind: str, torn: int) -> None:
        if sequence := self.choose(choice):
            with self.lane(self.current()) as ring:
                ring.raise_fence(self.epoch)
                result = b"%d by %d" % (sequence, self.epoch)
                ring.decide(sequence, self.epoch, 1, 2, kind, result, torn)
            self.committed(sequence, kind, torn, result)

    @rule(
        choice=st.integers(0, 9),
        kind=st.sampled_from(KINDS),
        torn=st.integers(0, 3),
        stores=st.integers(0, STORES + 2),
    )
    def die_deciding(self, choice: int, kind: str, torn: int, stores: int) -> None:
        if not (sequence := self.choose(choice)):
            return
        with self.lane(self.current()) as ring:
            ring.raise_fence(self.epoch)
            kept, life = (ring._words, ring._bytes, ring._totals._words), [stores]
            mortal: list[Any] = [Mortal(view, life) for view in kept]
            ring._words, ring._bytes, ring._totals._words = mortal
            with suppress(Died):
                ring.decide(sequence, self.epoch, 1, 2, kind, b"never", torn)
                self.committed(sequence, kind, torn, b"never")
            ring._words, ring._bytes, ring._totals._words = kept

    @rule()
    def hand_over(self) -> None:
        self.epoch += 1
        for number, ring in enumerate(self.rings, start=1):
            if not ring.removed:
                with self.lane(number) as lane:
                    lane.raise_fence(self.epoch)

    @precondition(lambda self: self.epoch > 0)
    @rule(choice=st.integers(0, 9))
    def the_old_lane_tries(self, choice: int) -> None:
        with self.lane(self.current()) as ring:
            ring.raise_fence(self.epoch)
            with pytest.raises(FencedError):
                ring.decide(self.choose(choice), self.epoch - 1, 1, 2, "inferred", b"")
            with pytest.raises(FencedError):
                ring.raise_fence(self.epoch - 1)

    @precondition(lambda self: self.current() < len(self.rings))
    @rule()
    def a_lane_runs_ahead(self) -> None:
        """Before the older ring is drained."""
        number, newest = len(self.rings), self.rings[-1]
        if newest.written > newest.decided:
            with self.lane(number) as ring:
                ring.raise_fence(self.epoch)
                with pytest.raises(FencedError, match="is to be decided first"):
                    ring.decide(newest.decided + 1, self.epoch, 1, 2, "inferred", b"")

    # -- what must hold

    @invariant()
    def account_is_exact(self) -> None:
        account = self.capture.account()
        written = self.rings[-1].written
        expected = Account(
            captured=written + self.overrun,
            **{name: self.counts[name] for name in COUNTS},
            overrun=self.overrun,
            in_flight=written - self.last,
        )
        assert account == expected
        assert account.balanced

    @invariant()
    def journal_is_exact(self) -> None:
        for number, expected in enumerate(self.rings, start=1):
            if not expected.removed:
                with Ring.open(*self.paths, "belt", number) as ring:
                    assert (ring.base, ring.written, ring.decided) == (
                        expected.base, expected.written, expected.decided,
                    )  # fmt: skip
                    for sequence in range(max(expected.base, expected.written - 9), ring.written):
                        entry = ring.entry(sequence + 1)
                        result = self.results.get(sequence + 1)
                        assert (entry.result if entry else None) == result


TestCamera = Camera.TestCase
TestCamera.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_an_account_that_does_not_add_up_says_so() -> None:
    good = Account(10, 1, 1, 1, 1, 1, 2, 3)
    assert good.balanced
    for name in vars(good):
        assert not Account(**(vars(good) | {name: 7})).balanced
    assert not Account(1, 2, 0, 0, 0, 0, 0, -1).balanced
