"""A camera's rings as the watchdog sees them: does something wait, is something decided, and when
was a frame judged validly again."""

import os
from contextlib import suppress

import msgspec

from common import bus
from common.errors import RingError
from common.frames import JOURNAL, Ring, generations
from common.messages import Result
from common.paths import Paths
from common.states import Validity
from services.watchdog.facts import Camera


class Rings:
    def __init__(self, paths: Paths, camera: str) -> None:
        self._paths, self._camera = paths, camera
        self._rings: dict[int, tuple[Ring, int]] = {}  # by generation, with its file's inode
        self._decided: tuple[int, ...] = ()
        self._undecided_ns = 0

    def look(self, now_ns: int) -> Camera | None:
        """None where there is no ring yet."""
        self._follow()
        if not self._rings:
            return None
        rings = [ring for ring, _ in self._rings.values()]
        decided = tuple(ring.decided for ring in rings)
        waiting = any(ring.written > ring.decided for ring in rings)
        if not waiting:
            self._undecided_ns = 0
        elif decided != self._decided or not self._undecided_ns:
            self._undecided_ns = now_ns
        self._decided = decided
        written, fence = max(ring.written for ring in rings), min(ring.fence for ring in rings)
        return Camera(written, fence, self._undecided_ns)

    def _follow(self) -> None:
        """Have every ring open in which there is, or will be, something to decide."""
        for generation, (ring, inode) in list(self._rings.items()):
            if ring.drained or _inode(ring) != inode:
                ring.close()
                del self._rings[generation]
        newest = next(reversed(self._rings.values()), None)
        if newest is not None and not newest[0].successor:
            return
        for generation in generations(self._paths.rings, self._camera):
            if generation in self._rings:
                continue
            with suppress(RingError):
                ring = Ring.open(self._paths.rings, self._paths.accounts, self._camera, generation)
                if ring.drained:
                    ring.close()
                else:
                    self._rings[generation] = ring, _inode(ring)

    @property
    def captured_ns(self) -> int:
        """When the newest frame was captured; 0 where there is none."""
        newest = next(reversed(self._rings.values()), None)
        if newest is None or not newest[0].written:
            return 0
        return newest[0].times(newest[0].written)[0]

    def first_valid(
        self, after_ns: int, run: int = 0, *, captured: bool = False
    ) -> tuple[int, int]:
        """When the camera was judged validly again after a failure, from the journal.

        Args:
            run: of the lane that failed: its own decisions do not count, but show that it still
                worked then.
            captured: whether the frame has to be captured after the failure as well.

        Returns:
            When it failed, as far as is known now, and when the first valid decision after it was
            made, 0 where there is none; CLOCK_MONOTONIC ns.
        """
        first = 0
        for ring, _ in reversed(self._rings.values()):
            for sequence in range(ring.decided, max(ring.decided - JOURNAL, ring.base), -1):
                entry = ring.entry(sequence)
                if entry is None:
                    continue
                try:
                    result = bus.decode(f"result/{self._camera}", entry.result)
                except msgspec.DecodeError:
                    continue
                assert isinstance(result, Result)
                decided_ns = result.captured_ns + result.age_ns
                if run and entry.run == run:
                    return max(after_ns, decided_ns), first
                if decided_ns <= after_ns:
                    return after_ns, first
                if result.validity == Validity.VALID and (
                    not captured or result.captured_ns > after_ns
                ):
                    first = decided_ns
        return after_ns, first

    def close(self) -> None:
        for ring, _ in self._rings.values():
            ring.close()


def _inode(ring: Ring) -> int:
    try:
        return os.stat(ring.path).st_ino  # noqa: PTH116 - several times a second
    except FileNotFoundError:
        return 0
