"""What the commands that look at a running system share: where it is, and hearing its messages."""

import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from common.bus import Subscriber
from common.config import Config, from_environment, load
from common.errors import NotRunningError, RingError
from common.frames import Ring, generations
from common.paths import Paths
from common.processes import capture_name, lane_name, lanes, processes, rendered_from
from common.topics import TOPICS, Topic


def configuration(paths: Paths) -> Config:
    """The running system's: VIGIL_CONFIG, else the file its programs were rendered from."""
    rendered = None if "VIGIL_CONFIG" in os.environ else rendered_from(paths)
    return load(rendered) if rendered else from_environment()


@dataclass(frozen=True)
class Expected:
    """A topic that a running system should have."""

    row: Topic
    owner: str
    rate: float | None  # 1/s; None: unknown beforehand


def topics(config: Config) -> dict[str, Expected]:
    """Every topic of this configuration."""
    found = {}
    for row in TOPICS:
        rate = row.rate if isinstance(row.rate, float) else None
        if row.per == "process":
            for process in processes(config):
                found[f"{row.name}/{process.name}"] = Expected(row, process.name, rate)
        elif row.per == "camera":
            for name, camera in config.cameras.items():
                if row.name == "truth" and camera.source not in ("virtual", "recording"):
                    continue
                if row.rate == "fps":
                    rate = camera.fps if isinstance(camera.fps, float) else None
                names = (lane_name(camera.group, lane) for lane in lanes(config, camera.group))
                owner = capture_name(name) if row.owner == "capture" else " or ".join(names)
                found[f"{row.name}/{name}"] = Expected(row, owner, rate)
        else:
            found[row.name] = Expected(row, row.owner, rate)
    return found


class Listener:
    """Hears the messages of every process of a configuration."""

    def __init__(self, config: Config, paths: Paths, prefixes: Iterable[str]) -> None:
        """Raises: NotRunningError: neither supervisord nor any process is there."""
        names = [process.name for process in processes(config)]
        require_running(paths, names)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        endpoints = [paths.endpoint(name) for name in names]
        self._subscriber = Subscriber(self._context, endpoints, prefixes)

    def hear(self, seconds: float, batch_s: float = 0.0) -> Iterator[tuple[int, str, bytes]]:
        """Arrival (CLOCK_MONOTONIC ns), topic and body of each message of the next `seconds`,
        several at once where `batch_s` lets them gather."""
        until = time.monotonic_ns() + round(seconds * 1e9)
        while (now := time.monotonic_ns()) < until:
            if self._subscriber.wait((until - now) / 1e9) and batch_s:
                time.sleep(batch_s)
            for topic, body in self._subscriber.drain():
                now = time.monotonic_ns()
                yield now, topic, body
                if now >= until:  # a flood never runs dry
                    return

    def want(self, prefix: str, wanted: bool) -> None:
        """Hear topics with this prefix from now on, or no more."""
        option = zmq.SUBSCRIBE if wanted else zmq.UNSUBSCRIBE
        self._subscriber.socket.setsockopt(option, prefix.encode())

    def close(self) -> None:
        self._subscriber.close()
        self._context.destroy(linger=0)


@contextmanager
def listener(config: Config, paths: Paths, prefixes: Iterable[str]) -> Iterator[Listener]:
    opened = Listener(config, paths, prefixes)
    try:
        yield opened
    finally:
        opened.close()


def require_running(paths: Paths, names: Iterable[str]) -> None:
    """Raises: NotRunningError: no socket of supervisord or of a process accepts."""
    sockets = [paths.supervisor_socket]
    sockets += [Path(paths.endpoint(name).removeprefix("ipc://")) for name in names]
    if not any(accepts(path) for path in sockets):
        raise NotRunningError(
            f"nothing runs under {paths.root} (run folder {paths.run}); "
            "start it with scripts/run, or point --root at the one you mean"
        )


def accepts(path: Path) -> bool:
    """Whether a process listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(os.fspath(path))
        except BlockingIOError:
            return True  # there, with more connections waiting than it has taken
        except PermissionError as error:
            raise NotRunningError(
                f"{path}: may not be used by this user; become its owner, or join its group"
            ) from error
        except OSError:
            return False
        return True


def newest_ring(paths: Paths, camera: str) -> Ring | None:
    """A camera's newest ring, for looking only; None where there is none yet."""
    for _ in range(3):  # capture may replace it between the two steps
        if not (existing := generations(paths.rings, camera)):
            return None
        try:
            return Ring.open(paths.rings, paths.accounts, camera, existing[-1])
        except RingError:
            if (paths.rings / f"{camera}.{existing[-1]}").exists():
                raise
    return None
