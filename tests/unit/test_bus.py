"""The bus between real processes: whoever reads slowly, stops or dies holds nobody up."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from common.bus import QUEUE, Publisher, Stream, Subscriber
from common.paths import PROJECT, Paths
from tests.support import until

BODY = bytes(4096)


class Ends:
    """Both ends of the bus of a process `probe`, closed when the test is over."""

    def __init__(self, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.endpoint = endpoint
        self.open: list[Publisher | Subscriber] = []

    def publisher(self) -> Publisher:
        publisher = Publisher(self.context, self.endpoint)
        self.open.append(publisher)
        return publisher

    def subscriber(self, *prefixes: str) -> Subscriber:
        subscriber = Subscriber(self.context, [self.endpoint], prefixes)
        self.open.append(subscriber)
        return subscriber

    def joined(self, publisher: Publisher, *prefixes: str) -> Subscriber:
        """A subscriber that hears `publisher`, which sends it `event` with b"?" until it does."""
        subscriber = self.subscriber("event", *prefixes)

        def hears() -> bool:
            publisher.publish_bytes("event", b"?")
            return subscriber.wait(0)

        until(hears, 10, "the first message")
        return subscriber


@pytest.fixture
def ends(paths: Paths) -> Iterator[Ends]:
    ends = Ends(paths.endpoint("probe"))
    yield ends
    for end in ends.open:
        end.close()
    ends.context.term()


class Listener:
    """A subscriber in a process of its own, which writes down what it reads."""

    def __init__(self, paths: Paths, endpoint: str, prefix: str, pause_s: float) -> None:
        self.file = paths.root / f"{os.urandom(4).hex()}.txt"
        with self.file.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.programs", "listen", endpoint, prefix, str(pause_s)],
                cwd=PROJECT,
                stdout=file,
            )

    def numbers(self) -> list[int]:
        lines = self.file.read_text().rpartition("\n")[0].splitlines()
        return [int(line.split()[1]) for line in lines]


Start = Callable[..., Listener]


@pytest.fixture
def listener(paths: Paths) -> Iterator[Start]:
    started: list[Listener] = []

    def start(endpoint: str, prefix: str = "", pause_s: float = 0) -> Listener:
        started.append(Listener(paths, endpoint, prefix, pause_s))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def send_until_heard(publisher: Publisher, listener: Listener) -> None:
    def heard() -> bool:
        publisher.publish_bytes("event", bytes(8))
        return bool(listener.numbers())

    until(heard, 20, "the listener's first message")


def flood(publisher: Publisher, count: int) -> float:
    """Publish `count` numbered messages of 4 KB; returns the seconds."""
    start = time.monotonic()
    for number in range(1, count + 1):
        publisher.publish_bytes("event", number.to_bytes(8, "little") + BODY)
    return time.monotonic() - start


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.mark.parametrize("trouble", ["slow", "stopped", "killed"])
def test_a_troubled_reader_holds_nobody_up(ends: Ends, listener: Start, trouble: str) -> None:
    publisher = ends.publisher()
    good = listener(ends.endpoint)
    send_until_heard(publisher, good)
    alone_s = flood(publisher, 20_000)
    bad = listener(ends.endpoint, pause_s=0.05 if trouble == "slow" else 0)
    send_until_heard(publisher, bad)
    if trouble == "stopped":
        bad.process.send_signal(signal.SIGSTOP)
    elif trouble == "killed":
        bad.process.kill()
    before_mb, before = rss_mb(), len(good.numbers())
    troubled_s = flood(publisher, 20_000)  # 82 MB that the bad one does not take
    assert rss_mb() - before_mb < 20
    assert troubled_s < 5 * alone_s + 0.5
    until(lambda: len(good.numbers()) > before, 10, "something for the good reader")
    if trouble == "stopped":
        bad.process.send_signal(signal.SIGCONT)
        until(lambda: 1 in bad.numbers(), 10, "the oldest of what was kept")
        flood(publisher, 1)

        def back() -> bool:
            publisher.publish_bytes("event", bytes(8))
            return bad.numbers()[-1] == 0

        until(back, 10, "what is new")
        assert 20_000 not in bad.numbers()  # the newest of the flood found its queue full


def test_a_late_joiner_and_a_publisher_that_starts_again(ends: Ends) -> None:
    early = ends.subscriber("event")
    assert not early.wait(0)
    for body in (b"1", b"2"):
        publisher = ends.publisher()

        def arrives(publisher: Publisher = publisher, body: bytes = body) -> bool:
            publisher.publish_bytes("event", body)
            return ("event", body) in list(early.drain())

        until(arrives, 10, "a message after the publisher came")
        assert set(ends.joined(publisher).drain()) == {("event", b"?")}
        publisher.close()


def test_only_what_was_asked_for_in_the_order_it_was_sent(ends: Ends) -> None:
    publisher = ends.publisher()
    subscriber = ends.joined(publisher, "result/belt")
    for topic in ("result/other", "beat/probe", "result/belt", "nothing", "event"):
        publisher.publish_bytes(topic, topic.encode())
    seen: list[tuple[str, bytes]] = []

    def last_came() -> bool:
        seen.extend(message for message in subscriber.drain() if message[1] != b"?")
        return len(seen) >= 2

    until(last_came, 10, "the last message")
    assert seen == [("result/belt", b"result/belt"), ("event", b"event")]


def test_draining_ends_though_messages_keep_coming(ends: Ends) -> None:
    publisher = ends.publisher()
    subscriber = ends.joined(publisher)
    taken = 0
    for _ in subscriber.drain():
        taken += 1
        assert taken <= 4 * QUEUE
        publisher.publish_bytes("event", b"another")
        publisher.publish_bytes("event", b"and another")
        subscriber.wait(1)
    assert taken == 4 * QUEUE


def test_alive_on_time_and_valid_are_three_questions() -> None:
    second = 10**9
    stream = Stream(rate=10.0)
    assert not stream.alive(0)
    assert not stream.on_time(0)
    assert stream.age_s(0) is None
    for n in range(21):
        stream.seen(n * second // 10, 100, valid=n != 20)
    now = 2 * second
    assert (stream.alive(now), stream.on_time(now), stream.valid) == (True, True, False)
    rate, bytes_s = stream.rate_seen(now)
    assert rate == pytest.approx(10.0)
    assert bytes_s == pytest.approx(1000.0)
    for n in range(9):
        stream.seen(now + (n + 1) * second // 4, 100)
    now += 9 * second // 4
    assert (stream.alive(now), stream.on_time(now), stream.valid) == (True, False, True)
    assert stream.alive(now + second)
    assert not stream.alive(now + second + 1)
    assert stream.age_s(now + 3 * second) == 3.0
    assert Stream(rate=None).on_time(0)
    slow = Stream(rate=0.5)
    slow.seen(0, 1)
    assert slow.alive(20 * second)
    assert not slow.alive(20 * second + 1)
    twice = Stream(rate=1.0)
    twice.seen(5, 1)
    twice.seen(5, 1)
    assert twice.rate_seen(5) == (0.0, 0.0)
