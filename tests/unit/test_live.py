"""What is given to whoever looks: the newest judged frame, small, with exactly its result."""

import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from common import bus
from common.config import Camera, Zone
from common.frames import Ring, Shape
from common.geometry import View
from common.messages import Item, Result, Stages, TruthItem
from common.paths import Paths
from common.states import Policy, Sight, Validity
from services.cli import live
from services.cli.live import Live, Shot
from services.cli.picture import Picture

BOX = (100.0, 40.0, 160.0, 80.0)
CAMERA = Camera("virtual", zones={"gate": Zone(((100.0, 40.0), (200.0, 40.0), (150.0, 90.0)))})
SHAPE = Shape(320, 240, slots=3)


@pytest.fixture
def ring(paths: Paths) -> Iterator[Ring]:
    with Ring.create(paths.rings, paths.accounts, "belt", SHAPE) as ring:
        yield ring


def write(ring: Ring, count: int = 1) -> None:
    """Frames in a grey of their own number."""
    for _ in range(count):
        ring.begin()[:] = bytes([grey(ring.written + 1)]) * ring.shape.picture_bytes
        ring.publish(time.monotonic_ns(), time.monotonic_ns())


def grey(sequence: int) -> int:
    return sequence * 20 % 250


def decide(ring: Ring, sequence: int, captured_ns: int | None = None, age_ns: int = 0) -> None:
    captured_ns = ring.times(sequence)[0] if captured_ns is None else captured_ns
    result = Result(
        "belt", ring.generation, sequence, 0, Validity.VALID, captured_ns,
        age_ns or time.monotonic_ns() - captured_ns, "m", "1", 1, "s", "r",
        (Item(f"part {sequence}", 0.9, 0, BOX, ("gate",)),), Stages(0, 0, 0, 0, 0, 0),
    )  # fmt: skip
    ring.decide(sequence, 0, 1, 1, "inferred", bus.encode(result))


def look(paths: Paths, side: int = 960) -> Live:
    return Live(paths, "belt", CAMERA, side)


def judged(shot: Shot | None, sequence: int) -> Shot:
    """It is that frame, its picture and its result."""
    assert shot is not None
    assert shot.judged
    assert shot.told["sequence"] == shot.told["result"]["sequence"] == sequence
    assert shot.told["result"]["items"][0]["label"] == f"part {sequence}"
    assert np.abs(pixels(shot).astype(int) - grey(sequence)).max() <= 2
    return shot


def pixels(shot: Shot) -> Picture:
    picture = cv2.imdecode(np.frombuffer(shot.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(picture, np.uint8)


def test_nothing_to_look_at(paths: Paths) -> None:
    one = look(paths)
    assert one.newest() is None
    Ring.create(paths.rings, paths.accounts, "belt", SHAPE).close()
    assert one.newest() is None
    assert one.encoded == 0


def test_the_newest_judged_frame_with_its_own_result(paths: Paths, ring: Ring) -> None:
    one = look(paths)
    write(ring, 2)
    decide(ring, 1)
    shot = judged(one.newest(), 1)
    assert pixels(shot).shape == (240, 320, 3)
    assert shot.told["result"]["items"][0]["box"] == list(BOX)
    assert shot.told["zones"]["gate"] == list(CAMERA.zones["gate"].points)
    write(ring)
    decide(ring, 3)
    judged(one.newest(), 3)


def test_a_frame_is_encoded_once_however_many_look(paths: Paths, ring: Ring) -> None:
    one = look(paths)
    write(ring)
    decide(ring, 1)
    lookers = [threading.Thread(target=one.newest) for _ in range(20)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    assert one.encoded == 1
    assert one.newest() is one.newest()


def test_made_as_small_as_wanted(paths: Paths, ring: Ring) -> None:
    write(ring)
    decide(ring, 1)
    small = judged(look(paths, side=160).newest(), 1)
    assert pixels(small).shape == (120, 160, 3)
    assert (small.told["width"], small.told["height"]) == (320, 240)  # what boxes are in


def test_frames_that_are_overwritten_before_they_are_judged(paths: Paths, ring: Ring) -> None:
    """A slow lane: what it judges is gone by then, so it is taken while the engine has it."""
    one = look(paths)
    write(ring)
    decide(ring, 1)
    judged(one.newest(), 1)
    write(ring, 5)
    for sequence in (6, 10, 14):
        ring.attempt(sequence)
        captured_ns = ring.times(sequence)[0]
        before = one.newest()
        assert before is not None
        assert before.told["sequence"] < sequence
        write(ring, 4)
        assert not ring.intact(sequence)
        decide(ring, sequence, captured_ns)
        judged(one.newest(), sequence)
    assert one.encoded == 4


def test_frames_that_nobody_judges(
    paths: Paths, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = look(paths)
    write(ring)
    first = one.newest()
    assert first is not None
    assert (first.judged, first.told["result"]) == (False, None)
    decide(ring, 1)
    assert judged(one.newest(), 1).id != first.id  # the same frame is worth another picture
    write(ring)
    judged(one.newest(), 1)
    monkeypatch.setattr(live, "UNJUDGED_NS", 0)
    second = one.newest()
    assert second is not None
    assert (second.judged, second.told["sequence"]) == (False, 2)
    assert np.abs(pixels(second).astype(int) - grey(2)).max() <= 2


def test_another_start_of_the_system_is_not_the_picture_before(paths: Paths, ring: Ring) -> None:
    """Its rings and frames have the same numbers."""
    one = look(paths)
    write(ring, 2)
    decide(ring, 1)
    judged(one.newest(), 1)
    ring.path.unlink()
    (paths.accounts / "belt").unlink()
    with Ring.create(paths.rings, paths.accounts, "belt", SHAPE) as other:
        other.begin()[:] = bytes([222]) * SHAPE.picture_bytes
        other.publish(time.monotonic_ns(), time.monotonic_ns())
        decide(other, 1)
        shot = one.newest()
    assert shot is not None
    assert int(pixels(shot).mean()) == 222


def test_the_words_of_the_ring_and_the_places_of_its_view(paths: Paths) -> None:
    """Boxes, zones and truth lie in the picture that is shown."""
    view = View.make((640, 480), (100, 40, 320, 240), 0, "horizontal", (160, 120))
    shape = Shape(160, 120, slots=2, policy=Policy.EVERY, view=view)
    with Ring.create(paths.rings, paths.accounts, "belt", shape) as ring:
        ring.begin()[:] = bytes([100]) * shape.picture_bytes
        ring.publish(time.monotonic_ns(), time.monotonic_ns(), Sight.DARK, trigger=5)
        decide(ring, 1)
        shot = look(paths).newest()
    assert shot is not None
    assert (shot.told["sight"], shot.told["trigger"]) == ("dark", 5)
    assert shot.told["result"]["items"][0]["box"] == [130, 0, 160, 20]
    assert shot.told["zones"]["gate"] == [(160, 0), (110, 0), (135, 25)]
    (truth,) = shot.truth([TruthItem("part", (100.0, 40.0, 180.0, 60.0))])
    assert truth == {"label": "part", "box": [120, 0, 160, 10]}
