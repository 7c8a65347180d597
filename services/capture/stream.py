"""Cameras on the network, through FFmpeg: RTSP, and MJPEG over HTTP.

FFmpeg's calls block, and one that is interrupted has broken its connection: a thread connects and
takes packets off the wire, whoever asks for pictures decodes. What a picture depends on is not
dropped: a queue that overflows goes on with the next key frame. Packets lost over UDP may smear
the picture up to the next key frame, of which FFmpeg says nothing; TCP loses none.
"""

import errno
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import urlsplit

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from common.config import Camera
from common.errors import SourceError
from common.sources import redacted
from services.capture.source import BadPictureError, Format, Picture, SizeChangedError, Stamp

_Packet: TypeAlias = "av.Packet[av.VideoStream]"
CLOSE_S = 0.5  # a thread that still hangs then ends by itself, at FFmpeg's time-outs
QUEUE, INTRA_QUEUE = 60, 4  # packets; of those that depend on each other, and that do not
SCHEMES = {"rtsp": ("rtsp", "rtsps"), "mjpeg": ("http", "https")}
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
# Look at as little as possible before the first packet is given out: the decoder sees the rest.
OPTIONS = {"probesize": "32", "analyzeduration": "1"}
NO_VIDEO = "what it sends is no video stream"
SAYS = {
    av.error.HTTPUnauthorizedError: "it asks for another user or password: put user:password@ "
    "before the host in url, special characters as %40",
    av.error.HTTPForbiddenError: "it refuses this user (403): give another in url",
    av.error.HTTPNotFoundError: "it has nothing at this path (404): look the url up in its manual",
    av.error.HTTPOtherClientError: "it refuses (4xx): perhaps there is no video at this path",
    av.error.ConnectionRefusedError: "nothing listens there: look at host and port of url",
    av.error.EOFError: NO_VIDEO,
    av.error.InvalidDataError: NO_VIDEO + ", or broke off",
}


