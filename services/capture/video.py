"""A video file, decoded by FFmpeg (in OpenCV) straight into the ring slot."""

import time
from pathlib import Path

import cv2

from common.config import Camera
from common.errors import SourceError
from services.capture.source import Format, Picture, Ready, Stamp, deliver


class VideoSource(Ready):
    def __init__(self, camera: Camera, path: Path) -> None:
        self._path = path
        self._loop = camera.loop
        self._capture = cv2.VideoCapture()
        self._held: tuple[Picture, int] | None = None  # a frame of another size than expected
        self._frames = 0

    def open(self) -> Format:
        if not self._path.is_file():
            raise SourceError(f"{self._path}: no such file; a video camera needs one")
        self._rewind()
        ok, first = self._capture.read()
        if not ok:
            raise SourceError(f"{self._path}: not a video that can be decoded (no frame in it)")
        self._rewind()
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        return Format(first.shape[1], first.shape[0], fps if 0 < fps <= 1000 else None)

    def _rewind(self) -> None:
        """Open anew: seeking to frame 0 is inexact in some containers."""
        self._frames = 0
        # One thread: more of them decode whole frames ahead, which is latency and memory.
        one = [cv2.CAP_PROP_N_THREADS, 1]
        if not self._capture.open(str(self._path), cv2.CAP_FFMPEG, one):
            raise SourceError(f"{self._path}: not a video that can be opened")

    def read(self, into: Picture) -> Stamp | None:
        picture, captured_ns = self._held or self._next(into)
        if picture is None:
            if not self._loop:
                return None
            if self._frames == 0:
                raise SourceError(f"{self._path}: holds no frame any more")
            self._rewind()
            return self.read(into)
        if self._held is None:
            self._frames += 1
            if picture.shape != into.shape:
                self._held = picture, captured_ns
        deliver(picture, into)
        self._held = None
        return Stamp(captured_ns)

    def _next(self, into: Picture) -> tuple[Picture | None, int]:
        captured_ns = time.monotonic_ns()
        ok, picture = self._capture.read(into)
        return (picture if ok else None), captured_ns  # type: ignore[return-value]

    def close(self) -> None:
        self._capture.release()
