"""Capture: one process a camera. Pictures go straight into its ring; a bell wakes the lanes.

It outlives its camera: what is lost is connected anew, with a pause that grows.
"""

import os
import select
import sys
import time
import zlib
from collections import deque
from dataclasses import replace

import numpy as np

from common.bell import Bell, Ringer
from common.config import Camera
from common.errors import ConfigError, RingError, SourceError
from common.frames import Ring, Shape, remove_drained
from common.messages import CameraReport, Frame, Trigger, Truth
from common.processes import capture_name, lane_name, lanes
from common.service import BEAT_S, Service, main
from common.sources import SOURCES
from common.states import CameraState, Policy, ProcessState, Severity, Sight
from services.capture.life import Life, Look
from services.capture.shaping import Shaping
from services.capture.source import (
    BadPictureError,
    Format,
    Picture,
    Ready,
    SizeChangedError,
    Stamp,
    make,
)
from services.capture.triggers import Motion, Triggers

FULL_RING_TICK_S = 0.1  # a full ring looks for room this often, also when no bell rings
# Drained rings stay a while, so that whoever reads the journal finds its end.
KEEP_RINGS_S = 10.0
KEEP_RINGS = 3
MIN_PACE = 0.05
BAD_EVENT_S = 10.0
TICK_S = 0.25  # at the longest without a look at the time while no frame comes
OPEN_S = 10.0  # at the longest; a scene may be rendered first
WAIT_S = 2.0  # a declared wait is renewed by each beat; silent for longer, the process hangs
DIGEST_S = 1.0  # between two looks at every pixel
LOOK = 24  # rows and columns, about, of which brightness and spread are taken
WRONG = {CameraState.STALLED, CameraState.FROZEN, CameraState.DARK, CameraState.LOST}


