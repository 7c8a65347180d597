"""Motion: a part that passes is told of once, on noise, under a slow change of light."""

import numpy as np
import pytest

from services.capture.scene import Scene
from services.capture.source import Picture
from services.capture.triggers import LEARN, Motion

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
    parts = [160, 230, 300, 370]
    told = [frame for frame in range(500) if motion.comes(belt(frame, parts))]
    assert len(told) == len(parts)
    reaches = 15 if polygon else 0  # frames until a part is at the gate
    for part, at in zip(parts, told, strict=True):
        assert reaches <= at - part <= reaches + 5


def test_light_that_fades_is_no_part_and_a_step_is_one_at_most() -> None:
    motion = Motion((160, 120), GATE, 0.03, 25)
    fading = [belt(frame, [], light=150 - frame / 8) for frame in range(500)]
    assert not any(map(motion.comes, fading))
    assert sum(motion.comes(belt(frame, [], light=140)) for frame in range(400)) <= 1
    told = sum(motion.comes(belt(frame, [50], light=140)) for frame in range(120))
    assert told == 1, "a part is seen all the same"


@pytest.mark.parametrize("seed", [8, 9, 10])
def test_parts_of_the_virtual_conveyor(seed: int) -> None:
    """Against its truth: nearly all are told of, each once, and hardly anything else."""
    scene, gate = Scene(640, 480, seed=seed), ((300.0, 0), (340.0, 0), (340.0, 480), (300.0, 480))
    motion = Motion((640, 480), gate, 0.1, 30)
    told, came, there = [], [], True
    for frame in range(900):
        picture, truth = scene.render(frame)
        if motion.comes(picture):
            told.append(frame)
        was, there = (
            there,
            any(
                thing.label == "part" and thing.box[0] < 340 and thing.box[2] > 300
                for thing in truth
            ),
        )
        if there and not was and frame > LEARN:
            came.append(frame)
    caught = [sum(0 <= at - part <= 25 for at in told) for part in came]
    assert len(came) > 12
    assert max(caught) == 1
    assert sum(caught) >= 0.85 * len(came)
    assert len(told) - sum(caught) <= 1
