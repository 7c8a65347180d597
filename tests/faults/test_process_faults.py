"""Faults of processes, disk, camera and clock, on the real system under its watchdog."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from common import processes, slots
from common.config import load
from common.paths import PROJECT, Paths
from common.states import Phase, Validity
from scripts.bench.lanes import Lanes, Processes
from tests.support import Journal, System, balanced, until

Start = Callable[[str], System]

CONFIG = f"""
[cameras.belt]
source = "virtual"
fps = 30
policy = "every"
prerender = 60
slots = 64
stale_after_s = 10.0
[groups.main]
model = "{PROJECT}/models/factory"
load_s = 10.0
"""
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@contextmanager
def running(start: Start, paths: Paths, config: str = CONFIG) -> Iterator[tuple[System, Lanes]]:
    """Start, have two lanes ready, and at the end find every frame judged once, without a gap."""
    line = start(config)
    line.until_valid()
    lanes, journal = Lanes(paths), Journal(paths, "belt")
    lanes.until_standby()
    journal.until_more(10)
    yield line, lanes
    journal.until_more(30)
    lanes.close()
    account = line.stop()["cameras"]["belt"]
    results = journal.stop()
    sequences = [result.sequence for result in results]
    assert balanced(account)
    assert account["skipped"] == account["torn"] == account["overrun"] == 0
    assert sequences == list(range(sequences[0], sequences[-1] + 1)), "a gap, or twice"
    assert {result.validity for result in results} == {Validity.VALID}


def live(line: System, lanes: Lanes) -> psutil.Process:
    process = line.process(f"inference-main-{lanes.record.live}")
    assert process is not None
    return process


def epoch_above(lanes: Lanes, epoch: int) -> bool:
    return lanes.record.epoch > epoch


def test_a_lane_stopped_briefly_goes_on(system: Start, paths: Paths) -> None:
    with running(system, paths) as (line, lanes):
        epoch, victim = lanes.record.epoch, live(line, lanes)
        victim.suspend()
        time.sleep(0.8)  # less than its deadline
        victim.resume()
        until(lambda: victim.is_running() and lanes.ready(lanes.record.live), 10, "it goes on")
        assert lanes.record.epoch == epoch


def test_a_lane_stopped_for_good_is_replaced(system: Start, paths: Paths) -> None:
    with running(system, paths) as (line, lanes):
        epoch, victim = lanes.record.epoch, live(line, lanes)
        victim.suspend()
        until(partial(epoch_above, lanes, epoch), 10, "the other lane goes live")
        victim.wait(5)  # killed: what hangs holds memory, and may hold a lock
        lanes.until_standby()


def test_a_lane_continued_after_it_was_replaced(system: Start, paths: Paths) -> None:
    """It can't decide any more: the fence says so, whatever it was about to do."""
    with running(system, paths) as (line, lanes):
        for _ in range(3):
            record, victim = lanes.record, live(line, lanes)
            victim.suspend()
            assert record.other is not None
            lanes.store.commit(lambda r: slots.take_over(r, str(r.other), "suspected"))
            until(lambda: lanes.report(lanes.record.live), 5, "a beat")
            time.sleep(0.3)  # the other lane decides meanwhile
            victim.resume()
            lanes.until_standby()
            assert victim.is_running(), "it stands by"


def test_both_lanes_die_at_once(system: Start, paths: Paths) -> None:
    with running(system, paths) as (line, lanes):
        for _ in range(3):
            epoch = lanes.record.epoch
            for lane in "ab":
                process = line.process(f"inference-main-{lane}")
                assert process is not None
                process.kill()
            until(partial(epoch_above, lanes, epoch), 10, "one starts again and goes live")
            lanes.until_standby()


def test_the_live_lane_dies_while_a_candidate_proves_itself(system: Start, paths: Paths) -> None:
    """There is no warm standby then: it starts again; the candidate does not take over unproven."""
    config = CONFIG + "shadow_frames = 100000\n[updates]\nunsigned = true\n"
    with running(system, paths, config) as (line, lanes):
        tar = paths.root / "bundle.tar"
        build = [sys.executable, "-m", "scripts.bundle_maker", f"{PROJECT}/models/factory"]
        psutil.Popen([*build, "--release", "2", "--out", str(tar)], cwd=PROJECT).wait(60)
        done = line.vigil("install", str(tar), timeout_s=60)
        assert done.returncode == 0, done.stderr
        until(lambda: lanes.record.txn.phase is Phase.PROVING and lanes.ready("b"), 30, "proving")
        epoch = lanes.record.epoch
        live(line, lanes).kill()
        until(partial(epoch_above, lanes, epoch), 10, "restarted")
        assert lanes.record.live == "a"
        assert lanes.record.lanes["a"].slot == slots.FACTORY
        done = line.vigil("rollback")  # ends what is under test
        assert done.returncode == 0, done.stderr
        lanes.until_standby()


