"""The account of every frame of a camera, exact at every instant, whoever is killed.

    captured = inferred + not_inferred + failed + skipped + torn + overrun + in_flight

A file per camera in tmpfs; it outlives its writers and the camera's rings. Capture counts overruns.
The lane that decides writes the new totals over the older of two copies, marked with the sequence
they include; they count only once the ring's `decided` has reached it. The camera's lock, under
which frames are decided, is a flock on this file: the kernel frees it when its holder dies.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import RingError

COUNTS = ("inferred", "not_inferred", "failed", "skipped", "torn")

_OVERRUN = 0
_TOTALS = (8, 16)  # two copies, a cache line each: sequence, then COUNTS
_WORDS = 24
_UNSET = 2**64 - 1


@dataclass(frozen=True)
class Account:
    """Where every frame of a camera went. `captured` is the sum of all the others."""

    captured: int
    inferred: int
    not_inferred: int
    failed: int
    skipped: int
    torn: int
    overrun: int
    in_flight: int

    @property
    def balanced(self) -> bool:
        gone = self.inferred + self.not_inferred + self.failed + self.skipped + self.torn
        return self.captured == gone + self.overrun + self.in_flight and self.in_flight >= 0


class Order:
    """A full memory barrier: a release followed by an acquire of the same lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


class Totals:
    """The account file: overruns, two copies of the lanes' totals, and the camera's lock."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o660)
        try:
            if writable:
                allocate(self._fd, _WORDS * 8, path)
            if os.fstat(self._fd).st_size != _WORDS * 8:
                raise RingError(f"{path}: is no account; remove it and restart capture")
            self._map = map_file(self._fd, _WORDS * 8, writable=writable)
        except BaseException:
            if writable and os.fstat(self._fd).st_size == 0:
                path.unlink()
            os.close(self._fd)
            raise
        self._words = memoryview(self._map).cast("Q")
        self._order = Order()

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[bool]:
        """Hold the camera's lock; without `wait`, False where another holds it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def committed(self, decided: int) -> tuple[int, ...]:
        """The totals that count: sequence and counts of the newest copy that `decided` covers."""
        copies = (tuple(self._words[at : at + 1 + len(COUNTS)]) for at in _TOTALS)
        return max((copy for copy in copies if copy[0] <= decided), default=(0,) * 6)

    @property
    def newest(self) -> int:
        """The newest sequence in either copy, whether it counts or not."""
        return max((n for at in _TOTALS if (n := self._words[at]) != _UNSET), default=0)

    def stage(self, decided: int, totals: tuple[int, ...]) -> None:
        """Write `totals` over the copy that does not count; `decided` makes it count."""
        kept = self.committed(decided)[0]
        at = _TOTALS[1] if self._words[_TOTALS[0]] == kept else _TOTALS[0]
        self._words[at] = _UNSET
        self._order()
        for i, count in enumerate(totals[1:], start=1):
            self._words[at + i] = count
        self._order()
        self._words[at] = totals[0]

    @property
    def overrun(self) -> int:
        return self._words[_OVERRUN]

    def count_overrun(self) -> None:
        """A live camera's frame found no free slot (capture only)."""
        self._words[_OVERRUN] += 1

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self._fd)


def allocate(fd: int, size: int, path: Path, what: str = "account") -> None:
    """Reserve space, so that a full tmpfs is an error here and never a bus error later.

    Raises:
        RingError: there is no room; the message gives both sizes.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise RingError(f"{path}: {error.strerror}") from error
        free = os.statvfs(path.parent)
        raise RingError(
            f"{path}: no room for {size / 1e6:.1f} MB ({what}); "
            f"{free.f_bavail * free.f_frsize / 1e6:.1f} MB are free in {path.parent}: "
            "make that tmpfs larger, or use fewer slots or a smaller picture"
        ) from error


def map_file(fd: int, size: int, *, writable: bool) -> mmap.mmap:
    return mmap.mmap(fd, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
