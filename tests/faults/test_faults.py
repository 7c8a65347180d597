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

import psutil
import pytest

from common.paths import PROJECT, Paths
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
    sequences = [result.sequence for result in journal.stop()]
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
    assert len(children) == 2
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
    """A ring that doesn't fit: an error with both sizes; the camera that fits goes on."""
    config = tmp_path / "vigil.toml"
    config.write_text(
        textwrap.dedent(f"""
        [cameras.small]
        source = "virtual"
        fps = 20
        [cameras.large]
        source = "virtual"
        size = [4096, 3072]
        prerender = 1
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
    assert "capture-large" in output
    assert "no room for 152.0 MB" in output
    assert "MB are free" in output
    assert '"small": {"captured"' in output
    assert '"large": null' in output
    assert done.returncode == 0, output
