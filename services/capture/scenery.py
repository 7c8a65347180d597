"""What a rendered conveyor is made of: parts, surfaces, belts, lamps and defects, in families.

`DOMAINS` gives each domain its own families of surfaces, belts, lamps, tints and defect shapes; no
family is in two domains, so that a model trained on one has never seen how another looks. Only the
parts' outlines and drillings are shared: a line inspects the products it was taught.

Fields are float32 arrays [height, width]; `u`, `v` are pixel coordinates along and across a part at
640x480 size (so that a texture scales with the picture); lengths are pixels at that size.
"""

# NumPy's stubs make Any of a float times an array.
# mypy: disable-error-code="no-any-return"

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from services.capture.dice import Dice

Field = NDArray[np.floating]
Points = NDArray[np.floating]  # [n, 2] x, y

LABELS = ("part", "scratch", "dent", "stain", "missing_hole")
DEFECTS = LABELS[1:]


def fine(dice: Dice, u: Field, sigma: float = 0.0) -> Field:
    """Noise of unit deviation, pixel by pixel, blurred by `sigma` pixels of the picture."""
    noise = dice.noise(*u.shape)
    if sigma:
        noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), sigma), np.float32)
        noise /= noise.std() + 1e-6
    return noise


def coarse(dice: Dice, u: Field, cells: int) -> Field:
    """Smooth noise of about unit deviation: a random grid of `cells` x `cells`, interpolated."""
    grid = dice.noise(cells, cells)
    size = (u.shape[1], u.shape[0])
    return np.asarray(cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC), np.float32)


def profile(dice: Dice, along: Field, step: float, smooth: float = 0.8) -> Field:
    """A random function of one coordinate: lines, rings or rays; a new value each `step` pixels."""
    table = dice.noise(1, 1024)
    table = np.asarray(cv2.GaussianBlur(table, (0, 0), smooth), np.float32)[0]
    table /= table.std()
    return table[(along / step).astype(np.int32) & 1023]


# --- outlines: polygons and holes of a part whose furthest point is 1 from its middle ----------


@dataclass(frozen=True)
class Shape:
    outline: Points
    holes: tuple[tuple[float, float, float], ...]  # x, y, radius
    drilled: int  # the last `drilled` holes are those that a drill may have missed


def ring(count: int, radius: float, hole: float) -> tuple[tuple[float, float, float], ...]:
    turns = [2 * math.pi * i / count for i in range(count)]
    return tuple((radius * math.cos(t), radius * math.sin(t), hole) for t in turns)


def polar(radius: NDArray[np.floating]) -> Points:
    turn = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1).astype(np.float32)


def plate() -> Shape:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    corner = np.array([[0.66, 0.46]]) * np.sign(np.stack([np.cos(turn), np.sin(turn)], 1) + 1e-9)
    outline = corner + 0.14 * np.stack([np.cos(turn), np.sin(turn)], 1)
    holes = [(x, y, 0.13) for x in (-0.57, 0.57) for y in (-0.37, 0.37)]
    return Shape(outline.astype(np.float32), ((0.0, 0.0, 0.2), *holes), 4)


def disc(bolts: int) -> Shape:
    return Shape(polar(np.full(72, 0.97)), ((0, 0, 0.24), *ring(bolts, 0.63, 0.135)), bolts)


def gear() -> Shape:
    teeth = np.tile([0.87, 0.87, 1.0, 1.0], 16)
    return Shape(polar(teeth), ((0, 0, 0.22), *ring(4, 0.56, 0.135)), 4)


def bracket() -> Shape:
    corners = [
        (-0.72, -0.69),
        (0.1, -0.69),
        (0.1, -0.02),
        (0.75, -0.02),
        (0.75, 0.66),
        (-0.72, 0.66),
    ]
    holes = ((-0.3, -0.34, 0.14), (-0.32, 0.3, 0.14), (0.4, 0.32, 0.14))
    return Shape(np.array(corners, np.float32), holes, 3)


def link() -> Shape:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 0.38 * np.cos(turn) + 0.6 * np.sign(np.cos(turn) + 1e-9)
    outline = np.stack([x, 0.38 * np.sin(turn)], 1).astype(np.float32)
    return Shape(outline, ((0, 0, 0.13), (-0.6, 0, 0.17), (0.6, 0, 0.17)), 3)


SHAPES = (plate(), disc(4), disc(6), gear(), bracket(), link())

# --- surfaces: a factor on the part's colour, and its colours (BGR 0..1) ------------------------

Surface = Callable[[Dice, Field, Field], Field]


