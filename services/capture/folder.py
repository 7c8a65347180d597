"""A folder of pictures, in the order of their names."""

import time
from pathlib import Path

import cv2

from common.config import Camera
from common.errors import SourceError
from services.capture.source import Format, Picture, Ready, Stamp, deliver

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class FolderSource(Ready):
    def __init__(self, camera: Camera, path: Path) -> None:
        self._path = path
        self._loop = camera.loop
        self._pictures: list[Path] = []
        self._next = 0

    def open(self) -> Format:
        if not self._path.is_dir():
            raise SourceError(f"{self._path}: no such folder; a folder camera needs one")
        self._list()
        first = self._decode(self._pictures[0])
        return Format(first.shape[1], first.shape[0], None)

    def _list(self) -> None:
        self._pictures = sorted(
            path for path in self._path.iterdir() if path.suffix.lower() in SUFFIXES
        )
        self._next = 0
        if not self._pictures:
            raise SourceError(f"{self._path}: holds no picture ({', '.join(sorted(SUFFIXES))})")

    def read(self, into: Picture) -> Stamp | None:
        if self._next == len(self._pictures):
            if not self._loop:
                return None
            self._list()
        captured_ns = time.monotonic_ns()
        deliver(self._decode(self._pictures[self._next]), into)
        self._next += 1
        return Stamp(captured_ns)

    def _decode(self, path: Path) -> Picture:
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if picture is None:
            raise SourceError(f"{path}: not a picture that can be decoded; repair or remove it")
        return picture  # type: ignore[return-value]

    def close(self) -> None:
        self._pictures = []
