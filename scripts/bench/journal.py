"""Every decision of a camera, read from the ring's journal by cursor, as a consumer does."""

import threading

from common import bus
from common.frames import JOURNAL, Ring, generations
from common.messages import Result
from common.paths import Paths

TICK_S = 0.005


class Journal:
    """Reads on a thread of its own until it is stopped."""

    def __init__(self, paths: Paths, camera: str) -> None:
        self._paths, self._camera = paths, camera
        self.results: list[Result] = []
        self.rings: list[int] = []
        self.missed: list[int] = []  # overwritten before this process, kept waiting, has read them
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        paths, camera = self._paths, self._camera
        ring: Ring | None = None
        cursor = 0
        while not self._stop.wait(TICK_S):
            if ring is None or (ring.drained and cursor >= ring.decided):
                done = 0 if ring is None else ring.generation
                newer = [g for g in generations(paths.rings, camera) if g > done]
                if not newer:
                    continue
                if ring is not None:
                    ring.close()
                ring = Ring.open(paths.rings, paths.accounts, camera, newer[0])
                self.rings.append(ring.generation)
            while cursor < ring.decided:
                cursor += 1
                entry = ring.entry(cursor)
                if entry is None and ring.decided + 1 - cursor >= JOURNAL:
                    self.missed.append(cursor)
                if entry is not None:
                    result = bus.decode(f"result/{camera}", entry.result)
                    assert isinstance(result, Result)
                    assert (result.sequence, result.epoch) == (entry.sequence, entry.epoch)
                    self.results.append(result)

    def stop(self) -> list[Result]:
        self._stop.set()
        self._thread.join()
        return self.results


def decided_ns(result: Result) -> int:
    """When the decision was made, CLOCK_MONOTONIC."""
    return result.captured_ns + result.age_ns
