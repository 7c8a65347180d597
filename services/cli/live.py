"""What a camera sees, for whoever looks: the newest judged frame as JPEG, with exactly its result.

A frame is encoded once, however many look, and none unless somebody does.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from common.config import Camera
from common.frames import JOURNAL, Ring
from common.geometry import Box, View
from common.messages import Item, Result, TruthItem
from common.paths import Paths
from services.cli.listen import newest_ring
from services.cli.picture import Picture, decision
from services.cli.tap import plain

QUALITY = 80
UNJUDGED_NS = 2_000_000_000  # without a decision for so long, frames are shown without one

cv2.setNumThreads(1)  # the other cores are the lanes'


@dataclass(frozen=True)
class Taken:
    """A frame as it was in the ring, made smaller."""

    sequence: int
    captured_ns: int
    told: dict[str, Any]
    pixels: Picture


@dataclass(frozen=True)
class Shot:
    """`told` has the result, all boxes and zones in pixels of the ring's picture."""

    frame: tuple[int, int]  # the ring's generation, sequence
    captured_ns: int
    judged: bool
    view: View | None
    told: dict[str, Any]
    jpeg: bytes

    @property
    def id(self) -> str:
        return f"{self.captured_ns}{'' if self.judged else '-unjudged'}"

    def truth(self, items: Sequence[TruthItem]) -> list[dict[str, Any]]:
        return _items(items, self.view)


class Live:
    """One camera at one size; any thread may ask."""

    def __init__(self, paths: Paths, name: str, camera: Camera, side: int) -> None:
        """
        Args:
            side: pixels; a picture that is broader or higher is made smaller.
        """
        self._paths, self._name, self._camera, self._side = paths, name, camera, side
        self._lock = threading.Lock()
        self._held: Taken | None = None
        self._shot: Shot | None = None
        self.encoded = 0

    def newest(self) -> Shot | None:
        """None where there is no frame, or none yet that is still whole and decided."""
        with self._lock:
            ring = newest_ring(self._paths, self._name)
            if ring is None:
                return None
            with ring:
                decided = ring.decided
                last = decision(ring, decided) if decided > ring.base else None
                if ring.written > decided and self._unjudged(last):
                    taken = self._take(ring, ring.written)
                    return self._encode(ring, taken, None) if taken else None
                return self._judged(ring, decided)

    def _unjudged(self, last: Result | None) -> bool:
        """Whether nobody seems to judge: the newest decision is old; a new ring has none yet."""
        since_ns = last.captured_ns + last.age_ns + last.stages.total if last else 0
        if last is None and self._shot and self._shot.judged:
            since_ns = self._shot.captured_ns
        return time.monotonic_ns() - since_ns > UNJUDGED_NS

    def _judged(self, ring: Ring, decided: int) -> Shot | None:
        shot = self._find(ring, decided)
        # Where frames are overwritten before they are judged, or at once, one is taken while the
        # engine has it, and shown when its decision is there.
        attempted, _ = ring.attempted
        waiting = self._held is not None and self._held.sequence > decided
        if attempted > decided and not waiting and not ring.intact(decided):
            self._held = self._take(ring, attempted)
        return shot

    def _find(self, ring: Ring, decided: int) -> Shot | None:
        shot, held = self._shot, self._held
        for sequence in range(decided, max(decided - JOURNAL, ring.base), -1):
            mine = held is not None and held.sequence == sequence
            if not mine and not ring.intact(sequence):
                continue
            if (result := decision(ring, sequence)) is None:
                continue
            if shot and shot.judged and result.captured_ns <= shot.captured_ns:
                return shot
            taken = held if mine else self._take(ring, sequence)
            if taken and taken.captured_ns == result.captured_ns:
                return self._encode(ring, taken, result)
        return shot if shot and shot.judged else None

    def _take(self, ring: Ring, sequence: int) -> Taken | None:
        """A small copy of a frame; None where it is overwritten, before or meanwhile."""
        view = ring.pixels(sequence)
        if view is None:
            return None
        shape = ring.shape
        pixels = np.frombuffer(view, np.uint8).reshape(shape.height, shape.width, shape.channels)
        scale = self._side / max(shape.width, shape.height)
        if scale < 1:
            size = max(1, round(shape.width * scale)), max(1, round(shape.height * scale))
            small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        else:
            small = pixels.copy()
        captured_ns, _ = ring.times(sequence)
        sight, trigger = ring.marks(sequence)
        told = {
            "ring": ring.generation,
            "sequence": sequence,
            "width": shape.width,
            "height": shape.height,
            "sight": sight.name.lower(),
            "trigger": trigger,
            "zones": {
                name: [_point(shape.view, point) for point in zone.points]
                for name, zone in self._camera.zones.items()
            },
        }
        if not ring.intact(sequence):
            return None
        return Taken(sequence, captured_ns, told, np.asarray(small, np.uint8))

    def _encode(self, ring: Ring, taken: Taken, result: Result | None) -> Shot:
        shot, view = self._shot, ring.shape.view
        if shot and (shot.captured_ns, shot.judged) == (taken.captured_ns, result is not None):
            return shot
        told = plain(result)
        if result is not None:
            told["items"] = _items(result.items, view)
        _, jpeg = cv2.imencode(".jpg", taken.pixels, (cv2.IMWRITE_JPEG_QUALITY, QUALITY))
        self.encoded += 1
        frame = ring.generation, taken.sequence
        self._shot = Shot(
            frame, taken.captured_ns, result is not None, view, {**taken.told, "result": told},
            jpeg.tobytes(),
        )  # fmt: skip
        return self._shot


def _items(items: Sequence[Item] | Sequence[TruthItem], view: View | None) -> list[dict[str, Any]]:
    return [{**plain(item), "box": _box(view, item.box)} for item in items]


def _box(view: View | None, box: Box | None) -> list[float] | None:
    placed = view.box_from_full(box) if view and box else box
    return placed and [round(value, 1) for value in placed]


def _point(view: View | None, point: tuple[float, float]) -> tuple[float, float]:
    return view.from_full(point) if view else point
