"""Capture: one process a camera. Pictures go straight into its ring; a bell wakes the lanes."""

import os
import select
import sys
import time

import numpy as np

from common.bell import Bell, Ringer
from common.config import Camera
from common.errors import ConfigError
from common.frames import Ring, Shape, remove_drained
from common.messages import Frame, Truth
from common.processes import capture_name, lane_name, lanes
from common.service import BEAT_S, Service, main
from common.sources import SOURCES
from common.states import CameraState, Policy, ProcessState, Severity
from services.capture.source import Format, Picture, SizeChangedError, Stamp, make

FULL_RING_TICK_S = 0.1  # a full ring looks for room this often, also when no bell rings
# Drained rings stay a while, so that whoever reads the journal finds its end.
KEEP_RINGS_S = 10.0
KEEP_RINGS = 3
MIN_PACE = 0.05
OPEN_S = 10.0
WAIT_S = 2.0  # a declared wait is renewed by each beat; silent for longer, the process hangs


class Capture:
    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        self._name = name
        if name not in service.config.cameras:
            raise ConfigError(f"{service.config.path}: has no [cameras.{name}]")
        self._camera: Camera = service.config.cameras[name]
        self._source = make(service.config, self._camera)
        self._state = CameraState.CONNECTING
        self._pace = 1.0
        self._tidy_ns = 0  # when to look for older rings; 0: there are none
        every, live = self._camera.policy is Policy.EVERY, SOURCES[self._camera.source].live
        self._waits = self._camera.fps == "max" or (every and not live)
        if self._camera.fps == "max":
            os.nice(5)  # who only waits for decisions leaves the cores to who makes them
        self._drops = every and not self._waits
        # Rung by lanes after each decision, for which a full ring waits.
        self._bell = Bell(service.paths.bell(service.name)) if self._waits else None
        group = self._camera.group
        names = [lane_name(group, lane) for lane in lanes(service.config, group)]
        self._lanes = Ringer(map(service.paths.bell, names))

    def run(self) -> None:
        self._beat("the source to open", OPEN_S)
        format = self._source.open()
        self._ring = self._make_ring(format.width, format.height)
        period_ns = self._period_ns(format)
        self._set_state(CameraState.STREAMING, f"{format.width}x{format.height}")
        due = time.monotonic_ns()
        while not self._service.stopping:
            now = time.monotonic_ns()
            full = self._waits and self._ring.full
            self._beat("a decision" if full else "the next frame" if now < due else "")
            if now < due:
                self._sleep((due - now) / 1e9)
                continue
            if full:
                self._wait_for_decision()
                continue
            if self._drops and self._ring.full:
                self._drop()
            elif not self._capture(self._ring.begin()):
                self._set_state(CameraState.ENDED, "nothing more to read")
                break
            due = self._next(due, period_ns)
        while not self._service.stopping:
            self._beat("nothing more")
            self._sleep(BEAT_S)

    def _capture(self, slot: memoryview) -> bool:
        """Fill the slot and hand it over; False at the end of the source."""
        shape = self._ring.shape
        picture: Picture = np.frombuffer(slot, np.uint8).reshape(shape.height, shape.width, 3)
        try:
            stamp = self._source.read(picture)
        except SizeChangedError as change:
            self._resize(change)
            return True
        if stamp is None:
            return False
        self._announce(stamp)
        return True

    def _drop(self) -> None:
        """A live camera goes on while the ring is full: the frame is taken from it and counted."""
        shape = self._ring.shape
        try:
            self._source.read(np.empty((shape.height, shape.width, 3), np.uint8))
        except SizeChangedError as change:
            self._resize(change)
        else:
            self._ring.count_overrun()
            self._service.progressed()

    def _resize(self, change: SizeChangedError) -> None:
        self._ring.close()
        self._ring = self._make_ring(change.width, change.height)
        self._set_state(CameraState.STREAMING, f"{change.width}x{change.height}")

    def _wait_for_decision(self) -> None:
        """Until the bell or the tick says that the ring may have room."""
        assert self._bell is not None
        select.select([self._bell.fd, self._service.wake_fd], [], [], FULL_RING_TICK_S)
        self._bell.heard()

    def _announce(self, stamp: Stamp) -> None:
        ring, filled_ns = self._ring, time.monotonic_ns()
        sequence = ring.publish(stamp.captured_ns, filled_ns)
        self._lanes.ring()
        message = Frame(ring.generation, sequence, stamp.captured_ns, filled_ns)
        self._service.publish(f"frame/{self._name}", message)
        self._service.progressed()
        if stamp.truth is not None:
            truth = Truth(ring.generation, sequence, stamp.truth)
            self._service.publish(f"truth/{self._name}", truth)

    def _make_ring(self, width: int, height: int) -> Ring:
        paths = self._service.paths
        remove_drained(paths.rings, paths.accounts, self._name, keep=KEEP_RINGS)
        shape = Shape(width, height, 3, self._camera.slots, self._camera.policy)
        ring = Ring.attach(paths.rings, paths.accounts, self._name, shape)
        self._tidy_ns = time.monotonic_ns() + round(KEEP_RINGS_S * 1e9)
        return ring

    def _next(self, due_ns: int, period_ns: int) -> int:
        """When the next frame is due, at the pace allowed."""
        now = time.monotonic_ns()
        if not period_ns:  # full speed: pauses in proportion to the work since the last one
            return now + round((now - due_ns) * (1 / self._pace - 1))
        period_ns = round(period_ns / self._pace)
        # Late by more than a period: go on from now, never in a burst.
        return max(due_ns + period_ns, now - period_ns)

    def _period_ns(self, format: Format) -> int:
        fps = format.fps if self._camera.fps == "source" else self._camera.fps
        if fps == "max":
            return 0
        if not isinstance(fps, float):
            raise ConfigError(
                f"cameras.{self._name}.fps: this {self._camera.source} has no rate of its own; "
                'give a number of frames a second, or "max"'
            )
        return round(1e9 / fps)

    def _set_state(self, state: CameraState, text: str) -> None:
        self._state = state
        self._service.event(
            f"camera.{state}", Severity.INFO, f"{self._name}: {state}, {text}", camera=self._name
        )

    def _beat(self, wait: str = "", wait_s: float = WAIT_S) -> None:
        if not self._service.beat_due(ProcessState.RUNNING):
            return
        self._read_pace()
        if self._tidy_ns and time.monotonic_ns() > self._tidy_ns:
            paths = self._service.paths
            left = remove_drained(paths.rings, paths.accounts, self._name)
            self._tidy_ns = time.monotonic_ns() + round(KEEP_RINGS_S * 1e9) if left else 0
        self._service.beat(ProcessState.RUNNING, wait=wait, wait_s=wait_s, camera=self._state)

    def _sleep(self, seconds: float) -> None:
        self._service.pause(min(seconds, BEAT_S))

    def _read_pace(self) -> None:
        """What share of the frame rate the watchdog allows: less where the board is too hot."""
        try:
            pace = float((self._service.paths.run / "pace").read_text())
        except (FileNotFoundError, ValueError):
            pace = 1.0
        self._pace = min(1.0, max(MIN_PACE, pace))

    def close(self) -> None:
        self._source.close()
        self._lanes.close()
        if self._bell:
            self._bell.close()


def run(service: Service) -> None:
    capture = Capture(service, sys.argv[1])
    try:
        capture.run()
    finally:
        capture.close()


if __name__ == "__main__":
    main(capture_name(sys.argv[1]), run)
