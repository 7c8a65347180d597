"""What a careful engineer writes without learning: the classical baseline of the factory benchmark.

Belt: a quadratic surface is fitted to each Lab channel of the picture, robustly, so that gradients
and vignetting go. Parts: what stands out from it in colour or edges, shadows excepted, closed,
filled, of a part's size. On a part: holes are round and show the belt; what deviates from the
locally smoothed surface is a scratch if long and thin, else a stain; a bright blob beside a dark
one, at a larger scale, is a dent; a hole is missing where the symmetry of the others asks for one.

`Settings` were chosen by `tune`: random search for the best F1 on scenes of the training domain.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from scripts.bench.factory_metrics import Count, Found, count
from services.capture.scene import Thing
from services.capture.sprite import Picture

Mask = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    stands_out: float = 3.0  # distance from the belt in its own deviations
    edge: float = 1e9  # gradient that belongs to a part (1e9: none does)
    shadow: float = 0.4  # darker than the belt down to this share, in the same hue: shadow
    close: int = 5  # pixels bridged
    rim: int = 5  # pixels beside edges and holes that a bevel takes
    blur: float = 0.8  # against texture
    surface: int = 15  # window of the smoothed surface
    deviates: float = 10.0  # deviation from it in the part's own deviations
    join: int = 11  # pixels between pieces of one defect
    grain: int = 90  # smallest defect, pixels
    long: float = 1.8  # length over width from which a defect is a scratch
    dent: float = 6.0  # deviation, at a dent's scale, of its bright and dark side
    two_sided: float = 0.45  # smaller over larger of bright and dark area from which it is a dent
    roundness: float = 0.8  # area over that of the enclosing circle from which a blob is a hole
    symmetry: float = 8.0  # pixels by which a hole may miss its mirror image


CHOICES = {
    "stands_out": (2.0, 3.0, 4.0, 5.0, 6.5, 8.0),
    "edge": (25.0, 35.0, 45.0, 60.0, 1e9),
    "shadow": (0.4, 0.55, 0.7, 1.0),
    "close": (5, 9, 13),
    "rim": (5, 8, 10),
    "blur": (0.8, 1.2, 1.8),
    "surface": (15, 21, 31, 45),
    "deviates": (4.0, 5.0, 6.5, 8.0, 10.0),
    "join": (5, 7, 11, 15),
    "grain": (40, 60, 90, 130),
    "long": (1.8, 2.2, 3.0, 4.0),
    "dent": (4.0, 5.0, 6.0, 7.5),
    "two_sided": (0.3, 0.45, 0.6),
    "roundness": (0.6, 0.7, 0.8),
    "symmetry": (5.0, 8.0, 12.0),
}


def belt_of(lab: NDArray[np.floating]) -> tuple[Values, Values]:
    """The belt behind everything [h, w, 3], and its deviation [3], by robust least squares."""
    h, w = lab.shape[:2]
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1).reshape(-1, 6)
    pixels = lab.reshape(-1, 3)
    some = np.linspace(0, len(pixels) - 1, 4000).astype(int)
    a, b = terms[some], pixels[some]
    sigma = np.full(3, 25.0)
    fit = np.zeros((6, 3))
    fit[0] = np.median(b, 0)
    for _ in range(12):
        apart = np.sqrt((((b - a @ fit) / sigma) ** 2).sum(1))
        weight = np.where(apart < 4, (1 - (apart / 4) ** 2) ** 2, 0)[:, None]
        fit = np.linalg.lstsq(a * weight, b * weight, rcond=None)[0]
        near = weight[:, 0] > 0
        sigma = np.maximum(1.48 * np.median(np.abs(b - a @ fit)[near], 0), 1.5)
    return (terms @ fit).reshape(h, w, 3).astype(np.float32), sigma.astype(np.float32)


def parts_of(picture: Picture, set_: Settings) -> list[tuple[Found, Mask]]:
    """Parts with their filled outline (uint8 [h, w] of 0 and 1)."""
    smooth = cv2.bilateralFilter(picture, 5, 30, 3)
    rail = len(smooth) // 20
    colours = cv2.cvtColor(smooth[rail:-rail].astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
    lab = np.asarray(colours, np.float32)
    belt, sigma = belt_of(lab)
    apart = np.sqrt((((lab - belt) / sigma) ** 2).sum(2))
    ratio = lab[..., 0] / np.maximum(belt[..., 0], 1)
    hue = np.abs(lab - belt)[..., 1:].max(2)
    shadow = (ratio < 1) & (ratio > set_.shadow) & (hue < 3 * sigma[1:].max())
    grey = cv2.cvtColor(smooth[rail:-rail], cv2.COLOR_BGR2GRAY)
    edge = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    mask = (((apart > set_.stands_out) & ~shadow) | (edge > set_.edge)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    round_ = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (set_.close, set_.close))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, round_)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    filled = np.zeros(picture.shape[:2], np.uint8)
    cv2.drawContours(filled[rail:-rail], outlines, -1, 1, -1)
    filled = np.asarray(cv2.morphologyEx(filled, cv2.MORPH_OPEN, np.ones((13, 13), np.uint8)), "u1")
    number, labels, stats, _ = cv2.connectedComponentsWithStats(filled)
    found = []
    for part in range(1, number):
        x, y, w, h, size = stats[part]
        if size > 3500 and max(w, h) < 230 and size > 0.35 * w * h:
            box = (float(x), float(y), float(x + w), float(y + h))
            found.append((Found("part", size / 1e5, box), (labels == part).astype(np.uint8)))
    return found


def blobs(mask: NDArray[np.bool_], least: int) -> list[tuple[Mask, NDArray[np.int32]]]:
    number, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return [
        ((labels == i).astype(np.uint8), stats[i])
        for i in range(1, number)
        if stats[i][cv2.CC_STAT_AREA] >= least
    ]


def defects_of(picture: Picture, part: Found, outline: Mask, set_: Settings) -> list[Found]:
    x1, y1, x2, y2 = (int(side) for side in part.box)
    window = np.s_[max(0, y1 - 4) : y2 + 4, max(0, x1 - 4) : x2 + 4]
    left, top = window[1].start, window[0].start
    within = cv2.erode(outline[window], np.ones((5, 5), np.uint8)).astype(bool)
    rim = np.ones((2 * set_.rim + 1, 2 * set_.rim + 1), np.uint8)
    inside = cv2.erode(outline[window], rim).astype(bool)
    if inside.sum() < 500:
        return []
    lab = cv2.cvtColor(picture[window].astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
    lab = np.asarray(cv2.GaussianBlur(lab, (0, 0), set_.blur), np.float32)
    light = np.asarray(lab[..., 0], np.float32)
    typical = np.median(light[inside])
    scaled = np.clip(2.55 * light[within], 0, 255).astype(np.uint8)
    level = cv2.threshold(scaled[None], 0, 255, cv2.THRESH_OTSU)[0] / 2.55
    found: list[Found] = []
    holes, centres = np.zeros(inside.shape, np.uint8), []
    if typical - level > 3:
        for blob, stats in blobs((light < level) & within, 80):
            contour = cv2.findContours(blob, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0]
            (cx, cy), r = cv2.minEnclosingCircle(contour)
            if stats[4] > set_.roundness * np.pi * r * r and 5 < r < 24:
                cv2.circle(holes, (int(cx), int(cy)), int(r) + set_.rim, 1, -1)
                centres.append((cx, cy, r))
    found += missing(centres, inside, (left, top), set_)
    body = inside & (holes == 0)
    if body.sum() < 500:
        return found
    plain = np.where(body, 2.55 * light, 2.55 * typical).astype(np.uint8)
    base = cv2.medianBlur(plain, set_.surface).astype(np.float32) / 2.55
    apart = light - base
    tint = np.abs(lab[..., 1:] - np.median(lab[..., 1:][body], 0)).max(2)
    noise = max(1.48 * float(np.median(np.abs(apart[body]))), 1.0)
    tinge = max(1.48 * float(np.median(tint[body])), 1.5)
    odd = ((np.abs(apart) > set_.deviates * noise) | (tint > set_.deviates * tinge)) & body
    join = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (set_.join, set_.join))
    odd = cv2.morphologyEx(odd.astype(np.uint8), cv2.MORPH_CLOSE, join)
    for blob, stats in blobs(odd.astype(bool), set_.grain):
        contour = cv2.findContours(blob, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0]
        _, (w, h), _ = cv2.minAreaRect(contour)
        if max(w, h) > 90:
            continue
        label = "scratch" if max(w, h) / max(min(w, h), 1) >= set_.long else "stain"
        x, y, bw, bh = (float(v) for v in stats[:4])
        cx, cy, bw, bh = x + bw / 2 + left, y + bh / 2 + top, max(bw, 18) / 2, max(bh, 18) / 2
        found.append(Found(label, float(stats[4]) / 1e4, (cx - bw, cy - bh, cx + bw, cy + bh)))
    return found + dents(light, body, (left, top), set_)


def dents(
    light: NDArray[np.floating], body: NDArray[np.bool_], corner: tuple[int, int], set_: Settings
) -> list[Found]:
    """Bright and dark blobs of a dent's size side by side, texture smoothed away."""
    weight = cv2.GaussianBlur(body.astype(np.float32), (0, 0), 9) + 1e-3
    broad = cv2.GaussianBlur(np.where(body, light, 0), (0, 0), 9) / weight
    weight = cv2.GaussianBlur(body.astype(np.float32), (0, 0), 2.5) + 1e-3
    band = cv2.GaussianBlur(np.where(body, light, 0), (0, 0), 2.5) / weight - broad
    limit = set_.dent * max(1.48 * float(np.median(np.abs(band[body]))), 0.5)
    sides = [
        [stats[:5].astype(float) for _, stats in blobs((sign * band > limit) & body, 25)]
        for sign in (1, -1)
    ]
    found = []
    for x1, y1, w1, h1, size1 in sides[0]:
        for x2, y2, w2, h2, size2 in sides[1]:
            away = np.hypot(x1 + w1 / 2 - x2 - w2 / 2, y1 + h1 / 2 - y2 - h2 / 2)
            alike = min(size1, size2) >= set_.two_sided * max(size1, size2)
            if away < 26 and alike and max(w1, h1, w2, h2) < 36:
                left, top = min(x1, x2) + corner[0], min(y1, y2) + corner[1]
                right, low = max(x1 + w1, x2 + w2) + corner[0], max(y1 + h1, y2 + h2) + corner[1]
                found.append(Found("dent", (size1 + size2) / 1e4, (left, top, right, low)))
    return found


