"""Bells: how the two ends of a frame ring wake each other, with one byte in a FIFO.

A message over ZeroMQ goes through two more threads and takes four times as long to wake its reader
when frames are far apart, so capture and lanes ring. A bell says nothing but "look at the ring":
a byte lost, doubled or late changes nothing, for each end also looks on a slow tick.
"""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# No FIFO yet, nobody who reads it, nobody any more, or full because it is not read.
_NOBODY_LISTENS = {errno.ENOENT, errno.ENXIO, errno.EPIPE, errno.EAGAIN}


class Bell:
    """The end that is woken: wait until `fd` is readable, then `heard`."""

    def __init__(self, path: Path) -> None:
        with suppress(FileExistsError):
            os.mkfifo(path, 0o660)
        # Both ways, so that it stays open, and never readable for nothing, while nobody rings.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def heard(self) -> bool:
        """Whether it was rung since it was last asked."""
        try:
            return bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self.fd)


class Ringer:
    """The end that wakes; whoever is not there, or does not listen, is no matter."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._fds: dict[Path, int | None] = dict.fromkeys(paths)

    def ring(self) -> None:
        for path, fd in self._fds.items():
            try:
                if fd is None:
                    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    self._fds[path] = fd
                os.write(fd, b"\0")
            except OSError as error:
                if error.errno not in _NOBODY_LISTENS:
                    raise

    def close(self) -> None:
        for fd in self._fds.values():
            if fd is not None:
                os.close(fd)