def test_a_disk_that_refuses(system: Start, paths: Paths) -> None:
    """A takeover between proven slots counts in memory, and is said, until the disk is well."""
    with running(system, paths) as (line, lanes):
        folder = lanes.store.folder
        for name in (".state.0.new", ".state.1.new"):
            (folder / name).mkdir()
        before = [(folder / name).read_bytes() for name in ("state.0", "state.1")]
        epoch = lanes.record.epoch
        live(line, lanes).kill()
        until(partial(epoch_above, lanes, epoch), 10, "the other lane goes live")
        lanes.until_standby()
        assert [(folder / name).read_bytes() for name in ("state.0", "state.1")] == before
        logs = "".join(path.read_text() for path in paths.logs.glob("*.log"))
        assert "counts until the next boot" in logs
        for name in (".state.0.new", ".state.1.new"):
            (folder / name).rmdir()
        epoch = lanes.record.epoch
        live(line, lanes).kill()
        until(partial(epoch_above, lanes, epoch), 10, "the other lane goes live")
        lanes.until_standby()
        assert [(folder / name).read_bytes() for name in ("state.0", "state.1")] != before


def test_a_camera_that_is_gone_and_comes_back(system: Start, paths: Paths, tmp_path: Path) -> None:
    """The other camera goes on; the lost one is said, and seen again when it is back."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.full((120, 160, 3), 90, np.uint8))
    config = CONFIG.replace(
        "[groups.main]",
        f'[cameras.folder]\nsource = "folder"\npath = "{folder}"\nfps = 10\n[groups.main]',
    )
    with running(system, paths, config) as (line, _):
        journal = Journal(paths, "folder")
        journal.until_more(5)
        away = folder.rename(tmp_path / "away")
        capture = line.process("capture-folder")
        assert capture is not None
        capture.kill()
        until(lambda: line.says("capture-folder:"), 20, "it is said")
        away.rename(folder)
        journal.until_more(5, timeout_s=30)
        journal.stop()


@pytest.mark.parametrize("step", ["+365d", pytest.param("-365d", marks=pytest.mark.slow)])
def test_the_wall_clock_steps_by_a_year(paths: Paths, tmp_path: Path, step: str) -> None:
    """supervisord trusts it; recovery must not. Its monotonic clock stays as it is."""
    if not FAKETIME.exists():
        pytest.skip(f"needs libfaketime (Debian: faketime) in {FAKETIME}")
    clock, config = tmp_path / "clock", paths.root / "vigil.toml"
    clock.write_text("+0")
    config.write_text(CONFIG)
    programs = processes.render(load(config), paths)
    # Only supervisord is lied to.
    programs = re.sub("^environment=", 'environment=LD_PRELOAD="",', programs, flags=re.M)
    (paths.programs / "vigil.conf").write_text(programs)
    environment = os.environ | {
        "VIGIL_RUN": str(paths.run),
        "VIGIL_CONFIG": str(config),
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable,
        "-m",
        "supervisor.supervisord",
        "-c",
        str(PROJECT / "supervisord.conf"),
    ]
    supervisord = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)
    try:
        until((paths.run / "supervisord.pid").exists, 20, "supervisord runs")
        running, lanes = Processes(paths), Lanes(paths)
        journal = Journal(paths, "belt")
        journal.until_more(30)
        lanes.until_standby()
        for now in (step, "+0"):
            clock.write_text(now)
            for name in ("inference-main-a", "inference-main-b", "capture-belt", "watchdog"):
                victim = running.all()[name]
                victim.kill()
                until(partial(replaced, running, name, victim.pid), 10, f"{name} runs again")
                journal.until_more(10)
            lanes.until_standby()
        results = journal.stop()
        lanes.close()
    finally:
        supervisord.terminate()
        supervisord.wait(20)
    sequences = [result.sequence for result in results]
    assert sequences == list(range(sequences[0], sequences[-1] + 1))
    assert {result.validity for result in results} == {Validity.VALID}


def replaced(running: Processes, name: str, pid: int) -> bool:
    process = running.get(name)
    return process is not None and process.pid != pid


def test_a_capture_that_hangs(system: Start, paths: Paths) -> None:
    """Ended within its deadline and started again; nothing that it had handed over is lost."""
    with running(system, paths) as (line, _):
        victim = line.process("capture-belt")
        assert victim is not None
        victim.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        victim.wait(10)
        assert time.monotonic() - started < 5
        until(lambda: line.process("capture-belt"), 10, "another one runs")