def missing(
    holes: list[tuple[float, float, float]],
    inside: NDArray[np.bool_],
    corner: tuple[int, int],
    set_: Settings,
) -> list[Found]:
    """Holes that the others' symmetry asks for: half turns, and sixth, quarter, third ones about a
    central hole; the symmetry that most holes keep, if it is broken once."""
    ys, xs = np.nonzero(inside)
    middle = np.array([xs.mean(), ys.mean()])
    points = np.array([hole[:2] for hole in holes]).reshape(-1, 2)
    around = [i for i, p in enumerate(points) if np.hypot(*(p - middle)) > 12]
    if len(around) < 2:
        return []
    for turns in (6, 4, 3, 2):
        broken = []
        for i in around:
            for turn in range(1, turns):
                angle = 2 * np.pi * turn / turns
                c, s = np.cos(angle), np.sin(angle)
                image = middle + (points[i] - middle) @ np.array([[c, s], [-s, c]])
                if np.hypot(*(points - image).T).min() > set_.symmetry:
                    broken.append(image)
        lonely = [
            b for n, b in enumerate(broken) if all(np.hypot(*(b - o)) > 15 for o in broken[:n])
        ]
        if not lonely:
            return []
        if len(lonely) == 1:
            x, y = (round(v) for v in lonely[0])
            if 0 <= x < inside.shape[1] and 0 <= y < inside.shape[0] and inside[y, x]:
                r = 1.6 * float(np.median([holes[i][2] for i in around]))
                x, y = x + corner[0], y + corner[1]
                return [Found("missing_hole", 0.5, (x - r, y - r, x + r, y + r))]
    return []


def inspect(picture: Picture, settings: Settings) -> list[Found]:
    """Everything found in a BGR picture [480, 640, 3]."""
    found = []
    for part, outline in parts_of(picture, settings):
        found += [part, *defects_of(picture, part, outline, settings)]
    return found


def tune(views: Sequence[tuple[Picture, Sequence[Thing]]], rounds: int = 2) -> Settings:
    """Coordinate search over CHOICES, in random order, for the best F1 over these pictures."""

    def f1(settings: Settings) -> float:
        whole = Count()
        for picture, things in views:
            whole = sum(count(inspect(picture, settings), things).values(), whole)
        return whole.f1

    chance = random.Random(1)
    best, best_f1 = Settings(), f1(Settings())
    for _ in range(rounds):
        for field in chance.sample(fields(Settings), len(fields(Settings))):
            for value in CHOICES[field.name]:
                trial = replace(best, **{field.name: value})  # type: ignore[arg-type]
                if trial != best and (trial_f1 := f1(trial)) > best_f1:
                    best, best_f1 = trial, trial_f1
                    print(f"{best_f1:.4f} {best}", flush=True)
    return best
