"""The updater's ways, as a process beside a real repository: sticks and inboxes, windows, clocks,
kills, full disks, ages."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from common import slots
from common.states import SlotState
from common.updates import REQUEST, Reply, Request
from services.updater.device import within
from services.updater.life import Checked
from services.updater.signed import pause_s
from tests.servers.updates import Fault
from tests.support import until
from tests.updates.attacks import Stage, staged
from tests.updates.device import Device, needs_faketime, publish


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as one:
        yield one


def away(hours: int) -> str:
    """A window that opens so many hours from now, for an hour."""
    begin, end = (time.localtime(time.time() + 3600 * n) for n in (hours, hours + 1))
    return f"{begin.tm_hour:02}:{begin.tm_min:02}-{end.tm_hour:02}:{end.tm_min:02}"


def test_an_inbox_and_a_stick(stage: Stage) -> None:
    """Without any network: through the same verification, resumed where a stick was pulled."""
    device = stage.device(url="")
    assert "nowhere to look" in device.check().error
    stage.repository.export(device.paths.updates / "inbox", channel="stable")
    device.until_step("activate", slot=stage.first)
    device.store.commit(lambda now: slots.abandon(now, "the test says so"))
    second = publish(stage.repository, stage.scratch, 2)
    stick = stage.folder / "stick"
    stage.repository.export(stick)
    [file] = (stick / "targets/bundles/parts/2").iterdir()
    file.rename(stick / "pulled")
    reply = device.check(place=str(stick))
    assert reply.begun == {"main": second}
    assert "there is no such file" in device.until_step("download", "waits", second).reason
    (stick / "pulled").rename(file)
    device.check(place=str(stick))
    device.until_step("activate", slot=second)
    assert stage.server.requests == []


def test_windows(stage: Stage) -> None:
    device = stage.device(f'download = ["{away(2)}"]\n')
    reply = device.check()
    assert reply.begun == {"main": stage.first}
    other = stage.device(f'activate = ["{away(3)}"]\n')
    other.check()
    other.until_step("install")
    until(lambda: other.store.read().state(stage.first) is SlotState.INSTALLED, 20, "installed")
    time.sleep(1.2)  # two of its ticks: nothing may come of them
    assert other.store.read().state(stage.first) is SlotState.INSTALLED
    assert not any("bundles" in r.path for r in stage.server.requests[:-1])
    assert [one.step for one in device.history] == ["found"]
    # A stick waits for no download window.
    stick = stage.folder / "stick"
    stage.repository.export(stick)
    device.check(place=str(stick))
    device.until_step("activate")


@pytest.mark.parametrize(
    ("windows", "hour", "open_"),
    [
        ((), 12, True),
        (("22:00-05:00",), 23, True),
        (("22:00-05:00",), 4, True),
        (("22:00-05:00",), 5, False),
        (("22:00-05:00",), 12, False),
        (("05:00-06:00", "13:00-14:00"), 13, True),
        (("05:00-06:00", "13:00-14:00"), 14, False),
        (("07:00-07:00",), 3, True),
    ],
)
def test_when_a_window_is_open(windows: tuple[str, ...], hour: int, open_: bool) -> None:
    now = time.mktime((2026, 11, 21, hour, 0, 0, 0, 0, -1))
    assert within(windows, now) is open_


@pytest.mark.parametrize(
    ("checked", "failures", "mean_s"),
    [
        (Checked(), 0, 3600),
        (Checked(error="no route"), 1, 30),
        (Checked(error="no route"), 4, 240),
        (Checked(error="no route"), 99, 3600),
        (Checked(error="not found", status=404), 1, 3600),
        (Checked(error="too many", status=429, wait_s=7200), 1, 7200),
        (Checked(error="busy", status=503, wait_s=100), 1, 100),
        (Checked(error="busy", status=503, wait_s=1e9), 1, 86_400),
    ],
)
def test_when_it_asks_again(checked: Checked, failures: int, mean_s: float) -> None:
    assert pause_s(checked, failures, 3600.0) == mean_s


@needs_faketime
@pytest.mark.parametrize("year", [1970, 2100])
def test_a_clock_that_is_wrong(stage: Stage, year: int) -> None:
    device, clock = stage.device(start=False), stage.folder / "clock"
    clock.write_text(f"@{year}-01-02 00:00:00")
    device.start(clock)
    reply = device.check()
    if year == 1970:
        assert reply.begun == {"main": stage.first}, reply
    else:
        assert "set the clock" in reply.error
        assert device.store.read().slots == {}
    device.close()
    device.paths.make()
    device.start()  # set right, it goes on
    assert device.check().error == ""
    device.until_step("activate", slot=stage.first)


def test_killed_at_any_moment(stage: Stage) -> None:
    """The updater and its children: it always goes on, and the bundle is fetched once."""
    device = stage.device()
    dice = random.Random(7)
    for _ in range(6):
        process = device.process
        assert process is not None
        request(device)
        time.sleep(dice.uniform(0.2, 1.2))  # the moment of the kill
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        psutil.wait_procs(children, 5)
        assert not any(child.is_running() for child in children), "a child outlived it"
        device.start()
    device.check()
    device.until_step("activate", slot=stage.first)
    [path] = [r for r in stage.server.sent if "bundles" in r]
    assert stage.server.sent[path] <= 2 * 10240
    assert device.store.verifies(stage.first)
    until(lambda: not list((device.paths.updates / "partial").iterdir()), 10, "nothing left")


def request(device: Device) -> None:
    """Ask, and do not wait for the answer."""
    (device.paths.run / REQUEST).write_bytes(msgspec.json.encode(Request(id="one")))


def test_notes_that_are_damaged(stage: Stage) -> None:
    """The transaction, the budget, the history: begun anew, and told."""
    device = stage.device()
    stage.server.faults["targets/bundles/*"] = Fault(status=503)
    device.check()
    device.stop()
    for name in ("txn-main", "budget", "history", "floors", "floors.copy"):
        (device.paths.updates / f"{name}.json").write_bytes(b'{"update": 7')
    stage.server.faults.clear()
    device.start()
    assert device.check().begun == {"main": stage.first}
    device.until_step("activate", slot=stage.first)
    told = [event["text"] for event in device.events("update.damaged")]
    assert any("txn-main.json" in text for text in told)
    assert any("floors.json" in text for text in told)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk(stage: Stage) -> None:
    """Space is checked before the first byte; with room it goes on."""
    folder = stage.folder / "device-0"
    device = Device(folder, stage.repository.anchor, stage.server.url)
    small = device.paths.updates
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small], check=True)
    try:
        device.start()
        assert device.check().begun == {"main": stage.first}
        reason = device.until_step("download", "waits").reason
        assert "free" in reason
        assert not any("bundles" in r.path for r in stage.server.requests)
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        device.check()
        device.until_step("activate", slot=stage.first)
        device.stop()
    finally:
        device.close()
        subprocess.run(["umount", "-l", small], check=True)


def test_an_old_model(stage: Stage) -> None:
    device = stage.device("warn_days = 0.000001\nescalate_days = 10000.0\n")
    until(lambda: device.events("model.old"), 20, "a warning")
    assert [event["level"] for event in device.events("model.old")] == ["warning"]


def test_who_is_not_meant(stage: Stage) -> None:
    """Rollouts, dates and groups of other devices."""
    device = stage.device('device = "press-7"\n')

    def says(words: str) -> Reply:
        reply = device.check(dry_run=True)
        assert words in reply.lines[0], reply
        return reply

    says("10240 bytes from")
    publish(stage.repository, stage.scratch, 2, rollout=0)
    says("release 2 is rolled out to 0 %, not to this device")
    assert device.store.read().slots == {}
    assert device.history == []
    other = stage.device('channel = "elsewhere"\n')
    assert "there is no such channel" in other.check().error
