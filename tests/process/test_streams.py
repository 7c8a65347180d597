"""Cameras on the network against real servers, which do what cameras do."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from common.config import Camera, load
from common.errors import ConfigError, SourceError
from common.frames import Ring, generations
from common.paths import PROJECT, Paths
from common.sources import redacted
from services.capture import stream
from services.capture.source import BadPictureError, Format, SizeChangedError, Stamp
from services.capture.stream import StreamSource
from tests.servers.running import IN_URL, MJPEG, PASSWORD, RTSP, Server
from tests.support import until

OPEN_S, LOST_S = 1.0, 0.5


@pytest.fixture(scope="module")
def http() -> Iterator[Server]:
    server = Server(*MJPEG)
    yield server
    server.close()


def rtsp_server(*arguments: str) -> Server:
    try:
        return Server(*RTSP, *arguments)
    except (OSError, RuntimeError):
        pytest.skip(
            "needs Debian's python3-gi, gir1.2-gst-rtsp-server-1.0 and gstreamer1.0-plugins-base, "
            "-good, -ugly"
        )


@pytest.fixture
def rtsp() -> Iterator[Server]:
    server = rtsp_server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    server = rtsp_server("--auth", "digest")
    yield server
    server.close()


def make(
    url: str, transport: Literal["tcp", "udp"] = "tcp", open_s: float = OPEN_S
) -> StreamSource:
    kind = "rtsp" if url.startswith("rtsp") else "mjpeg"
    camera = Camera(kind, url=url, transport=transport, open_s=open_s, lost_s=LOST_S)
    return StreamSource(camera, None)


@dataclass
class Seen:
    """What came of a source."""

    format: Format | None = None
    stamps: list[Stamp] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None = None
    bad: int = 0
    error: str = ""


def watch(source: StreamSource, pictures: int = 10, seconds: float = 5.0) -> Seen:
    """Take so many pictures, or until an error, or for so long; then close."""
    seen = Seen()
    started = time.monotonic()
    try:
        seen.format = source.open()
        into = np.zeros((seen.format.height, seen.format.width, 3), np.uint8)
        seen.sizes.append(into.shape[1::-1])
        while len(seen.stamps) < pictures and time.monotonic() < started + seconds:
            called = time.monotonic()
            there = source.wait(0.25)
            assert time.monotonic() - called < 0.5, "wait took longer than it was given"
            if not there:
                continue
            try:
                seen.stamps.append(source.read(into))
                seen.picture = into
            except SizeChangedError as change:
                into = np.zeros((change.height, change.width, 3), np.uint8)
                seen.sizes.append((change.width, change.height))
            except BadPictureError:
                seen.bad += 1
    except SourceError as error:
        seen.error = str(error)
    finally:
        closing = time.monotonic()
        source.close()
        assert time.monotonic() - closing < stream.CLOSE_S + 0.2
    return seen


def to_its_end(source: StreamSource) -> tuple[float, str]:
    """Pass over what comes; when the last picture came, and why no more do."""
    last = 0.0
    while True:
        try:
            if source.wait(0.25):
                source.skip()
                last = time.monotonic()
        except SourceError as error:
            return last, str(error)


HTTP = {
    # path: pictures that come of it, and the error, of which a part is given
    "steady": (10, ""),
    "moved": (10, ""),
    "bare": (10, ""),
    f"{IN_URL}basic": (10, ""),
    f"{IN_URL}digest": (10, ""),
    "basic": (0, "it asks for another user or password: put user:password@"),
    "eye:wrong@digest": (0, "it asks for another user or password: put user:password@"),
    "nothing": (0, "it has nothing at this path (404)"),
    "page": (0, "what it sends is no video stream"),
    "silent": (0, " connecting"),
    "drips_head": (0, " connecting"),
    "noise": (0, "no picture within 1 s, still getting what can't be decoded"),
    "freezes": (5, "nothing came for 0.5 s"),
    "drips": (5, "nothing came for 0.5 s"),
    "ends": (5, "it broke off"),
    "half": (5, "it broke off"),
}


@pytest.mark.parametrize("path", HTTP)
def test_mjpeg_over_http(http: Server, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the server does, it takes as long as allowed, and is said without the password."""
    user, _, what = path.rpartition("@")
    pictures, error = HTTP[path]
    started = time.monotonic_ns()
    source = make(f"http://{user}{'@' * bool(user)}127.0.0.1:{http.port}/{what}?key={PASSWORD}")
    seen = watch(source, 10)
    assert time.monotonic_ns() - started < (OPEN_S + LOST_S + 0.5) * 1e9
    assert len(seen.stamps) == pictures
    assert error in seen.error
    assert bool(error) == bool(seen.error)
    assert seen.bad == (what == "half"), "half a picture is none"
    if seen.picture is not None:
        left, right = seen.picture[100, 80], seen.picture[100, 240]
        assert np.allclose(left, (0, 180, 255), atol=8), "orange"
        assert np.allclose(right, (255, 60, 0), atol=8), "blue"
        assert seen.format == Format(320, 240, None, "mjpeg")
        arrivals = [stamp.captured_ns for stamp in seen.stamps]
        assert started < arrivals[0] <= arrivals[-1] < time.monotonic_ns()
        assert all(one < other for one, other in pairwise(arrivals))
    said = "".join(capfd.readouterr()) + seen.error
    assert not any(secret in said for secret in (PASSWORD, "s3cret", "wrong"))


