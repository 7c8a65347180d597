"""What test_update_power_cuts.py cuts short: a device's life of signed updates, on production code.

`python -m tests.updates.update_programs` lives one for each line of its input, a `Life` as JSON, in
a process of its own, which stops itself before it begins; it prints the process's id then, and its
exit status at the end.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from common import config, store
from common.paths import Paths
from common.store import parse
from common.updates import HISTORY
from scripts.bench.fleet_bench import Here, Teller, judge
from services.updater import download, floors, life
from services.updater.budget import Budget
from services.updater.candidate import Candidate
from services.updater.floors import Floors
from services.updater.signed import Signed
from services.updater.sources import HttpSource
from tests.faults.power_cut_programs import without_fsync

PIECE = 4096  # of a download
TURNS = 100  # of the updater's loop, at most, until it is at rest
# Where one is left out, and in which part of a life that shows.
FSYNCS = {
    "durable.write < floors.save": 0,
    "durable.sync_folder < durable.write < floors.save": 0,
    "durable.write < life.save": 0,
    "durable.sync_folder < durable.write < life.save": 1,
    "durable.write < life.add_status": 0,
    "durable.write < budget._write": 0,
    "download.sync": 0,
    "durable.sync_folder < download.remove": 0,
    "durable.sync_folder < signed._tidy": 3,
    "durable.write < store._write < store.adopt": 0,
    "durable.sync_folder < store.adopt": 0,
    "archive._write": 0,
}


class Life(msgspec.Struct):
    folder: Path  # root/ is the device's disk, run/ its memory
    served: Path  # a link to what the repository is at the moment
    first: int = 0  # state of the repository
    last: int = 0
    mutant: str = ""

    @property
    def root(self) -> Path:
        return self.folder / "root"


class Promise(msgspec.Struct):
    """What the device has told, or acted on: no power cut may take it back."""

    state: int  # of the repository
    floors: Floors = Floors()
    release: int = 0  # the highest that was good
    sequence: int = 0  # of the record
    bad: set[str] = set()  # slots
    refused: set[str] = set()
    statuses: int = 0
    moved: dict[str, int] = {}  # bytes of each download


class Device:
    def __init__(self, its: Life) -> None:
        self.its = its
        paths = Paths(its.root, its.folder / "run")
        paths.make()
        self.service = Teller(paths, config.load(its.folder / "vigil.toml"))
        self.candidate = Candidate(self.service, "main")
        self.store = self.candidate.store
        work = type("Work", (_Told,), {"service": self.service, "device": self})
        self.signed = Signed(self.service, {"main": self.candidate}, work)
        self.way = self.signed.ways["main"]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.marks, self.promises = (os.open(its.folder / n, flags) for n in ("marks", "promises"))
        promised = (its.folder / "promises").read_bytes().splitlines()
        self.count = len(promised)
        last = promised[-1] if promised else msgspec.json.encode(Promise(its.first))
        self.promise = msgspec.json.decode(last, type=Promise)

    def note(self) -> None:
        """What will be promised."""
        os.write(self.promises, msgspec.json.encode(self.promise) + b"\n")
        self.count += 1

    def mark(self) -> None:
        """Promise it."""
        self.note()
        os.write(self.marks, b"%d\n" % self.count)

    def live(self) -> None:
        for state in (*range(self.its.first, self.its.last + 1), self.its.last):
            new = self.its.served.with_suffix(".new")
            new.unlink(missing_ok=True)
            new.symlink_to(str(state))
            new.rename(self.its.served)
            self.promise.state = state
            self.mark()
            self.signed._next_s = 0.0
            for _ in range(2):
                self.way._retry = 0.0  # the operator is impatient
                turns = 0
                while self.turn():
                    turns += 1
                    assert turns < TURNS, self.way.report()

    def turn(self) -> bool:
        """Of the updater's loop, and of the others'; whether there was anything to do."""
        child = self.signed.next_child()
        if child and (settle := child.ended()):
            settle()
        record = self.store.read()
        self.candidate.look(record, {}, self.way.may_activate)
        self.way.observe(record)
        self.signed.report()
        judge(self.store, self.store.read())
        self.see()
        return bool(child) or self.store.read() != record

    def see(self) -> None:
        """Each write has returned by now."""
        now, updates = self.promise, self.service.paths.updates
        for path in self.store.folder.glob("state.?"):
            now.sequence = max(now.sequence, parse(path.read_bytes())[0])
        record = self.store.read()
        now.bad |= {name for name in record.slots if record.state(name) == "bad"}
        if good := record.slots.get(record.known_good):
            now.release = max(now.release, good.release)
        now.refused |= set(self.way.noted.refused)
        now.statuses = len(life.history(updates / HISTORY))
        self.mark()

    def moves(self, count: int) -> None:
        """Bytes of a download are here."""
        update = self.way.noted.update
        assert update
        moved = self.promise.moved
        moved[update.sha256] = moved.get(update.sha256, 0) + count
        self.mark()


class _Told(Here):
    """What a check has said counts from then on."""

    device: Device

    def ended(self) -> Callable[[], None]:
        settle = super().ended()
        self.device.mark()
        return settle


def _watch(device: Device) -> None:
    """Note floors before they are written, and bytes before they are kept; in pieces."""
    save, read = floors.save, HttpSource.read

    def noted(folder: Path, floors: Floors) -> None:
        device.promise.floors = floors
        device.note()
        save(folder, floors)

    def counted(self: HttpSource, path: str, *part: int) -> Generator[bytes, None, None]:
        with closing(read(self, path, *part)) as blocks:
            for block in blocks:
                if "/bundles/" in path:
                    device.moves(len(block))
                yield block

    floors.save = noted
    HttpSource.read = counted  # type: ignore[assignment, method-assign]
    download.PIECE = PIECE


# -- breakages -----------------------------------------------------------------------------------


def floors_last(device: Device) -> None:
    """Floors are raised once the update is noted."""
    save, turn, late = floors.save, device.turn, list[Any]()
    floors.save = lambda *a: late.append(a)

    def turned() -> bool:
        more = turn()
        while late:
            save(*late.pop(0))
        return more

    device.turn = turned  # type: ignore[method-assign]


def reserved_last(_: Device) -> None:
    """A budget is counted once the bytes are there."""
    reserve = Budget.reserve

    def unwritten(self: Budget, *a: Any) -> int:
        write, Budget._write = Budget._write, lambda self: None  # type: ignore[method-assign]
        try:
            return reserve(self, *a)
        finally:
            Budget._write = write  # type: ignore[method-assign]

    Budget.reserve = unwritten  # type: ignore[assignment]


ORDERS = {"floors last": floors_last, "reserved last": reserved_last}
MUTANTS = FSYNCS | dict.fromkeys(ORDERS, 0)


def lived(its: Life) -> None:
    store._BOOT_ID = its.folder / "boot"
    if its.mutant in FSYNCS:
        without_fsync(its.mutant)
    device = Device(its)
    if its.mutant in ORDERS:
        ORDERS[its.mutant](device)
    _watch(device)
    device.live()


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            lived(msgspec.json.decode(line, type=Life, dec_hook=lambda kind, text: kind(text)))
            return
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
