"""What capture asks of a source of pictures; the table of them is `common.sources`."""

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from common.config import Camera, Config
from common.messages import TruthItem
from common.sources import factory
from common.states import Sight

Picture = NDArray[np.uint8]  # rows x columns x 3, BGR


@dataclass(frozen=True)
class Format:
    """What was agreed with the source."""

    width: int
    height: int
    fps: float | None  # the source's own rate, where it has one
    name: str = ""  # how pictures come: "MJPG", "YUYV", "h264"
    raw: bool = False  # uncompressed, noise and all: a live picture never repeats exactly

    def __str__(self) -> str:
        rate = f"{self.fps:g}/s" if self.fps else ""
        return " ".join(filter(None, (f"{self.width}x{self.height}", self.name, rate)))


@dataclass(frozen=True)
class Stamp:
    """What is known of a picture besides its pixels."""

    captured_ns: int  # CLOCK_MONOTONIC; the driver's where it gives one, else before decoding
    truth: tuple[TruthItem, ...] | None = None
    lost: int = 0  # frames before it that are gone and were never seen here
    sight: Sight = Sight.CLEAR  # what is known of it already, of a recording
    mark: int | None = None  # the source's own count or time of it: a frozen one repeats it


class SizeChangedError(Exception):
    """The next picture has another size; `read` it again into one of that size."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height}")
        self.width, self.height = width, height


class BadPictureError(Exception):
    """This picture can't be decoded; the source goes on with the next."""


class Source(Protocol):
    """After a SourceError it is closed, and may be opened again, any number of times.

    No call takes longer than `camera.open_s` (open) or about half a second (the others).
    """

    def open(self) -> Format:
        """Raises: SourceError: it can't be opened; the text shows no password."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Whether a picture, or the end, is there for `read` or `skip`, by then.

        Raises:
            SourceError: the source is gone.
        """
        ...

    def skip(self) -> None:
        """Pass over the picture that `wait` told of, undecoded where the codec allows it."""
        ...

    def read(self, into: Picture) -> Stamp | None:
        """Fill `into` in place; None at the end of a source that does not loop.

        Raises:
            SizeChangedError: nothing was read, `into` has the wrong size.
            BadPictureError: this picture is passed over.
            SourceError: it can't be read any more.
        """
        ...

    def close(self) -> None:
        """Give everything back; also where `open` failed, and twice."""
        ...


class Ready:
    """Base of sources that are asked when a picture is wanted: one is always there."""

    def wait(self, timeout_s: float) -> bool:
        return True

    def skip(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} gives pictures when asked")


def make(config: Config, camera: Camera) -> Source:
    path = config.resolve(camera.path) if camera.path is not None else None
    return cast(Source, factory(camera.source)(camera, path))


def whole_jpeg(data: bytes) -> bool:
    """Whether a JPEG goes on to its end; decoders fill in grey where it does not. A marker can't
    stand inside of coded pixels, and a thumbnail's end comes before the picture's own scan."""
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def deliver(picture: Picture, into: Picture) -> None:
    """Make sure that `picture` is what `into` holds; no copy where it was decoded in place.

    Raises:
        SizeChangedError: the shapes differ.
    """
    if picture.shape != into.shape:
        raise SizeChangedError(picture.shape[1], picture.shape[0])
    if picture.ctypes.data != into.ctypes.data:
        np.copyto(into, picture)
