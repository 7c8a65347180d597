"""What capture asks of a source of pictures; the table of them is `common.sources`."""

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from common.config import Camera, Config
from common.messages import TruthItem
from common.sources import SOURCES

Picture = NDArray[np.uint8]  # rows x columns x 3, BGR


@dataclass(frozen=True)
class Format:
    width: int
    height: int
    fps: float | None  # the source's own rate, where it has one


@dataclass(frozen=True)
class Stamp:
    """What is known of a picture besides its pixels."""

    captured_ns: int  # CLOCK_MONOTONIC; the driver's where it gives one, else before decoding
    truth: tuple[TruthItem, ...] | None = None


class SizeChangedError(Exception):
    """The next picture has another size; `read` it again into one of that size."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height}")
        self.width, self.height = width, height


class Source(Protocol):
    def open(self) -> Format:
        """Raises: SourceError: it can't be opened."""
        ...

    def read(self, into: Picture) -> Stamp | None:
        """Fill `into` in place; None at the end of a source that does not loop.

        Raises:
            SizeChangedError: nothing was read, `into` has the wrong size.
            SourceError: it can't be read any more.
        """
        ...

    def close(self) -> None: ...


def make(config: Config, camera: Camera) -> Source:
    """The source of a camera, imported only here so that each process loads one kind."""
    module, _, name = SOURCES[camera.source].factory.partition(":")
    factory = getattr(importlib.import_module(module), name)
    path = config.resolve(camera.path) if camera.path is not None else None
    return cast(Source, factory(camera, path))


def deliver(picture: Picture, into: Picture) -> None:
    """Make sure that `picture` is what `into` holds; no copy where it was decoded in place.

    Raises:
        SizeChangedError: the shapes differ.
    """
    if picture.shape != into.shape:
        raise SizeChangedError(picture.shape[1], picture.shape[0])
    if picture.ctypes.data != into.ctypes.data:
        np.copyto(into, picture)