class Capture:
    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        self._name = name
        if name not in service.config.cameras:
            raise ConfigError(f"{service.config.path}: has no [cameras.{name}]")
        self._camera: Camera = service.config.cameras[name]
        self._source = make(service.config, self._camera)
        self._ready = isinstance(self._source, Ready)  # asked at our pace; others have their own
        self._live = SOURCES[self._camera.source].live
        pushes = self._live and not self._ready
        self._life = Life(self._camera, live=pushes, now=time.monotonic_ns())
        self._said: tuple[CameraState, str] | None = CameraState.CONNECTING, ""
        self._format = Format(0, 0, None)
        self._ring: Ring | None = None
        self._shaping: Shaping
        self._pace = 1.0
        self._came: deque[int] = deque(maxlen=60)  # when the newest frames did
        self._skipped = 0
        self._digest_ns = 0  # when to look at every pixel
        self._glance_ns = 0  # when to look at a frame that no trigger asked for
        self._bad = self._bad_said_ns = 0  # pictures that could not be decoded; said when
        self._tidy_ns = 0  # when to look for older rings; 0: there are none
        every = self._camera.policy is Policy.EVERY
        at_once = self._camera.fps == "max" and self._ready
        self._waits = at_once or (every and not self._live)
        if self._camera.fps == "max":
            os.nice(5)  # who only waits for decisions leaves the cores to who makes them
        self._drops = every and not self._waits
        # Rung by lanes after each decision, for which a full ring waits.
        self._bell = Bell(service.paths.bell(service.name)) if self._waits else None
        group = self._camera.group
        names = [lane_name(group, lane) for lane in lanes(service.config, group)]
        self._lanes = Ringer(map(service.paths.bell, names))
        self._triggers = Triggers(service, name, self._camera) if self._camera.trigger else None
        self._motion: Motion | None = None

    def run(self) -> None:
        while not self._service.stopping and self._life.state is not CameraState.ENDED:
            try:
                self._connect()
                self._stream()
            except (SourceError, RingError) as error:
                self._source.close()
                pause_ns = self._life.failed(str(error), time.monotonic_ns())
                self._wait_until(time.monotonic_ns() + pause_ns, "the camera to come back")
        self._wait_until(None, "nothing more")

    def _wait_until(self, until_ns: int | None, wait: str) -> None:
        while not self._service.stopping:
            left_ns = BEAT_S * 1e9 if until_ns is None else until_ns - time.monotonic_ns()
            if left_ns <= 0:
                return
            self._beat(wait)
            self._service.pause(min(left_ns / 1e9, BEAT_S))

    def _connect(self) -> None:
        self._beat("the source to open", max(self._camera.open_s + WAIT_S, OPEN_S), at_once=True)
        self._format = self._source.open()
        self._period_ns = self._period()
        self._fit(self._format.width, self._format.height)
        self._digest_ns = 0
        self._came.clear()
        self._life.connected(time.monotonic_ns())

    def _fit(self, width: int, height: int) -> None:
        """Make room for pictures of this size, and for what is cut out of them."""
        shaping = Shaping(self._camera, width, height)
        camera = self._camera
        shape = Shape(*shaping.size, 3, camera.slots, camera.policy, shaping.view)
        if self._ring is None or self._ring.shape != shape:
            if self._ring is not None:
                self._ring.close()
                self._ring = None
            self._ring = self._make_ring(shape)
        if shaping.problem:
            text = f"{self._name}: {shaping.problem}"
            self._service.event("camera.misconfigured", Severity.ERROR, text, camera=self._name)
        self._shaping = shaping
        if self._triggers:
            self._triggers.remember(self._ring)
        trigger = camera.trigger
        if trigger and trigger.by == "motion":
            polygon = camera.zones[trigger.zone].points if trigger.zone else None
            if polygon and shaping.view:
                polygon = tuple(map(shaping.view.from_full, polygon))
            self._motion = Motion(shaping.size, polygon, trigger.share, trigger.level)

    def _stream(self) -> None:
        due = time.monotonic_ns()
        while not self._service.stopping:
            now = time.monotonic_ns()
            ring = self._open_ring
            full = self._waits and ring.full
            early = self._ready and now < due
            asked = self._triggers and not self._motion
            frame = "the next frame" if early or not self._ready else ""
            self._beat("a decision" if full else "a trigger" if asked else frame)
            if early:
                self._service.pause(min((due - now) / 1e9, BEAT_S))
                continue
            if full:
                self._wait_for_decision()
                continue
            if not self._source.wait(TICK_S):
                if reason := self._life.silent(time.monotonic_ns()):
                    raise SourceError(reason)
                continue
            try:
                if not self._ready and not self._wanted(due):
                    self._pass_over()
                    self._skipped += 1
                    continue
                if asked and not self._triggered(now):
                    self._go_on(now)
                elif not self._take():
                    self._life.ended(time.monotonic_ns())
                    return
            except SizeChangedError as change:
                self._format = replace(self._format, width=change.width, height=change.height)
                self._fit(change.width, change.height)
                self._said = None
            except BadPictureError as error:
                self._say_bad(error)
            due = self._next(due)
            if self._life.stuck(now):
                raise SourceError(f"{self._life.reason}; connecting anew")

    @property
    def _open_ring(self) -> Ring:
        assert self._ring is not None
        return self._ring

    # -- frames ------------------------------------------------------------------------------

    def _wanted(self, due: int) -> bool:
        """Whether a frame that came by itself is taken: fewer are where `fps` or heat says so.

        Half an interval early is nearer than half an interval late.
        """
        if not self._period_ns or (self._pace == 1.0 and self._camera.fps == "source"):
            return True
        interval = 1e9 / self._format.fps if self._format.fps else 0.0
        return time.monotonic_ns() >= due - interval / 2

    def _triggered(self, now: int) -> bool:
        return self._triggers is not None and self._triggers.due(now) is not None

    def _go_on(self, now: int) -> None:
        """While no trigger comes: a file waits; what is live goes on, and is glanced at."""
        assert self._triggers is not None
        if not self._live:
            self._triggers.wait(TICK_S)
        elif self._ready or now >= self._glance_ns:
            self._glance_ns = now + round(DIGEST_S * 1e9)
            picture = self._scratch()
            if stamp := self._read(picture):
                self._look(picture, stamp)
            self._service.progressed()
        else:
            self._pass_over()

    def _pass_over(self) -> None:
        self._source.skip()
        now = time.monotonic_ns()
        self._came.append(now)
        self._life.heard(now)
        self._service.progressed()

    def _take(self) -> bool:
        """Take the next frame from the source; False at its end."""
        ring = self._open_ring
        drops = self._drops and ring.full
        if drops and not self._ready and not self._triggers:
            self._pass_over()  # a live camera goes on while the ring is full
            ring.count_overrun()
            return True
        into = self._scratch() if drops else self._slot(ring)
        stamp = self._read(into)
        if stamp is None:
            return False
        if self._camera.policy is Policy.EVERY:
            for _ in range(stamp.lost):  # no part may pass unseen, and uncounted
                ring.count_overrun()
        sight = max(stamp.sight, self._look(into, stamp))
        trigger = self._trigger_for(into, stamp)
        if self._triggers and trigger is None:
            self._service.progressed()
        elif drops:
            ring.count_overrun()
            self._service.progressed()
            if self._triggers and trigger:
                self._triggers.fail(trigger, "no frame before it is decided yet: the ring is full")
        else:
            self._announce(stamp, sight, trigger)
        return True

    def _read(self, into: Picture) -> Stamp | None:
        shaping = self._shaping
        stamp = self._source.read(into if shaping.full is None else shaping.full)
        if stamp is not None:
            self._came.append(time.monotonic_ns())
            shaping.apply(into)
        return stamp

    def _slot(self, ring: Ring) -> Picture:
        shape = ring.shape
        return np.frombuffer(ring.begin(), np.uint8).reshape(shape.height, shape.width, 3)

    def _scratch(self) -> Picture:
        return np.empty((*self._shaping.size[::-1], 3), np.uint8)

    def _look(self, picture: Picture, stamp: Stamp) -> Sight:
        """What the picture shows at a glance."""
        now = time.monotonic_ns()
        few = picture[:: picture.shape[0] // LOOK or 1, :: picture.shape[1] // LOOK or 1]
        digest = None
        if self._format.raw and now >= self._digest_ns:
            digest = zlib.crc32(picture.data)
            self._digest_ns = now + round(DIGEST_S * 1e9)
        mark = None if self._format.raw else stamp.mark
        # By colour, since light may be red alone; as numpy does it fastest.
        points = few.reshape(-1, 3).astype(np.float64)
        mean = points.mean(0)
        spread = max(0.0, float(((points * points).mean(0) - mean * mean).max())) ** 0.5
        return self._life.frame(Look(float(mean.max()), spread, mark, digest), now)

    def _trigger_for(self, picture: Picture, stamp: Stamp) -> Trigger | None:
        if self._triggers is None:
            return None
        if self._motion and self._motion.comes(picture):
            self._triggers.take(Trigger(stamp.captured_ns, stamp.captured_ns))
        return self._triggers.due(stamp.captured_ns)

    def _announce(self, stamp: Stamp, sight: Sight, trigger: Trigger | None) -> None:
        ring, filled_ns = self._open_ring, time.monotonic_ns()
        asked = trigger.id if trigger else 0
        sequence = ring.publish(stamp.captured_ns, filled_ns, sight, asked)
        self._lanes.ring()
        message = Frame(ring.generation, sequence, stamp.captured_ns, filled_ns, sight, asked)
        self._service.publish(f"frame/{self._name}", message)
        self._service.progressed()
        if self._triggers and trigger:
            self._triggers.answer(trigger, ring.generation, sequence)
        if stamp.truth is not None:
            truth = Truth(ring.generation, sequence, stamp.truth)
            self._service.publish(f"truth/{self._name}", truth)

    def _wait_for_decision(self) -> None:
        """Until the bell or the tick says that the ring may have room."""
        assert self._bell is not None
        select.select([self._bell.fd, self._service.wake_fd], [], [], FULL_RING_TICK_S)
        self._bell.heard()

    def _make_ring(self, shape: Shape) -> Ring:
        paths = self._service.paths
        remove_drained(paths.rings, paths.accounts, self._name, keep=KEEP_RINGS)
        ring = Ring.attach(paths.rings, paths.accounts, self._name, shape)
        self._tidy_ns = time.monotonic_ns() + round(KEEP_RINGS_S * 1e9)
        return ring

    def _say_bad(self, error: BadPictureError) -> None:
        """A picture that can't be decoded is told of and passed over."""
        now = time.monotonic_ns()
        self._bad += 1
        self._life.heard(now)
        self._service.progressed()
        if now >= self._bad_said_ns:
            self._bad_said_ns = now + round(BAD_EVENT_S * 1e9)
            text = f"{self._name}: {error}; {self._bad} passed over so far"
            self._service.event("camera.bad_picture", Severity.ERROR, text, camera=self._name)

    # -- rate --------------------------------------------------------------------------------

    def _next(self, due_ns: int) -> int:
        """When the next frame is due, at the pace allowed."""
        now = time.monotonic_ns()
        if not self._period_ns:  # full speed: pauses in proportion to the work since the last one
            return now + round((now - due_ns) * (1 / self._pace - 1))
        period_ns = round(self._period_ns / self._pace)
        # Late by more than a period: go on from now, never in a burst.
        return max(due_ns + period_ns, now - period_ns)

    def _period(self) -> int:
        """Between two frames wanted, ns; 0: whatever comes."""
        fps = self._format.fps if self._camera.fps == "source" else self._camera.fps
        if fps == "max" or (fps is None and not self._ready):
            return 0
        if not isinstance(fps, float):
            raise ConfigError(
                f"cameras.{self._name}.fps: this {self._camera.source} has no rate of its own; "
                'give a number of frames a second, or "max"'
            )
        return round(1e9 / fps)

    def _read_pace(self) -> None:
        """What share of the frame rate the watchdog allows: less where the board is too hot."""
        try:
            pace = float((self._service.paths.run / "pace").read_text())
        except (FileNotFoundError, ValueError):
            pace = 1.0
        self._pace = min(1.0, max(MIN_PACE, pace))

    # -- telling -----------------------------------------------------------------------------

    def _beat(self, wait: str = "", wait_s: float = WAIT_S, *, at_once: bool = False) -> None:
        state = self._life.state
        says = state, self._life.reason if state is CameraState.LOST else ""
        changed = self._said != says
        if changed:
            self._said = says
            self._tell_state()
        elif not at_once and not self._service.beat_due(ProcessState.RUNNING):
            return
        self._read_pace()
        if self._tidy_ns and time.monotonic_ns() > self._tidy_ns:
            paths = self._service.paths
            left = remove_drained(paths.rings, paths.accounts, self._name)
            self._tidy_ns = time.monotonic_ns() + round(KEEP_RINGS_S * 1e9) if left else 0
        self._service.beat(
            ProcessState.RUNNING, wait=wait, wait_s=wait_s, at_once=True, camera=self._report()
        )

    def _tell_state(self) -> None:
        life = self._life
        severity = Severity.ERROR if life.state in WRONG else Severity.INFO
        text = f"{self._name}: {life.state}, {life.reason or self._format}"
        self._service.event(f"camera.{life.state}", severity, text, camera=self._name)

    def _report(self) -> CameraReport:
        life, came = self._life, self._came
        span_ns = time.monotonic_ns() - came[0] if came else 0
        return CameraReport(
            state=life.state,
            since_ns=life.since_ns,
            reason=life.reason,
            format=str(self._format) if self._format.width else "",
            problem=self._shaping.problem if self._ring is not None else "",
            per_s=len(came) / (span_ns / 1e9) if span_ns else 0.0,
            reconnects=life.reconnects,
            skipped=self._skipped,
            brightness=life.look.brightness,
            spread=life.look.spread,
            triggers=self._triggers.answered if self._triggers else 0,
            triggers_missed=self._triggers.missed if self._triggers else 0,
        )

    def close(self) -> None:
        self._source.close()
        self._lanes.close()
        if self._bell:
            self._bell.close()
        if self._triggers:
            self._triggers.close()


def run(service: Service) -> None:
    capture = Capture(service, sys.argv[1])
    try:
        capture.run()
    finally:
        capture.close()


if __name__ == "__main__":
    main(capture_name(sys.argv[1]), run)
