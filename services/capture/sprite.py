"""Parts of the conveyor, drawn once when they come into view: relief, surface, defects, shadow."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from services.capture.dice import Dice
from services.capture.scenery import DEFECTS, SHAPES, Domain, Field, Points, Shape, turned_by

Picture = NDArray[np.uint8]
Box = tuple[float, float, float, float]

RADIUS = (64.0, 84.0)  # of a part, to its furthest point, pixels at 640x480
SMALLEST_SIDE = 20.0  # boxes of defects are widened to this: a level scratch has hardly a height
BEVEL = 1.6  # how steeply light and relief make bright and dark

# Characters as an engraver draws them: lines of points x, y, in a field of 2 x 4 units. OpenCV's
# own text would cost 10 MB of fonts in capture, and looks different in each of its versions.
_CHARACTERS = (
    "0020240400 0420", "011014", "002022020424", "00202404 0222", "000222 2024", "200002222404",
    "200004242202", "002014", "0020240400 0222", "220200202404", "04002024 0222",
    "0400201202 122404", "20000424", "00041423211000", "20000424 0212", "200004 0212",
    "0004 2024 0222", "0004 200224", "000424", "0400122024", "04002420", "0400202202",
    "0400202202 1224", "0020 1014", "0024 2004",
)  # fmt: skip
GLYPHS = [
    [np.array([*map(int, line)], np.float32).reshape(-1, 2) for line in lines.split()]
    for lines in _CHARACTERS
]


@dataclass(frozen=True)
class Sprite:
    """A part ready to be laid on the belt: belt * through / 255 + colour."""

    colour: Picture  # [n, n, 3] BGR, multiplied by its opacity
    through: Picture  # [n, n] share of the belt that is seen, shadow included
    things: tuple[tuple[str, Box], ...]  # in the sprite's pixels


class Part:
    """The fields of one part while it is drawn: float32 [n, n] around its middle."""

    def __init__(self, dice: Dice, domain: Domain, s: float) -> None:
        self.dice, self.domain, self.s = dice, domain, s
        shape: Shape = dice.pick(SHAPES)
        radius = dice.uniform(*RADIUS) * s
        self.size = n = 2 * int(radius + 18 * s)
        angle, flip = dice.uniform(0, 2 * np.pi), np.array([1, dice.pick([-1, 1])])
        outline = turned_by(shape.outline * flip * radius, angle)
        holes = np.array(shape.holes)
        self.drilled = shape.drilled
        self.holes = turned_by(holes[:, :2] * flip * radius, angle) + n / 2  # [holes, 2]
        self.hole_radius = holes[:, 2] * radius
        self.body = fill(n, [outline], (n / 2, n / 2))
        self.bored = np.zeros((n, n), np.float32)
        axis = (np.arange(n, dtype=np.float32) - n / 2) / s
        x, y = np.meshgrid(axis, axis)
        lay = angle + dice.pick([0.0, dice.uniform(0, np.pi)])  # of the machining
        self.u = (x * math.cos(lay) + y * math.sin(lay)).astype(np.float32)
        self.v = (y * math.cos(lay) - x * math.sin(lay)).astype(np.float32)
        surface = dice.pick(domain.surfaces)
        albedo = np.asarray(surface(dice, self.u, self.v), np.float32) * dice.uniform(0.26, 0.74)
        brass = np.array([0.55, 0.85, 1.0]) if dice.chance() < 0.25 else np.ones(3)
        colour = (brass * dice.spread(0.95, 1.05, 3)).astype(np.float32)
        self.albedo = albedo[:, :, None] * colour
        self.relief = np.zeros((n, n), np.float32)
        self.things: list[tuple[str, Box]] = []

    def bore(self, missing: int) -> None:
        """Drill all holes but number `missing` (-1: none is missing), which becomes a defect."""
        dice, s = self.dice, self.s
        for number, ((x, y), r) in enumerate(zip(self.holes, self.hole_radius, strict=True)):
            if number != missing:
                turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
                rim = r * np.stack([np.cos(turn), np.sin(turn)], 1)
                self.bored = np.maximum(
                    self.bored, fill(self.size, [rim.astype(np.float32)], (x, y))
                )
                continue
            families = self.domain.missing_hole
            trace = [line * np.float32(s) for line in dice.pick(families)(dice)]
            self.darken(stroke(self.size, trace, (x, y), 1), -dice.uniform(0.1, 0.3))
            r = 1.6 * r  # the place and what is around it
            self.things.append(("missing_hole", (x - r, y - r, x + r, y + r)))
        self.solid = self.body * (1 - self.bored)
        self.relief += np.asarray(cv2.GaussianBlur(self.solid, (0, 0), 1.3 * s), np.float32)
        self.room = (self.solid > 0.5).astype(np.uint8)
        for x1, y1, x2, y2 in (box for _, box in self.things):
            self.room[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = 0

    def place(self, clear: float) -> tuple[float, float] | None:
        """A free place at least `clear` pixels from edges, holes and what is placed already."""
        away = cv2.distanceTransform(self.room, cv2.DIST_L2, 3)
        places = np.flatnonzero(away > clear)
        if len(places) == 0:
            return None
        y, x = divmod(int(places[self.dice.below(len(places))]), self.size)
        cv2.circle(self.room, (x, y), int(clear + 6 * self.s), 0, -1)
        return float(x), float(y)

    def darken(self, mask: Field, amount: float) -> None:
        self.albedo *= (1 + amount * mask)[:, :, None]

    def mark(self) -> None:
        """A lot number, etched: legitimate, and as fine as a scratch."""
        dice, s, n = self.dice, self.s, self.size
        at = self.place(11 * s)
        if at is None:
            return
        turn, amount = dice.uniform(0, 2 * np.pi), dice.pick([-0.4, 0.35])
        lines = []
        for place in (-4.5, -1.5, 1.5, 4.5):  # 4 characters, 3 units apart
            for line in dice.pick(GLYPHS):
                lines.append(turned_by((line + np.array([place - 1, -2])) * 1.5 * s, turn))
        self.darken(stroke(n, lines, at, 1), amount)

    def spoil(self, label: str) -> None:
        """Add a scratch, dent or stain where there is room for it."""
        dice, s = self.dice, self.s
        families = {
            "scratch": self.domain.scratch,
            "dent": self.domain.dent,
            "stain": self.domain.stain,
        }[label]
        drawn = dice.pick(families)(dice)
        middle = np.concatenate(drawn)
        middle = (middle.min(0) + middle.max(0)) / 2
        drawn = [(points - middle) * np.float32(s) for points in drawn]
        reach = max(float(np.hypot(*points.T).max()) for points in drawn)
        at = self.place((0.6 if label == "scratch" else 0.75) * reach)
        if at is None:
            return
        if label == "scratch":
            mask = stroke(self.size, drawn, at, max(1, round(s * dice.uniform(1.6, 3.2))))
            there = float((self.albedo[:, :, 1] * mask).sum() / (mask.sum() + 1e-6))
            bright = there < 0.35 or (there < 0.6 and dice.chance() < 0.5)  # seen on either
            self.darken(mask, dice.uniform(0.4, 0.9) if bright else -dice.uniform(0.4, 0.7))
            self.relief -= 0.7 * mask
        elif label == "dent":
            mask = fill(self.size, drawn, at)
            bowl = np.asarray(cv2.GaussianBlur(mask, (0, 0), 0.23 * reach), np.float32)
            self.relief -= dice.uniform(2.8, 4.2) * bowl
            self.darken(bowl, -dice.uniform(0.08, 0.22))
        else:
            mask = fill(self.size, drawn, at)
            soft = np.asarray(cv2.GaussianBlur(mask, (0, 0), s * dice.uniform(0.7, 2)), np.float32)
            soft *= 1 + 0.15 * dice.noise(*soft.shape)
            kinds = ((0.4, 0.4, 0.42), (0.25, 0.5, 0.75), (0.45, 0.6, 0.5), (0.6, 0.4, 0.4))
            stain = np.array(dice.pick(kinds), np.float32)
            self.albedo *= 1 + (dice.uniform(0.6, 0.95) * (stain - 1)) * soft[:, :, None]
        y, x = np.nonzero(mask * self.solid > 0.35)
        if len(x):
            box = widened(x.min(), y.min(), x.max() + 1, y.max() + 1, SMALLEST_SIDE * s)
            self.things.append((label, box))

    def lit(self, turn: float, focus: float) -> Sprite:
        """The finished part under light that comes from the direction `turn`."""
        dice, s = self.dice, self.s
        lx, ly = math.cos(turn), math.sin(turn)
        relief = cv2.GaussianBlur(self.relief, (0, 0), 0.6 * s)
        gx, gy = cv2.Sobel(relief, -1, 1, 0, scale=0.125), cv2.Sobel(relief, -1, 0, 1, scale=0.125)
        shade = np.clip(1 - BEVEL * s * (gx * lx + gy * ly), 0.15, 2.5)
        across = (self.u * lx + self.v * ly) / dice.uniform(18, 50) - dice.uniform(-1.5, 1.5)
        gloss = dice.uniform(0, 0.22) * np.exp(-(across**2))
        colour = np.clip(self.albedo * shade[:, :, None] + gloss[:, :, None], 0, 1)
        shift = np.array([[1, 0, -7 * s * lx], [0, 1, -7 * s * ly]], np.float32)
        shadow = cv2.warpAffine(self.solid, shift, (self.size, self.size))
        shadow = dice.uniform(0.3, 0.65) * cv2.GaussianBlur(shadow, (0, 0), 3.5 * s)
        through = (1 - self.solid) * (1 - shadow) * (1 - 0.45 * self.bored)
        colour = cv2.GaussianBlur(colour * self.solid[:, :, None], (0, 0), focus)
        through = cv2.GaussianBlur(through, (0, 0), focus)
        y, x = np.nonzero(self.solid > 0.5)
        box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
        return Sprite(
            (255 * colour).astype(np.uint8),
            np.rint(255 * through).astype(np.uint8),
            (("part", box), *self.things),
        )


def make_sprite(
    dice: Dice, domain: Domain, s: float, focus: float, turn: float, defects: float
) -> Sprite:
    """A part of random shape, pose, surface and unlike defects (`defects`: their mean number)."""
    part = Part(dice, domain, s)
    chosen = dice.some(DEFECTS, min(3, dice.poisson(defects)))
    missing = len(part.holes) - 1 - dice.below(part.drilled)
    part.bore(missing if "missing_hole" in chosen else -1)
    if dice.chance() < 0.4:
        part.mark()
    for label in chosen:
        if label != "missing_hole":
            part.spoil(label)
    return part.lit(turn, focus)


def widened(x1: float, y1: float, x2: float, y2: float, side: float) -> Box:
    """The box made at least `side` wide and high around its middle."""
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    w, h = max(x2 - x1, side) / 2, max(y2 - y1, side) / 2
    return float(cx - w), float(cy - h), float(cx + w), float(cy + h)


def fill(size: int, areas: list[Points], at: tuple[float, float]) -> Field:
    """Areas (points around 0, 0, in pixels) filled around `at`: float32 [size, size] of 0..1."""
    mask = np.zeros((size, size), np.uint8)
    for area in areas:
        points = ((area + np.array(at, np.float32)) * 16).round().astype(np.int32)
        cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def stroke(size: int, lines: list[Points], at: tuple[float, float], width: int) -> Field:
    """Lines (points around 0, 0, in pixels) drawn around `at`: float32 [size, size] of 0..1."""
    mask = np.zeros((size, size), np.uint8)
    points = [((line + np.array(at, np.float32)) * 16).round().astype(np.int32) for line in lines]
    cv2.polylines(mask, points, False, 255, width, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255
