"""A conveyor belt with parts and their defects under changing light, rendered with ground truth.

Random access: a frame depends on the arguments of `Scene` and its index alone. Belt, noise and the
parts in view are kept ready; a frame is then a few copies, one multiplication by the light and one
addition of noise, all in uint8.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from common.messages import TruthItem
from services.capture.dice import Dice
from services.capture.scenery import DOMAINS, LABELS, Domain, Field
from services.capture.sprite import RADIUS, Box, Picture, Sprite, make_sprite

__all__ = ["DOMAINS", "LABELS", "Scene", "Thing"]

VISIBLE = 0.6  # of its box inside the picture: from here on a thing is truth
WHOLE = 0.9  # of a part inside the picture: from here on one can tell where it lacks a hole
PITCH = 214.0  # between columns of parts, pixels at 640x480
GAIN_ONE = 112  # the light's unit in its uint8 map, so that lamps reach 2.3 times the mean


@dataclass(frozen=True)
class Thing:
    """One thing of a frame: its whole box, also outside the picture, and the share inside it.

    Where a hole is missing nobody can tell from a part that is cut: none of it counts as visible
    then.
    """

    label: str
    box: Box
    visible: float


class Scene:
    """Renders a belt that moves to the right.

    domain: the families of looks ("train", "held_out" or "demo", see `scenery`); what the virtual
    camera shows by default was never trained on. speed: pixels a frame at 640x480. gaps: share of
    columns left empty; with 0 every frame holds at least one whole part. defects: mean number of
    defects a part. Everything scales with the picture's smaller ratio to 640x480.

    Raises: ValueError for a domain that isn't, or a picture under 64x48.
    """

    def __init__(
        self,
        width: int = 640,
        height: int = 480,
        seed: int = 0,
        domain: str = "demo",
        *,
        speed: float = 5.0,
        gaps: float = 0.15,
        defects: float = 0.8,
    ) -> None:
        if domain not in DOMAINS:
            raise ValueError(f"scene domain {domain!r}: expected one of {', '.join(DOMAINS)}")
        if width < 64 or height < 48 or speed <= 0:
            raise ValueError(
                f"scene {width}x{height} at speed {speed}: expected 64x48 or more, > 0"
            )
        self.width, self.height, self.seed, self.speed = width, height, seed, speed
        self.gaps, self.defects = gaps, defects
        self.domain = DOMAINS[domain]
        self.scale = min(width / 640, height / 480)
        dice = self._dice(0)
        self.lamp = dice.pick(self.domain.lamps)
        low, high = dice.pick(self.domain.kelvin)
        self.kelvin = dice.uniform(low, high)
        self.exposure = dice.uniform(0.85, 1.12)
        self.phase, self.period = dice.uniform(0, 2 * np.pi), dice.uniform(400, 1200)
        self.flicker = dice.uniform(0, 0.035)
        self.vignette = dice.uniform(0.05, 0.22)
        self.focus = dice.uniform(0.35, 0.75) * self.scale
        self.belt = make_belt(dice, self.domain, int(1.6 * width), height, self.scale, self.focus)
        self.rail = make_rail(dice, width, max(4, int(0.045 * height)))
        self.noise = make_noise(dice, width + 64, height + 64)
        x, y = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 18))
        self.x, self.y = x.astype(np.float32), y.astype(np.float32)
        self.light = np.empty((height, width, 3), np.uint8)
        self.sprites: dict[tuple[int, int], Sprite] = {}

    def render(
        self, index: int, into: Picture | None = None
    ) -> tuple[Picture, tuple[TruthItem, ...]]:
        """Frame `index` as uint8 BGR [height, width, 3], drawn into `into` if given, and its truth.

        Truth holds what is at least `VISIBLE` inside the picture, boxes clipped to it, in pixels.
        """
        picture = np.empty((self.height, self.width, 3), np.uint8) if into is None else into
        length = self.belt.shape[1]
        start = -self._moved(index) % length
        first = min(length - start, self.width)
        picture[:, :first] = self.belt[:, start : start + first]
        picture[:, first:] = self.belt[:, : self.width - first]
        for sprite, x, y in self._laid(index):
            lay(picture, sprite, x, y)
        rail = self.rail.shape[0]
        picture[:rail], picture[-rail:] = self.rail, self.rail[::-1]
        cv2.multiply(picture, self._light(index), dst=picture, scale=1 / GAIN_ONE)
        jump = (index * 2654435761) & 0xFFFFFFFF
        x, y = jump >> 8 & 63, jump >> 16 & 63
        cv2.add(picture, self.noise[y : y + self.height, x : x + self.width], dst=picture)
        truth = tuple(
            TruthItem(thing.label, clip(thing.box, self.width, self.height))
            for thing in self.things(index)
            if thing.visible >= VISIBLE
        )
        return picture, truth

    def things(self, index: int) -> tuple[Thing, ...]:
        """Everything of frame `index` of which any part is inside the picture."""
        found = []
        for sprite, x, y in self._laid(index):
            whole = 0.0  # share of the part, the first of the sprite's things
            for label, (x1, y1, x2, y2) in sprite.things:
                box = (x1 + x, y1 + y, x2 + x, y2 + y)
                left, top, right, bottom = clip(box, self.width, self.height)
                inside = max(0.0, right - left) * max(0.0, bottom - top)
                visible = inside / ((x2 - x1) * (y2 - y1))
                whole = visible if label == "part" else whole
                if label == "missing_hole" and whole < WHOLE:
                    visible = 0.0
                if inside > 0:
                    found.append(Thing(label, box, visible))
        return tuple(found)

    def _dice(self, *key: int) -> Dice:
        return Dice(self.domain.code, self.seed, *key)

    def _moved(self, index: int) -> int:
        return self.width + int(index * self.speed * self.scale)

    def _laid(self, index: int) -> list[tuple[Sprite, int, int]]:
        """Sprites of frame `index` with the place of their top left corner, and no others kept."""
        moved, pitch = self._moved(index), PITCH * self.scale
        margin = 1.5 * RADIUS[1] * self.scale
        first = math.floor((moved - self.width - margin) / pitch)
        last = math.ceil((moved + margin) / pitch)
        laid, kept = [], {}
        for column in range(first, last + 1):
            for lane, cx, cy in self._column(column):
                x = moved - int(cx)
                if not -margin < x < self.width + margin:
                    continue
                key = (column, lane)
                sprite = self.sprites.get(key)
                if sprite is None:
                    turn = self._turn((cx - self.width / 2) / (self.speed * self.scale))
                    sprite = make_sprite(
                        self._dice(2, *key), self.domain, self.scale, self.focus, turn, self.defects
                    )
                kept[key] = sprite
                half = sprite.through.shape[0] // 2
                laid.append((sprite, x - half, int(cy) - half))
        self.sprites = kept
        return laid

    def _column(self, column: int) -> list[tuple[int, float, float]]:
        """Lane, place along the belt and height in the picture of a column's parts."""
        dice = self._dice(1, column)
        if dice.chance() < self.gaps:
            return []
        s, cx = self.scale, (column + 0.5) * PITCH * self.scale
        spread = self.height / 2 - 130 * s  # of the two lanes from the middle
        lanes = [-1.0, 1.0] if dice.chance() < 0.6 else [dice.uniform(-1, 1)]
        return [
            (
                lane,
                cx + s * dice.uniform(-14, 14),
                self.height / 2 + spread * at + s * dice.uniform(-8, 8),
            )
            for lane, at in enumerate(lanes)
        ]

    def _turn(self, index: float) -> float:
        return self.phase + 2 * math.pi * index / self.period

    def _light(self, index: int) -> Picture:
        """The light on frame `index`, uint8 [height, width, 3] in units of 1 / GAIN_ONE."""
        turn = self._turn(index)
        drift = 1 + 0.1 * math.sin(0.37 * turn) + self.flicker * math.sin(2.4 * index)
        field = self.lamp(self.x, self.y, turn) * (1 - self.vignette * (self.x**2 + self.y**2) / 2)
        field = np.clip(field * (self.exposure * drift), 0.25, 2.2) * GAIN_ONE
        warm = tint(self.kelvin + 300 * math.sin(0.61 * turn))
        small = np.clip(field[:, :, None] * warm, 0, 255).astype(np.uint8)
        cv2.resize(small, (self.width, self.height), dst=self.light)
        return self.light


