"""Cameras behind GStreamer pipelines, with Debian's GStreamer."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from common.config import Camera
from common.errors import SourceError
from common.paths import PROJECT, Paths
from services.capture.gstreamer import GstreamerSource
from services.capture.source import Format, SizeChangedError, Stamp
from tests.servers.running import RTSP, Server
from tests.support import Journal, System, balanced, until

DEBIANS = Path("/usr/lib/python3/dist-packages/gi")
BARS = "videotestsrc is-live=true pattern=smpte100 ! video/x-raw,width=101,height=50,framerate=30/1"
# Debian's bindings are older than this Python's importlib wishes.
pytestmark = pytest.mark.filterwarnings("ignore:DynamicImporter:ImportWarning")


@pytest.fixture
def _gi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's bindings, and nothing else of Debian's Python."""
    (tmp_path / "gi").symlink_to(DEBIANS)
    monkeypatch.syspath_prepend(tmp_path)
    gi = pytest.importorskip(
        "gi", reason="needs Debian's python3-gi, for this Python's version", exc_type=ImportError
    )
    try:
        gi.require_version("Gst", "1.0")
    except ValueError:
        pytest.skip("needs Debian's gir1.2-gstreamer-1.0 and gstreamer1.0-plugins-good")


def make(pipeline: str) -> GstreamerSource:
    return GstreamerSource(Camera("gstreamer", pipeline=pipeline, open_s=2.0), None)


@pytest.mark.usefixtures("_gi")
def test_pictures_of_a_pipeline() -> None:
    """Rows that are filled up, colours, and the times that its clock gives."""
    source = make(BARS)
    assert source.open() == Format(101, 50, 30.0, "video/x-raw", raw=True)
    picture = np.zeros((50, 101, 3), np.uint8)
    stamps: list[Stamp] = []
    while len(stamps) < 10:
        assert source.wait(1)
        before = time.monotonic_ns()
        stamps.append(source.read(picture))
        assert before - 1e9 < stamps[-1].captured_ns <= before
    colours = [(1, 1, 1), (0, 1, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0)]
    assert [tuple(bar > 128) for bar in picture[40, 7:98:14]] == colours
    apart = [after.captured_ns - one.captured_ns for one, after in pairwise(stamps)]
    assert np.allclose(apart, 1e9 / 30, atol=2), "the driver's times, not the reader's"
    assert len({stamp.mark for stamp in stamps}) == 10
    assert source.wait(1)
    source.skip()
    caps = source._gst.Caps.from_string("video/x-raw,width=64,height=48,framerate=30/1")
    source._pipeline.get_by_name("capsfilter0").set_property("caps", caps)
    with pytest.raises(SizeChangedError, match="64x48"):
        until(lambda: source.wait(1) and not source.read(picture), 5, "the new size")
    source.read(np.zeros((48, 64, 3), np.uint8))
    source.close()


def skipped(source: GstreamerSource) -> bool:
    there = source.wait(0.4)
    source.skip()
    return there


WRONG = {
    "nosuch": 'can\'t make it: no element "nosuch"',
    "videotestsrc ! ! x": "can't make it: syntax error",
    "audiotestsrc": "can't make it: could not link audiotestsrc0 to videoconvert",
    "v4l2src device=/dev/video77": "Cannot identify device '/dev/video77'. (system error: No such",
    "videotestsrc num-buffers=0": "the stream has ended",
    "videotestsrc ! valve drop=true": "no picture within 2 s",
    "souphttpsrc location=http://a:s3cret@127.0.0.1:1/x?key=s3cret ! jpegdec": "souphttpsrc",
    "rtspsrc location=rtsp://a:s3cret@127.0.0.1:1/x user-pw=s3cret ! rtpjpegdepay ! jpegdec": (
        "rtspsrc0: Could not open resource"
    ),
}


