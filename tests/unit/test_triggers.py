"""Motion: a part that passes is told of once, on noise, under a slow change of light."""

import numpy as np
import pytest

from services.capture.source import Picture
from services.capture.triggers import Motion

GATE = ((60.0, 0.0), (100.0, 0.0), (100.0, 120.0), (60.0, 120.0))


def belt(frame: int, parts: list[int], light: float = 90.0) -> Picture:
    """160x120: parts of 30x40 that entered at these frames move by 4 a frame over a noisy belt."""
    noise = np.random.default_rng(frame).normal(0, 4, (120, 160, 1))
    picture = np.full((120, 160, 3), light) + noise
    for entered in parts:
        right = (frame - entered) * 4
        if right > 0:
            picture[40:80, max(0, right - 30) : max(0, right)] += 60
    return picture.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("polygon", [GATE, None], ids=["gate", "whole picture"])
def test_each_part_is_told_of_once(polygon: tuple[tuple[float, float], ...] | None) -> None:
    motion = Motion((160, 120), polygon, 0.03, 25)
    parts = [60, 130, 200, 270]
    told = [frame for frame in range(400) if motion.comes(belt(frame, parts))]
    assert len(told) == len(parts)
    reaches = 15 if polygon else 0  # frames until a part is at the gate
    for part, at in zip(parts, told, strict=True):
        assert reaches <= at - part <= reaches + 5


def test_light_that_fades_is_no_part_and_a_step_is_one_at_most() -> None:
    motion = Motion((160, 120), GATE, 0.03, 25)
    told = sum(motion.comes(belt(frame, [], light=150 - frame / 8)) for frame in range(800))
    assert told == 0
    told = sum(motion.comes(belt(frame, [], light=120)) for frame in range(2000))
    assert told == 1
    told = sum(motion.comes(belt(frame, [50], light=120)) for frame in range(120))
    assert told == 1, "the new light was learnt, and a part is seen again"
