"""V4l2Source, `vigil cameras` and capture on a real kernel driver: vivid, Debian's own build.

Run in the guest of `guest.py`, by test_vivid.py.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ctypes import c_uint32
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from common import bus, v4l2
from common.bus import Subscriber
from common.config import Camera, load
from common.errors import SourceError
from common.messages import Beat, Event, Frame
from common.paths import PROJECT, Paths
from common.states import Policy
from common.v4l2 import BUTTON, ControlValue, Device
from services.capture.source import BadPictureError, Picture, SizeChangedError, Stamp
from services.capture.v4l2 import RAW, V4l2Source, set_control
from tests.support import until

DEVICE = "/dev/video0"
DRIVER = Path("/sys/bus/platform/drivers/vivid")
S_INPUT = v4l2._request("S_INPUT", 39, c_uint32)
WEBCAM, HDMI = 0, 3
SIZE = (320, 180)
SLOW = 5.0  # frames a second, of which the driver itself loses none on a busy machine
VIGIL = (sys.executable, "-m", "services.cli.main")


@pytest.fixture(autouse=True)
def _as_new() -> None:
    """The driver as it was when it was loaded; it remembers what is set."""
    device = Device(DEVICE)
    device.ask(S_INPUT, c_uint32(WEBCAM))
    for control in device.controls().values():
        if control.type != BUTTON:
            device.ask(v4l2.S_CTRL, ControlValue(control.id, control.default), *v4l2.NOT_THERE)
    device.close()


class Opened:
    """A source with the picture that it fills."""

    def __init__(self, **keys: Any) -> None:
        camera = Camera("v4l2", device=DEVICE, size=SIZE, fps=30.0)
        self.source = V4l2Source(msgspec.structs.replace(camera, **keys), None)

    def reopen(self) -> None:
        self.format = self.source.open()
        self.picture: Picture = np.zeros((self.format.height, self.format.width, 3), np.uint8)

    def read(self) -> Stamp:
        assert self.source.wait(3), "no frame within 3 s"
        stamp = self.source.read(self.picture)
        assert stamp is not None
        return stamp

    def read_until_error(self) -> str:
        """Reads on until the source is gone; why it is."""
        try:
            for _ in range(100):
                if self.source.wait(0.5):
                    self.source.read(self.picture)
        except SourceError as error:
            return str(error)
        raise AssertionError("it is read on and on")


@pytest.fixture
def opened() -> Iterator[Callable[..., Opened]]:
    made: list[Opened] = []

    def make(**keys: Any) -> Opened:
        made.append(Opened(**keys))
        made[-1].reopen()
        return made[-1]

    yield make
    for one in made:
        one.source.close()


def push(button: str) -> None:
    device = Device(DEVICE)
    set_control(device, button, True)
    device.close()


@pytest.mark.parametrize("name", RAW)
def test_each_raw_format_shows_the_colours_of_the_test_pattern(
    opened: Callable[..., Opened], name: str
) -> None:
    camera = opened(format=name, controls={"test_pattern": "100% Colorbar", "osd_text_mode": 2})
    assert (camera.format.name, camera.format.raw) == (name, True)
    camera.read()
    height, width = camera.picture.shape[:2]
    bars = [camera.picture[height // 2, width * (2 * i + 1) // 16].astype(int) for i in range(8)]
    levels = [
        (1, 1, 1),
        (0, 1, 1),
        (1, 1, 0),
        (0, 1, 0),
        (1, 0, 1),
        (0, 0, 1),
        (1, 0, 0),
        (0, 0, 0),
    ]
    for bar, level in zip(bars, levels, strict=True):  # blue, green, red
        if name == "GREY":
            assert bar[0] == bar[1] == bar[2]
        else:
            assert np.abs(bar - 255 * np.array(level)).max() < 40, (bar, level)
    if name == "GREY":
        assert [bar[0] for bar in bars] == sorted((bar[0] for bar in bars), reverse=True)


@pytest.mark.parametrize(
    ("size", "asked", "given"),
    [
        ((320, 180), 30.0, 30),
        ((640, 360), 20.0, 25),  # the next that is not below
        ((640, 480), 12.5, 12.5),
        ((320, 180), 500.0, 60),  # the most there is
        ((320, 180), "source", 30),
        (None, "source", 12.5),  # 1280x720
    ],
)
def test_sizes_and_rates_are_negotiated_and_kept(
    opened: Callable[..., Opened], size: tuple[int, int] | None, asked: Any, given: float
) -> None:
    camera = opened(size=size, fps=asked)
    width, height = size or (1280, 720)
    assert (camera.format.width, camera.format.height) == (width, height)
    assert camera.format.fps == given
    assert str(camera.format) == f"{width}x{height} YUYV {given:g}/s"
    first, last = camera.read(), camera.read()
    while last.captured_ns - first.captured_ns < 1e9:
        last = camera.read()
    assert first.mark is not None
    assert last.mark is not None
    period_ns = (last.captured_ns - first.captured_ns) / (last.mark - first.mark)
    assert 1e9 / period_ns == pytest.approx(given, rel=0.05)  # by the driver's clock and count


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"size": (322, 180)}, ["gives no 322x180", "320x180", "3840x2160"]),
        ({"format": "MJPG"}, ["'MJPG'", "YUYV", "Vigil takes"]),
        ({"format": "RGGB"}, ["'RGGB'", "Vigil takes YUYV"]),
        ({"controls": {"shine": 3}}, ["control shine", "there is none", "brightness"]),
        ({"controls": {"brightness": 256}}, ["control brightness = 256", "0 to 255"]),
        ({"controls": {"brightness": "high"}}, ["control brightness = 'high'", "0 to 255"]),
        ({"controls": {"test_pattern": "Stripes"}}, ["test_pattern = 'Stripes'", "75% Colorbar"]),
        ({"controls": {"menu": 2}}, ["control menu = 2", "Menu Item 3"]),
        ({"controls": {"gain_automatic": 1, "gain": 9}}, ["control gain", "inactive"]),
    ],
)
def test_what_the_driver_has_not_is_refused_and_listed(
    opened: Callable[..., Opened], keys: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SourceError) as error:
        opened(**keys)
    for word in (DEVICE, *words):
        assert word in str(error.value)


@pytest.mark.parametrize("path", ["/dev/video1", "/dev/null", "/dev/video77"])
def test_what_is_no_camera_is_refused(path: str) -> None:
    source = V4l2Source(Camera("v4l2", device=path), None)
    with pytest.raises(SourceError, match=r"no camera|no V4L2 device|no such device"):
        source.open()
    source.close()


def test_controls_change_the_picture(opened: Callable[..., Opened]) -> None:
    means = []
    for brightness in (60, 200):
        controls = {"gain_automatic": False, "gain": 100, "brightness": brightness}
        camera = opened(controls=controls)
        camera.read()
        means.append(camera.picture.mean())
        camera.source.close()
    assert means[1] > means[0] + 30


def test_stamps_are_the_drivers(opened: Callable[..., Opened]) -> None:
    camera = opened()
    stamps = []
    for _ in range(10):
        stamps.append(camera.read())
        assert 0 <= time.monotonic_ns() - stamps[-1].captured_ns < 0.3e9
    times = [stamp.captured_ns for stamp in stamps]
    marks = [stamp.mark or 0 for stamp in stamps]
    assert sorted(set(times)) == times
    assert sorted(set(marks)) == marks


def test_every_loses_none_and_latest_takes_the_newest(opened: Callable[..., Opened]) -> None:
    every = opened(policy=Policy.EVERY, fps=SLOW)
    first = every.read().mark
    assert first is not None
    time.sleep(5 / SLOW)  # a slow reader
    assert [every.read().mark for _ in range(4)] == [first + i for i in range(1, 5)]
    assert every.source.wait(3)
    every.source.skip()
    assert every.read().mark == first + 6
    time.sleep(14 / SLOW)  # more than there are buffers
    late = [every.read() for _ in range(12)]
    marks = [one.mark for one in late if one.mark is not None]
    gaps = sum(after - before - 1 for before, after in pairwise([first + 6, *marks]))
    assert sum(one.lost for one in late) == gaps > 0, "what the driver dropped is known"
    every.source.close()
    latest = opened(fps=SLOW)
    first = latest.read().mark
    assert first is not None
    time.sleep(3.5 / SLOW)
    newest = latest.read()
    assert (newest.mark or 0) >= first + 3
    assert time.monotonic_ns() - newest.captured_ns < 1.5e9 / SLOW


def test_a_second_user_is_told_so(opened: Callable[..., Opened]) -> None:
    opened()
    with pytest.raises(SourceError, match="another process uses it"):
        opened()


def test_a_picture_of_another_size_than_expected(opened: Callable[..., Opened]) -> None:
    camera = opened()
    assert camera.source.wait(3)
    with pytest.raises(SizeChangedError) as change:
        camera.source.read(np.zeros((10, 10, 3), np.uint8))
    assert (change.value.width, change.value.height) == SIZE
    camera.read()


def test_a_damaged_buffer_is_passed_over(opened: Callable[..., Opened]) -> None:
    camera = opened(policy=Policy.EVERY, fps=SLOW)
    before = camera.read().mark
    assert before is not None
    push("inject_v4l2_buf_flag_error")
    marks, damaged = [], []
    for mark in range(before + 1, before + 6):
        try:
            marks.append(camera.read().mark)
        except BadPictureError as error:
            damaged.append(str(error))
            marks.append(mark)
    assert marks == list(range(before + 1, before + 6))
    assert [text.partition(": ")[2] for text in damaged] == ["the driver says that it is damaged"]


@pytest.mark.parametrize("button", ["inject_fatal_streaming_error", "disconnect"])
def test_a_device_lost_while_it_streams_can_be_opened_again(
    opened: Callable[..., Opened], button: str
) -> None:
    camera = opened()
    camera.read()
    push(button)
    said = camera.read_until_error()
    assert DEVICE in said
    assert "gone" in said or "does not answer" in said
    camera.source.close()
    camera.reopen()
    camera.read()


@pytest.mark.parametrize("button", ["inject_vidioc_reqbufs_error", "inject_vidioc_streamon_error"])
def test_a_failed_open_leaves_nothing_behind(opened: Callable[..., Opened], button: str) -> None:
    camera = opened()
    camera.source.close()
    push(button)
    with pytest.raises(SourceError, match=DEVICE):
        camera.reopen()
    camera.source.close()
    camera.reopen()
    camera.read()


def test_pulled_while_reading_and_put_back(opened: Callable[..., Opened]) -> None:
    camera = opened()
    camera.read()
    (DRIVER / "unbind").write_text("vivid.0")
    assert "gone" in camera.read_until_error()
    camera.source.close()
    with pytest.raises(SourceError, match="no such device"):
        camera.reopen()
    (DRIVER / "bind").write_text("vivid.0")
    camera.reopen()
    camera.read()


def test_an_hdmi_source_that_changes_its_size_or_goes_dark(opened: Callable[..., Opened]) -> None:
    device = Device(DEVICE)
    device.ask(S_INPUT, c_uint32(HDMI))
    camera = opened(size=None, fps="source")
    assert (camera.format.width, camera.format.height) == (1280, 720)
    camera.read()
    set_control(device, "dv_timings_signal_mode", "Selected DV Timings")
    with pytest.raises(SizeChangedError) as change:
        camera.read()
    assert (change.value.width, change.value.height) == (640, 480)
    camera.picture = np.zeros((480, 640, 3), np.uint8)
    camera.read()
    assert camera.picture.any()
    set_control(device, "dv_timings_signal_mode", "No Signal")
    assert "no signal" in camera.read_until_error()
    camera.source.close()
    set_control(device, "dv_timings_signal_mode", "Current DV Timings")
    device.close()


def test_a_hundred_connections_leave_nothing_behind(opened: Callable[..., Opened]) -> None:
    camera = opened()
    camera.read()

    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("/dev/video")
        return len(list(Path("/proc/self/fd").iterdir())), maps

    before = held()
    for _ in range(100):
        camera.reopen()
        camera.read()
    assert held() == before


def vigil(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VIGIL, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=100
    )


class Heard:
    """What capture publishes."""

    def __init__(self, paths: Paths) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        topics = ["beat/", "frame/", "event"]
        self._subscriber = Subscriber(self._context, [paths.endpoint("capture-vivid")], topics)
        self.messages: list[Any] = []

    def more(self) -> None:
        self._subscriber.wait(0.2)
        self.messages += [bus.decode(topic, body) for topic, body in self._subscriber.drain()]

    def until(self, wanted: Callable[[Any], bool], what: str) -> Any:
        """The first message that is wanted, of those not looked at yet."""

        def look() -> Any:
            self.more()
            while self.messages:
                if wanted(message := self.messages.pop(0)):
                    return message
            return None

        return until(look, 60, what)

    def close(self) -> None:
        self._subscriber.close()
        self._context.destroy(linger=0)


def test_the_block_of_vigil_cameras_is_run_by_capture(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    # udev makes this link; the guest has none.
    link = Path("/dev/v4l/by-path/platform-vivid.0-video-index0")
    link.parent.mkdir(parents=True)
    link.symlink_to("../../video0")
    found = json.loads(vigil("cameras", "--json").stdout)
    assert [one["path"] for one in found if one["camera"]] == [DEVICE]
    assert len(found) > 1, "vivid has nodes that are no camera"
    block = vigil("cameras").stdout
    file = paths.root / "vigil.toml"
    file.write_text(f'{block}\n[groups.main]\nmodel = "{PROJECT}/models/factory"\n')
    row = load(file).cameras["vivid"]
    assert (row.source, row.device, row.size, row.format) == (
        "v4l2",
        str(link),
        (1280, 720),
        "YUYV",
    )
    monkeypatch.setenv("VIGIL_CONFIG", str(file))
    heard = Heard(paths)
    command = [sys.executable, "-m", "services.capture.main", "vivid"]
    with subprocess.Popen(command, cwd=PROJECT) as capture:
        try:
            frame = heard.until(lambda m: isinstance(m, Frame), "a frame")
            assert 0 < frame.filled_ns - frame.captured_ns < 1e9
            beat = heard.until(lambda m: isinstance(m, Beat) and m.camera is not None, "a beat")
            assert (beat.camera.state, beat.camera.format) == ("streaming", "1280x720 YUYV 12.5/s")
            assert "in use by capture-vivid: streaming, 1280x720 YUYV" in vigil("check").stdout
            (DRIVER / "unbind").write_text("vivid.0")
            heard.until(lambda m: isinstance(m, Event) and m.code == "camera.lost", "lost")
            done = vigil("check")
            assert "vigil: camera vivid: v4l2, in use by capture-vivid: lost" in done.stderr
            (DRIVER / "bind").write_text("vivid.0")
            heard.until(lambda m: isinstance(m, Event) and m.code == "camera.streaming", "back")
            heard.until(lambda m: isinstance(m, Frame), "a frame again")
        finally:
            capture.terminate()
    heard.close()
    assert capture.returncode == 0
