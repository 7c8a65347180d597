"""Faults of the real system: whatever dies, stops or fills up, the rest goes on and is counted."""

import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from common.frames import Ring
from common.paths import PROJECT, Paths
from scripts.bench.lanes import Lanes
from tests.onnx_files import save
from tests.support import Journal, System, balanced, until

Start = Callable[[str], System]

BELT = f"""
[cameras.belt]
source = "virtual"
fps = 30
policy = "POLICY"
slots = 16
[groups.main]
model = "{PROJECT}/models/factory"
"""


@pytest.mark.parametrize("policy", ["every", "latest"])
def test_any_process_killed_at_any_moment(system: Start, paths: Paths, policy: str) -> None:
    """Under `every` with a source that waits, a journal reader sees no gap and no frame twice."""
    config = BELT.replace("POLICY", policy)
    if policy == "every":  # as fast as it goes, and the source waits: not one frame may be lost
        config = config.replace("fps = 30", 'fps = "max"\nprerender = 8')
    line = system(config)
    journal = Journal(paths, "belt")
    line.until_valid()
    dice = random.Random(1)
    for name in ("inference-main-a", "capture-belt") * 3:
        victim = until(partial(line.process, name), 10, f"{name} runs")
        journal.until_more(1)
        time.sleep(dice.uniform(0, 0.1))  # the moment, not a wait for something
        victim.kill()
        journal.until_more(20)
    account = line.stop()["cameras"]["belt"]
    sequences = sorted([*(result.sequence for result in journal.stop()), *journal.missed])
    assert balanced(account)
    assert len(set(sequences)) == len(sequences), "no frame judged twice"
    assert account["inferred"] + account["failed"] == len(sequences)
    if policy == "every":
        assert sequences == list(range(1, len(sequences) + 1)), "no gap"
        assert account["skipped"] == account["torn"] == 0
        assert account["in_flight"] <= 16


def test_supervisord_killed_leaves_no_orphan(system: Start, paths: Paths) -> None:
    line = system(BELT.replace("POLICY", "latest"))
    line.until_valid()
    supervisord = psutil.Process(int((paths.run / "supervisord.pid").read_text()))
    children = supervisord.children()
    assert len(children) == 5, "capture, two lanes, updater, watchdog"
    supervisord.kill()
    assert psutil.wait_procs(children, timeout=5)[1] == [], "still alive"
    line.runner.wait(20)
    assert line.runner.returncode == 1
    assert "supervisord ended by itself" in line.output.read_text()
    assert not paths.run.exists(), "left behind in shared memory"


def test_runner_killed_and_started_again(system: Start, paths: Paths) -> None:
    """What a killed run leaves in shared memory is removed by the next one, not built upon."""
    first = system(BELT.replace("POLICY", "latest"))
    first.until_valid()
    supervisord = psutil.Process(int((paths.run / "supervisord.pid").read_text()))
    first.runner.kill()
    first.runner.wait()
    supervisord.wait(20)
    second = system(BELT.replace("POLICY", "latest"))
    second.until_valid()
    report = second.stop()
    assert balanced(report["cameras"]["belt"])
    assert not paths.run.exists()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_subscriber_that_stops_or_dies(system: Start, paths: Paths, how: int) -> None:
    line = system(BELT.replace("POLICY", "latest"))
    line.until_valid()
    tap = subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", "tap", "dump"],
        cwd=PROJECT,
        env=line.environment,
        stdout=subprocess.PIPE,
    )
    assert tap.stdout is not None
    assert tap.stdout.readline(), "it listens"
    lane = until(lambda: line.process("inference-main-a"), 5, "the lane runs")
    journal = Journal(paths, "belt")
    tap.send_signal(how)
    until(lambda: len(journal.results) > 60, 20, "results flow on")
    results = journal.stop()
    tap.kill()
    tap.wait()
    tap.stdout.close()
    assert all(result.validity == "valid" for result in results[-30:])
    assert lane.is_running()
    assert balanced(line.stop()["cameras"]["belt"])


