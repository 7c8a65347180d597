"""V4L2 without a driver: a stand-in answers behind the ioctl layer. tests/vivid has a real driver,
which gives no MJPEG."""

import errno
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from common import v4l2
from common.config import Camera, load
from common.errors import SourceError
from common.paths import PROJECT, Paths
from common.states import Policy
from common.v4l2 import Device, Request, choose
from services.capture.source import BadPictureError, Picture
from services.capture.v4l2 import DAMAGED, RAW, V4l2Source
from services.cli import cameras
from services.cli.listen import accepts
from tests.servers.running import IN_URL, MJPEG, PASSWORD, Server
from tests.support import until

REQUESTS = {one.number: one.name for one in vars(v4l2).values() if isinstance(one, Request)}
WEBCAM = {  # raw where the cable allows it, as most have it
    "MJPG": {(640, 480): [30], (1280, 720): [60, 30], (1920, 1080): [30]},
    "YUYV": {(640, 480): [30, 15], (1280, 720): [10, 5]},
    "H264": {(1920, 1080): [30]},
}
BUFFER = 1 << 20
DAY_NS = 86_400_000_000_000


class StandIn:
    """Answers ioctls on a file as a webcam's driver would; what it streams is `pictures`."""

    def __init__(self, formats: dict[str, Any], pictures: list[bytes], stride: int = 0) -> None:
        self.formats, self.pictures, self.stride = formats, pictures, stride
        self.card = b"Stand-in"
        self.queued: list[int] = []
        self.taken_ns = time.monotonic_ns()
        self.flags = v4l2.BUFFER_MONOTONIC

    def ioctl(self, fd: int, number: int, data: Any) -> None:
        self.fd = fd
        answer = getattr(self, REQUESTS[number].lower(), None)
        refused = errno.ENOTTY if answer is None else answer(data)
        if refused:
            raise OSError(refused, os.strerror(refused))

    def querycap(self, data: Any) -> None:
        data.card, data.driver, data.bus = self.card, b"stand-in", b"usb-1"
        data.device_caps = v4l2.CAP_CAPTURE | v4l2.CAP_STREAMING

    def enum_fmt(self, data: Any) -> int:
        return self._enumerate(data, list(self.formats), self._describe)

    def _describe(self, data: Any, format: str) -> None:
        data.pixelformat, data.description = v4l2.code(format), b"in words"

    def enum_framesizes(self, data: Any) -> int:
        sizes = list(self.formats[v4l2.fourcc(data.pixelformat)])
        return self._enumerate(data, sizes, lambda data, size: self._fill(data.sizes, data, size))

    def enum_frameintervals(self, data: Any) -> int:
        rates = self.formats[v4l2.fourcc(data.pixelformat)][data.width, data.height]
        fill = lambda data, fps: self._fill(data.intervals, data, (1, fps))  # noqa: E731
        return self._enumerate(data, rates, fill)

    def _fill(self, words: Any, data: Any, values: tuple[int, int]) -> None:
        data.type = 1
        words[0], words[1] = values

    def _enumerate(self, data: Any, rows: list[Any], fill: Any) -> int:
        if data.index >= len(rows):
            return errno.EINVAL
        fill(data, rows[data.index])
        return 0

    def s_fmt(self, data: Any) -> None:
        depth = 2 if v4l2.fourcc(data.pix.pixelformat) in RAW else 0
        data.pix.bytesperline = data.pix.width * depth + (self.stride if depth else 0)

    def s_parm(self, data: Any) -> None:
        pass

    def reqbufs(self, data: Any) -> None:
        os.ftruncate(self.fd, data.count * BUFFER)

    def querybuf(self, data: Any) -> None:
        data.length, data.offset = BUFFER, data.index * BUFFER

    def streamon(self, data: Any) -> None:
        pass

    def qbuf(self, data: Any) -> None:
        self.queued.append(data.index)

    def dqbuf(self, data: Any) -> int:
        if not self.pictures or not self.queued:
            return errno.EAGAIN
        data.index, picture = self.queued.pop(0), self.pictures.pop(0)
        os.pwrite(self.fd, picture, data.index * BUFFER)
        data.bytesused, data.flags = len(picture), self.flags
        data.seconds, data.microseconds = divmod(self.taken_ns // 1000, 1_000_000)
        return 0


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    one = StandIn(WEBCAM, [])
    monkeypatch.setattr(v4l2, "fcntl", SimpleNamespace(ioctl=one.ioctl))
    (tmp_path / "video0").touch()
    return one


def source(folder: Path, **keys: Any) -> V4l2Source:
    device = str(folder / "video0")
    camera = Camera("v4l2", device=device, policy=Policy.EVERY, size=(640, 480))
    return V4l2Source(msgspec.structs.replace(camera, **keys), None)


def read_all(camera: V4l2Source, slot: Picture) -> None:
    while camera.wait(0):
        with suppress(BadPictureError):
            camera.read(slot)


def scene(seed: int) -> Picture:
    few = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return cv2.resize(few, (640, 480), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


def jpeg(seed: int) -> bytes:
    return bytes(cv2.imencode(".jpg", scene(seed))[1])


def test_structures_are_the_kernels(tmp_path: Path) -> None:
    """A request's number holds its direction and the size of its structure."""
    if not shutil.which("gcc") or not Path("/usr/include/linux/videodev2.h").exists():
        pytest.skip("needs gcc and linux-libc-dev")
    lines = "".join(f'printf("%lu\\n", (unsigned long)VIDIOC_{one});' for one in REQUESTS.values())
    code = f"#include <stdio.h>\n#include <linux/videodev2.h>\nint main() {{ {lines} return 0; }}"
    program = tmp_path / "numbers"
    subprocess.run(["gcc", "-x", "c", "-", "-o", program], input=code.encode(), check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(zip(REQUESTS.values(), map(int, said.split()), strict=True)) == {
        name: number for number, name in REQUESTS.items()
    }


def test_mjpeg_is_decoded_in_place_and_what_is_damaged_passed_over(
    tmp_path: Path, stand_in: StandIn
) -> None:
    other_size = bytes(cv2.imencode(".jpg", scene(5)[:100])[1])
    whole = jpeg(1)
    stand_in.pictures += [whole, whole[:-400], b"", b"\xff\xd8 no picture", other_size, jpeg(2)]
    camera = source(tmp_path, format="MJPG")
    assert str(camera.open()) == "640x480 MJPG 30/s"
    slot = np.zeros((480, 640, 3), np.uint8)
    shown: list[Picture] = []
    damaged = []
    while camera.wait(0):
        try:
            assert camera.read(slot) is not None
            shown.append(slot.copy())
        except BadPictureError as error:
            damaged.append(str(error)[:29])
    for picture, seed in zip(shown, (1, 2), strict=True):
        decoded = cv2.imdecode(np.frombuffer(jpeg(seed), np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        assert np.array_equal(picture, decoded)
    assert damaged == [
        "picture 0: no whole JPEG: Pre", *["picture 0: no whole JPEG: tjD"] * 2,
        "picture 0: a JPEG of 640x100",
    ]  # fmt: skip
    stand_in.pictures += [whole[:1000]] * DAMAGED
    with pytest.raises(SourceError, match=f"{DAMAGED} damaged pictures in a row: no whole JPEG"):
        read_all(camera, slot)
    camera.close()  # while the traceback of the error is alive


def test_yuyv_with_padded_lines_is_converted_in_place(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.stride = 64
    raw = np.random.default_rng(1).integers(0, 255, (480, 640 * 2 + 64), np.uint8)
    stand_in.pictures += [raw.tobytes()[:-100], raw.tobytes()]  # the first is cut off
    camera = source(tmp_path)
    assert str(camera.open()) == "640x480 YUYV 30/s"
    slot = np.zeros((480, 640, 3), np.uint8)
    assert camera.wait(0)
    with pytest.raises(BadPictureError, match="645020 bytes of 645120"):
        camera.read(slot)
    assert camera.wait(0)
    stamp = camera.read(slot)
    camera.close()
    lines = np.ascontiguousarray(raw[:, : 640 * 2]).reshape(480, 640, 2)
    assert np.array_equal(slot, cv2.cvtColor(lines, cv2.COLOR_YUV2BGR_YUYV))
    assert stamp is not None
    assert stamp.captured_ns == stand_in.taken_ns // 1000 * 1000


@pytest.mark.parametrize(("flags", "ago_ns"), [(0, 0), (v4l2.BUFFER_MONOTONIC, DAY_NS),
                                               (v4l2.BUFFER_MONOTONIC, -DAY_NS)])  # fmt: skip
def test_a_driver_s_time_that_can_t_be_right_is_not_used(
    tmp_path: Path, stand_in: StandIn, flags: int, ago_ns: int
) -> None:
    before = time.monotonic_ns()
    stand_in.flags, stand_in.taken_ns = flags, before - ago_ns
    stand_in.pictures.append(jpeg(1))
    camera = source(tmp_path, format="MJPG")
    camera.open()
    assert camera.wait(0)
    stamp = camera.read(np.zeros((480, 640, 3), np.uint8))
    camera.close()
    assert stamp is not None
    assert before < stamp.captured_ns <= time.monotonic_ns()


@pytest.mark.parametrize(
    ("format", "size", "fps", "chosen"),
    [
        (None, None, 30.0, "MJPG 1280x720 30"),  # no larger than that unless asked
        (None, (640, 480), 30.0, "YUYV 640x480 30"),
        (None, (640, 480), 10.0, "YUYV 640x480 15"),
        (None, (1280, 720), 10.0, "YUYV 1280x720 10"),
        (None, (1280, 720), 11.0, "MJPG 1280x720 30"),  # raw is too slow
        (None, (1280, 720), 1000.0, "MJPG 1280x720 60"),
        ("YUYV", (1280, 720), 30.0, "YUYV 1280x720 10"),
        (None, (1920, 1080), 30.0, "MJPG 1920x1080 30"),
        (None, (800, 600), 30.0, "gives no 800x600, but YUYV 640x480, 1280x720; MJPG 640x480, "),
        ("H264", None, 30.0, "gives MJPG, YUYV, H264; format = 'H264' is to be one of these, and"),
    ],
)
def test_which_mode_is_chosen(
    tmp_path: Path, stand_in: StandIn, format: Any, size: Any, fps: float, chosen: str
) -> None:
    device = Device(str(tmp_path / "video0"))
    try:
        said = choose(device, format, size, fps)
        text = f"{said.format} {said.size[0]}x{said.size[1]} {said.rate}"
    except SourceError as error:
        text = str(error)
    device.close()
    assert chosen in text


def test_the_whole_of_vigil_cameras_is_a_configuration(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stand_in.card = 'Caméra "HD"\n#2 = ['.encode()
    paths = [tmp_path / "video0", tmp_path / "video1", tmp_path / "video2"]
    paths[1].touch()
    paths[2].mkdir()  # can't be opened for writing
    monkeypatch.setattr(cameras, "attached", lambda: [cameras.device(path) for path in paths])
    assert cameras.run(Namespace(url=None, json=False)) == 0
    said = capsys.readouterr().out
    assert f"video2 at {paths[2]}: {paths[2]}: Is a directory" in said
    file = tmp_path / "vigil.toml"
    file.write_text(said + '[groups.main]\nmodel = "m"\n')
    rows = load(file).cameras
    assert list(rows) == ["cam-ra-hd-2", "cam-ra-hd-2-2"]
    assert [row.device for row in rows.values()] == [str(path) for path in paths[:2]]
    assert {(row.size, row.format, row.fps) for row in rows.values()} == {
        ((1280, 720), "MJPG", 30.0)
    }


def test_no_camera_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cameras, "attached", list)
    assert cameras.run(Namespace(url=None, json=False)) == cameras.NOT_WELL
    assert "no camera: no video device" in capsys.readouterr().out


# A real process with a real beat, of which only the camera is made up.
CAPTURE = """
import sys
from common.messages import CameraReport
from common.service import main
from common.states import ProcessState

def body(service):
    while not service.stopping:
        report = CameraReport(sys.argv[1], 0, "pulled", "640x480 YUYV 30/s")
        service.beat(ProcessState.RUNNING, camera=report)
        service.pause(0.1)

main("capture-belt", body)
"""


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            "streaming",
            "ok  camera belt: v4l2, in use by capture-belt: streaming, 640x480 YUYV 30/s",
        ),
        ("lost", "vigil: camera belt: v4l2, in use by capture-belt: lost, pulled"),
    ],
)
def test_vigil_check_opens_no_camera_that_capture_has(paths: Paths, state: str, said: str) -> None:
    file = paths.root / "vigil.toml"
    camera = 'source = "v4l2"\ndevice = "/dev/nowhere"'
    file.write_text(f'[cameras.belt]\n{camera}\n[groups.main]\nmodel = "m"\n')
    environment = os.environ | {"VIGIL_CONFIG": str(file)}
    check = [sys.executable, "-m", "services.cli.main", "check"]
    with subprocess.Popen(
        [sys.executable, "-c", CAPTURE, state], cwd=PROJECT, env=environment
    ) as capture:
        endpoint = Path(paths.endpoint("capture-belt").removeprefix("ipc://"))
        try:
            until(lambda: accepts(endpoint), 10, "capture to start")
            done = subprocess.run(
                check, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=30
            )
        finally:
            capture.terminate()
    assert said in done.stdout + done.stderr


def test_vigil_cameras_asks_a_stream(tmp_path: Path) -> None:
    """A real server, a real process."""
    server = Server(*MJPEG)
    url = f"http://{IN_URL}127.0.0.1:{server.port}"

    def ask(path: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.cli.main", "cameras", url + path]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=30)

    try:
        done, missing = ask("/basic"), ask("/nowhere")
    finally:
        server.close()
    file = tmp_path / "vigil.toml"
    file.write_text(done.stdout + '[groups.main]\nmodel = "m"\n')
    assert load(file).cameras["127-0-0-1"].url == f"{url}/basic"
    assert "320x240" in done.stdout
    assert missing.returncode == 1
    assert "404" in missing.stderr
    assert PASSWORD not in missing.stderr
