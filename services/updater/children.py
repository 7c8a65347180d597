"""Work in processes that end: what needs a library, an engine or much memory, and what a hostile
file or server might kill, is not for the updater's own process."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import partial

from common import config
from common.errors import VigilError
from common.paths import PROJECT, Paths

_PR_SET_PDEATHSIG = 1
STOP_S = 3.0  # to end in good order


class Outcome(IntEnum):
    """Exit status of a child."""

    DONE = 0
    DIED = 1  # or was killed, or took too long
    REFUSED = 2  # what it looked at is no good
    LATER = 3  # not its fault


Settle = Callable[[Outcome, str], None]


class Child:
    """A process at work; it prints one line and says by its exit status how it went."""

    def __init__(self, module: str, *arguments: str, limit_s: float, settle: Settle) -> None:
        """
        Args:
            settle: called with what it came to, by whoever polls.
        """
        self.until = time.monotonic() + limit_s
        self.what = module.rpartition(".")[2]
        self._limit_s, self._settle, self._stopped = limit_s, settle, False
        command = [sys.executable, "-OO", "-m", module, str(os.getpid()), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT)
        self.fd = os.pidfd_open(self._process.pid)

    def ended(self) -> Callable[[], None] | None:
        """What settles it, once it has ended or its time is over; to be called once."""
        late = time.monotonic() >= self.until
        if self._process.poll() is None and not late:
            return None
        said = self.close()
        outcome, status = Outcome.DIED, self._process.returncode
        if self._stopped and status != Outcome.DONE:
            return partial(self._settle, Outcome.LATER, "")
        if late:
            said = f"its {self.what} was not done within {self._limit_s:g} s"
        elif status in tuple(Outcome):
            outcome = Outcome(status)
        if outcome is Outcome.DIED:
            said = said or f"its {self.what} ended with status {status}"
        return partial(self._settle, outcome, said)

    def stop(self) -> None:
        """Have it end soon; what settles it is told LATER, and nothing said, unless it is done."""
        if not self._stopped:
            self._stopped, self.until = True, min(self.until, time.monotonic() + STOP_S)
            self._process.terminate()

    def close(self, wait_s: float = 0.0) -> str:
        """End it, which may end by itself for so long; returns what it said."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        self._process.kill()
        said = self._process.communicate()[0].decode(errors="replace")
        os.close(self.fd)
        return said.strip()


def main(work: Callable[..., tuple[Outcome, str]]) -> None:
    """A child: do the work, of (config, paths, *arguments), and say what it came to."""
    parent, *arguments = sys.argv[1:]
    _begin(parent)
    try:
        outcome, said = work(config.from_environment(), Paths.from_environment(), *arguments)
    except (VigilError, OSError) as error:  # the one handler: the disk, or vigil.toml as it is now
        outcome, said = Outcome.LATER, " ".join(str(error).split())
    print(said)
    sys.exit(outcome)


def _begin(parent: str) -> None:
    """An updater that starts anew clears what its predecessor's children were at: none of them may
    outlive it. Exits if the parent is gone already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Outcome.LATER))
    if os.getppid() != int(parent):
        sys.exit(Outcome.LATER)
    os.nice(10)
