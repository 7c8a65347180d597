"""The ring's own code killed at each of its steps: before every bytecode of what decides and hands
over, before every line of what makes a ring. After each death the next process must go on."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from common import account, frames
from common.frames import Ring, Shape, generations
from common.paths import Paths
from common.states import Policy

FILES = (account.__file__, frames.__file__)
SMALL = Shape(16, 8, slots=3)


def killed(belt: "Belt", action: Callable[[Ring], Any], at: int, *, bytecodes: bool) -> bool:
    """Run `action` in a child that is SIGKILLed before its step number `at` (from 1) in the ring's
    code; False where the action ended before that. The child opens the ring itself: a lock on an
    inherited descriptor would outlive it."""
    child = os.fork()
    if child == 0:
        try:
            ring = belt.ring()
            _die_before(at, "opcode" if bytecodes else "line")
            action(ring)
        except BaseException as error:  # noqa: BLE001 - the child must not return to pytest
            sys.settrace(None)
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def _die_before(at: int, kind: str) -> None:
    left = at

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == kind:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


class Belt:
    """A camera whose files can be put back to what they were."""

    def __init__(self, paths: Paths, shape: Shape) -> None:
        self.paths = paths
        with Ring.attach(paths.rings, paths.accounts, "belt", shape) as ring:
            for _ in range(3):
                publish(ring)
            decide(ring, 1)
            if shape.policy is Policy.LATEST:
                for _ in range(4):
                    publish(ring)
                decide(ring, 4)
            else:
                decide(ring, 2)
                publish(ring)
        self._content = {path: path.read_bytes() for path in self.files()}

    def files(self) -> list[Path]:
        return [*self.paths.rings.iterdir(), self.paths.accounts / "belt"]

    def restore(self) -> None:
        for path in self.files():
            if path in self._content:
                with path.open("r+b") as file:
                    file.write(self._content[path])
            else:
                path.unlink()

    def ring(self, generation: int = 1) -> Ring:
        paths = self.paths
        return Ring.open(paths.rings, paths.accounts, "belt", generation, writable=True)


def publish(ring: Ring) -> None:
    ring.begin()[:] = bytes([ring.written + 1]) * ring.shape.picture_bytes
    ring.publish(ring.written, ring.written)


def decide(ring: Ring, sequence: int, epoch: int = 0, kind: str = "inferred") -> None:
    ring.decide(sequence, epoch, 5, 6, kind, b"%d by %d" % (sequence, epoch), torn=1)


def counts(ring: Ring) -> dict[str, int]:
    assert ring.account().balanced
    return vars(ring.account())


def after(before: dict[str, int], **more: int) -> dict[str, int]:
    return {name: count + more.get(name, 0) for name, count in before.items()}


@pytest.fixture(params=list(Policy))
def belt(paths: Paths, request: pytest.FixtureRequest) -> Belt:
    """`latest`: 7 written, 4 decided, 3 skipped or torn. `every`: 4 written, 2 decided."""
    return Belt(paths, Shape(16, 8, slots=3, policy=request.param))


def check_takeover(belt: Belt, before: dict[str, int], at: int) -> bool:
    """After a lane died in deciding the next frame: all or nothing, and a successor goes on.
    Returns whether the decision was committed."""
    with belt.ring() as ring:
        first, step = (3, 1) if ring.shape.policy is Policy.EVERY else (6, 2)
        passed = {"torn": step - 1}
        committed = ring.decided == first
        once = after(before, inferred=1, in_flight=-step, **passed)
        assert counts(ring) == (once if committed else before), at
        entry = ring.entry(first)
        assert (entry is not None) == committed, at
        assert entry is None or entry.result == b"%d by 0" % first
        ring.raise_fence(9)
        if not committed:
            decide(ring, first, epoch=9, kind="failed")
            once = after(before, failed=1, in_flight=-step, **passed)
        assert counts(ring) == once, at
        decide(ring, first + 1, epoch=9)
        assert counts(ring) == after(once, inferred=1, in_flight=-1), at
        entry = ring.entry(first + 1)
        assert entry is not None
        assert entry.result == b"%d by 9" % (first + 1)
        for _ in range(2):
            publish(ring)
        assert counts(ring) == after(once, inferred=1, in_flight=1, captured=2), at
    return committed


def test_lane_killed_while_it_decides(belt: Belt) -> None:
    with belt.ring() as ring:
        before = counts(ring)
        next_one = 3 if ring.shape.policy is Policy.EVERY else 6

        def action(ring: Ring) -> None:
            decide(ring, next_one)

        ends, at = [], 1
        while killed(belt, action, at, bytecodes=True):
            ends.append(check_takeover(belt, before, at))
            belt.restore()
            at += 1
    assert len(ends) > 300
    assert ends == sorted(ends)  # one step commits, and it stays so
    assert {False, True} == set(ends)


def test_lane_killed_and_its_successor_killed(belt: Belt) -> None:
    with belt.ring() as ring:
        before = counts(ring)
        next_one = 3 if ring.shape.policy is Policy.EVERY else 6

        def first_lane(ring: Ring) -> None:
            decide(ring, next_one)

        def second_lane(ring: Ring) -> None:
            if ring.decided < next_one:
                decide(ring, next_one)

        at = 1
        while killed(belt, first_lane, at, bytecodes=False):
            again = 1
            while killed(belt, second_lane, again, bytecodes=False):
                check_takeover(belt, before, at)
                belt.restore()
                assert killed(belt, first_lane, at, bytecodes=False)
                again += 5
            belt.restore()
            at += 4  # with the 5 above: pairs enough, in seconds
    assert at > 50


def test_capture_killed_while_it_hands_over(belt: Belt) -> None:
    with belt.ring() as ring:
        if ring.shape.policy is Policy.EVERY:
            assert ring.written - ring.decided == 2
        before = counts(ring)

        def action(ring: Ring) -> None:
            publish(ring)

        ends, at = [], 1
        while killed(belt, action, at, bytecodes=True):
            written = ring.written
            assert written - before["captured"] in (0, 1)
            ends.append(written)
            assert counts(ring) == after(before, captured=written - before["captured"],
                                         in_flight=written - before["captured"])  # fmt: skip
            assert ring.pixels(written - 3) is None
            paths, shape = belt.paths, ring.shape
            with Ring.attach(paths.rings, paths.accounts, "belt", shape) as capture:
                if ring.shape.policy is Policy.EVERY and written == 5:
                    decide(capture, 3)
                publish(capture)
                assert capture.written == written + 1
                for sequence in range(capture.written - 2, capture.written + 1):
                    view = capture.pixels(sequence)
                    assert view is not None
                    assert bytes(view) == bytes([sequence]) * shape.picture_bytes, at
                    view.release()
            belt.restore()
            at += 1
    assert len(ends) > 150
    assert ends == sorted(ends)


def test_lane_killed_while_it_raises_the_fence_or_notes_an_attempt(belt: Belt) -> None:
    with belt.ring() as ring:

        def action(ring: Ring) -> None:
            ring.raise_fence(4)
            ring.attempt(3)

        ring.attempt(3)
        before = counts(ring)
        at = 1
        while killed(belt, action, at, bytecodes=True):
            assert ring.fence in (0, 4)
            assert counts(ring) == before
            with belt.ring() as successor:
                successor.raise_fence(5)
                assert 1 <= successor.attempt(3) <= 3
                assert successor.attempt(4) == 1
            belt.restore()
            ring.attempt(3)
            at += 1
    assert at > 80


def test_capture_killed_while_it_makes_the_next_ring(belt: Belt) -> None:
    paths = belt.paths
    with belt.ring() as old:
        before, last = counts(old), old.written

        def action(_: Ring) -> None:
            larger = Shape(32, 8, slots=3, policy=old.shape.policy)
            Ring.attach(paths.rings, paths.accounts, "belt", larger)

        ends, at = [], 1
        while killed(belt, action, at, bytecodes=False):
            seen = generations(paths.rings, "belt")
            ends.append((seen[-1], old.successor))
            with belt.ring(seen[-1]) as newest:
                assert counts(newest) == before
            # The next start may find another size again, or the same as before.
            width = (16, 32, 48)[at % 3]
            shape = Shape(width, 8, slots=3, policy=old.shape.policy)
            with Ring.attach(paths.rings, paths.accounts, "belt", shape) as ring:
                seen = generations(paths.rings, "belt")
                assert ring.generation == seen[-1]
                assert [p.name for p in paths.rings.glob(".*")] in ([], [".belt.2.new"])
                if ring.generation > 1:
                    assert not list(paths.rings.glob(".*.new")) or width == 16
                    assert (old.successor, ring.base) == (2, last)
                    if old.shape.policy is Policy.EVERY:
                        decide(old, 3)
                        decide(old, 4)
                    publish(ring)
                    if len(seen) == 3:
                        with belt.ring(2) as between:
                            assert between.successor == 3
                            assert between.drained
                    decide(ring, last + 1)
                    assert ring.account().in_flight == 0
                    assert counts(ring)["captured"] == last + 1
                else:
                    assert old.successor == 0
            belt.restore()
            at += 1
    assert set(ends) == {(1, 0), (2, 0), (2, 2)}
