"""Where a ring's picture lies in the camera's own full picture, and what lies in a zone.

Coordinates are pixels, x to the right, y down, origin in the top left corner of the picture.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from common.errors import SourceError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Point = tuple[float, float]
Matrix = tuple[float, float, float, float, float, float]

_PACKED = struct.Struct("<QQ6d")


@dataclass(frozen=True)
class View:
    """A picture that was cut, turned, flipped or scaled from a full one.

    `matrix` is a, b, c, d, e, f: full x = a x + b y + c, full y = d x + e y + f. It turns by
    quarters only, so that boxes stay boxes.
    """

    full_width: int
    full_height: int
    matrix: Matrix

    @classmethod
    def make(
        cls,
        full: tuple[int, int],
        crop: tuple[int, int, int, int],
        rotate: int,
        flip: str,
        size: tuple[int, int],
    ) -> Self:
        """
        Args:
            full: width and height of the full picture.
            crop: x, y, width, height in it, cut first.
            rotate: degrees clockwise, second.
            flip: "none", "horizontal", "vertical" or "both", third.
            size: width and height of the result.
        """
        x, y, width, height = crop
        turned = (height, width) if rotate in (90, 270) else (width, height)
        # From the result back: scale up, flip back, turn back, move to the crop.
        matrix: Matrix = (turned[0] / size[0], 0.0, 0.0, 0.0, turned[1] / size[1], 0.0)
        if flip in ("horizontal", "both"):
            matrix = _then(matrix, (-1.0, 0.0, turned[0], 0.0, 1.0, 0.0))
        if flip in ("vertical", "both"):
            matrix = _then(matrix, (1.0, 0.0, 0.0, 0.0, -1.0, turned[1]))
        back: dict[int, Matrix] = {
            0: (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            90: (0.0, 1.0, 0.0, -1.0, 0.0, height),
            180: (-1.0, 0.0, width, 0.0, -1.0, height),
            270: (0.0, -1.0, width, 1.0, 0.0, 0.0),
        }
        matrix = _then(matrix, back[rotate])
        return cls(*full, _then(matrix, (1.0, 0.0, x, 0.0, 1.0, y)))

    def to_full(self, point: Point) -> Point:
        a, b, c, d, e, f = self.matrix
        return a * point[0] + b * point[1] + c, d * point[0] + e * point[1] + f

    def from_full(self, point: Point) -> Point:
        a, b, c, d, e, f = self.matrix
        x, y, scale = point[0] - c, point[1] - f, a * e - b * d
        return (e * x - b * y) / scale, (a * y - d * x) / scale

    def box_to_full(self, box: Box) -> Box:
        return _box(self.to_full(box[:2]), self.to_full(box[2:]))

    def box_from_full(self, box: Box) -> Box:
        return _box(self.from_full(box[:2]), self.from_full(box[2:]))

    def pack(self) -> bytes:
        """64 bytes, as a ring's header has them."""
        return _PACKED.pack(self.full_width, self.full_height, *self.matrix)

    @classmethod
    def unpack(cls, packed: bytes | memoryview) -> Self | None:
        """None: the picture is the full one."""
        width, height, *matrix = _PACKED.unpack(packed)
        return cls(width, height, tuple(matrix)) if width else None


@dataclass(frozen=True)
class Fit:
    """What geometry makes of a full picture: cut, then scaled, turned and flipped."""

    crop: tuple[int, int, int, int]
    scaled: tuple[int, int]  # width, height before it is turned
    size: tuple[int, int]
    view: View | None  # None: nothing changes


def fit(
    full: tuple[int, int],
    crop: tuple[int, int, int, int] | None,
    rotate: int,
    flip: str,
    scale: float,
) -> Fit:
    """
    Raises:
        SourceError: the crop does not lie in the picture.
    """
    width, height = full
    x, y, w, h = crop = crop or (0, 0, width, height)
    if x < 0 or y < 0 or x + w > width or y + h > height:
        raise SourceError(
            f"crop = {list(crop)} lies outside the {width}x{height} picture; it is x, y, "
            "width, height"
        )
    scaled = max(1, round(w * scale)), max(1, round(h * scale))
    size = scaled[::-1] if rotate in (90, 270) else scaled
    same = crop == (0, 0, width, height) and not rotate and flip == "none" and scaled == full
    return Fit(crop, scaled, size, None if same else View.make(full, crop, rotate, flip, size))


def _then(first: Matrix, second: Matrix) -> Matrix:
    """One mapping after another."""
    a, b, c, d, e, f = first
    g, h, i, j, k, m = second
    return (
        g * a + h * d, g * b + h * e, g * c + h * f + i,
        j * a + k * d, j * b + k * e, j * c + k * f + m,
    )  # fmt: skip


def _box(one: Point, other: Point) -> Box:
    (x1, x2), (y1, y2) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return x1, y1, x2, y2


def anchor(box: Box, where: str) -> Point:
    """The point of a box that a zone asks for: its "center", or the middle of its "bottom"."""
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, y2 if where == "bottom" else (y1 + y2) / 2


def inside(point: Point, polygon: Sequence[Point]) -> bool:
    """Whether a point lies in a polygon, by the even-odd rule (a ray to the right)."""
    x, y = point
    within = False
    before = polygon[-1]
    for corner in polygon:
        if (corner[1] > y) != (before[1] > y):
            slope = (before[0] - corner[0]) / (before[1] - corner[1])
            if x < corner[0] + (y - corner[1]) * slope:
                within = not within
        before = corner
    return within


def outside(polygons: Mapping[str, Sequence[Point]], width: int, height: int) -> list[str]:
    """What is wrong with polygons that do not lie in a picture, a text for each."""
    return [
        f"{name}: the point [{x:g}, {y:g}] lies outside the {width}x{height} picture"
        for name, points in polygons.items()
        for x, y in [p for p in points if not (0 <= p[0] <= width and 0 <= p[1] <= height)][:1]
    ]