def test_pictures_of_other_sizes_and_broken_ones(http: Server) -> None:
    resized = watch(make(f"http://127.0.0.1:{http.port}/resizes"))
    assert (resized.sizes, len(resized.stamps)) == ([(320, 240), (160, 120)], 10)
    broken = watch(make(f"http://127.0.0.1:{http.port}/broken_ones"))
    assert len(broken.stamps) == 10
    assert broken.bad in (9, 10)


def test_pictures_are_passed_over_undecoded(http: Server) -> None:
    source = make(f"http://127.0.0.1:{http.port}/noise")
    with pytest.raises(SourceError):
        source.open()
    source.close()
    source = make(f"http://127.0.0.1:{http.port}/broken_ones")
    source.open()
    for _ in range(10):
        assert source.wait(1.0)
        source.skip()
    source.close()


WRONG = {
    "rtsp://127.0.0.1:{free}/x": "nothing listens there: look at host and port",
    "http://127.0.0.1:{free}/x": "nothing listens there: look at host and port",
    "http://eye:s3cret@camera.invalid/x": "no host of this name is known: camera.invalid",
    "rtsp://127.0.0.1:{http}/steady": "what it sends is no video stream",
    "rtmp://127.0.0.1/x": "expected http://host/path",
    "http:///x": "expected http://host/path",
    "http://eye:s3/cret@127.0.0.1/x": "expected http://host/path",
}


