"""What `vigil status` knows: from supervisord, the beats, the messages, the rings and journals;
`groups` knows the rest.

Files are the truth: rates, validity, latency and model come from the ring. Heard are only beats,
health and truth: who listens to frames and results takes time from the lanes.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from common import bus
from common.bus import Stream
from common.config import Config
from common.frames import JOURNAL, Ring
from common.messages import Beat, CameraReport, Health, Message, Result, Stages, Truth, TruthItem
from common.paths import Paths
from common.processes import Process, capture_name, processes
from common.states import CameraState, ProcessState, Validity
from common.supervisor import Program, programs
from services.cli import supervisor
from services.cli.groups import GroupStatus, Incident, group, incidents
from services.cli.listen import Listener, newest_ring, topics
from services.cli.tap import plain
from services.cli.text import number, seconds
from services.cli.truth import Score

JUDGED = (Validity.VALID, Validity.STALE, Validity.DEGRADED)
BEAT_NS = 1_000_000_000  # at the longest between two beats of a process that progresses
PREFIXES = ("beat/", "health")
BLIND = (CameraState.LOST, CameraState.STALLED, CameraState.FROZEN, CameraState.DARK)
RATE_S = 3.0  # rates are those of the newest so many seconds
COUNTED = 8  # frames in them that tell a rate; of fewer, their times do
FAST_PER_S = 100.0  # truth that comes faster is heard at the end of each round, for SAMPLE_S
SAMPLE_S = 0.1


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
    state_reason: str = ""
    state_s: float | None = None  # in this state
    format: str = ""  # as negotiated with the camera
    size: tuple[int, int] | None = None  # width and height of the ring's pictures
    given_per_s: float | None = None  # frames that the camera gives, taken or not
    reconnects: int = 0
    passed_over: int = 0  # before decoding, to keep the rate asked
    brightness: float | None = None  # mean of the newest picture, 0..255
    triggers: int = 0  # answered by a frame
    triggers_missed: int = 0
    zones: dict[str, tuple[tuple[float, float], ...]] = {}  # in pixels of the full picture
    stages_ms: dict[str, float] = {}  # medians of the newest results
    fresh_s: float | None = None  # an older frame is not what is there now; None: it may be


class Status(msgspec.Struct):
    well: bool
    root: str
    run: str
    processes: list[ProcessStatus]
    cameras: list[CameraStatus]
    problems: list[str]
    groups: list[GroupStatus] = []
    incidents: list[Incident] = []  # newest last
    health: dict[str, Any] | None = None  # messages.Health, where it was heard


class Observer:
    """Listens, and tells what it has seen so far."""

    def __init__(self, config: Config, paths: Paths, listener: Listener) -> None:
        self._config, self._paths, self._listener = config, paths, listener
        self._topics = topics(config)
        self._streams = {topic: Stream(row.rate) for topic, row in self._topics.items()}
        self._beats: dict[str, Beat] = {}
        self._first_beats: dict[str, Beat] = {}
        self._health: Health | None = None
        self._scores: dict[str, Score] = {}
        self._scored: dict[str, tuple[int, int]] = {}  # newest ring and sequence
        self._counts: dict[str, deque[tuple[int, int, int]]] = {}  # when, captured, judged
        self._undecoded = 0
        self._heard_s = 0.0
        for topic in self._topics:
            if topic.startswith("truth/"):
                listener.want(topic, True)

    def listen(self, seconds: float, batch_s: float = 0.0) -> None:
        """
        Args:
            batch_s: look for messages no more often than that; each look takes time.
        """
        self._heard_s = seconds
        self._first_beats.clear()
        fast = []
        for name in self._config.cameras:
            if ring := newest_ring(self._paths, name):
                with ring:
                    captured_per_s, _ = self._count(ring, time.monotonic_ns())
                    if self._score(ring) and (captured_per_s or 0.0) > FAST_PER_S:
                        fast.append(f"truth/{name}")
        if fast:
            for topic in fast:
                self._listener.want(topic, False)
            self._hear(seconds - SAMPLE_S, batch_s)
            for topic in fast:
                self._listener.want(topic, True)
        self._hear(min(SAMPLE_S, seconds) if fast else seconds, batch_s)

    def _hear(self, seconds: float, batch_s: float) -> None:
        for at, topic, body in self._listener.hear(seconds, batch_s):
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
            case Health():
                self._health = message

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
            not problems, str(paths.root), str(paths.run), rows, cameras, problems, groups, recent,
            plain(self._health) if self._health else None,
        )  # fmt: skip

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
        settings = self._config.cameras[name]
        rate = settings.fps if isinstance(settings.fps, float) and not settings.trigger else None
        unseen = StreamStatus(False, rate is None, 0.0, rate, None)
        row = CameraStatus(name, settings.source, "unknown", unseen, unseen)
        row.zones = {zone: options.points for zone, options in settings.zones.items()}
        beat = self._beats.get(capture_name(name))
        if beat and beat.camera and self._streams[f"beat/{capture_name(name)}"].alive(now):
            _report(row, beat.camera, now)
        if ring := newest_ring(self._paths, name):
            with ring:
                self._look_into(ring, row, rate)
        elif row.state not in BLIND:
            row.problems.append("no frame yet: capture has not made its ring")
        if not settings.trigger:
            row.fresh_s = settings.stale_after_s + 2 / (rate or row.frames.per_s or 1.0)
        row.problems += _camera_problems(row) if ring or row.state in BLIND else []
        return row

    def _look_into(self, ring: Ring, row: CameraStatus, rate: float | None) -> None:
        account = ring.account()
        row.account = asdict(account)
        row.size = ring.shape.width, ring.shape.height
        if not account.balanced:
            row.problems.append("the account of its frames does not balance")
        filled, captured = [], 0
        written = ring.written
        for sequence in range(max(written - ring.shape.slots, ring.base) + 1, written + 1):
            captured_ns, filled_ns = ring.times(sequence)
            if ring.intact(sequence):
                filled.append(filled_ns)
                captured = captured_ns
        decided = self._journal(ring)
        now = time.monotonic_ns()
        row.frame_age_s = (now - captured) / 1e9 if captured else None
        times = [result.captured_ns + result.age_ns for result in decided]
        captured_per_s, judged_per_s = self._count(ring, now)
        row.frames = _flow(filled, captured_per_s, rate, now)
        row.results = _flow(times, judged_per_s, rate, now)
        if decided:
            newest = decided[-1]
            row.valid = newest.validity == Validity.VALID
            row.validity, row.reason = newest.validity, newest.reason
            row.model = ModelStatus(
                newest.model, newest.version, newest.release, newest.slot, newest.runtime
            )
            totals = [result.stages.total / 1e6 for result in decided]
            row.latency_p50_ms, row.latency_max_ms = statistics.median(totals), max(totals)
            since = times[-1] - RATE_S * 1e9
            stages = [r.stages for r, at in zip(decided, times, strict=True) if at >= since]
            row.stages_ms = {
                name: round(statistics.median(getattr(one, name) for one in stages) / 1e6, 3)
                for name in Stages.__struct_fields__
            }
        if score := self._score(ring):
            last = self._scored.get(row.name, (0, 0))
            for result in decided:
                frame = result.ring, result.sequence
                if frame > last and result.validity in JUDGED:
                    score.add_items(frame, result.items)
                self._scored[row.name] = frame
            row.precision, row.recall = score.precision, score.recall
            row.frames_compared = score.frames

    def _count(self, ring: Ring, now: int) -> tuple[float | None, float | None]:
        """Frames captured and judged a second; None where too few came for their number to tell."""
        account = ring.account()
        judged = account.inferred + account.not_inferred + account.failed
        counts = self._counts.setdefault(ring.camera, deque(maxlen=64))
        while counts and (counts[0][0] < now - RATE_S * 1e9 or counts[0][1] > account.captured):
            counts.popleft()  # too old, or of another run
        counts.append((now, account.captured, judged))
        at, *before = counts[0]
        grown = (account.captured - before[0], judged - before[1])
        span = (now - at) / 1e9
        captured, judged_per_s = (n / span if span and n >= COUNTED else None for n in grown)
        return captured, judged_per_s

    def _score(self, ring: Ring) -> Score | None:
        """Of a camera whose truth is told."""
        if f"truth/{ring.camera}" not in self._topics:
            return None
        shape = ring.shape
        picture = 0.0, 0.0, float(shape.width), float(shape.height)
        seen = shape.view.box_to_full(picture) if shape.view else picture
        score = self._scores.setdefault(ring.camera, Score(seen))
        score.seen = seen
        return score

    def truth(self, camera: str, frame: tuple[int, int]) -> Sequence[TruthItem] | None:
        """What was really there, of the ring's generation and sequence; from any thread."""
        score = self._scores.get(camera)
        return score.known.get(frame) if score else None

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