class _Connection:
    """One connection, and its thread, which ends with it."""

    def __init__(self, camera: Camera) -> None:
        assert camera.url is not None
        self._camera = camera
        self._url = camera.url
        self._packets: deque[_Packet] = deque()
        self._changed = threading.Condition()
        self._stopping = self._skipping = False
        self._error = ""
        self._lost = 0
        self.doing = "looking up its name"
        self.codec: av.VideoCodecContext | None = None
        self.intra = False
        self.fps: float | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether a packet is there by then.

        Raises:
            SourceError: there is none, and none will come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._packets or self._error, timeout_s)
            if not self._packets and self._error:
                raise SourceError(f"{redacted(self._url)}: {self._error}")
            return bool(self._packets)

    def take(self) -> "_Packet | None":
        with self._changed:
            return self._packets.popleft() if self._packets else None

    def damaged(self) -> None:
        """A packet could not be decoded: nor can those that depend on it."""
        self.doing = "getting what can't be decoded"
        if not self.intra:
            with self._changed:
                self._to_key_frame()

    def lost(self) -> int:
        """Packets that were dropped since it was last asked."""
        with self._changed:
            lost, self._lost = self._lost, 0
            return lost

    def _to_key_frame(self) -> None:
        self._lost += len(self._packets)
        self._packets.clear()
        self._skipping = True

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._packets.clear()
        self._thread.join(CLOSE_S)

    @property
    def hangs(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        error = "a fault in the code"
        try:
            where = urlsplit(self._url)
            # FFmpeg does not tell an unknown name from other failures.
            socket.getaddrinfo(where.hostname, where.port or PORTS[where.scheme])
            self.doing = "connecting"
            error = self._receive()
        except (socket.gaierror, UnicodeError):
            error = f"no host of this name is known: {urlsplit(self._url).hostname}"
        except av.error.ExitError:
            silent_s = self._camera.lost_s if self.codec else self._camera.open_s
            error = f"nothing came for {silent_s:g} s while {self.doing}"
        except av.FFmpegError as failure:
            said = "it broke off" if failure.errno == errno.EIO else failure.strerror
            error = SAYS.get(type(failure), f"{said} while {self.doing}")
        finally:
            with self._changed:
                self._error = error
                self._changed.notify()

    def _receive(self) -> str:
        """Until the stream ends; returns why."""
        form, options = "mpjpeg", OPTIONS
        if self._camera.source == "rtsp":
            # Sound would go on when the picture does not, and nothing would time out.
            only = {"rtsp_transport": self._camera.transport, "allowed_media_types": "video"}
            form, options = "rtsp", OPTIONS | only
        limits = self._camera.open_s, self._camera.lost_s
        with av.open(self._url, format=form, options=options, timeout=limits) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                return NO_VIDEO
            codec = stream.codec_context
            codec.thread_count = 1  # more of them decode ahead, which is latency and memory
            codec.options = {"err_detect": "explode"}  # half a picture is none
            codec.copy_opaque = True
            self.intra = codec.codec.intra_only
            self.fps = float(stream.average_rate) if stream.average_rate else None
            self.codec = codec
            self.doing = "waiting for a picture"
            before = time.monotonic_ns()
            for packet in container.demux(stream):
                now = time.monotonic_ns()
                if self._stopping:
                    return "it was closed"
                if now - before > self._camera.lost_s * 1e9:
                    raise av.error.ExitError(0, "")  # all that came is what a parser still held
                if packet.size:
                    # A parser knows a picture's end by the next one's beginning.
                    packet.opaque = now if self.intra else before
                    self._put(packet)
                before = now
            return "it ended the stream"

    def _put(self, packet: _Packet) -> None:
        with self._changed:
            if self.intra and len(self._packets) == INTRA_QUEUE:
                self._packets.popleft()
                self._lost += 1
            elif len(self._packets) == QUEUE:
                self._to_key_frame()
            self._skipping &= not packet.is_keyframe
            self._lost += self._skipping
            if not self._skipping:
                self._packets.append(packet)
                self._changed.notify()


class StreamSource:
    def __init__(self, camera: Camera, path: Path | None) -> None:
        self._camera = camera
        self._where = redacted(camera.url or "")
        self._connection: _Connection | None = None
        self._frames: deque[av.VideoFrame] = deque()
        self._bad = False  # what comes next could not be decoded
        self._to_bgr = VideoReformatter()

    def open(self) -> Format:
        self._check()
        if self._connection and self._connection.hangs:
            raise SourceError(
                f"{self._where}: the try before still hangs while {self._connection.doing}; "
                "tried again when that has ended"
            )
        self._connection = _Connection(self._camera)
        until = time.monotonic() + self._camera.open_s
        while not self._frames and time.monotonic() < until and self._decode(until):
            self._bad = False
        if not self._frames:
            hint = '; or try transport = "tcp"' if self._camera.transport == "udp" else ""
            raise SourceError(
                f"{self._where}: no picture within {self._camera.open_s:g} s, still "
                f"{self._connection.doing}; if it only is slow, give it a longer open_s{hint}"
            )
        frame, codec = self._frames[0], self._connection.codec
        assert codec is not None
        return Format(frame.width, frame.height, self._connection.fps, codec.name)

    def _check(self) -> None:
        schemes = SCHEMES[self._camera.source]
        try:
            parts = urlsplit(self._camera.url or "")
            right = parts.scheme in schemes and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right:
            raise SourceError(
                f"{self._where}: not a url of this camera; expected {schemes[0]}://host/path, "
                "special characters in user and password as %40"
            )

    def wait(self, timeout_s: float) -> bool:
        if self._open.intra and not self._frames:
            return self._open.wait(timeout_s)
        return self._decode(time.monotonic() + timeout_s)

    def skip(self) -> None:
        if self._frames:
            self._frames.popleft()
        elif not self._bad:
            self._open.take()
        self._bad = False

    def read(self, into: Picture) -> Stamp:
        self._decode(0.0)
        if not self._frames:
            self._bad = False
            raise BadPictureError(f"{self._where}: a picture is damaged or cut short")
        frame = self._frames[0]
        if (frame.height, frame.width) != into.shape[:2]:
            raise SizeChangedError(frame.width, frame.height)
        self._frames.popleft()
        np.copyto(into, self._to_bgr.reformat(frame, format="bgr24", threads=1).to_ndarray())
        # Time stamps of MJPEG over HTTP are FFmpeg's own count.
        mark = frame.pts if self._camera.source == "rtsp" else None
        return Stamp(cast(int, frame.opaque), lost=self._open.lost(), mark=mark)

    def _decode(self, until: float) -> bool:
        """Decode until then, at least what is there, or until a picture comes, a bad one too."""
        while not self._frames and not self._bad:
            if not self._open.wait(max(0.0, until - time.monotonic())):
                return False
            packet, codec = self._open.take(), self._open.codec
            if packet is None or codec is None:
                continue
            try:
                self._frames.extend(codec.decode(packet))
            except av.FFmpegError:
                self._open.damaged()
                self._bad = True
        return True

    @property
    def _open(self) -> _Connection:
        assert self._connection is not None
        return self._connection

    def close(self) -> None:
        self._frames.clear()
        self._bad = False
        if self._connection:
            self._connection.close()
            if not self._connection.hangs:
                self._connection = None