def clip(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = (float(edge) for edge in box)  # numpy's own numbers don't go on the wire
    return max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)


def tint(kelvin: float) -> Field:
    """Blue, green, red factors of a lamp of that colour temperature, half balanced."""
    warm = (5000 - kelvin) / 5000
    return np.array([1 - 0.28 * warm, 1.0, 1 + 0.22 * warm], np.float32)


def lay(picture: Picture, sprite: Sprite, x: int, y: int) -> None:
    """Put a sprite into the picture with its top left corner at x, y, clipped."""
    n = sprite.through.shape[0]
    x1, y1 = max(0, x), max(0, y)
    x2, y2 = min(picture.shape[1], x + n), min(picture.shape[0], y + n)
    if x1 >= x2 or y1 >= y2:
        return
    patch = picture[y1:y2, x1:x2]
    inside = np.s_[y1 - y : y2 - y, x1 - x : x2 - x]
    through = cv2.cvtColor(sprite.through[inside], cv2.COLOR_GRAY2BGR)
    seen = cv2.multiply(patch, through, scale=1 / 255)
    cv2.add(seen, sprite.colour[inside], dst=patch)


def make_noise(dice: Dice, width: int, height: int) -> Picture:
    """Sensor noise with its black level, never negative: uint8 [height, width, 3]."""
    sigma = dice.uniform(1.0, 3.2)
    noise = dice.noise(height, width, 3)
    noise *= sigma
    noise += dice.uniform(5, 11)
    return np.clip(noise, 0, 40, out=noise).astype(np.uint8)


