"""`vigil update`, asked by more than one, while the updater dies, or has much to do."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import msgspec
import pytest

from common import config
from common.errors import NotRunningError
from common.paths import PROJECT
from common.updates import REPORT, REQUEST, Report
from services.cli import install
from tests.servers.updates import Fault
from tests.support import until
from tests.updates.attacks import Stage
from tests.updates.desk import Desk
from tests.updates.device import Device, needs_faketime, sign


def update(device: Device, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", "update", *arguments],
        cwd=PROJECT, env=device.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_two_ask_at_once_and_the_updater_dies(stage: Stage) -> None:
    """Each is answered."""
    device = stage.device()
    until((device.paths.run / REPORT).exists, 20, "it runs")
    stage.server.faults["metadata/timestamp.json"] = Fault(silent=True)
    both = [update(device, "--dry-run") for _ in range(2)]
    try:
        until(lambda: stage.server.requests, 20, "it is looking")
        assert device.process is not None
        device.process.kill()
        device.process.wait()
        stage.server.faults.clear()
        device.start()
        for one in both:
            said, _ = one.communicate(timeout=30)
            assert (one.returncode, "10240 bytes from" in said) == (0, True), said
        assert not (device.paths.run / REQUEST).exists()
    finally:
        for one in both:
            one.kill()
            one.communicate()


def test_a_configuration_that_is_edited_meanwhile(stage: Stage) -> None:
    """Its children read it anew: they say what is wrong, and tell of groups it does not know."""
    device = stage.device()
    until((device.paths.run / REPORT).exists, 20, "it runs")
    text = device.config.read_text()
    device.config.write_text(text + "nonsense = 1\n")
    assert "nonsense" in device.check(dry_run=True).error
    side = '[groups.side]\nmodel = "nowhere"\n[cameras.other]\nsource = "virtual"\ngroup = "side"\n'
    device.config.write_text(text + side)
    assert len(device.check(dry_run=True).lines) == 1
    assert device.process is not None
    assert device.process.poll() is None, device.log.read_text()


def test_who_waits_for_a_verdict_is_patient(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a line that stands still a candidate waits for frames: for as long as somebody judges."""
    monkeypatch.setattr(install, "TAKEN_S", 0.1)
    desk = Desk(stage.folder / "desk", stage.repository.anchor, stage.server.url)
    desk.work()
    text = desk.config.read_text().replace("[updates]", "soak_s = 0.1\n[updates]")
    desk.config.write_text(text.replace("[updates]", "load_s = 0.1\nprove_s = 0.1\n[updates]"))
    arguments = config.load(desk.config), desk.paths, "main", stage.first
    with pytest.raises(NotRunningError, match="no watchdog"):
        install.follow(*arguments)
    with ThreadPoolExecutor() as pool, socket.socket(socket.AF_UNIX) as watchdog:
        watchdog.bind(desk.paths.endpoint("watchdog").removeprefix("ipc://"))
        watchdog.listen()
        following = pool.submit(install.follow, *arguments)
        until(lambda: "for frames" in capsys.readouterr().out, 20, "its patience is told")
        desk.judge()
        assert following.result(20) == 0
    desk.close()


def until_begun(device: Device) -> None:
    """Until some of the bundle is there."""
    partial = device.paths.updates / "partial"
    until(lambda: any(one.stat().st_size for one in partial.glob("*")), 20, "a first block")


def test_a_download_makes_way_for_a_check(stage: Stage) -> None:
    """It may take hours: what is withdrawn meanwhile, or asked, is not to wait for it."""
    device = stage.device("rate_kb_s = 2\n")
    device.check()
    until_begun(device)
    assert "on its way: download" in device.check().lines[0]
    assert device.until_step("activate").bytes == 10240
    assert [one.step for one in device.history] == ["found", "download", "install", "activate"]


@needs_faketime
def test_a_download_ends_with_its_window(stage: Stage) -> None:
    tomorrow, clock = datetime.now() + timedelta(days=1), stage.folder / "clock"  # local time
    clock.write_text(f"{tomorrow:%Y-%m-%d} 12:00:30")
    device = stage.device('rate_kb_s = 1\ndownload = ["12:00-12:01"]\n', start=False)
    device.start(clock)
    device.check()
    until_begun(device)
    clock.write_text(f"{tomorrow:%Y-%m-%d} 12:01:30")

    def waits() -> str:
        report = msgspec.json.decode((device.paths.run / REPORT).read_bytes(), type=Report)
        return report.groups["main"].waits

    until(lambda: waits() == "a download window", 20, "the end of its window")
    assert [one.step for one in device.history] == ["found"]


def pad(stage: Stage) -> None:
    """Make the bundle one of 210,240 bytes."""
    path, repository = "bundles/parts/1/any.tar", stage.repository
    custom = repository.state().targets.targets[path].custom
    [tar] = (stage.server.folder / "targets/bundles/parts/1").iterdir()
    sign(repository, path, tar.read_bytes() + bytes(200_000), custom)


def test_a_download_when_the_board_is_restarted(stage: Stage) -> None:
    """In good order: what came is kept, and no more of the budget is spent."""
    pad(stage)
    device = stage.device("rate_kb_s = 50\n")
    device.check()
    until_begun(device)
    device.stop()
    [note] = (device.paths.updates / "partial").glob("*.synced")
    spent = json.loads((device.paths.updates / "budget.json").read_bytes())
    assert spent["today"] == note.with_suffix("").stat().st_size == int(note.read_text())


@needs_faketime
def test_a_download_over_midnight(stage: Stage) -> None:
    """What it moves after 00:00 UTC counts on the new day."""
    pad(stage)
    clock, day = stage.folder / "clock", int(time.time() // 86_400) + 1
    device = stage.device("rate_kb_s = 200\n", start=False)

    def set_clock(seconds: int) -> None:
        clock.write_text(f"{datetime.fromtimestamp(day * 86_400 + seconds):%F %T}")

    set_clock(-30)
    device.start(clock)
    device.check()
    until_begun(device)
    set_clock(30)
    device.until_step("activate")
    spent = json.loads((device.paths.updates / "budget.json").read_bytes())
    assert spent["day"] == day
    assert 0 < spent["today"] < 210_240
