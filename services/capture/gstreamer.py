"""A camera behind a GStreamer pipeline: CSI cameras, GenICam through Aravis, what has a plugin.

GStreamer and its bindings are the system's, never pip's: this Python must see the system's `gi`.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Camera
from common.errors import SourceError
from common.sources import redacted
from services.capture.source import Format, Picture, SizeChangedError, Stamp

SINK = (
    "videoconvert ! video/x-raw,format=BGR ! appsink name=vigil max-buffers=2 drop=true sync=false"
)
PACKAGES = "python3-gi, gir1.2-gstreamer-1.0 and gstreamer1.0-plugins-base"
TICK_S = 0.1
OLD_NS = 10_000_000_000  # older than that, a time stamp is of another clock


class GstreamerSource:
    def __init__(self, camera: Camera, path: Path | None) -> None:
        self._camera = camera
        self._pipeline: Any = None
        self._sample: Any = None  # the next picture

    def open(self) -> Format:
        self._gst, glib = gst, _ = _load()
        try:
            self._pipeline = gst.parse_launch(f"{self._camera.pipeline} ! {SINK}")
        except glib.Error as error:
            raise self._error(f"GStreamer can't make it: {error.message}") from error
        self._sink, self._bus = self._pipeline.get_by_name("vigil"), self._pipeline.get_bus()
        change = self._pipeline.set_state(gst.State.PAUSED)
        # Only a live pipeline's time stamps tell when a picture was taken.
        self._live = change == gst.StateChangeReturn.NO_PREROLL
        self._live &= self._pipeline.get_clock() in (None, gst.SystemClock.obtain())
        self._pipeline.set_state(gst.State.PLAYING)
        until = time.monotonic() + self._camera.open_s
        while not self.wait(TICK_S) and time.monotonic() < until:
            pass  # an error is seen only between two looks
        if self._sample is None:
            raise self._error(
                f"no picture within {self._camera.open_s:g} s; look whether gst-launch-1.0 shows "
                "one; if it only is slow, give it a longer open_s"
            )
        width, height = self._size()
        has_rate, rate, per = self._caps(self._sample).get_fraction("framerate")
        name, raw = self._comes_as()
        return Format(width, height, rate / per if has_rate and rate else None, name, raw)

    def _comes_as(self) -> tuple[str, bool]:
        """What the pipeline's own sources give, and whether that is uncompressed pixels.

        A bin that is a source may hold a decoder, so what comes out of it is not trusted to be raw.
        """
        names, raw = [], True
        sources = self._pipeline.iterate_sources()
        while (found := sources.next())[0] == self._gst.IteratorResult.OK:
            for pad in found[1].srcpads:
                caps = pad.get_current_caps()
                names.append(caps.get_structure(0).get_name() if caps else "")
            raw &= not isinstance(found[1], self._gst.Bin)
        return ",".join(names), raw and set(names) == {"video/x-raw"}

    def wait(self, timeout_s: float) -> bool:
        if self._sample is None:
            self._sample = self._sink.emit("try-pull-sample", round(timeout_s * 1e9))
        if self._sample is None:
            self._check()
        return self._sample is not None

    def _check(self) -> None:
        """Raises: SourceError: the pipeline has failed, or ended."""
        kinds = self._gst.MessageType
        message = self._bus.pop_filtered(kinds.ERROR | kinds.EOS)
        if message is None and not self._sink.get_property("eos"):
            return
        if message is None or message.type == kinds.EOS:
            raise self._error("the stream has ended")
        error, detail = message.parse_error()
        detail = (detail or "").rpartition("\n")[2]
        raise self._error(f"{message.src.get_name()}: {error.message} ({detail})")

    def _error(self, text: str) -> SourceError:
        return SourceError(redacted(f"the camera's pipeline: {text}"))

    def skip(self) -> None:
        self._sample = None

    def read(self, into: Picture) -> Stamp:
        width, height = self._size()
        if (height, width) != into.shape[:2]:
            raise SizeChangedError(width, height)
        sample, self._sample = self._sample, None
        buffer = sample.get_buffer()
        data = buffer.extract_dup(0, buffer.get_size())
        # Rows are filled up to 4 bytes.
        rows = np.frombuffer(data, np.uint8).reshape(height, -1)[:, : 3 * width]
        np.copyto(into, rows.reshape(height, width, 3))
        known = buffer.pts != self._gst.CLOCK_TIME_NONE
        return Stamp(self._captured_ns(sample, buffer.pts), mark=buffer.pts if known else None)

    def _captured_ns(self, sample: Any, pts: int) -> int:
        now = time.monotonic_ns()
        running = sample.get_segment().to_running_time(self._gst.Format.TIME, pts)
        at = self._pipeline.get_base_time() + running
        return at if self._live and now - OLD_NS < at <= now else now

    def _size(self) -> tuple[int, int]:
        caps = self._caps(self._sample)
        return caps.get_int("width")[1], caps.get_int("height")[1]

    def _caps(self, sample: Any) -> Any:
        return sample.get_caps().get_structure(0)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.set_state(self._gst.State.NULL)
        self._pipeline = self._sink = self._bus = self._sample = None


def _load() -> tuple[Any, Any]:
    """The Gst and GLib modules; loaded only by who has such a camera."""
    try:
        import gi

        gi.require_version("Gst", "1.0")
        from gi.repository import GLib, Gst
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"GStreamer is not there for this Python ({error}): install {PACKAGES}, and make gi "
            "importable: a venv made with --system-site-packages by the system's own Python"
        ) from error
    Gst.init(None)
    return Gst, GLib
