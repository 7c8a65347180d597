"""Cameras of the real system: zones, geometry, triggers, what is dark, what does not fit."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import zmq

from common import bus
from common.geometry import inside
from common.messages import Trigger
from common.paths import Paths
from tests.support import Journal, System, balanced, until

Start = Callable[[str], System]

MODEL = f"""
[groups.main]
model = "{Path(__file__).parents[2]}/models/factory"
"""


def test_zones_geometry_and_motion(system: Start, paths: Paths) -> None:
    """Two views of one scene: where things are is the same; a gate lets only moments through."""
    camera = 'source = "virtual"\nseed = 8\nfps = "max"\npolicy = "every"\n'
    line = system(f"""
    [cameras.plain]
    {camera}
    [cameras.plain.zones.left]
    points = [[0, 0], [320, 0], [320, 480], [0, 480]]
    [cameras.turned]
    {camera}
    crop = [20, 10, 600, 460]
    rotate = 180
    flip = "both"
    masks = [[[0, 0], [40, 0], [40, 480], [0, 480]]]
    [cameras.gate]
    {camera.replace('"max"', "30")}
    trigger = {{ by = "motion", zone = "gate", share = 0.1, level = 30 }}
    zones = {{ gate = {{ points = [[300, 0], [340, 0], [340, 480], [300, 480]] }} }}
    {MODEL}
    """)
    plain, turned, gate = (Journal(paths, name) for name in ("plain", "turned", "gate"))
    until(lambda: len(gate.results) > 2, 60, "parts at the gate")
    until(lambda: min(len(plain.results), len(turned.results)) > 200, 60, "results")
    for one in (plain, turned, gate):
        one.stop()
    account = line.stop()["cameras"]
    assert all(map(balanced, account.values()))
    left = ((0, 0), (320, 0), (320, 480), (0, 480))
    found = 0
    same = {result.sequence: result for result in turned.results}
    for a in plain.results[:200]:
        b = same.get(a.sequence)
        if b is None:  # overwritten before this process has read it
            continue
        for item in a.items:
            assert item.box is not None
            middle = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            assert item.zones == (("left",) if inside(middle, left) else ())
        boxes = [item.box for item in b.items if item.box]
        assert all(box[0] >= 20 and box[3] <= 470 for box in boxes), "inside of the crop"
        for item in a.items:
            if item.label == "part" and item.box and item.box[0] > 60 and item.box[2] < 600:
                found += any(np.abs(np.subtract(item.box, box)).max() < 15 for box in boxes)
    assert found > 60, "the same parts at the same places, through cut, turn and flip"
    seconds = (gate.results[-1].captured_ns - gate.results[0].captured_ns) / 1e9
    assert len(gate.results) - 1 < seconds * 30 / 4, "only moments"
    ids = [result.trigger for result in gate.results]
    assert len(set(ids)) == len(ids)
    assert 0 not in ids


def test_a_part_is_inspected_once_and_only_once(system: Start, paths: Paths) -> None:
    """Triggers of two senders, some repeated, through the death of capture."""
    line = system(f"""
    [cameras.belt]
    source = "virtual"
    prerender = 30
    fps = 30
    policy = "every"
    trigger = {{ by = "message" }}
    stale_after_s = 10
    {MODEL}
    """)
    capture = until(lambda: line.process("capture-belt"), 20, "capture")
    journal = Journal(paths, "belt")
    assert line.vigil("trigger", "belt", "--id", "7", "--timeout", "25").stdout.startswith(
        "part 7: frame 1: "
    )
    again = line.vigil("trigger", "belt", "--id", "7")
    assert again.returncode == 2
    assert "a trigger of this id was taken before" in again.stdout
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    senders = [context.socket(zmq.PUSH) for _ in range(2)]
    for sender in senders:
        sender.connect(paths.trigger("belt"))
    for part in range(100, 120):
        for sender in senders if part % 3 else senders[:1]:
            now = Trigger(part, time.monotonic_ns())
            sender.send_multipart([b"trigger/belt", bus.encode(now)])
    senders[0].send_multipart([b"trigger/belt", b"rubbish"])
    senders[0].send(b"one part only")
    until(lambda: len(journal.results) == 21, 30, "every part judged")
    os.kill(capture.pid, signal.SIGKILL)
    capture.wait()
    until(lambda: line.process("capture-belt"), 20, "capture again")
    newest = Trigger(119, time.monotonic_ns())  # sent again by who did not hear the answer
    senders[0].send_multipart([b"trigger/belt", bus.encode(newest)])
    last = Trigger(120, time.monotonic_ns())
    senders[0].send_multipart([b"trigger/belt", bus.encode(last)])
    until(lambda: len(journal.results) == 22, 30, "the part after capture's death")
    context.destroy(linger=0)
    inspected = [result.trigger for result in journal.stop()]
    assert sorted(inspected) == [7, *range(100, 121)], "senders may overtake each other"
    account = line.stop()["cameras"]["belt"]
    assert account["captured"] == account["inferred"] == 22
    assert "a trigger that can't be read" in line.output.read_text()


def test_what_is_dark_is_not_judged(system: Start, paths: Paths, tmp_path: Path) -> None:
    """Each dark frame says so, in its turn; the others are judged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    red, white = noise * np.array((0, 0, 1), np.uint8), np.full_like(noise, 255)
    kinds = (noise, noise // 40, red, white)
    for number in range(40):
        cv2.imwrite(str(folder / f"{number:02}.png"), kinds[number % 4])
    line = system(f"""
    [cameras.belt]
    source = "folder"
    path = "{folder}"
    loop = false
    fps = "max"
    policy = "every"
    dark_level = 8
    dark_spread = 2
    {MODEL}
    """)
    journal = Journal(paths, "belt")
    until(lambda: len(journal.results) == 40, 30, "every picture")
    results = journal.stop()
    for number, result in enumerate(results):
        dark = number % 2 == 1
        assert result.sequence == number + 1
        assert result.validity == ("not_inferred" if dark else "valid"), result
        assert result.reason == ("blind: the camera is dark or covered" if dark else "")
    account = line.stop()["cameras"]["belt"]
    assert (account["inferred"], account["not_inferred"]) == (20, 20)


def test_a_camera_whose_file_comes_late_and_goes(
    system: Start, paths: Paths, tmp_path: Path
) -> None:
    """Capture outlives its camera; status says what is wrong with it and since when."""
    folder = tmp_path / "pictures"
    line = system(f"""
    [cameras.belt]
    source = "folder"
    path = "{folder}"
    fps = 10
    reconnect_max_s = 1
    zones = {{ far = {{ points = [[0, 0], [700, 0], [0, 40]] }} }}
    {MODEL}
    """)
    lost = "belt: lost, .*no such folder"
    until(lambda: line.says("no such folder; a folder camera needs one"), 20, lost)
    capture = until(lambda: line.process("capture-belt"), 5, "capture")
    assert f"belt: the camera is lost for 1 s: {folder}: no such" in (
        until(
            lambda: re.sub(r"for [\d.]+ m?s", "for 1 s", line.vigil("status").stdout), 5, "status"
        )
    )
    noise = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    folder.mkdir()
    cv2.imwrite(str(folder / "1.png"), noise)
    line.until_valid()
    status = line.vigil("status").stdout
    assert "zones.far: the point [700, 0] lies outside the 64x48 picture" in status
    (folder / "1.png").unlink()
    until(lambda: "lost" in line.vigil("status").stdout, 20, "lost in status")
    assert capture.is_running(), "it was one process all the time"


@pytest.mark.parametrize("key", ["crop = [0, 0, 65, 48]"])
def test_a_crop_that_does_not_fit(system: Start, tmp_path: Path, key: str) -> None:
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((48, 64, 3), np.uint8))
    line = system(f"""
    [cameras.belt]
    source = "folder"
    path = "{tmp_path}"
    fps = 10
    {key}
    {MODEL}
    """)
    text = "belt: lost, crop = [0, 0, 65, 48] lies outside the 64x48 picture"
    until(lambda: line.says(text), 20, text)
