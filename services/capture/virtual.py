"""The virtual camera: a rendered conveyor with parts and defects, and the truth of each frame."""

import time
from pathlib import Path

from common.config import Camera
from common.errors import SourceError
from common.messages import TruthItem
from services.capture.scene import Scene
from services.capture.source import Format, Picture, Ready, Stamp, deliver

DEFAULT_SIZE = (640, 480)
DEFAULT_FPS = 15.0


class VirtualSource(Ready):
    def __init__(self, camera: Camera, path: Path | None) -> None:
        self._width, self._height = camera.size or DEFAULT_SIZE
        self._scene = Scene(self._width, self._height, seed=camera.seed)
        if camera.gaps is not None:
            self._scene.gaps = camera.gaps
        self._loop = camera.loop
        self._prerender = camera.prerender
        self._rendered: list[tuple[Picture, tuple[TruthItem, ...]]] = []
        self._index = 0

    def open(self) -> Format:
        if not self._loop and not self._prerender:
            raise SourceError("a virtual camera has no end: loop = false needs prerender = N")
        self._rendered = [self._scene.render(index) for index in range(self._prerender)]
        return Format(self._width, self._height, DEFAULT_FPS)

    def read(self, into: Picture) -> Stamp | None:
        captured_ns = time.monotonic_ns()
        if not self._prerender:
            picture, truth = self._scene.render(self._index, into)
        elif self._index < self._prerender or self._loop:
            picture, truth = self._rendered[self._index % self._prerender]
        else:
            return None
        self._index += 1
        deliver(picture, into)
        return Stamp(captured_ns, truth)

    def close(self) -> None:
        self._rendered = []
