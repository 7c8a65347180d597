"""What `vigil status` knows: from supervisord, the beats, the messages, the rings and journals;
`groups` knows the rest.

Files are the truth: counters, validity, latency and model come from the ring; messages give rates.
"""

import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import msgspec

from common import bus
from common.bus import Stream
from common.config import Config
from common.frames import JOURNAL, Ring
from common.messages import Beat, Message, Result, Truth
from common.paths import Paths
from common.processes import Process, capture_name, processes
from common.states import CameraState, ProcessState, Validity
from common.supervisor import Program, programs
from services.cli import supervisor
from services.cli.groups import GroupStatus, Incident, group, incidents
from services.cli.listen import Listener, newest_ring, topics
from services.cli.text import number, seconds
from services.cli.truth import Score

JUDGED = (Validity.VALID, Validity.STALE, Validity.DEGRADED)
BEAT_NS = 1_000_000_000  # at the longest between two beats of a process that progresses
PREFIXES = ("beat/", "frame/", "result/", "truth/")


class ProcessStatus(msgspec.Struct):
    name: str
    state: str
    alive: bool = False  # its working loop turns: a beat came
    beat_age_s: float | None = None
    pid: int | None = None
    uptime_s: float | None = None
    rss_bytes: int | None = None
    work_per_s: float | None = None  # how fast its progress counter grows
    restarts: int | None = None
    problem: str = ""


class StreamStatus(msgspec.Struct):
    """Three questions, kept apart."""

    alive: bool
    on_time: bool
    per_s: float
    expected_per_s: float | None
    age_s: float | None


class ModelStatus(msgspec.Struct):
    name: str
    version: str
    release: int
    slot: str
    runtime: str


class CameraStatus(msgspec.Struct):
    name: str
    source: str
    state: str
    frames: StreamStatus
    results: StreamStatus
    valid: bool = False  # what the newest result says of itself
    validity: str | None = None
    reason: str = ""
    frame_age_s: float | None = None  # of the newest frame
    latency_p50_ms: float | None = None  # slot filled -> decided, over the journal
    latency_max_ms: float | None = None
    model: ModelStatus | None = None
    account: dict[str, int] | None = None
    precision: float | None = None
    recall: float | None = None
    frames_compared: int = 0
    problems: list[str] = []


class Status(msgspec.Struct):
    well: bool
    root: str
    run: str
    processes: list[ProcessStatus]
    cameras: list[CameraStatus]
    problems: list[str]
    groups: list[GroupStatus] = []
    incidents: list[Incident] = []  # newest last


