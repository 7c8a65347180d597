"""A folder of pictures, in the order of their names."""

import time
from pathlib import Path

import cv2
import numpy as np

from common.config import Camera
from common.errors import SourceError
from services.capture.source import (
    BadPictureError,
    Format,
    Picture,
    Ready,
    Stamp,
    deliver,
    whole_jpeg,
)

JPEG = {".jpeg", ".jpg"}
SUFFIXES = JPEG | {".bmp", ".png", ".tif", ".tiff", ".webp"}


class FolderSource(Ready):
    def __init__(self, camera: Camera, path: Path) -> None:
        self._path = path
        self._loop = camera.loop
        self._pictures: list[Path] = []
        self._next = self._bad = 0

    def open(self) -> Format:
        if not self._path.is_dir():
            raise SourceError(f"{self._path}: no such folder; a folder camera needs one")
        self._list()
        while True:
            try:
                first = self._decode(self._pictures[self._next])
            except BadPictureError as error:
                self._pass_over(error)
            else:
                return Format(first.shape[1], first.shape[0], None)

    def _list(self) -> None:
        try:
            self._pictures = sorted(
                path for path in self._path.iterdir() if path.suffix.lower() in SUFFIXES
            )
        except OSError as error:
            raise SourceError(f"{self._path}: can't be read: {error.strerror}") from error
        self._next = self._bad = 0
        if not self._pictures:
            raise SourceError(f"{self._path}: holds no picture ({', '.join(sorted(SUFFIXES))})")

    def read(self, into: Picture) -> Stamp | None:
        if self._next == len(self._pictures):
            if not self._loop:
                return None
            self._list()
        captured_ns = time.monotonic_ns()
        try:
            deliver(self._decode(self._pictures[self._next]), into)
        except BadPictureError as error:
            self._pass_over(error)
            raise
        self._next += 1
        return Stamp(captured_ns)

    def _pass_over(self, error: BadPictureError) -> None:
        self._next += 1
        self._bad += 1
        if self._bad == len(self._pictures):
            raise SourceError(f"{self._path}: none of its pictures can be decoded: {error}")

    def _decode(self, path: Path) -> Picture:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadPictureError(f"{path}: can't be read: {error.strerror}") from error
        if path.suffix.lower() in JPEG and not whole_jpeg(data):
            raise BadPictureError(f"{path}: cut off after {len(data)} bytes")
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None:
            raise BadPictureError(f"{path}: not a picture that can be decoded")
        return picture  # type: ignore[return-value]

    def close(self) -> None:
        self._pictures = []