def make_rail(dice: Dice, width: int, height: int) -> Picture:
    """The conveyor's side: a metal edge with bolts, uint8 [height, width, 3]."""
    across = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    shade = dice.uniform(70, 150) * (1 - 0.5 * across**2) * np.ones((1, width), np.float32)
    rail = cv2.cvtColor(shade.astype(np.uint8), cv2.COLOR_GRAY2BGR)
    for x in range(int(dice.uniform(0, 90)), width, 4 * height + 40):
        cv2.circle(rail, (x, height // 2), max(2, height // 4), (40, 42, 45), -1, cv2.LINE_AA)
    return np.asarray(rail, np.uint8)


def make_belt(
    dice: Dice, domain: Domain, width: int, height: int, s: float, focus: float
) -> Picture:
    """A closed belt, uint8 [height, width, 3]: its texture, seam, scuffs, oil and swarf."""
    u, v = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    texture = dice.pick(domain.belts)(dice, u / s, v / s)
    tone = dice.uniform(0.14, 0.62)
    colour = tone * (1 + dice.spread(-0.16, 0.16, 3))
    marks = np.zeros((height, width), np.float32)
    for _ in range(dice.below(4, 10)):  # oil: soft dark spots the size of stains and dents
        x, y, r = dice.uniform(0, width), dice.uniform(0, height), s * dice.uniform(8, 34)
        axes = (int(r * dice.uniform(0.5, 1)), int(r))
        centre = (int(x), int(y))
        dark = dice.uniform(0.12, 0.45)
        cv2.ellipse(marks, centre, axes, dice.uniform(0, 180), 0, 360, -dark, -1, cv2.LINE_AA)
    marks = np.asarray(cv2.GaussianBlur(marks, (0, 0), 2.2 * s), np.float32)
    for _ in range(dice.below(4, 12)):  # scuffs, bright or dark, like scratches
        x, y = dice.uniform(0, width), dice.uniform(0, height)
        dx, dy = s * dice.uniform(-60, 60), s * dice.uniform(-30, 30)
        ends = (int(x), int(y)), (int(x + dx), int(y + dy))
        cv2.line(marks, *ends, dice.uniform(-0.3, 0.4), max(1, round(s)), cv2.LINE_AA)
    # The seam is where the belt, and with it this texture, closes.
    cv2.line(marks, (2, 0), (2, height), -dice.uniform(0.3, 0.6), max(1, round(5 * s)))
    for _ in range(dice.below(3, 12)):  # swarf: bright curls
        centre = (int(dice.uniform(0, width)), int(dice.uniform(0, height)))
        axes, angle = (
            (int(s * dice.uniform(2, 7)), int(s * dice.uniform(2, 5))),
            dice.uniform(0, 360),
        )
        cv2.ellipse(marks, centre, axes, angle, 0, dice.uniform(60, 250), 1.0, 1, cv2.LINE_AA)
    field = texture * (1 + marks)
    belt = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        belt[:, :, channel] = np.clip(field * (255 * colour[channel]), 0, 255)
    return np.asarray(cv2.GaussianBlur(belt, (0, 0), focus), np.uint8)
