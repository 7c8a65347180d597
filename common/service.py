"""What every process has in common: name, lock, socket, signals, beats, log, one handler."""

import ctypes
import fcntl
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import zmq

from common import config
from common.bus import Publisher
from common.errors import AlreadyRunningError, NotRunningError, VigilError
from common.messages import Beat, CameraReport, Event, LaneReport
from common.paths import Paths
from common.states import ProcessState, Severity

BEAT_S = 0.5
_PR_SET_PDEATHSIG = 1
log = logging.getLogger("vigil")


class Service:
    """A process of Vigil. Its working loop calls `beat` and watches `wake_fd` beside its sockets,
    which becomes readable when a signal asks it to stop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paths = Paths.from_environment()
        self.config = config.from_environment()
        self.stopping = False
        self.progress = 0
        self._progressed_ns = time.monotonic_ns()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._last_beat: tuple[int, str] = (0, "")
        self.paths.make()
        self._lock = lock(self.paths, name)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._publisher = Publisher(self.context, self.paths.endpoint(name))
        self.publish = self._publisher.publish
        self.publish_bytes = self._publisher.publish_bytes
        self._handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._publisher.close()
        self.context.destroy(linger=0)
        os.close(self._lock)
        os.close(self.wake_fd)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        os.eventfd_write(self.wake_fd, 1)

    def pause(self, seconds: float) -> None:
        """Wait so long, or until a signal asks the process to stop."""
        select.select([self.wake_fd], [], [], seconds)

    def progressed(self) -> None:
        """The working loop has done a piece of work."""
        self.progress += 1
        self._progressed_ns = time.monotonic_ns()

    def beat_due(self, state: ProcessState) -> bool:
        due = time.monotonic_ns() - self._last_beat[0] >= BEAT_S * 1e9
        return due or self._last_beat[1] != state

    def beat(
        self,
        state: ProcessState,
        *,
        wait: str = "",
        wait_s: float = 0.0,
        lane: LaneReport | None = None,
        camera: CameraReport | None = None,
        at_once: bool = False,
        **detail: str,
    ) -> None:
        """Tell that the loop turns: at most every BEAT_S, at once when the state changes.

        Args:
            at_once: this can't wait.
            wait: what the process is about to wait for without progress, `wait_s` at the longest.
            detail: short words for `vigil status`.
        """
        if not at_once and not self.beat_due(state):
            return
        now = time.monotonic_ns()
        self._last_beat = (now, state)
        beat = Beat(
            self.name, os.getpid(), self.progress, state, _rss_bytes(), now,
            wait, now + round(wait_s * 1e9) if wait else 0, detail, self._progressed_ns,
            lane, camera,
        )  # fmt: skip
        self.publish(f"beat/{self.name}", beat)

    def event(self, code: str, severity: Severity, text: str, **data: str) -> None:
        """Log an event and announce it."""
        level = logging.INFO if severity is Severity.INFO else logging.WARNING
        log.log(level, text, extra={"fields": {"code": code, **data}})
        event = Event(code, severity, text, self.name, time.monotonic_ns(), time.time(), data)
        self.publish("event", event)


def main(name: str, body: Callable[[Service], None]) -> None:
    """Run a process: the one place that catches everything, says it, and exits non-zero."""
    start_log(name)
    try:
        _die_with_supervisor()
        with Service(name) as service:
            body(service)
            log.info("stopped")
    except VigilError as error:
        log.error(str(error), extra={"fields": {"code": type(error).__name__}})
        sys.exit(1)
    except Exception as error:  # the top-level handler: the supervisor restarts, the log says why
        log.exception(f"a fault in the code: {type(error).__name__}: {error}")
        sys.exit(70)


def lock(paths: Paths, name: str) -> int:
    """Take the lock of a process's name; its file descriptor holds it until it is closed.

    Raises:
        AlreadyRunningError: another process has it.
    """
    path = paths.lock(name)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyRunningError(
            f"{name}: already runs under {paths.root}; stop it, or set VIGIL_ROOT to another folder"
        ) from None
    return fd


class _JsonLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z",
            "monotonic_s": round(time.monotonic(), 3),
            "process": self._process,
            "level": record.levelname.lower(),
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_log(process: str) -> None:
    """Structured lines on standard error, one JSON object each; supervisord keeps them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(process))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _die_with_supervisor() -> None:
    """Under supervisord: die when it dies, since nobody would restart or stop this process."""
    if "SUPERVISOR_ENABLED" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ask only now: had it died before prctl, no signal would come.
    pidfile = Paths.from_environment().run / "supervisord.pid"
    try:
        pid = int(pidfile.read_text())
    except (FileNotFoundError, ValueError):
        raise NotRunningError(
            f"{pidfile}: no supervisord runs there, though SUPERVISOR_ENABLED says so; unset it to "
            "run this process by itself"
        ) from None
    if os.getppid() != pid:
        raise NotRunningError(f"supervisord {pid} is gone; this process will not run alone")


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
