"""Triggers: a part is inspected once and only once, by the first frame at or after its time."""

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np
import zmq

from common import bus
from common.config import Camera
from common.frames import Ring
from common.geometry import Point, inside
from common.messages import Trigger
from common.service import Service
from common.states import Severity
from services.capture.source import Picture

WAITING = 64  # triggers that wait for their frames
REMEMBERED = 1000
_ROWS, _COLUMNS = 60, 80  # a picture is looked at through about so many points
LEARN = 100  # frames
_FORGET = 0.998  # a frame; a new background is known after some 350
_BIN = 8  # grey levels
_SURE_THERE, _SURE_GONE = 2, 3  # frames in a row


class Triggers:
    """Takes triggers from any number of processes, gives each at most one frame, and says so."""

    def __init__(self, service: Service, name: str, camera: Camera) -> None:
        assert camera.trigger is not None
        self._service, self._topic = service, f"trigger/{name}"
        self._name = name
        self._delay_ns = round(camera.trigger.delay_s * 1e9)
        self._late_ns = round(camera.stale_after_s * 1e9)
        self._waiting: deque[Trigger] = deque()
        self._seen: deque[int] = deque(maxlen=REMEMBERED)
        self.answered = self.missed = 0
        self._socket = service.context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.bind(service.paths.trigger(name))

    def remember(self, ring: Ring) -> None:
        """What the ring holds was inspected, maybe by a process before this one."""
        for sequence in range(max(1, ring.written - ring.shape.slots + 1), ring.written + 1):
            trigger = ring.marks(sequence)[1]
            if trigger and ring.intact(sequence) and trigger not in self._seen:
                self._seen.append(trigger)

    def wait(self, seconds: float) -> None:
        """Until a trigger comes, or so long."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._service.wake_fd, zmq.POLLIN)
        poller.poll(round(seconds * 1000))

    def take(self, trigger: Trigger) -> None:
        if trigger.id < 1:
            self._say(trigger, reason="an id is a number from 1 on")
        elif trigger.id in self._seen:
            self._say(trigger, reason="a trigger of this id was taken before")
        elif len(self._waiting) == WAITING:
            self._miss(trigger, f"{WAITING} triggers wait already")
        else:
            self._seen.append(trigger.id)
            self._waiting.append(trigger)

    def due(self, captured_ns: int) -> Trigger | None:
        """The trigger that a frame of this time answers; those that waited too long are missed."""
        while True:
            try:
                _, body = self._socket.recv_multipart(zmq.NOBLOCK)
                message = bus.decode(self._topic, body)
                assert isinstance(message, Trigger)
            except zmq.Again:
                break
            except (ValueError, msgspec.DecodeError) as error:
                text = f"{self._name}: a trigger that can't be read: {error}"
                self._service.event("trigger.unreadable", Severity.WARNING, text)
                continue
            self.take(message)
        while self._waiting:
            oldest = self._waiting[0]
            due_ns = oldest.at_ns + self._delay_ns
            if captured_ns < due_ns:
                return None
            if captured_ns < due_ns + self._late_ns:
                return oldest
            self._waiting.popleft()
            self._miss(oldest, f"no frame within {self._late_ns / 1e9:g} s of it")
        return None

    def answer(self, trigger: Trigger, ring: int, sequence: int) -> None:
        """A frame was taken for the trigger that `due` gave."""
        self._waiting.remove(trigger)
        self.answered += 1
        self._say(trigger, ring=ring, sequence=sequence)

    def fail(self, trigger: Trigger, reason: str) -> None:
        """No frame can be taken for the trigger that `due` gave."""
        self._waiting.remove(trigger)
        self._miss(trigger, reason)

    def _miss(self, trigger: Trigger, reason: str) -> None:
        self.missed += 1
        self._say(trigger, reason=reason)
        text = f"{self._name}: part {trigger.id} was not inspected: {reason}"
        self._service.event("trigger.missed", Severity.ERROR, text, camera=self._name)

    def _say(self, trigger: Trigger, *, ring: int = 0, sequence: int = 0, reason: str = "") -> None:
        answer = Trigger(trigger.id, trigger.at_ns, ring, sequence, reason)
        self._service.publish(self._topic, answer)

    def close(self) -> None:
        self._socket.close()


class Motion:
    """Tells when something comes into the picture, or into a polygon of it: once until it left.

    Points on a coarse grid, in green, are compared with the background, which is each point's most
    frequent value of late: parts differ, the belt does not. How much all of them differ together
    is light, not a part. The first frames are only learnt.

    Args:
        polygon: corners in pixels of the picture looked at; None: all of it.
        share: of the points watched that have to differ.
        level: grey levels that a point has to differ by.
    """

    def __init__(
        self, size: tuple[int, int], polygon: Sequence[Point] | None, share: float, level: float
    ) -> None:
        width, height = size
        self._step = max(1, height // _ROWS), max(1, width // _COLUMNS)
        self._watched = np.ones((-(-height // self._step[0]), -(-width // self._step[1])), bool)
        if polygon is not None:
            for at, _ in np.ndenumerate(self._watched):
                y, x = (place * step + 0.5 for place, step in zip(at, self._step, strict=True))
                self._watched[at] = inside((x, y), polygon)
        self._points = np.arange(np.count_nonzero(self._watched))
        # Of each point, how often each value was seen; one more at both ends, for neighbours.
        self._seen = np.zeros((self._points.size, 256 // _BIN + 2), np.float32)
        self._share, self._level = share, level
        self._frames = self._there = self._gone = 0
        self._armed = True

    def comes(self, picture: Picture) -> bool:
        """Look at the next picture (height x width x 3, uint8, BGR)."""
        if not self._points.size:
            return False
        values = picture[:: self._step[0], :: self._step[1], 1][self._watched].astype(np.int32)
        differs = values - (self._seen[:, 1:-1].argmax(1) * _BIN + _BIN // 2)
        differs = np.abs(differs - np.median(differs)) > self._level
        share = float(differs.mean())
        self._seen *= _FORGET
        for neighbour, weight in ((0, 0.5), (1, 1.0), (2, 0.5)):
            self._seen[self._points, values // _BIN + neighbour] += weight
        self._frames += 1
        self._there = self._there + 1 if share >= self._share else 0
        self._gone = self._gone + 1 if share < self._share / 2 else 0
        if self._frames <= LEARN:
            return False
        self._armed |= self._gone >= _SURE_GONE
        comes = self._armed and self._there >= _SURE_THERE
        self._armed &= not comes
        return comes
