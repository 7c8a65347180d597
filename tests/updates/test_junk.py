"""What may lie in the updater's folders, and disks that refuse: it goes on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from common import slots
from common.slots import Slot
from common.states import Phase, SlotState
from common.updates import REPORT, REQUEST
from tests.servers.updates import Fault
from tests.support import until
from tests.updates.attacks import Stage

root_only = pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _folder(path: Path) -> None:
    (path / "in it").mkdir(parents=True)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


JUNK: dict[str, Callable[[Path], object]] = {
    "folder": _folder,
    "fifo": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "huge": _huge,
    "torn": lambda path: path.write_text('{"id": '),
    "nul": lambda path: path.write_text('{"id": "1", "place": "\\u0000"}'),
}


def test_requests_of_every_kind(stage: Stage) -> None:
    device = stage.device()
    request = device.paths.run / REQUEST
    until((device.paths.run / REPORT).exists, 20, "it runs")
    for name in ("folder", "fifo", "endless", "nul"):
        JUNK[name](request)
        until(lambda: not os.path.lexists(request), 10, f"{name} is gone")
    assert device.check().error == ""
    assert device.process is not None
    assert device.process.poll() is None, device.log.read_text()


def test_notes_and_downloads_of_every_kind(stage: Stage) -> None:
    device = stage.device(start=False)
    folder = device.paths.updates / "partial"
    folder.mkdir(parents=True)
    [tar] = (stage.server.folder / "targets/bundles/parts/1").iterdir()
    wanted = tar.name.removesuffix(".any.tar")
    names = {wanted: "fifo", f"{wanted}.synced": "folder"} | {kind: kind for kind in JUNK}
    for name, kind in names.items():
        JUNK[kind](folder / name)
    JUNK["folder"](device.paths.updates / "txn-main.json")
    JUNK["fifo"](device.paths.updates / "history.json")
    JUNK["fifo"](device.paths.updates / "floors.json")
    JUNK["torn"](device.paths.updates / "inbox")
    device.start()
    assert device.check().begun == {"main": stage.first}
    device.until_step("activate", slot=stage.first)
    until(lambda: not list(folder.iterdir()), 10, "nothing is left")
    assert device.events("update.damaged")


@root_only
def test_notes_that_can_not_be_written_keep_no_candidate_from_its_test(stage: Stage) -> None:
    """Who does not prove itself in time is bad: the disk is not to be the reason."""
    device = stage.device(start=False)
    with mounted(device.paths.updates):
        stage.server.faults["targets/bundles/*"] = Fault(status=503)
        device.start()
        device.check()
        device.stop()
        device.store.commit(
            partial(slots.install, name=stage.first, slot=Slot(SlotState.INSTALLED))
        )
        remount = ["mount", "-o", "remount,ro", str(device.paths.updates)]
        subprocess.run(remount, check=True)
        device.start()
        until(lambda: device.store.read().txn.phase is Phase.PROVING, 20, "it is tested")
        device.stop()


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@root_only
def test_what_is_found_can_not_be_noted(stage: Stage) -> None:
    """Who asked is told so."""
    device = stage.device(url="", start=False)  # it looks only where it is told to, when it is
    place = stage.server.url
    with mounted(device.paths.updates):
        device.start()
        assert device.check(place=place, dry_run=True).error == ""
        _fill(device.paths.updates / "filler")
        assert "No space left" in device.check(place=place).error
        (device.paths.updates / "filler").unlink()
        assert device.check(place=place).begun == {"main": stage.first}
        device.stop()


@root_only
def test_a_full_run_folder(stage: Stage) -> None:
    device = stage.device(start=False)
    with mounted(device.paths.run):
        device.paths.make()
        device.start()
        until((device.paths.run / REPORT).exists, 20, "it runs")
        (device.paths.run / REQUEST).write_bytes(b'{"id": "1"}')
        filler = device.paths.run / "filler"
        _fill(filler)
        device.until_step("activate", slot=stage.first)
        filler.unlink()
        assert device.check().error == ""
        assert device.process is not None
        assert device.process.poll() is None
        device.stop()


@root_only
def test_a_root_that_can_not_be_written(stage: Stage) -> None:
    """From its very start: it says so, and stays."""
    device = stage.device(start=False)
    with mounted(device.paths.root / "models"):
        subprocess.run(["mount", "-o", "remount,ro", device.paths.root / "models"], check=True)
        device.start()
        assert device.check().begun == {"main": stage.first}
        assert "can't" in device.until_step("install", "waits", stage.first).reason
        device.stop()
