"""Ways to move pictures from one process to another, each as its users write it.

A Sender copies the picture into what it sends; a Receiver gives it as an array, to be read before
`done`. At most about SLOTS pictures are on their way; flat out none is lost.
"""

import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import imagezmq
import numpy as np
import zmq
from numpy.typing import NDArray

from common.bell import Bell, Ringer
from common.bus import Publisher
from common.errors import RingError
from common.frames import Ring, Shape
from common.messages import Frame
from common.states import Policy

Picture = NDArray[np.uint8]
SLOTS = 4
TICK_S = 0.5  # only for a bell that was not heard
RESULT = bytes(200)  # about what one decision with a few items takes


@dataclass(frozen=True)
class Link:
    """What both ends of a way are told."""

    folder: Path
    size: tuple[int, int]  # rows, columns
    paced: bool
    queue: Any


class Sender(Protocol):
    def send(self, picture: Picture, stamp_ns: int) -> None: ...


class Receiver(Protocol):
    def receive(self) -> tuple[int, Picture]: ...

    def done(self) -> None: ...


class RingSender:
    """Vigil's own, as capture does it: the slot is filled in place, a bell wakes the reader and a
    message tells whoever else listens; under `every` a full ring waits for a decision."""

    def __init__(self, link: Link) -> None:
        folder, (height, width) = link.folder, link.size
        policy = Policy.LATEST if link.paced else Policy.EVERY
        shape = Shape(width, height, 3, SLOTS, policy)
        self._ring = Ring.attach(folder, folder, "cam", shape)
        self._shape = height, width, 3
        self._publisher = Publisher(zmq.Context(), f"ipc://{folder}/capture.ipc")
        self._bell = Bell(folder / "capture.bell")
        self._lane = Ringer([folder / "lane.bell"])

    def send(self, picture: Picture, stamp_ns: int) -> None:
        ring = self._ring
        while ring.full and ring.shape.policy is Policy.EVERY:
            wait(self._bell)
        np.copyto(np.frombuffer(ring.begin(), np.uint8).reshape(self._shape), picture)
        filled_ns = time.monotonic_ns()
        sequence = ring.publish(stamp_ns, filled_ns)
        self._lane.ring()
        message = Frame(ring.generation, sequence, stamp_ns, filled_ns)
        self._publisher.publish("frame/cam", message)


class RingReceiver:
    """Reads in place. Under `every` it also commits a decision for each picture, and announces it,
    as a lane does: the writer waits for it. Under `latest` nothing does, so it only looks whether
    the picture was overwritten."""

    def __init__(self, link: Link) -> None:
        folder, (height, width) = link.folder, link.size
        while not (folder / "cam.1").exists():
            time.sleep(0.01)
        self._ring = Ring.open(folder, folder, "cam", 1, writable=True)
        self._ring.raise_fence(1)
        self._read = 0
        self._shape = height, width, 3
        self._publisher = Publisher(zmq.Context(), f"ipc://{folder}/lane.ipc")
        self._bell = Bell(folder / "lane.bell")
        self._capture = Ringer([folder / "capture.bell"])

    def receive(self) -> tuple[int, Picture]:
        while self._ring.written == self._read:
            wait(self._bell)
        newest_wins = self._ring.shape.policy is Policy.LATEST
        self._read = self._ring.written if newest_wins else self._read + 1
        pixels = self._ring.pixels(self._read)
        if pixels is None:
            raise RingError(f"picture {self._read} is overwritten already")
        picture = np.frombuffer(pixels, np.uint8).reshape(self._shape)
        return self._ring.times(self._read)[0], picture

    def done(self) -> None:
        if not self._ring.intact(self._read):
            raise RingError(f"picture {self._read} was overwritten while it was read")
        if self._ring.shape.policy is Policy.EVERY:
            self._ring.decide(self._read, 1, 1, 1, "inferred", RESULT)
            self._publisher.publish_bytes("result/cam", RESULT)
            self._capture.ring()


def wait(bell: Bell) -> None:
    select.select([bell.fd], [], [], TICK_S)
    bell.heard()


class ZmqSender:
    """Whole pictures over ZeroMQ."""

    def __init__(self, link: Link) -> None:
        self._socket = zmq.Context().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, SLOTS // 2)
        self._socket.bind(f"ipc://{link.folder}/frames.ipc")

    def send(self, picture: Picture, stamp_ns: int) -> None:
        self._socket.send(stamp_ns.to_bytes(8, "little"), zmq.SNDMORE)
        self._socket.send(picture.copy().data, copy=False)


class ZmqReceiver:
    def __init__(self, link: Link) -> None:
        self._shape = *link.size, 3
        self._socket = zmq.Context().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, SLOTS // 2)
        self._socket.connect(f"ipc://{link.folder}/frames.ipc")

    def receive(self) -> tuple[int, Picture]:
        stamp, body = self._socket.recv_multipart(copy=False)
        picture = np.frombuffer(body.buffer, np.uint8).reshape(self._shape)
        return int.from_bytes(stamp.buffer, "little"), picture

    def done(self) -> None: ...


class ImagezmqSender:
    """imagezmq as it comes: request and reply."""

    def __init__(self, link: Link) -> None:
        self._sender = imagezmq.ImageSender(f"ipc://{link.folder}/frames.ipc")

    def send(self, picture: Picture, stamp_ns: int) -> None:
        self._sender.send_image(str(stamp_ns), picture.copy())


class ImagezmqReceiver:
    def __init__(self, link: Link) -> None:
        self._hub = imagezmq.ImageHub(f"ipc://{link.folder}/frames.ipc")

    def receive(self) -> tuple[int, Picture]:
        stamp, picture = self._hub.recv_image()
        self._hub.send_reply(b"OK")  # at once, so that the next picture comes while this is read
        return int(stamp), picture

    def done(self) -> None: ...


class QueueSender:
    """A multiprocessing queue, which pickles."""

    def __init__(self, link: Link) -> None:
        self._queue = link.queue

    def send(self, picture: Picture, stamp_ns: int) -> None:
        self._queue.put((stamp_ns, picture.copy()))


class QueueReceiver:
    def __init__(self, link: Link) -> None:
        self._queue = link.queue

    def receive(self) -> tuple[int, Picture]:
        stamp, picture = self._queue.get()
        return stamp, picture

    def done(self) -> None: ...


WAYS: dict[str, tuple[type[Any], type[Any]]] = {
    "ring": (RingSender, RingReceiver),
    "zmq": (ZmqSender, ZmqReceiver),
    "imagezmq": (ImagezmqSender, ImagezmqReceiver),
    "queue": (QueueSender, QueueReceiver),
}
