"""One camera as a lane sees it: which ring, which frame next, and the right to decide there."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from common.config import Camera
from common.errors import RingGoneError
from common.frames import Ring, generations
from common.paths import Paths
from common.states import Policy

MAX_ATTEMPTS = 2


class Feed:
    def __init__(self, name: str, camera: Camera, paths: Paths) -> None:
        self.name = name
        self.camera = camera
        self._paths = paths
        self.epoch = 0
        self._taken = 0  # newest sequence that is decided or on its way to it
        self._on_the_way = 0  # taken and not decided
        self._torn = 0  # since the last decision
        self.ring: Ring | None = None

    def highest_fence(self) -> int:
        """Over the camera's rings, whoever wrote them."""
        highest = 0
        for ring in self._rings():
            highest = max(highest, ring.fence)
            ring.close()
        return highest

    def go_live(self, epoch: int) -> None:
        self.epoch = epoch
        self.refresh()

    def refresh(self) -> None:
        """Follow the camera to its next ring once nothing is left to decide in this one."""
        if self.ring is not None and (self._on_the_way or not self.ring.drained):
            return
        for ring in self._rings(after=0 if self.ring is None else self.ring.generation):
            if ring.drained:
                ring.close()
                continue
            ring.raise_fence(self.epoch)
            if self.ring is not None:
                self.ring.close()
            self.ring = ring
            self._taken = max(self._taken, ring.decided)
            return

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
            self.refresh()
        if self.ring is None:
            return None
        written = self.ring.written
        if written <= self._taken:
            return None
        return self._taken + 1 if self.every else written

    @property
    def every(self) -> bool:
        """Whether no frame may be passed over; the ring's word, which may lag behind vigil.toml."""
        return self.ring is not None and self.ring.shape.policy is Policy.EVERY

    def picture(self, sequence: int) -> NDArray[np.uint8] | None:
        """rows x columns x 3, uint8, BGR: a view into the ring; call `take` after its last use."""
        assert self.ring is not None
        pixels = self.ring.pixels(sequence)
        if pixels is None:
            return None
        shape = self.ring.shape
        return np.frombuffer(pixels, np.uint8).reshape(shape.height, shape.width, shape.channels)

    def take(self, sequence: int) -> tuple[int, int] | None:
        """After the last use of the picture: captured_ns and filled_ns, None where it is torn."""
        assert self.ring is not None
        times = self.ring.times(sequence)
        if not self.ring.intact(sequence):
            self._torn += 1
            return None
        self._taken = sequence
        self._on_the_way += 1
        return times

    def attempt(self, sequence: int) -> bool:
        """Note that the engine gets this frame now; False where it has killed two lanes."""
        assert self.ring is not None
        return self.ring.attempt(sequence) <= MAX_ATTEMPTS

    def decide(self, sequence: int, slot: int, kind: str, result: bytes) -> None:
        assert self.ring is not None
        self._on_the_way -= 1
        self.ring.decide(sequence, self.epoch, self.epoch, slot, kind, result, self._torn)
        self._torn = 0