class Observer:
    """Listens, and tells what it has seen so far."""

    def __init__(self, config: Config, paths: Paths, listener: Listener) -> None:
        self._config, self._paths, self._listener = config, paths, listener
        self._topics = topics(config)
        self._streams = {topic: Stream(row.rate) for topic, row in self._topics.items()}
        self._beats: dict[str, Beat] = {}
        self._first_beats: dict[str, Beat] = {}
        self._scores: dict[str, Score] = {}
        self._undecoded = 0
        self._heard_s = 0.0

    def listen(self, seconds: float) -> None:
        self._heard_s = seconds
        self._first_beats.clear()
        for name in self._config.cameras:
            if name not in self._scores and (ring := newest_ring(self._paths, name)):
                with ring:
                    self._scores[name] = Score((ring.shape.width, ring.shape.height))
        for at, topic, body in self._listener.hear(seconds):
            if topic not in self._streams:
                continue
            self._streams[topic].seen(at, len(body))
            try:
                self._take(topic.partition("/")[2], bus.decode(topic, body))
            except msgspec.DecodeError:
                self._undecoded += 1

    def _take(self, what: str, message: Message) -> None:
        match message:
            case Beat():
                first = self._first_beats.get(what)
                if first is None or first.pid != message.pid:
                    self._first_beats[what] = message
                self._beats[what] = message
            case Truth() if what in self._scores:
                self._scores[what].add_truth((message.ring, message.sequence), message.items)
            case Result() if what in self._scores and message.validity in JUDGED:
                self._scores[what].add_items((message.ring, message.sequence), message.items)

    def status(self) -> Status:
        now = time.monotonic_ns()
        problems = []
        known = programs(self._paths)
        if known is None:
            problems.append(
                f"supervisord does not answer at {self._paths.supervisor_socket}: "
                "nothing starts again what dies"
            )
        restarts = supervisor.restarts(self._paths) if known else {}
        rows = []
        for process in processes(self._config):
            program = known.get(process.name) if known else None
            row = self._process(process, program, now)
            row.restarts = restarts.get(process.name)
            if known is not None and program is None:
                row.problem = "supervisord does not have it: did vigil.toml change since the start?"
            rows.append(row)
        cameras = [self._camera(name, now) for name in self._config.cameras]
        problems += [f"{row.name}: {row.problem}" for row in rows if row.problem]
        problems += [f"{row.name}: {problem}" for row in cameras for problem in row.problems]
        alive = {row.name: self._beats[row.name] for row in rows if row.alive}
        uptimes = {row.name: row.uptime_s for row in rows if row.uptime_s is not None}
        groups = [
            group(self._config, self._paths, name, alive, uptimes)
            for name in self._config.groups
            if self._config.cameras_of(name)
        ]
        problems += [problem for row in groups for problem in row.problems]
        recent, unreadable = incidents(self._paths)
        problems += [unreadable] if unreadable else []
        if self._undecoded:
            problems.append(f"{self._undecoded} messages could not be decoded: mixed versions?")
        paths = self._paths
        return Status(
            not problems, str(paths.root), str(paths.run), rows, cameras, problems, groups, recent
        )

    # -- processes ---------------------------------------------------------------------------

    def _process(self, process: Process, program: Program | None, now: int) -> ProcessStatus:
        stream = self._streams[f"beat/{process.name}"]
        row = ProcessStatus(process.name, program.state.lower() if program else "not running")
        row.beat_age_s = stream.age_s(now)
        row.pid = program.pid or None if program else None
        beat = self._beats.get(process.name)
        if beat and stream.alive(now) and (program is None or program.pid == beat.pid):
            row.alive = True  # the beat is its own, not its predecessor's
            row.state, row.pid, row.rss_bytes = beat.state, beat.pid, beat.rss_bytes
            row.work_per_s = self._work_per_s(beat)
            if beat.state == ProcessState.WAITING and row.work_per_s:
                row.state = ProcessState.RUNNING  # it waits between two frames
        row.uptime_s = uptime_s(row.pid) if row.pid else None
        row.problem = self._problem(row, beat, program, process, now)
        return row

    def _work_per_s(self, beat: Beat) -> float | None:
        first = self._first_beats.get(beat.process, beat)
        span = (beat.sent_ns - first.sent_ns) / 1e9
        return (beat.progress - first.progress) / span if span > 0 else None

    def _problem(
        self,
        row: ProcessStatus,
        beat: Beat | None,
        program: Program | None,
        process: Process,
        now: int,
    ) -> str:
        if program and program.state != "RUNNING":
            why = supervisor.last_error(program.log) or program.error
            return f"{program.state.lower()}{f': {why}' if why else ''}"
        if not row.alive or beat is None:
            if row.pid is None:
                return "not running"
            heard = seconds(row.beat_age_s if row.beat_age_s is not None else self._heard_s)
            return f"no beat for {heard} (pid {row.pid}): it hangs, is stopped or just starts"
        if beat.state in (ProcessState.STARTING, ProcessState.LOADING):
            return f"{beat.state} (may take {seconds(process.kind.start_s)})"
        # A wait shorter than the time between two beats is over before the next one can say so.
        if beat.wait and now > max(beat.wait_until_ns, beat.sent_ns + BEAT_NS):
            return f"waits for {beat.wait} {seconds((now - beat.wait_until_ns) / 1e9)} too long"
        return ""

    # -- cameras -----------------------------------------------------------------------------

    def _camera(self, name: str, now: int) -> CameraStatus:
        beat = self._beats.get(capture_name(name))
        state = beat.detail.get("camera", "unknown") if beat else "unknown"
        frames, results = self._streams[f"frame/{name}"], self._streams[f"result/{name}"]
        row = CameraStatus(
            name,
            self._config.cameras[name].source,
            state,
            _stream(frames, now),
            _stream(results, now),
        )
        if score := self._scores.get(name):
            row.precision, row.recall = score.precision, score.recall
            row.frames_compared = score.frames
        ring = newest_ring(self._paths, name)
        if ring is None:
            row.problems.append("no frame yet: capture has not made its ring")
            return row
        with ring:
            self._look_into(ring, row, now)
        row.problems += _camera_problems(row)
        return row

    def _look_into(self, ring: Ring, row: CameraStatus, now: int) -> None:
        """What the ring knows; its times stand in where too few messages came to tell a rate."""
        account = ring.account()
        row.account = asdict(account)
        if not account.balanced:
            row.problems.append("the account of its frames does not balance")
        filled = []
        written = ring.written
        for sequence in range(max(written - ring.shape.slots, ring.base) + 1, written + 1):
            captured_ns, filled_ns = ring.times(sequence)
            if ring.intact(sequence):
                filled.append(filled_ns)
                row.frame_age_s = (now - captured_ns) / 1e9
        row.frames = self._best(f"frame/{row.name}", filled, now)
        decided = self._journal(ring)
        times = [result.captured_ns + result.age_ns for result in decided]
        row.results = self._best(f"result/{row.name}", times, now)
        if decided:
            newest = decided[-1]
            row.valid = newest.validity == Validity.VALID
            row.validity, row.reason = newest.validity, newest.reason
            row.model = ModelStatus(
                newest.model, newest.version, newest.release, newest.slot, newest.runtime
            )
            totals = [result.stages.total / 1e6 for result in decided]
            row.latency_p50_ms, row.latency_max_ms = statistics.median(totals), max(totals)

    def _journal(self, ring: Ring) -> list[Result]:
        """The decisions that the journal still holds, oldest first."""
        results = []
        decided = ring.decided
        for sequence in range(max(decided - JOURNAL, ring.base) + 1, decided + 1):
            if entry := ring.entry(sequence):
                try:
                    result = bus.decode(f"result/{ring.camera}", entry.result)
                except msgspec.DecodeError:
                    self._undecoded += 1
                    continue
                assert isinstance(result, Result)
                results.append(result)
        return results

    def _best(self, topic: str, times: list[int], now: int) -> StreamStatus:
        heard = self._streams[topic]
        if len(heard.arrivals) >= 2 or not times:
            return _stream(heard, now)
        from_ring = Stream(heard.rate)
        for at in times:
            from_ring.seen(at, 0)
        return _stream(from_ring, now)


def _stream(stream: Stream, now: int) -> StreamStatus:
    return StreamStatus(
        stream.alive(now),
        stream.on_time(now),
        stream.rate_seen(now)[0],
        stream.rate,
        stream.age_s(now),
    )


def _camera_problems(row: CameraStatus) -> list[str]:
    found = []
    if row.state == CameraState.LOST:
        found.append("the camera is lost")
    if row.state != CameraState.ENDED:
        for what, stream in (("frame", row.frames), ("result", row.results)):
            if stream.age_s is None:
                found.append(f"no {what} yet")
            elif not stream.alive:
                found.append(f"no {what} for {seconds(stream.age_s)}")
            elif not stream.on_time:
                rates = f"{number(stream.per_s)} of {number(stream.expected_per_s)}"
                found.append(f"{what}s are late: {rates}/s")
    if row.validity is not None and not row.valid:
        reason = f": {row.reason}" if row.reason else ""
        found.append(f"no valid result: the newest is {row.validity}{reason}")
    return found


def uptime_s(pid: int) -> float | None:
    """Since the process was started, from /proc, which no wall clock changes."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    ticks = int(
        stat.rpartition(")")[2].split()[19]
    )  # field 22; the name in field 2 may hold blanks
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
