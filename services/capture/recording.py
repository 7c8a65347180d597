"""A camera that was recorded: the pictures of a file that `vigil tap record` wrote, as they were.

Their picture is the full one here: what a crop, turn or scale had made of it when it was recorded
counts as the camera's own, and the recorded truth is given in its pixels.
"""

import logging
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

import msgspec

from common import bus
from common.config import Camera
from common.errors import SourceError
from common.geometry import View
from common.messages import Truth, TruthItem
from common.recording import PIXELS, Pixels, Recording, unpack
from services.capture.source import Format, Picture, Ready, Stamp, deliver

RATE_OF = 64  # frames of which the recorded rate is taken
log = logging.getLogger("vigil")

Frame = tuple[Pixels, Picture, tuple[TruthItem, ...] | None]


class RecordingSource(Ready):
    def __init__(self, camera: Camera, path: Path) -> None:
        self._path, self._loop, self._wanted = path, camera.loop, camera.recorded
        self._recording: Recording | None = None
        self._frames: Iterator[Frame] = iter(())
        self._held: Frame | None = None  # of another size than expected
        self._read = 0  # since the beginning
        self._said = 0  # problems of the recording

    def open(self) -> Format:
        self.close()
        self._recording = recording = Recording(self._path)
        self._camera = self._choose(recording)
        self._rewind()
        first = list(islice(self._frames, RATE_OF))
        self._say_problems()
        if not first:
            raise SourceError(f"{self._path}: holds no whole picture of {self._camera}")
        gaps = [b[0].captured_ns - a[0].captured_ns for a, b in pairwise(first)]
        gap_ns = median(gaps) if gaps else 0
        self._rewind()
        name = f"recorded {first[0][0].encoding}{', damaged or cut off' * bool(recording.problems)}"
        fps = 1e9 / gap_ns if gap_ns > 0 else None
        return Format(first[0][0].width, first[0][0].height, fps, name)

    def _choose(self, recording: Recording) -> str:
        """Which of the recorded cameras this is."""
        names = recording.cameras
        if not names:
            raise SourceError(
                f"{self._path}: holds no pictures; record them: vigil tap record FILE --pixels "
                "lossless"
            )
        if self._wanted is None and len(names) == 1:
            return names[0]
        if self._wanted not in names:
            raise SourceError(
                f"{self._path}: holds pictures of {', '.join(names)}; expected "
                f"recorded = one of them{f', not {self._wanted}' if self._wanted else ''}"
            )
        return self._wanted

    def _rewind(self) -> None:
        assert self._recording is not None
        self._frames, self._held, self._read = self._iterate(self._recording), None, 0

    def _iterate(self, recording: Recording) -> Iterator[Frame]:
        """Each picture with its truth, which comes after it and before the next."""
        ahead: tuple[Pixels, Picture] | None = None
        truth: tuple[TruthItem, ...] | None = None
        for message in recording.messages(f"{PIXELS}/{self._camera}", f"truth/{self._camera}"):
            if message.topic.startswith(PIXELS):
                if ahead is not None:
                    yield *ahead, truth
                ahead, truth = unpack(message.body), None
            elif ahead is not None:
                truth = _truth(message.topic, message.body, ahead[0]) or truth
        if ahead is not None:
            yield *ahead, truth

    def read(self, into: Picture) -> Stamp | None:
        captured_ns = time.monotonic_ns()
        frame = self._held or next(self._frames, None)
        if frame is None:
            self._say_problems()
            if not self._loop:
                return None
            if not self._read:
                raise SourceError(f"{self._path}: holds no whole picture any more")
            self._rewind()
            return self.read(into)
        self._held = frame
        deliver(frame[1], into)
        self._held = None
        self._read += 1
        return Stamp(captured_ns, frame[2], sight=frame[0].sight)

    def _say_problems(self) -> None:
        assert self._recording is not None
        for problem in self._recording.problems[self._said :]:
            log.warning(f"{self._path}: {problem}")
        self._said = len(self._recording.problems)

    def close(self) -> None:
        self._frames, self._held, self._said = iter(()), None, 0
        if self._recording is not None:
            self._recording.close()
        self._recording = None


def _truth(topic: str, body: bytes, pixels: Pixels) -> tuple[TruthItem, ...] | None:
    """The truth of this picture in its own pixels; None where it is of another."""
    try:
        truth = bus.decode(topic, body)
    except msgspec.DecodeError:
        return None
    assert isinstance(truth, Truth)
    if (truth.ring, truth.sequence) != (pixels.ring, pixels.sequence):
        return None
    if pixels.view is None:
        return truth.items
    return tuple(_seen(truth.items, pixels.view, pixels.width, pixels.height))


def _seen(items: tuple[TruthItem, ...], view: View, width: int, height: int) -> Iterator[TruthItem]:
    for item in items:
        x1, y1, x2, y2 = view.box_from_full(item.box)
        box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        if box[0] < box[2] and box[1] < box[3]:
            yield TruthItem(item.label, box)