@pytest.mark.usefixtures("_gi")
@pytest.mark.parametrize("pipeline", WRONG)
def test_pipelines_that_give_nothing(pipeline: str, capfd: pytest.CaptureFixture[str]) -> None:
    source = make(pipeline)
    started = time.monotonic()
    with pytest.raises(SourceError) as error:
        source.open()
    source.close()
    assert time.monotonic() - started < 2.7
    assert WRONG[pipeline] in str(error.value)
    assert "s3cret" not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.usefixtures("_gi")
def test_a_server_behind_it_freezes_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        server = Server(*RTSP)
    except (OSError, RuntimeError):
        pytest.skip("needs Debian's gir1.2-gst-rtsp-server-1.0")
    source = make(
        f"rtspsrc location=rtsp://127.0.0.1:{server.port}/jpeg protocols=tcp latency=0 "
        "! rtpjpegdepay ! jpegdec"
    )
    try:
        format = source.open()
        assert (format.width, format.height, format.raw) == (320, 240, False)
        server.freeze()
        until(lambda: not skipped(source), 5, "no pictures")
        server.close()
        with pytest.raises(SourceError):
            until(lambda: skipped(source) and False, 5, "an end")
    finally:
        source.close()
        server.close()


@pytest.mark.usefixtures("_gi")
def test_nothing_is_left_of_a_pipeline() -> None:
    source = make("videotestsrc num-buffers=3 pattern=black")
    picture = np.zeros((240, 320, 3), np.uint8)
    before = (0, 0)
    for again in range(20):
        source.open()
        source.read(picture)
        with pytest.raises(SourceError, match="the stream has ended"):
            until(lambda: skipped(source) and False, 5, "its end")
        source.close()
        now = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
        assert again < 2 or now == before
        before = now


def test_gstreamer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gi", None)
    with pytest.raises(SourceError, match=r"install python3-gi, gir1\.2-gstreamer-1\.0"):
        make(BARS).open()


@pytest.mark.usefixtures("_gi")
def test_who_is_blind_is_not_judged(
    system: Callable[[str], System], paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera that freezes, one that is covered, one that moves, on the real system. A new
    connection to the frozen one shows the same picture: that is no new beginning."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    size = "video/x-raw,width=160,height=120,framerate=10/1"
    line = system(f"""
    [cameras.frozen]
    source = "gstreamer"
    pipeline = "videotestsrc num-buffers=1 ! {size} ! imagefreeze is-live=true ! {size}"
    frozen_s = 2
    lost_s = 1
    [cameras.covered]
    source = "gstreamer"
    pipeline = "videotestsrc is-live=true pattern=red ! {size}"
    [cameras.moving]
    source = "gstreamer"
    pipeline = "videotestsrc is-live=true pattern=snow ! {size}"
    [groups.main]
    model = "{PROJECT}/models/factory"
    """)
    frozen, covered, moving = (Journal(paths, name) for name in ("frozen", "covered", "moving"))
    line.until_valid()

    def renewed() -> bool:
        cameras = json.loads(line.vigil("status", "--json").stdout)["cameras"]
        return [c["state"] for c in cameras if c["reconnects"]] == ["frozen"]

    until(renewed, 30, "frozen again, after a new connection")
    for one in (frozen, covered, moving):
        one.until_more(5)
        one.stop()
    seen = [(result.validity, result.reason) for result in frozen.results]
    blind = ("not_inferred", "blind: the camera is frozen")
    first = seen.index(blind)
    assert first > 5
    assert set(seen[:first]) == {("valid", "")}
    assert set(seen[first:]) == {blind}
    reason = "blind: the camera is dark or covered"
    assert {(r.validity, r.reason) for r in covered.results} == {("not_inferred", reason)}
    assert {result.validity for result in moving.results} == {"valid"}
    account = line.stop()["cameras"]
    assert all(map(balanced, account.values()))
    assert account["covered"]["inferred"] == account["moving"]["not_inferred"] == 0
