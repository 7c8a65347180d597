"""Decisions drawn into a picture, for people."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from common.messages import Item

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE, _BLACK, _RED = (255, 255, 255), (0, 0, 0), (40, 40, 200)
_MOST_LINES = 5  # of items that have no box


def draw(
    picture: NDArray[np.uint8], items: Sequence[Item], caption: str, *, alarm: bool = False
) -> NDArray[np.uint8]:
    """A copy of a picture [H, W, 3] BGR with boxes, labels and scores, and a banner on top.

    Args:
        items: boxes in the picture's own pixels; those without go into the banner.
        caption: the banner's first line: whose picture, and what the result is worth.
        alarm: the banner is red: not to be relied on.
    """
    image = picture.copy()
    unit = max(0.35, min(image.shape[:2]) / 900)  # text that can be read at any size
    for item in reversed(items):  # the best on top
        if item.box is not None:
            colour = _colour(item.index)
            x1, y1, x2, y2 = (round(value) for value in item.box)
            cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), colour, max(1, round(2 * unit)))
            _write(image, f"{item.label} {item.score:.2f}", x1, y1, unit, colour, above=True)
    placeless = [item for item in items if item.box is None][:_MOST_LINES]
    lines = [caption, *(f"{item.score:.3f} {item.label}" for item in placeless)]
    y = 0
    for line in lines:
        y = _write(image, line, 0, y, unit, _RED if alarm else _BLACK)
    return image


def _write(
    image: NDArray[np.uint8],
    text: str,
    x: int,
    y: int,
    unit: float,
    colour: tuple[int, int, int],
    above: bool = False,
) -> int:
    """Text on a filled box whose corner is at x, y, kept inside; returns where the box ends."""
    thickness = max(1, round(unit))
    (width, height), base = cv2.getTextSize(text, _FONT, unit, thickness)
    height += base + 2
    x = max(0, min(x, image.shape[1] - width))
    top = y - height if above and y >= height else y
    cv2.rectangle(image, (x, top), (x + width, top + height), colour, cv2.FILLED)
    ink = _BLACK if sum(colour) > 380 else _WHITE
    cv2.putText(image, text, (x, top + height - base), _FONT, unit, ink, thickness, cv2.LINE_AA)
    return top + height


def _colour(index: int) -> tuple[int, int, int]:
    """A colour for a class; neighbours differ (hues a golden ratio apart)."""
    hue = round(index * 0.618034 * 180) % 180
    pixel = cv2.cvtColor(np.array([[[hue, 190, 230]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    return int(pixel[0]), int(pixel[1]), int(pixel[2])
