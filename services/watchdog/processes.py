"""The processes as they are: a pidfd for each, so that a death is seen at once; their newest beats;
supervisord, which is asked seldom and woken when something died."""

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common import supervisor
from common.messages import Beat
from common.paths import Paths
from common.states import ProcessState
from services.watchdog.facts import Death, Seen

ASK_S = 5.0
FIRST_S, MOST_S = 0.04, 1.0  # after a death, asked again at so many seconds, doubling
BRIEF_S = 2.0  # who lived no longer is left to supervisord's own tick: a crash loop is no hurry
LOG_TRIES, LOG_S = 5, 0.001


@dataclass
class Child:
    name: str
    pid: int
    fd: int  # pidfd
    spawned_ns: int
    beat: Beat | None = None
    progressed_ns: int = 0
    waited: bool = False  # in its newest beat
    ready_ns: int = 0


class Processes:
    def __init__(self, paths: Paths, names: Collection[str]) -> None:
        self._paths = paths
        now = time.monotonic_ns()
        self._gone = dict.fromkeys(names, now)  # without a pid, and since when
        self._children: dict[str, Child] = {}
        self.answered_ns = now
        self.ask_ns = 0  # when supervisord is to be asked next
        self._again_s = FIRST_S
        self.supervisord = 0

    @property
    def fds(self) -> dict[int, str]:
        return {child.fd: child.name for child in self._children.values()}

    @property
    def missing(self) -> bool:
        return bool(self._gone)

    def pid(self, name: str) -> int | None:
        child = self._children.get(name)
        return child.pid if child else None

    def ask(self) -> None:
        """Have supervisord look after its children at once, and say who they are."""
        found = supervisor.programs(self._paths)
        now = time.monotonic_ns()
        if found is None:
            self.ask_ns = now + round(MOST_S * 1e9)
            return
        self.answered_ns = now
        with suppress(FileNotFoundError, ValueError):
            self.supervisord = int((self._paths.run / "supervisord.pid").read_text())
        for name, program in found.items():
            if program.pid:
                self._adopt(name, program.pid)
        wait_s = ASK_S
        if self._gone:
            wait_s, self._again_s = self._again_s, min(2 * self._again_s, MOST_S)
        self.ask_ns = now + round(wait_s * 1e9)

    def hear(self, beat: Beat) -> None:
        if self.pid(beat.process) is None:
            self._adopt(beat.process, beat.pid)
        child = self._children.get(beat.process)
        if child is None or child.pid != beat.pid:
            return  # of a predecessor, late
        waits = bool(beat.wait)
        if child.waited and not waits:  # what ends is not a hang of the time before
            child.progressed_ns = beat.sent_ns
        child.progressed_ns = max(child.progressed_ns, beat.progressed_ns)
        ready = beat.lane is not None and beat.lane.ready and beat.state != ProcessState.LOADING
        child.ready_ns = (child.ready_ns or beat.sent_ns) if ready else 0
        child.beat, child.waited = beat, waits

    def _adopt(self, name: str, pid: int) -> None:
        """A pid that somebody told: believed if it is supervisord's living child."""
        known = self._children.get(name)
        if (known and known.pid == pid) or (known is None and name not in self._gone):
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        stat = _stat(pid)
        if stat is None or stat.dead or stat.parent != self.supervisord or known is not None:
            os.close(fd)  # not yet gone is gone first: its pidfd says so
            return
        del self._gone[name]
        self._children[name] = Child(name, pid, fd, stat.spawned_ns)
        if not self._gone:
            self._again_s = FIRST_S

    def bury(self, fd: int) -> Death:
        """The process of a pidfd that has fired. Its zombie still says how it ended."""
        child = self._children.pop(self.fds[fd])
        now = time.monotonic_ns()
        stat = _stat(child.pid)
        os.close(fd)
        self._gone[child.name] = now
        brief = now - child.spawned_ns < BRIEF_S * 1e9
        self.ask_ns = min(self.ask_ns, now + round(MOST_S * 1e9)) if brief else 0
        if stat is not None and stat.dead:
            code = os.waitstatus_to_exitcode(stat.status)
            killer = signal.Signals(-code).name if code < 0 else ""
            how = f"terminated by {killer}" if killer else f"exit status {code}"
        else:
            how = self._logged_end(child)
        clean = how == "exit status 0" if how else None
        report = child.beat.lane if child.beat else None
        return Death(child.name, child.pid, now, clean, f"died: {how}" if how else "died", report)

    def _logged_end(self, child: Child) -> str:
        """supervisord was first to reap it, and is about to write how it ended."""
        for _ in range(LOG_TRIES):
            if how := supervisor.how_it_ended(self._paths, child.name, child.pid):
                return how
            time.sleep(LOG_S)
        return ""

    def signal(self, name: str, pid: int, number: int) -> None:
        child = self._children.get(name)
        if child and child.pid == pid:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.fd, number)

    def start(self, name: str) -> None:
        """Raises: NotRunningError: supervisord does not answer, or can't."""
        with suppress(supervisor.FaultError):
            supervisor.stop(self._paths, name)  # it may only believe that it is running
        self.ask_ns, self._again_s = 0, FIRST_S
        supervisor.start(self._paths, name)

    def seen(self) -> dict[str, Seen]:
        found = {name: Seen(gone_ns=since) for name, since in self._gone.items()}
        for name, child in self._children.items():
            beat = child.beat
            if beat is None:
                found[name] = Seen(child.pid, child.spawned_ns)
                continue
            found[name] = Seen(
                pid=child.pid,
                spawned_ns=child.spawned_ns,
                progressed_ns=child.progressed_ns,
                wait_until_ns=beat.wait_until_ns,
                sent_ns=beat.sent_ns,
                begun=beat.progress > 0 or child.ready_ns > 0,
                rss_bytes=beat.rss_bytes,
                report=beat.lane,
                ready_ns=child.ready_ns,
            )
        return found

    def memory_mb(self) -> dict[str, float]:
        beats = [child.beat for child in self._children.values() if child.beat]
        return {beat.process: round(beat.rss_bytes / 1e6, 1) for beat in beats}

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass(frozen=True)
class Stat:
    parent: int
    dead: bool
    spawned_ns: int  # CLOCK_MONOTONIC
    status: int  # as wait() gives it, once it is dead


def _stat(pid: int) -> Stat | None:
    """/proc/PID/stat (proc(5)); None where there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in field 2 may hold blanks
    up_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    age_ns = up_ns - int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    spawned_ns = time.monotonic_ns() - age_ns
    return Stat(int(fields[1]), fields[0] in "ZX", spawned_ns, int(fields[49]))
