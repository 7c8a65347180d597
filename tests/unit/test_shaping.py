"""Geometry: the picture in the ring, and coordinates that are always the camera's own."""

from itertools import product

import numpy as np
import pytest

from common.config import Camera, Zone
from common.errors import SourceError
from common.geometry import inside
from common.messages import Item
from services.capture.shaping import Shaping
from services.capture.source import Picture
from services.inference.results import located

WIDTH, HEIGHT = 64, 48
SPOT = (40, 12, 44, 20)  # x1, y1, x2, y2 of a white thing on black


def picture() -> Picture:
    full = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    full[SPOT[1] : SPOT[3], SPOT[0] : SPOT[2]] = 255
    return full


def shaped(camera: Camera) -> tuple[Shaping, Picture]:
    shaping = Shaping(camera, WIDTH, HEIGHT)
    into = np.full((*shaping.size[::-1], 3), 7, np.uint8)
    if shaping.full is None:
        into[:] = picture()
    else:
        shaping.full[:] = picture()
    shaping.apply(into)
    return shaping, into


def seen(into: Picture) -> tuple[float, float, float, float]:
    """Box of what is white."""
    rows, columns = np.nonzero(into[..., 1] > 127)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(
    ("rotate", "flip", "crop", "scale"),
    list(product((0, 90, 180, 270), ("none", "horizontal", "vertical", "both"),
                 (None, (20, 4, 40, 32)), (1.0, 0.5))),
)  # fmt: skip
def test_a_thing_is_found_where_it_is_in_the_full_picture(
    rotate: int, flip: str, crop: tuple[int, int, int, int] | None, scale: float
) -> None:
    camera = Camera("virtual", rotate=rotate, flip=flip, crop=crop, scale=scale)  # type: ignore[arg-type]
    shaping, into = shaped(camera)
    width, height = crop[2:] if crop else (WIDTH, HEIGHT)
    expected = (height, width) if rotate in (90, 270) else (width, height)
    assert shaping.size == tuple(round(side * scale) for side in expected)
    gate = {"gate": Zone(((39, 11), (45, 11), (45, 21), (39, 21)))}
    (item,) = located([Item("spot", 1.0, 0, seen(into))], shaping.view, gate)
    assert item.box == SPOT
    assert item.zones == ("gate",)


def test_nothing_asked_for_costs_nothing() -> None:
    shaping, into = shaped(Camera("virtual"))
    assert shaping.full is None
    assert shaping.view is None
    assert (into == picture()).all()


@pytest.mark.parametrize("rotate", [0, 180])
def test_what_is_masked_is_black(rotate: int) -> None:
    x1, y1, x2, y2 = SPOT
    over = ((x1 - 1, y1 - 1), (x2 + 1, y1 - 1), (x2 + 1, y2 + 1), (x1 - 1, y2 + 1))
    _, into = shaped(Camera("virtual", masks=(over,), rotate=rotate))  # type: ignore[arg-type]
    assert not into.any()


def test_a_crop_outside_is_an_error() -> None:
    with pytest.raises(SourceError, match=r"crop = \[40, 0, 32, 16\] lies outside the 64x48 pic"):
        Shaping(Camera("virtual", crop=(40, 0, 32, 16)), WIDTH, HEIGHT)


def test_a_zone_outside_is_said() -> None:
    zones = {"press": Zone(((0, 0), (65, 0), (65, 9))), "gate": Zone(((0, 0), (64, 0), (64, 48)))}
    shaping = Shaping(Camera("virtual", zones=zones, masks=(((0, -1), (1, 0), (1, 1)),)), 64, 48)
    assert shaping.problem == (
        "zones.press: the point [65, 0] lies outside the 64x48 picture; "
        "masks[0]: the point [0, -1] lies outside the 64x48 picture"
    )


@pytest.mark.parametrize(
    ("anchor", "zones"), [("center", ("upper",)), ("bottom", ("lower",))], ids=str
)
def test_the_anchor_of_a_zone(anchor: str, zones: tuple[str, ...]) -> None:
    halves = {
        "upper": Zone(((0, 0), (64, 0), (64, 24), (0, 24)), anchor),  # type: ignore[arg-type]
        "lower": Zone(((0, 24), (64, 24), (64, 48), (0, 48)), anchor),  # type: ignore[arg-type]
    }
    tall = Item("post", 1.0, 0, (10, 4, 14, 40))
    assert located([tall], None, halves)[0].zones == zones
    assert located([Item("all of it", 1.0, 0)], None, halves)[0].zones == (), "it has no place"


def test_inside_of_a_polygon_that_turns_back() -> None:
    hook = ((0, 0), (10, 0), (10, 10), (6, 10), (6, 4), (4, 4), (4, 10), (0, 10))
    within = {(x, y) for x, y in product(range(12), range(12)) if inside((x + 0.5, y + 0.5), hook)}
    expected = {(x, y) for x, y in product(range(10), range(10)) if y < 4 or not 4 <= x < 6}
    assert within == expected