@pytest.mark.parametrize("url", WRONG)
def test_urls_that_lead_nowhere(http: Server, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    seen = watch(make(url.format(free=free, http=http.port)))
    assert WRONG[url] in seen.error
    assert "s3" not in seen.error


def test_a_name_server_that_hangs(http: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs the caller no more than open_s, and one thread, not one a try."""
    answer = threading.Event()
    look_up = socket.getaddrinfo

    def slow(*arguments: object) -> object:
        answer.wait()
        return look_up(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    threads = threading.active_count()
    source = make(f"http://127.0.0.1:{http.port}/steady", open_s=0.2)
    assert "no picture within 0.2 s, still looking up its name" in watch(source).error
    assert "the try before still hangs while looking up its name" in watch(source).error
    assert threading.active_count() == threads + 1
    answer.set()
    until(lambda: threading.active_count() == threads, 2, "the thread's end")
    assert len(watch(source).stamps) == 10


def test_nothing_is_left_of_a_connection(http: Server) -> None:
    """scripts/bench/reconnect does it 1,000 times, over RTSP too, and looks at memory."""
    source = make(f"http://127.0.0.1:{http.port}/ends")
    watch(source)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    for _ in range(20):
        assert "it broke off" in watch(source).error
    source.close()
    after = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    assert after == before


@pytest.mark.parametrize(
    ("path", "transport", "name"),
    [
        ("h264", "tcp", "h264"),
        ("h264", "udp", "h264"),
        ("h264-10bit", "tcp", "h264"),
        ("jpeg", "tcp", "mjpeg"),
    ],
)
def test_rtsp(rtsp: Server, path: str, transport: Literal["tcp", "udp"], name: str) -> None:
    """Bars in the right colours, each with the time of the server's clock."""
    seen = watch(make(f"rtsp://127.0.0.1:{rtsp.port}/{path}", transport), 20)
    assert seen.format == Format(320, 240, 30.0, name), seen.error
    assert seen.picture is not None
    bars = seen.picture[120, 23::46]
    colours = [(1, 1, 1), (0, 1, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0)]
    assert [tuple(bar > 128) for bar in bars] == colours
    marks = [stamp.mark for stamp in seen.stamps if stamp.mark is not None]
    assert {after - before for before, after in pairwise(marks)} == {3000}, "90 kHz, 30/s"
    assert len(marks) >= 19
    arrivals = [stamp.captured_ns for stamp in seen.stamps]
    assert all(one < other for one, other in pairwise(arrivals))
    assert arrivals[-1] < time.monotonic_ns()


def test_rtsp_servers_that_do_what_they_like(rtsp: Server, locked: Server) -> None:
    address = f"rtsp://127.0.0.1:{rtsp.port}"
    assert "perhaps there is no video at this path" in watch(make(f"{address}/audio")).error
    assert "it has nothing at this path (404)" in watch(make(f"{address}/none")).error
    asks = f"127.0.0.1:{locked.port}/h264"
    assert len(watch(make(f"rtsp://{IN_URL}{asks}")).stamps) == 10
    for who in ("", "eye:s3cret@"):
        error = watch(make(f"rtsp://{who}{asks}")).error
        assert "it asks for another user or password" in error
        assert "s3cret" not in error
    # It changes its size, freezes, and is started anew.
    source = make(f"{address}/h264")
    source.open()
    rtsp.tell("size 160 120")
    picture = np.zeros((240, 320, 3), np.uint8)
    with pytest.raises(SizeChangedError, match="160x120"):
        until(lambda: source.wait(0.25) and not source.read(picture), 5, "a picture of that size")
    picture = np.zeros((120, 160, 3), np.uint8)
    assert source.read(picture), "it is the same picture that was told of"
    assert picture.any()
    rtsp.freeze()
    frozen = time.monotonic()
    last, error = to_its_end(source)
    assert "nothing came for 0.5 s" in error
    assert time.monotonic() - frozen > LOST_S
    assert last - frozen < LOST_S / 2, "what a parser still held is no new picture"
    source.close()
    assert "no picture within 1 s" in watch(source).error
    rtsp.close()
    rtsp.start(rtsp.port)
    until(lambda: len(watch(source).stamps) == 10, 5, "pictures after a new start")
    source.open()
    rtsp.tell("drop")
    assert f"127.0.0.1:{rtsp.port}/h264: it " in to_its_end(source)[1]
    source.close()


def test_who_is_too_slow_goes_on_at_a_key_frame(
    rtsp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue does not grow, and what was lost damages no picture."""
    monkeypatch.setattr(stream, "QUEUE", 4)
    source = make(f"rtsp://127.0.0.1:{rtsp.port}/h264")
    source.open()
    first, later = np.zeros((2, 240, 320, 3), np.uint8)
    stamps = [source.read(first)]
    while stamps[-1].mark is None:  # the first may have none
        assert source.wait(1)
        stamps = [source.read(first)]
    connection = source._connection
    assert connection is not None
    lost = threading.Event()
    to_key_frame = connection._to_key_frame

    def told() -> None:
        to_key_frame()
        lost.set()

    monkeypatch.setattr(connection, "_to_key_frame", told)
    assert lost.wait(5)
    while not stamps[-1].lost:
        assert len(connection._packets) <= 4
        assert source.wait(1)
        stamps.append(source.read(later))
    ticks = (stamps[-1].mark or 0) - (stamps[0].mark or 0)
    assert ticks // 3000 == len(stamps) - 1 + sum(stamp.lost for stamp in stamps[1:])
    assert np.abs(first.astype(int) - later).max() < 16
    source.close()


def test_secrets(tmp_path: Path) -> None:
    for text, shown in {
        "rtsp://eye:pass@host/x": "rtsp://***@host/x",
        "rtsp://eye:pass word@host/x": "rtsp://***@host/x",
        "https://eye:p@ss@host/x": "https://***@host/x",
        "rtsp://eye:p/a@ss@host:554/x?u=a&p=b": "rtsp://***@host:554/x?***",
        "http://host/x?key=a@b": "http://host/x?***",
        "http://eye:p?a@host/x": "http://***",
        "http://eye@host/ and rtsp://eye:p/a@host": "http://***@host/ and rtsp://***@host",
        'location="rtsp://a:b@h/x" user-pw=c': 'location="rtsp://***@h/x" user-pw=***',
        "http://host/x": "http://host/x",
    }.items():
        assert redacted(text) == shown
    text = '[cameras.a]\nsource = "virtual"\nurl = "rtsp://a:b@h/x"\n[groups.main]\nmodel = "m"\n'
    (tmp_path / "vigil.toml").write_text(text)
    with pytest.raises(ConfigError, match=r'url = "rtsp://\*\*\*@h/x": expected no url'):
        load(tmp_path / "vigil.toml")


@dataclass
class Line:
    """A capture process by itself, and what it logs."""

    process: subprocess.Popen[bytes]
    log: Path

    def until_said(self, code: str, times: int = 1, text: str = "") -> None:
        def said() -> bool:
            lines = [json.loads(line) for line in self.log.read_text().splitlines()]
            found = [line for line in lines if line.get("code") == code and text in line["text"]]
            return len(found) >= times

        until(said, 10, f"{code} {text} in {self.log.read_text()}")


@pytest.fixture
def capture(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Line]]:
    lines: list[Line] = []

    def start(source: str, url: str) -> Line:
        config, log = paths.root / "vigil.toml", paths.root / "log"
        config.write_text(f"""
        [cameras.gate]
        source = "{source}"
        url = "{url}"
        open_s = {OPEN_S}
        no_frame_s = 0.3
        lost_s = 0.8
        reconnect_max_s = 0.2
        [groups.main]
        model = "none"
        """)
        monkeypatch.setenv("VIGIL_CONFIG", str(config))
        command = [sys.executable, "-m", "services.capture.main", "gate"]
        with log.open("wb") as stderr:
            lines.append(Line(subprocess.Popen(command, cwd=PROJECT, stderr=stderr), log))
        return lines[-1]

    yield start
    for line in lines:
        line.process.kill()
        line.process.wait()


@pytest.mark.parametrize("source", ["rtsp", "mjpeg"])
def test_capture_outlives_its_server(
    source: str, capture: Callable[[str, str], Line], paths: Paths
) -> None:
    """It freezes, goes on, dies, is started anew; one process all the time, and no secret told."""
    server = rtsp_server("--auth", "digest") if source == "rtsp" else Server(*MJPEG)
    path = "h264" if source == "rtsp" else "digest"
    scheme = "rtsp" if source == "rtsp" else "http"
    try:
        line = capture(source, f"{scheme}://{IN_URL}127.0.0.1:{server.port}/{path}")
        line.until_said("camera.streaming", text="320x240")
        server.freeze()
        line.until_said("camera.stalled")
        line.until_said("camera.lost", text="for 0.8 s")
        server.go_on()
        line.until_said("camera.streaming", 2)
        server.close()
        line.until_said("camera.lost", 2)
        server.start(server.port)
        line.until_said("camera.streaming", 3)
        if source == "rtsp":
            before = generations(paths.rings, "gate")[-1]
            server.tell("size 160 120")
            until(lambda: generations(paths.rings, "gate")[-1] > before, 10, "another ring")
            newest = generations(paths.rings, "gate")[-1]
            with Ring.open(paths.rings, paths.accounts, "gate", newest) as ring:
                assert (ring.shape.width, ring.shape.height) == (160, 120)
        server.freeze()
        line.until_said("camera.stalled", 2)
        line.process.terminate()
        assert line.process.wait(5) == 0, "also while a call of FFmpeg's hangs"
        assert not any(secret in line.log.read_text() for secret in ("s3cret", "w@rd", "w%40rd"))
    finally:
        server.close()
