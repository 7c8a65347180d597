"""The watchdog: what should be against what is. Each turn it looks, has the policy decide, and does
what that orders. All that it knows is in files and processes, so that its own restart is harmless.
"""

import select
import signal
import time

import msgspec
import zmq

from common import bus, durable, supervisor
from common.errors import NotRunningError, StorageError
from common.messages import Beat
from common.paths import Paths
from common.processes import lane_name
from common.service import Service, main
from common.states import Phase, ProcessState, Severity
from services.watchdog import health
from services.watchdog.facts import (
    Action,
    Event,
    Feed,
    Group,
    Incident,
    Kill,
    Memory,
    Observation,
    Restart,
    SetPace,
    Start,
    Transition,
    Wake,
)
from services.watchdog.hardware import Hardware, Notify
from services.watchdog.incidents import Incidents
from services.watchdog.limits import settings
from services.watchdog.policy import decide
from services.watchdog.processes import Processes
from services.watchdog.rings import Rings
from services.watchdog.stores import Stores

TICK_S = 0.25  # beats are read, rings looked at so often
AWAY_S = 1.0  # who did not look for so long may have missed beats, and judges nobody for a while
HEALTH_S = 5.0
HANG_S = {"capture": 2.0, "updater": 10.0}  # the updater waits for disks; nobody waits for it
OUTCOMES = {  # of an incident, by what was done
    "take_over": "lane {} took over",
    "fail_soak": "rolled back",
    "give_way": "gave way to the next model",
}
_FIRST = (Kill, Incident, Transition)
SAY_NS = 60_000_000_000