def brushed(dice: Dice, u: Field, v: Field) -> Field:
    lines = profile(dice, v + 0.02 * u, dice.uniform(0.7, 1.6))
    return 1 + dice.uniform(0.04, 0.1) * lines + 0.02 * fine(dice, u)


def turned(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + dice.uniform(0.03, 0.08) * profile(dice, np.hypot(u, v), dice.uniform(0.9, 2.0))


def blasted(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + dice.uniform(0.03, 0.09) * fine(dice, u, 0.7)


def coated(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + dice.uniform(0.02, 0.05) * coarse(dice, u, 40) + 0.03 * coarse(dice, u, 6)


def milled(dice: Dice, u: Field, v: Field) -> Field:
    wave = np.sin(2 * np.pi * v / dice.uniform(4, 9)).astype(np.float32)
    return 1 + dice.uniform(0.03, 0.08) * wave + 0.03 * profile(dice, u, 1.5)


def crossed(dice: Dice, u: Field, v: Field) -> Field:
    both = profile(dice, u + 0.6 * v, 1.1) + profile(dice, v - 0.6 * u, 1.1)
    return 1 + dice.uniform(0.025, 0.055) * both


def cast(dice: Dice, u: Field, v: Field) -> Field:
    rough = fine(dice, u, 0.6) + 0.8 * fine(dice, u, 2.0) + 0.4 * coarse(dice, u, 9)
    return 1 + dice.uniform(0.025, 0.05) * rough


def faced(dice: Dice, u: Field, v: Field) -> Field:
    away = np.hypot(u - dice.uniform(60, 160), v - dice.uniform(60, 160))
    wave = np.sin(2 * np.pi * away / dice.uniform(5, 8)).astype(np.float32)
    return 1 + dice.uniform(0.03, 0.06) * wave + 0.03 * profile(dice, away, 1.2)


def rolled(dice: Dice, u: Field, v: Field) -> Field:
    sway = v + 3 * np.sin(u / dice.uniform(14, 30))
    return 1 + dice.uniform(0.03, 0.06) * profile(dice, sway, 2.2) + 0.02 * fine(dice, u)


def galvanised(dice: Dice, u: Field, v: Field) -> Field:
    flakes = np.round(2 * coarse(dice, u, 24)) / 2
    return 1 + dice.uniform(0.03, 0.05) * flakes + 0.02 * fine(dice, u)


# --- belts: a factor on the belt's colour; `u` runs along the belt and closes on itself ---------


def rubber(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + dice.uniform(0.04, 0.1) * fine(dice, u, 0.8)


def woven(dice: Dice, u: Field, v: Field) -> Field:
    weave = np.sin(2 * np.pi * u / 8) * np.sin(2 * np.pi * v / dice.uniform(6, 10))
    return (1 + dice.uniform(0.05, 0.14) * weave + 0.04 * fine(dice, u)).astype(np.float32)


def matt(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + 0.05 * coarse(dice, u, 14) + 0.03 * fine(dice, u, 1.2)


def grooved(dice: Dice, u: Field, v: Field) -> Field:
    groove = np.maximum(0, np.cos(2 * np.pi * v / dice.uniform(18, 40)) - 0.8) * 5
    return (1 - dice.uniform(0.15, 0.3) * groove + 0.04 * fine(dice, u)).astype(np.float32)


def ribbed(dice: Dice, u: Field, v: Field) -> Field:
    wave = np.sin(2 * np.pi * u / dice.uniform(10, 60)) ** 3
    return 1 + dice.uniform(0.08, 0.25) * wave + 0.04 * fine(dice, u)


def speckled(dice: Dice, u: Field, v: Field) -> Field:
    spots = (coarse(dice, u, dice.below(40, 130)) > dice.uniform(0.6, 1.4)).astype(np.float32)
    return 1 + dice.uniform(-0.2, 0.3) * spots + 0.04 * fine(dice, u)


def diamond(dice: Dice, u: Field, v: Field) -> Field:
    cross = np.cos(2 * np.pi * (u + v) / 16) * np.cos(2 * np.pi * (u - v) / 16)
    return (1 + dice.uniform(0.1, 0.2) * (np.abs(cross) < 0.15) + 0.04 * fine(dice, u)).astype(
        np.float32
    )


def felt(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + 0.06 * fine(dice, u, 1.8) + 0.05 * fine(dice, u) + 0.05 * coarse(dice, u, 30)


def slatted(dice: Dice, u: Field, v: Field) -> Field:
    gap = (np.mod(u, 64) < 3).astype(np.float32)
    return 1 - dice.uniform(0.25, 0.4) * gap + 0.03 * fine(dice, u) + 0.03 * profile(dice, v, 3)


def pebbled(dice: Dice, u: Field, v: Field) -> Field:
    return 1 + 0.12 * (fine(dice, u, 2.2) > 0.9).astype(np.float32) + 0.04 * fine(dice, u)


# --- lamps: brightness over the picture, x and y from -1 to 1, `turn` their slow movement --------

Lamp = Callable[[Field, Field, float], Field]


def window(x: Field, y: Field, turn: float) -> Field:
    return 1 + 0.28 * (x * math.cos(turn) + y * math.sin(turn))


def dome(x: Field, y: Field, turn: float) -> Field:
    return 1.12 - 0.22 * ((x - 0.4 * math.cos(turn)) ** 2 + (y - 0.4 * math.sin(turn)) ** 2)


def pair(x: Field, y: Field, turn: float) -> Field:
    side = x * math.cos(turn) + y * math.sin(turn)
    return 0.88 + 0.28 * side**2 + 0.08 * side


def dusk(x: Field, y: Field, turn: float) -> Field:
    return (0.85 + 0.2 * math.sin(turn)) * (1 + 0.12 * x)


def bar(x: Field, y: Field, turn: float) -> Field:
    off = x * math.cos(0.7) + y * math.sin(0.7) - 0.8 * math.sin(turn)
    return 0.85 + 0.35 * np.exp(-((off / 0.6) ** 2))


def corner(x: Field, y: Field, turn: float) -> Field:
    away = np.hypot(x - math.copysign(1, math.sin(turn)), y + 1)
    return 0.7 + 0.6 * np.exp(-away * (0.8 + 0.15 * math.cos(turn)))


def spots(x: Field, y: Field, turn: float) -> Field:
    left = np.exp(-4 * ((x + 0.5) ** 2 + (y - 0.3 * math.sin(turn)) ** 2))
    right = np.exp(-4 * ((x - 0.5) ** 2 + (y + 0.3 * math.sin(turn)) ** 2))
    return 0.87 + 0.28 * (left + right)


def skylight(x: Field, y: Field, turn: float) -> Field:
    return 1 + 0.2 * np.sin(1.6 * x + 1.1 * y + turn)


# --- defect shapes, around 0, 0, in pixels at 640x480; scratches are lines, the others areas ----


def bent(dice: Dice, bend: Callable[[Field], Field], low: float, high: float) -> Points:
    """A line of `low` to `high` pixels whose sideways course is `bend` of -1..1."""
    length = dice.uniform(low, high)
    t = np.linspace(-1, 1, 17, dtype=np.float32)
    line = np.stack([0.5 * length * t, 0.5 * length * bend(t)], 1)
    return turned_by(line, dice.uniform(0, 2 * np.pi))


def turned_by(points: NDArray[np.floating], angle: float) -> Points:
    c, s = math.cos(angle), math.sin(angle)
    return (points @ np.array([[c, s], [-s, c]])).astype(np.float32)


def straight(dice: Dice) -> list[Points]:
    return [bent(dice, lambda t: 0 * t, 28, 56)]


def bowed(dice: Dice) -> list[Points]:
    bow = dice.uniform(0.2, 0.5)
    return [bent(dice, lambda t: bow * t**2, 30, 56)]


def double(dice: Dice) -> list[Points]:
    line = bent(dice, lambda t: 0 * t, 28, 50)
    normal = np.array([-line[-1, 1], line[-1, 0]]) / np.hypot(*line[-1])
    return [line, (0.8 * line + normal * dice.uniform(5, 8)).astype(np.float32)]


def kinked(dice: Dice) -> list[Points]:
    knee = dice.uniform(-0.4, 0.4)
    return [bent(dice, lambda t: 0.6 * np.maximum(0, t - knee), 30, 54)]


def wavy(dice: Dice) -> list[Points]:
    return [bent(dice, lambda t: 0.22 * np.sin(4.5 * t), 32, 56)]


def hooked(dice: Dice) -> list[Points]:
    return [bent(dice, lambda t: 0.5 * np.maximum(0, t) ** 3, 30, 54)]


def forked(dice: Dice) -> list[Points]:
    line = bent(dice, lambda t: 0 * t, 30, 52)
    return [line, line[8] + 0.8 * turned_by(line[8:] - line[8], 0.5)]


def dashed(dice: Dice) -> list[Points]:
    line = bent(dice, lambda t: 0.1 * t**2, 36, 58)
    return [line[:8], line[9:]]


def contour(dice: Dice, low: float, high: float, lobes: dict[int, float]) -> Points:
    """A closed curve of mean radius `low` to `high` with `lobes` (number: relative height)."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    shape = np.ones(40)
    for number, height in lobes.items():
        shape += height * np.cos(number * turn + dice.uniform(0, 2 * np.pi))
    return turned_by(polar(shape * dice.uniform(low, high)), dice.uniform(0, 2 * np.pi))


def round_dent(dice: Dice) -> list[Points]:
    return [contour(dice, 10, 15, {})]


def oval_dent(dice: Dice) -> list[Points]:
    return [contour(dice, 11, 15, {2: dice.uniform(0.15, 0.3)})]


def twin_dent(dice: Dice) -> list[Points]:
    first = contour(dice, 8, 10, {})
    return [first, first + turned_by(np.array([[10.0, 0.0]]), dice.uniform(0, 2 * np.pi))]


def drop_dent(dice: Dice) -> list[Points]:
    return [contour(dice, 11, 15, {1: 0.25, 2: 0.15})]


def wedge_dent(dice: Dice) -> list[Points]:
    return [contour(dice, 11, 15, {3: 0.16})]


def square_dent(dice: Dice) -> list[Points]:
    return [contour(dice, 11, 15, {4: 0.1})]


def blot(dice: Dice) -> list[Points]:
    return [contour(dice, 11, 19, {2: 0.15, 3: 0.15, 5: 0.08})]


def cluster(dice: Dice) -> list[Points]:
    return [contour(dice, 7, 12, {2: 0.1}) + dice.spread(-8, 8, 1, 2) for _ in range(3)]


def smear(dice: Dice) -> list[Points]:
    return [contour(dice, 13, 19, {2: 0.35, 7: 0.06})]


def splash(dice: Dice) -> list[Points]:
    drops = [contour(dice, 3, 5, {}) + dice.spread(-17, 17, 1, 2) for _ in range(4)]
    return [contour(dice, 10, 14, {3: 0.1, 6: 0.12}), *drops]


def drip(dice: Dice) -> list[Points]:
    head = contour(dice, 10, 13, {2: 0.08})
    run = turned_by(np.array([[0, -4], [24, -3], [27, 0], [24, 3], [0, 4]]), dice.uniform(0, 6.28))
    return [head, run]


def leaf(dice: Dice) -> list[Points]:
    return [contour(dice, 13, 18, {2: 0.25, 4: 0.12, 9: 0.04})]


def blank(dice: Dice) -> list[Points]:
    return []  # the drill never came


def punched(dice: Dice) -> list[Points]:
    return [contour(dice, 1.5, 2.2, {})]  # centre punch only


def scribed(dice: Dice) -> list[Points]:
    return [np.array([[-4, 0], [4, 0]], np.float32), np.array([[0, -4], [0, 4]], np.float32)]


def pencilled(dice: Dice) -> list[Points]:
    return [contour(dice, 4, 5, {})[:20]]


DefectShape = Callable[[Dice], list[Points]]


@dataclass(frozen=True)
class Domain:
    """What one domain's scenes are drawn from; no entry is in two domains."""

    code: int  # keeps the random streams of two domains apart, for the same seed
    surfaces: tuple[Surface, ...]
    belts: tuple[Surface, ...]
    lamps: tuple[Lamp, ...]
    kelvin: tuple[tuple[int, int], ...]  # ranges of colour temperature
    scratch: tuple[DefectShape, ...]
    dent: tuple[DefectShape, ...]
    stain: tuple[DefectShape, ...]
    missing_hole: tuple[DefectShape, ...]


DOMAINS = {
    "train": Domain(
        1,
        (brushed, turned, blasted, coated, milled),
        (rubber, woven, matt, grooved, ribbed, speckled),
        (window, dome, pair, dusk),
        ((2700, 3600), (4400, 5200), (6600, 8000)),
        (straight, bowed, double, kinked),
        (round_dent, oval_dent, twin_dent),
        (blot, cluster, smear),
        (blank, punched),
    ),
    "held_out": Domain(
        2,
        (crossed, cast, faced),
        (diamond, felt),
        (bar, corner),
        ((3600, 4000), (5200, 5800)),
        (wavy, hooked),
        (drop_dent, wedge_dent),
        (splash, drip),
        (scribed,),
    ),
    "demo": Domain(  # the virtual camera: never trained on
        3,
        (rolled, galvanised),
        (slatted, pebbled),
        (spots, skylight),
        ((4000, 4400), (5800, 6600)),
        (forked, dashed),
        (square_dent,),
        (leaf,),
        (pencilled,),
    ),
}
