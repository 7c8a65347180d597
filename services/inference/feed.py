"""One camera as a lane sees it: which ring, which frame next, and the right to decide there."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from common.config import Camera
from common.errors import FencedError, RingGoneError
from common.frames import Ring, generations
from common.paths import Paths
from common.states import Policy, Sight

MAX_ATTEMPTS = 2


class Feed:
    """
    Args:
        authority: asked for the right to decide in a ring; gives its epoch, 0 for not (yet).
    """

    def __init__(
        self, name: str, camera: Camera, paths: Paths, authority: Callable[[Ring], int]
    ) -> None:
        self.name = name
        self.camera = camera
        self._paths = paths
        self._authority = authority
        self.epoch = 0
        self.hold = 0  # how often the right was taken; tells what belongs to an earlier time
        self.taken = 0  # newest sequence that is decided or on its way to it
        self._on_the_way = 0  # taken and not decided, of whatever hold
        self._torn = 0  # since the last decision
        self.ring: Ring | None = None
        self._left: list[Ring] = []  # still named by what is on the way
        self.pending = False  # there is a ring in which this lane does not decide yet

    def refresh(self, epoch: int) -> None:
        """Take the right to decide under `epoch`; follow the camera to its next ring once nothing
        is left to decide in this one."""
        ring = self.ring
        while self._left and not self._on_the_way:
            self._left.pop().close()
        if ring is not None and ring.fence != self.epoch:
            self.release()
        elif ring is not None and self.epoch != epoch:
            self.epoch = self._authority(ring) or self.epoch
        if self.ring is not None and (self._on_the_way or not self.ring.drained):
            return
        self.pending = False
        for ring in self._rings(after=0 if self.ring is None else self.ring.generation):
            if ring.drained:
                ring.close()
                continue
            granted = self._authority(ring)
            if not granted:
                self.pending = True
                ring.close()
                return
            if self.ring is not None:
                self.ring.close()
            self.ring, self.epoch = ring, granted
            self.taken, self._torn = ring.decided, 0
            self.hold += 1
            return

    def release(self) -> None:
        """Another lane decides here."""
        if self.ring is not None:
            self._left.append(self.ring)
        self.ring = None
        self.hold += 1

    def _rings(self, after: int = 0) -> Iterator[Ring]:
        """The camera's rings, oldest first, but those that capture removes meanwhile."""
        paths = self._paths
        for generation in generations(paths.rings, self.name):
            if generation > after:
                with suppress(RingGoneError):
                    yield Ring.open(
                        paths.rings, paths.accounts, self.name, generation, writable=True
                    )

    @property
    def next_sequence(self) -> int | None:
        """The frame to judge next, None while there is none."""
        if self.ring is not None and self.ring.successor:
            self.refresh(self.epoch)
        if self.ring is None:
            return None
        written = self.ring.written
        if written <= self.taken:
            return None
        return self.taken + 1 if self.every else written

    @property
    def every(self) -> bool:
        """Whether no frame may be passed over; the ring's word, which may lag behind vigil.toml."""
        return self.ring is not None and self.ring.shape.policy is Policy.EVERY

    def picture(self, sequence: int) -> NDArray[np.uint8] | None:
        """rows x columns x 3, uint8, BGR: a view into the ring; call `take` after its last use."""
        assert self.ring is not None
        return view(self.ring, sequence)

    def blind(self, sequence: int) -> bool:
        """Whether capture says that the picture shows nothing that could be judged."""
        assert self.ring is not None
        return self.ring.marks(sequence)[0] is not Sight.CLEAR

    def take(self, sequence: int) -> tuple[int, int, Sight, int] | None:
        """After the last use of the picture: captured_ns, filled_ns, what capture says of it and
        the trigger it answers; None where it is torn."""
        assert self.ring is not None
        known = *self.ring.times(sequence), *self.ring.marks(sequence)
        if not self.ring.intact(sequence):
            self._torn += 1
            return None
        self.taken = sequence
        self._on_the_way += 1
        return known

    def put_back(self, sequence: int, hold: int) -> None:
        """A frame that was taken, and is to be judged once more."""
        self._on_the_way -= 1
        if hold == self.hold:
            self.taken = min(self.taken, sequence - 1)

    def attempt(self, sequence: int, hold: int) -> bool:
        """Note that the engine gets this frame now; False where it has killed two lanes."""
        ring = self.ring
        if ring is None or hold != self.hold or ring.fence != self.epoch:
            return True  # another lane decides here, and notes its own
        return ring.attempt(sequence) <= MAX_ATTEMPTS

    def decide(
        self, sequence: int, hold: int, run: int, slot: int, kind: str, result: bytes
    ) -> None:
        """
        Raises:
            FencedError: another lane decides here now; nothing has changed.
        """
        self._on_the_way -= 1
        if self.ring is None or hold != self.hold:
            raise FencedError(f"{self.name}: another lane decides here")
        try:
            self.ring.decide(sequence, self.epoch, run, slot, kind, result, self._torn)
        except FencedError:
            if self.ring.fence == self.epoch and not self.ring.successor:
                raise AssertionError(f"{self.name}: frame {sequence} out of order") from None
            self.release()
            raise
        self._torn = 0


class Watcher:
    """One camera as a lane sees it that decides nothing there: in the shadow of the live one."""

    def __init__(self, name: str, paths: Paths) -> None:
        self.name = name
        self._paths = paths
        self._ring: Ring | None = None
        self._seen = 0

    def newest(self, every: int) -> tuple[Ring, int] | None:
        """The newest decided frame, at least `every` frames after the last one given."""
        existing = generations(self._paths.rings, self.name)
        if not existing:
            return None
        if self._ring is None or self._ring.generation != existing[-1]:
            self.close()
            with suppress(RingGoneError):
                self._ring = Ring.open(
                    self._paths.rings, self._paths.accounts, self.name, existing[-1]
                )
        if self._ring is None or self._ring.decided < self._seen + every:
            return None
        sequence = self._ring.decided
        self._seen = sequence
        return self._ring, sequence

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = None


def view(ring: Ring, sequence: int) -> NDArray[np.uint8] | None:
    """rows x columns x 3, uint8, BGR, in the ring itself; None where it is overwritten."""
    pixels = ring.pixels(sequence)
    if pixels is None:
        return None
    shape = ring.shape
    return np.frombuffer(pixels, np.uint8).reshape(shape.height, shape.width, shape.channels)