def test_no_room_in_the_tmpfs(paths: Paths, tmp_path: Path) -> None:
    """A ring that doesn't fit, from the start or when it has to grow: an error with both sizes; the
    camera that fits goes on, and so does capture."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (1200, 1600, 3), np.uint8)
    cv2.imwrite(str(pictures / "1.png"), noise[:48, :64])
    cv2.imwrite(str(pictures / "2.jpg"), noise)
    config = tmp_path / "vigil.toml"
    config.write_text(
        textwrap.dedent(f"""
        [cameras.small]
        source = "virtual"
        fps = 20
        [cameras.large]
        source = "virtual"
        size = [1600, 1200]
        prerender = 1
        fps = 5
        [cameras.grows]
        source = "folder"
        path = "{pictures}"
        fps = 5
        [groups.main]
        model = "{PROJECT}/models/factory"
        """)
    )
    run = tmp_path / "run"
    run.mkdir()
    script = (
        f"mount -t tmpfs -o size=24m tmpfs {run} && VIGIL_RUN={run} "
        f"exec {sys.executable} -m scripts.runner --config {config} --seconds 8"
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    probe = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"needs a mount namespace for a small tmpfs: {probe.stderr.decode().strip()}")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    output = done.stdout + done.stderr
    for name in ("large", "grows"):
        assert f"capture-{name}: {name}: lost, " in output
        assert f"rings/{name}." in output
    assert output.count("no room for 24.1 MB (4 slots of 1600x1200x3, latest)") >= 2
    assert "MB are free" in output
    assert '"small": {"captured"' in output
    assert '"large": null' in output
    assert '"grows": {"captured"' in output, "the small picture was taken"
    assert done.returncode == 0, output


@pytest.mark.slow  # test_one_frame_that_kills_whoever_judges_it is the quick one
def test_a_frame_that_kills_two_lanes(system: Start, paths: Paths, tmp_path: Path) -> None:
    """It is committed as failed and not tried a third time; the next frame is judged."""
    model = slow_classifier(tmp_path / "slow")
    line = system(f"""
    [cameras.belt]
    source = "virtual"
    prerender = 2
    fps = "max"
    policy = "every"
    stale_after_s = 60
    [groups.main]
    model = "{model}"
    """)
    journal = Journal(paths, "belt")
    line.until_valid()
    frame, lanes = 0, Lanes(paths)
    lanes.until_standby()
    for attempt in (1, 2):
        lane = until(lambda: line.process(f"inference-main-{lanes.record.live}"), 30, "a live lane")
        caught = partial(stopped_in_the_engine, lane, paths, attempt, frame)
        frame = until(caught, 30, "a frame in the engine")
        lane.kill()
        lane.wait()
    until(lambda: len(journal.results) > frame, 60, "the next frame is judged")
    lanes.close()
    results = journal.stop()
    assert [result.sequence for result in results] == list(range(1, len(results) + 1))
    assert results[frame - 1].validity == "failed"
    assert "killed the process twice" in results[frame - 1].reason
    assert results[frame].validity == "valid"
    account = line.stop()["cameras"]["belt"]
    assert balanced(account)
    assert account["failed"] == 1
    assert "could not be judged" in line.output.read_text()


def test_a_model_that_cannot_judge_a_frame(system: Start, paths: Paths, tmp_path: Path) -> None:
    """NaN on dark pictures: each of those is `failed`, none says "nothing there"; others go on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, grey in enumerate((200, 0, 180, 0, 220)):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((48, 64, 3), grey, np.uint8))
    nodes: list[Any] = [
        ("ReduceMean", ["x"], ["mean"], {"axes": [2, 3], "keepdims": 0}),
        ("Sub", ["mean", "dark"], ["above"], {}),
        ("Log", ["above"], ["logits"], {}),
        ("Softmax", ["logits"], ["y"], {}),
    ]
    model = bundle(tmp_path / "log", nodes, {"dark": np.array([0.2], np.float32)})
    line = system(f"""
    [cameras.belt]
    source = "folder"
    path = "{folder}"
    fps = 20
    loop = false
    policy = "every"
    [groups.main]
    model = "{model}"
    """)
    journal = Journal(paths, "belt")
    until(lambda: len(journal.results) >= 5, 30, "every picture judged")
    results = journal.stop()
    assert [result.validity for result in results] == [
        "valid",
        "failed",
        "valid",
        "failed",
        "valid",
    ]
    assert all("nan" in result.reason.lower() for result in results if result.validity == "failed")
    account = line.stop()["cameras"]["belt"]
    assert (account["inferred"], account["failed"], account["in_flight"]) == (3, 2, 0)


def stopped_in_the_engine(
    lane: psutil.Process, paths: Paths, attempt: int, frame: int
) -> int | None:
    """The frame that is in the engine for that attempt (`frame` from the second on).

    The lane stands still then: it can't decide the frame before it is killed."""
    lane.suspend()
    with Ring.open(paths.rings, paths.accounts, "belt", 1) as ring:
        tried, count = ring.attempted
        if tried > ring.decided and count == attempt and frame in (0, tried):
            return tried
    lane.resume()
    return None


def slow_classifier(folder: Path) -> Path:
    """A bundle: half a second an inference or more, so that a kill finds a frame in the engine."""
    size, steps = 1024, 30
    nodes: list[Any] = [
        ("ReduceMean", ["x"], ["mean"], {"keepdims": 0}),
        ("Mul", ["mean", "w"], ["m0"], {}),
        *(("MatMul", [f"m{i}", "w"], [f"m{i + 1}"], {}) for i in range(steps)),
        ("Slice", [f"m{steps}", "zero", "three", "axis"], ["row"], {}),
        ("Slice", ["row", "zero", "one", "rows"], ["logits"], {}),
        ("Softmax", ["logits"], ["y"], {}),
    ]
    constants = {
        "w": np.eye(size, dtype=np.float32),
        "zero": np.array([0]),
        "one": np.array([1]),
        "three": np.array([3]),
        "axis": np.array([1]),
        "rows": np.array([0]),
    }
    return bundle(folder, nodes, constants)


def bundle(folder: Path, nodes: list[Any], constants: dict[str, Any]) -> Path:
    """A classifier of three classes as a bundle folder."""
    folder.mkdir()
    save(folder / "model.onnx", nodes, (1, 3), constants=constants)
    (folder / "manifest.toml").write_text("""
    name = "made"
    version = "1"
    release = 1
    variants = [{runtime = "onnxruntime", file = "model.onnx"}]
    input = {colour = "rgb", resize = "stretch", scale = 255}
    decoder = {kind = "classification", activation = "none"}
    """)
    return folder
