"""ZeroMQ between the processes of one device: one PUB socket a process, no broker, no TCP.

A message is two frames: the topic, then the MessagePack body. Messages only announce: who needs
every result reads the ring's journal.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from common import topics
from common.messages import Message

QUEUE = 256  # messages kept for a slow reader at either end, then the newest are dropped
_DRAIN = 4 * QUEUE
_RECONNECT_MS = 20  # a process that was started again is heard about as soon
_decoders: dict[type[Message], msgspec.msgpack.Decoder[Message]] = {}


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(topic: str, body: bytes) -> Message:
    """The message of a topic.

    Raises:
        msgspec.DecodeError: no such topic, or the body is not its message.
    """
    row = topics.row(topic)
    if row is None:
        raise msgspec.DecodeError(f"unknown topic {topic}")
    if row.message not in _decoders:
        _decoders[row.message] = msgspec.msgpack.Decoder(row.message)
    return _decoders[row.message].decode(body)


class Publisher:
    """The one PUB socket of a process. Bind it only while holding the lock of the process's name:
    a second bind to the same path succeeds silently and takes the readers away."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.bind(endpoint)

    def publish(self, topic: str, message: Message) -> None:
        self.publish_bytes(topic, encode(message))

    def publish_bytes(self, topic: str, body: bytes) -> None:
        self._socket.send_multipart((topic.encode(), body), zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


class Subscriber:
    """A SUB socket connected to many processes, some of which may not be there yet."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Iterable[str],
        prefixes: Iterable[str],
    ) -> None:
        self.socket = context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, QUEUE)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        for prefix in prefixes:
            self.socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        for endpoint in endpoints:
            self.socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)

    def drain(self) -> Iterator[tuple[str, bytes]]:
        """The messages that have arrived, oldest first, without waiting; not for ever, where they
        come faster than they are used."""
        for _ in range(_DRAIN):
            # Asking is cheaper than an exception for each time that nothing is left.
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            topic, body = self.socket.recv_multipart(zmq.NOBLOCK)
            yield topic.decode(), body

    def wait(self, timeout_s: float) -> bool:
        """Whether something arrived within the time."""
        return bool(self._poller.poll(round(timeout_s * 1000)))

    def close(self) -> None:
        self.socket.close()


@dataclass
class Stream:
    """Three questions about a stream of messages, kept apart: alive? on time? valid?"""

    rate: float | None  # expected, 1/s
    arrivals: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=256))
    valid: bool = False  # what the newest message says of itself

    def seen(self, now_ns: int, size: int, *, valid: bool = True) -> None:
        self.arrivals.append((now_ns, size))
        self.valid = valid

    def age_s(self, now_ns: int) -> float | None:
        return (now_ns - self.arrivals[-1][0]) / 1e9 if self.arrivals else None

    def alive(self, now_ns: int) -> bool:
        """Whether the newest message is no older than ten of its periods, 1 s at the least."""
        age = self.age_s(now_ns)
        return age is not None and age <= max(1.0, 10.0 / self.rate if self.rate else 1.0)

    def rate_seen(self, now_ns: int, window_s: float = 2.0) -> tuple[float, float]:
        """Messages and bytes a second over the window (shorter while it fills)."""
        recent = [(at, size) for at, size in self.arrivals if now_ns - at <= window_s * 1e9]
        if len(recent) < 2:
            return 0.0, 0.0
        span = (recent[-1][0] - recent[0][0]) / 1e9
        if span <= 0:
            return 0.0, 0.0
        return (len(recent) - 1) / span, sum(size for _, size in recent[1:]) / span

    def on_time(self, now_ns: int) -> bool:
        """Whether the rate seen is at least 0.8 of the one expected."""
        if self.rate is None:
            return True
        return self.rate_seen(now_ns, max(2.0, 3.0 / self.rate))[0] >= 0.8 * self.rate


_encoder = msgspec.msgpack.Encoder()
