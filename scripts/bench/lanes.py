"""What benchmarks of recovery share: the processes of a running system, and its lanes' own word."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import zmq

from common import bus, config
from common.messages import Beat, LaneReport
from common.paths import Paths
from common.processes import lane_name, processes
from common.slots import Record
from common.store import Store

T = TypeVar("T")
TICK_S = 0.02


def until(condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Wait for something; what it gave.

    Raises:
        RuntimeError: it did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s} s: {what}")
        time.sleep(TICK_S)
    return value


class Processes:
    """The processes of a running system by name, found among supervisord's children."""

    def __init__(self, paths: Paths) -> None:
        self._pidfile = paths.run / "supervisord.pid"

    def all(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(int(self._pidfile.read_text())).children():
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            module = next((word for word in command if word.startswith("services.")), "")
            if module:
                rest = command[command.index(module) + 1 :]
                found["-".join((module.split(".")[1], *rest))] = child
        return found

    def get(self, name: str) -> psutil.Process | None:
        return self.all().get(name)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Lanes:
    """The record of the group `main`, and what its lanes say in their beats."""

    def __init__(self, paths: Paths, lanes: int = 2) -> None:
        settings = config.load(paths.root / "vigil.toml")
        self.store = Store(paths, "main", lanes)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        names = [process.name for process in processes(settings) if process.kind.per == "lane"]
        self._beats = bus.Subscriber(self._context, map(paths.endpoint, names), ["beat/"])
        self._newest: dict[str, Beat] = {}

    @property
    def record(self) -> Record:
        return self.store.read()

    def report(self, lane: str) -> LaneReport | None:
        """None too where the process that it is of is dead."""
        for topic, body in self._beats.drain():
            beat = bus.decode(topic, body)
            assert isinstance(beat, Beat)
            self._newest[beat.process] = beat
        newest = self._newest.get(lane_name("main", lane))
        if newest is None or not alive(newest.pid):
            return None
        return newest.lane

    def ready(self, lane: str) -> bool:
        report, record = self.report(lane), self.record
        recorded = record.lanes[lane]
        return bool(
            report and report.ready and (report.run, report.slot) == (recorded.run, recorded.slot)
        )

    def until_standby(self, timeout_s: float = 60.0) -> None:
        """Until no change is under way and both lanes are ready."""

        def standby() -> bool:
            record = self.record
            other = record.other
            calm = not record.txn.lane and self.ready(record.live)
            return calm and (other is None or self.ready(other))

        until(standby, timeout_s, "a warm standby")

    def close(self) -> None:
        self._beats.close()
        self._context.destroy(linger=0)
