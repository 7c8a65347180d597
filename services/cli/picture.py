"""The newest picture of a camera, as its decision in the journal saw it."""

import time
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from common import bus
from common.config import Config
from common.errors import ConfigError, NotRunningError, StorageError
from common.frames import Ring
from common.messages import Result
from common.paths import Paths
from services.cli.draw import draw
from services.cli.listen import newest_ring
from services.cli.text import seconds

PATIENCE_S = 1.0  # at hundreds of frames a second most pictures go before they are copied
SUFFIXES = (".png", ".jpg", ".jpeg")

Picture = NDArray[np.uint8]  # rows x columns x 3, BGR


def save(config: Config, paths: Paths, camera: str, out: Path) -> str:
    """Write the newest judged frame with its boxes; returns what was written, in a line.

    Raises:
        ConfigError: no such camera.
        NotRunningError: it has given no frame yet.
        StorageError: `out` can't be written.
    """
    if camera not in config.cameras:
        raise ConfigError(f"no camera {camera}; {config.path} has {', '.join(config.cameras)}")
    if out.suffix.lower() not in SUFFIXES:
        raise StorageError(f"{out}: expected a name that ends in {', '.join(SUFFIXES)}")
    ring = newest_ring(paths, camera)
    if ring is None:
        raise NotRunningError(f"{camera}: has no frame yet under {paths.root}; see vigil status")
    with ring:
        result, picture, caption = newest(ring)
    drawn = draw(picture, result.items if result else (), caption)
    _, encoded = cv2.imencode(out.suffix.lower(), drawn)
    try:
        out.write_bytes(encoded.tobytes())
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error.strerror}") from error
    return f"{out}: {caption}"


def newest(ring: Ring) -> tuple[Result | None, Picture, str]:
    """The newest judged frame that is still whole, its result and a caption; where pixels go
    faster than they can be copied, the newest frame without a result.

    Raises:
        NotRunningError: there is no frame.
    """
    if ring.written == ring.base:
        raise NotRunningError(f"{ring.camera}: has no frame yet; see vigil status")
    until = time.monotonic_ns() + round(PATIENCE_S * 1e9)
    while time.monotonic_ns() < until:
        decided = ring.decided
        for sequence in range(decided, max(decided - ring.shape.slots, ring.base), -1):
            result = decision(ring, sequence)
            if result and (picture := copy(ring, sequence)) is not None:
                age_s = (time.monotonic_ns() - result.captured_ns) / 1e9
                model = f"{result.model} {result.version}".strip()
                return result, picture, _caption(ring, sequence, age_s, result.validity, model)
        if decided == ring.base:
            break
    while True:
        sequence = ring.written
        captured_ns, _ = ring.times(sequence)
        if (picture := copy(ring, sequence)) is not None:
            age_s = (time.monotonic_ns() - captured_ns) / 1e9
            return None, picture, _caption(ring, sequence, age_s, "not judged yet")


def copy(ring: Ring, sequence: int) -> Picture | None:
    """A copy of a frame's pixels; None where they were overwritten before or meanwhile."""
    view = ring.pixels(sequence)
    if view is None:
        return None
    shape = ring.shape
    pixels = np.frombuffer(view, np.uint8).reshape(shape.height, shape.width, shape.channels)
    picture = pixels.copy()
    return picture if ring.intact(sequence) else None


def decision(ring: Ring, sequence: int) -> Result | None:
    """A frame's result; None where it has none, or one that can't be decoded."""
    entry = ring.entry(sequence)
    if entry is None:
        return None
    try:
        result = bus.decode(f"result/{ring.camera}", entry.result)
    except msgspec.DecodeError:
        return None
    assert isinstance(result, Result)
    return result


def _caption(ring: Ring, sequence: int, age_s: float, *words: str) -> str:
    return ", ".join((f"{ring.camera} frame {sequence}", *words, f"{seconds(age_s)} old"))