class Watchdog:
    def __init__(self, service: Service) -> None:
        self._service = service
        config, paths = service.config, service.paths
        self._settings = settings(config)
        self._processes = Processes(paths, self._settings.processes)
        self._stores = Stores(service)
        self._rings = {name: Rings(paths, name) for name in config.cameras}
        self._memory_path = paths.run / "watchdog.json"
        self._memory = self._saved = _remembered(paths)
        self._incidents = Incidents(
            paths.run / "incidents.json", self._settings, config, self._rings
        )
        self._sensors = health.Sensors()
        self._temperatures: tuple[dict[str, float], tuple[str, ...]] = {}, ()
        self._health_ns = self._looked_ns = self._listening_ns = self._wake_ns = 0
        self._said_ns: dict[str, int] = {}
        self._notify = Notify()
        self._hardware = _hardware(service)
        endpoints = map(paths.endpoint, self._settings.processes)
        self._bus = bus.Subscriber(service.context, endpoints, ["beat/"])
        self._poll = select.poll()
        self._polled: set[int] = set()
        self._fired: set[int] = set()
        self._set_pace(self._memory.pace)
        self._notify.ready()

    def run(self) -> None:
        while not self._service.stopping:
            now = time.monotonic_ns()
            if now - self._looked_ns > AWAY_S * 1e9:
                self._listening_ns = now
            self._looked_ns = now
            self._look()
            self._service.progressed()
            self._service.beat(ProcessState.WAITING, wait="anything", wait_s=TICK_S)
            self._wait()

    def _wait(self) -> None:
        """Until a process dies, something is due, or a tick has passed. Beats are read in passing,
        unless something is under way that one of them may let go on."""
        fds = {*self._processes.fds, self._service.wake_fd}
        if self._urgent():
            fds.add(int(self._bus.socket.getsockopt(zmq.FD)))
        for fd in self._polled - fds:
            self._poll.unregister(fd)
        for fd in fds - self._polled:
            self._poll.register(fd, select.POLLIN)
        self._polled = fds
        now = time.monotonic_ns()
        due = min(self._wake_ns, self._processes.ask_ns, now + round(TICK_S * 1e9))
        fired = self._poll.poll(max(0, -(-(due - now) // 1_000_000)))
        self._fired = {fd for fd, _ in fired}

    def _urgent(self) -> bool:
        if self._processes.missing or self._memory.down:
            return True
        return any(w.phase == Phase.REQUESTED for w in self._memory.watched.values())

    # -- looking -----------------------------------------------------------------------------

    def _look(self) -> None:
        for topic, body in self._bus.drain():  # the last words of the dead among them
            self._hear(topic, body)
        deaths = tuple(map(self._processes.bury, self._fired & self._processes.fds.keys()))
        now = time.monotonic_ns()
        if not deaths and now >= self._processes.ask_ns:
            self._processes.ask()
        seen = Observation(
            now_ns=time.monotonic_ns(),
            listening_ns=self._listening_ns,
            answered_ns=self._processes.answered_ns,
            supervisord=self._processes.supervisord,
            processes=self._processes.seen(),
            groups={group: self._group(group, now) for group in self._stores.groups},
            deaths=deaths,
            temperatures_c=self._temperatures[0],
            lost=self._temperatures[1],
        )
        self._memory, actions = decide(self._settings, self._memory, seen)
        # Who is live comes before what is said of it.
        for action in sorted(actions, key=lambda a: not isinstance(a, _FIRST)):
            self._do(action)
        for row in self._incidents.follow(seen.processes):
            text = f"{row.process} {row.what}; {row.outcome}, well after {row.recovery_ms} ms"
            data = {"of": row.process, "recovery_ms": str(row.recovery_ms)}
            self._service.event("incident.recovered", Severity.INFO, text, **data)
        self._stores.announce_problems()
        if not deaths and not self._memory.down:
            self._stores.clean_up()
        if not deaths and now - self._health_ns >= HEALTH_S * 1e9:
            self._health_ns = now
            self._publish_health()
        self._keep()

    def _hear(self, topic: str, body: bytes) -> None:
        try:
            beat = bus.decode(topic, body)
        except msgspec.DecodeError as error:
            self._say("beat.unreadable", Severity.ERROR, f"{topic}: {error}: mixed versions?")
            return
        assert isinstance(beat, Beat)
        self._processes.hear(beat)

    def _group(self, group: str, now: int) -> Group:
        cameras = {
            name: camera
            for name in self._service.config.cameras_of(group)
            if (camera := self._rings[name].look(now)) is not None
        }
        stores = self._stores
        limits, expected = stores.expectations(group)
        return Group(stores.record(group), cameras, stores.gate_failed(group), limits, expected)

    # -- doing -------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case Kill(name, pid):
                self._processes.signal(name, pid, signal.SIGKILL)
            case Restart(name, pid):
                self._processes.signal(name, pid, signal.SIGTERM)
            case Start(name):
                try:
                    self._processes.start(name)
                except NotRunningError as error:
                    self._say("process.not_started", Severity.ERROR, str(error), of=name)
            case Transition():
                self._commit(action)
            case SetPace(value):
                self._set_pace(value)
            case Event(code, severity, text, data):
                self._service.event(code, severity, text, **data)
            case Incident():
                self._incidents.add(action)
            case Feed():
                self._feed()
            case Wake(at_ns):
                self._wake_ns = at_ns

    def _commit(self, order: Transition) -> None:
        before = self._stores.record(order.group)
        if self._stores.commit(order):
            self._wake_ns = 0  # look at once at what follows from it
            if outcome := OUTCOMES.get(order.kind):
                lanes = [lane_name(order.group, lane) for lane in before.lanes]
                live = lane_name(order.group, before.live)
                self._incidents.conclude(lanes, outcome.format(order.lane), live, order.reason)
        elif (pid := self._stores.stuck(order.group)) is not None:
            name = next((n for n in self._settings.processes if self._processes.pid(n) == pid), "")
            text = f"{name or 'a process that is none of ours'} (pid {pid}) holds the record's lock"
            self._say("state.locked", Severity.CRITICAL, text, of=name)
            self._processes.signal(name, pid, signal.SIGKILL)

    def _set_pace(self, pace: float) -> None:
        self._write("pace", f"{pace:g}\n".encode())

    def _feed(self) -> None:
        self._notify.feed()
        if self._hardware is not None:
            try:
                self._hardware.feed()
            except StorageError as error:
                self._say("watchdog.not_fed", Severity.CRITICAL, str(error))

    def _publish_health(self) -> None:
        now = health.read(
            self._service.paths,
            self._sensors,
            self._memory.pace,
            self._processes.memory_mb(),
        )
        self._temperatures = now.temperatures_c, now.lost
        self._service.publish("health", now)

    # -- what is kept ------------------------------------------------------------------------

    def _keep(self) -> None:
        if self._memory != self._saved:
            self._write("watchdog.json", msgspec.json.encode(self._memory))
            self._saved = self._memory
        try:
            self._incidents.save()
        except StorageError as error:
            self._say("run.not_written", Severity.ERROR, str(error))

    def _write(self, name: str, content: bytes) -> None:
        try:
            durable.write(self._service.paths.run / name, content)
        except StorageError as error:
            self._say("run.not_written", Severity.ERROR, str(error))

    def _say(self, code: str, severity: Severity, text: str, **data: str) -> None:
        """An event that may come again and again: at most once a minute."""
        now = time.monotonic_ns()
        if now - self._said_ns.get(code, -SAY_NS) >= SAY_NS:
            self._said_ns[code] = now
            self._service.event(code, severity, text, **data)

    def close(self, *, stop: bool) -> None:
        """`stop`: in good order; else the hardware watchdog stays armed."""
        if stop and supervisor.shuts_down(self._service.paths):
            self._notify.stopping()  # all of Vigil does; else only the watchdog is restarted
        if self._hardware is not None:
            self._hardware.close(stop=stop)
        self._bus.close()
        self._processes.close()
        for rings in self._rings.values():
            rings.close()


def _hardware(service: Service) -> Hardware | None:
    """A device that is not there, or refuses, is said; recovery needs none."""
    watchdog = service.config.watchdog
    if watchdog.device is None:
        return None
    try:
        hardware = Hardware(watchdog.device, watchdog.timeout_s)
    except StorageError as error:
        service.event("watchdog.no_device", Severity.CRITICAL, str(error))
        return None
    if hardware.timeout_s != watchdog.timeout_s:
        service.event("watchdog.timeout", Severity.WARNING, hardware.differs)
    return hardware


def _remembered(paths: Paths) -> Memory:
    try:
        return msgspec.json.decode((paths.run / "watchdog.json").read_bytes(), type=Memory)
    except (FileNotFoundError, msgspec.MsgspecError):
        return Memory()


def run(service: Service) -> None:
    watchdog = Watchdog(service)
    try:
        watchdog.run()
    except BaseException:
        watchdog.close(stop=False)
        raise
    watchdog.close(stop=True)


if __name__ == "__main__":
    main("watchdog", run)