def _report(row: CameraStatus, report: CameraReport, now: int) -> None:
    """What capture says of its camera."""
    row.state, row.state_reason, row.format = report.state, report.reason, report.format
    row.state_s, row.given_per_s = (now - report.since_ns) / 1e9, report.per_s
    row.reconnects, row.passed_over = report.reconnects, report.skipped
    row.brightness = report.brightness
    row.triggers, row.triggers_missed = report.triggers, report.triggers_missed
    row.problems += [report.problem] if report.problem else []


def _flow(
    times: list[int], counted_per_s: float | None, expected: float | None, now: int
) -> StreamStatus:
    """
    Args:
        times: of the newest ones, CLOCK_MONOTONIC ns, oldest first.
        counted_per_s: where it is known; else they tell the rate.
    """
    stream = Stream(expected)
    for at in times:
        stream.seen(at, 0)
    alive = stream.alive(now)
    if counted_per_s is None:
        per_s, on_time = stream.rate_seen(now)[0], stream.on_time(now)
    else:
        per_s, on_time = counted_per_s, expected is None or counted_per_s >= 0.8 * expected
    return StreamStatus(alive, on_time, per_s, expected, stream.age_s(now))


def _camera_problems(row: CameraStatus) -> list[str]:
    if row.state in BLIND:  # the cause of the rest
        why = f": {row.state_reason}" if row.state_reason else ""
        return [f"the camera is {row.state} for {seconds(row.state_s)}{why}"]
    found = []
    if row.state != CameraState.ENDED and row.fresh_s is not None:
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
