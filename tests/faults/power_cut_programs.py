"""What test_power_cuts.py cuts short: a life of a device's models, from the first boot to the
fourth update. `python -m tests.faults.power_cut_programs ROOT RUN MARKS [MUTANT]`.

It asks the record what to do next, so that it goes on where it was killed. In MARKS it notes, by
sequence number, each version of the record whose commit returned, or which it acted on.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import archive, durable, slots
from common.digest import digest
from common.paths import Paths
from common.slots import FACTORY, Record, Slot
from common.states import Phase, SlotState
from common.store import Store, parse

BOOT = "boot 1"
BUNDLES = ("one", "two", "three", "four")


def bundle(name: str) -> dict[str, bytes]:
    return {"manifest.toml": f"name = {name!r}\n".encode(), "samples/1.bin": name.encode() * 40}


class Device:
    def __init__(self, root: Path, run: Path, marks: Path) -> None:
        paths = Paths(root, run)
        paths.make()
        self.marks = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.tars = [marks.with_name(f"{name}.tar") for name in BUNDLES]
        for tar, name in zip(self.tars, BUNDLES, strict=True):
            if not tar.exists():
                self.pack(tar, name)
        self.names = [tar.with_suffix(".digest").read_text() for tar in self.tars]
        self.store = Store(paths, "main", 2, BOOT)

    def pack(self, tar: Path, name: str) -> None:
        folder = tar.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in bundle(name).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        tar.with_suffix(".digest").write_text(digest(folder))
        archive.pack(folder, tar)

    def mark(self) -> None:
        """What is visible now was committed, or acted on: no power cut may take it back."""
        versions = (path.read_bytes() for path in self.store.folder.glob("state.?"))
        os.write(self.marks, b"%d\n" % max(parse(content)[0] for content in versions))

    def commit(self, change: Callable[[Record], Record]) -> None:
        self.store.commit(change)
        self.mark()

    def install(self, number: int) -> None:
        self.clean_up()
        into = self.store.staging / "incoming"
        name = archive.unpack(self.tars[number], into)
        self.store.adopt(into, name, Slot(SlotState.INSTALLED, name=BUNDLES[number]))
        self.mark()

    def clean_up(self) -> None:
        for left in self.store.staging.glob("*"):
            shutil.rmtree(left)
        self.store.clean_up()
        self.mark()

    def next_step(self) -> Callable[[], object] | None:
        record = self.store.read()
        txn, lane = record.txn, record.lanes.get(record.txn.lane)
        if txn.phase is Phase.SOAK:
            if txn.slot == self.names[3]:
                return lambda: self.commit(lambda r: slots.fail_soak(r, "it is wrong"))
            return lambda: self.commit(slots.mark_good)
        if txn.phase is Phase.REQUESTED:
            return lambda: self.commit(slots.hand_over)
        if lane is not None and not lane.trying:
            return lambda: self.commit(lambda r: slots.start(r, txn.lane))
        if txn.phase is Phase.PROVING:
            return lambda: self.commit(slots.request)
        known = [n for n, name in enumerate(self.names) if record.state(name) is not None]
        last = known[-1] if known else -1
        state = record.state(self.names[last]) if known else None
        if state is SlotState.INSTALLED:
            return partial(self.commit, partial(slots.activate, name=self.names[last]))
        if state is SlotState.GOOD and last == 2:
            return lambda: self.commit(lambda r: slots.roll_back(r, "by hand"))
        return None if last == 3 else partial(self.install, last + 1)

    def live(self) -> None:
        """All of its life that is left."""
        self.commit(lambda record: slots.start(record, "a"))
        self.die_unsynced()
        while step := self.next_step():
            step()
        self.clean_up()

    def die_unsynced(self) -> None:
        """A lane is killed between the rename and the sync of its start; the next holder acts."""
        child = os.fork()
        if child == 0:
            sync = durable.sync_folder
            kept = self.store.folder

            def die(folder: Path) -> None:
                if folder == kept:
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(folder)

            durable.sync_folder = die
            self.store.commit(lambda record: slots.start(record, "b"))
        os.waitpid(child, 0)
        with self.store.held():
            self.mark()


def finished(record: Record, names: list[str]) -> bool:
    """Whether a record is what such a life ends with."""
    expected = [None, SlotState.GOOD, SlotState.BAD, SlotState.BAD]
    return (
        record.known_good == names[1]
        and record.previous == FACTORY
        and {lane.slot for lane in record.lanes.values()} == {names[1]}
        and [record.state(name) for name in names] == expected
        and record.txn.phase is Phase.NONE
    )


# -- breakages -----------------------------------------------------------------------------------


def caller(depth: int) -> str:
    """`file.function` of who called, outside this module, innermost first."""
    frame = sys._getframe(1)
    found: list[str] = []
    while frame is not None and len(found) < depth:
        if frame.f_code.co_filename != __file__:
            name = Path(frame.f_code.co_filename).stem
            found.append(f"{name}.{frame.f_code.co_name}")
        assert frame.f_back is not None
        frame = frame.f_back
    return " < ".join(found)


def without_fsync(where: str) -> None:
    """Leave out the calls of fsync that come from `where`; `where#2`: each second one of them."""
    fsync, (site, _, turn) = os.fsync, where.partition("#")
    seen = 0

    def selective(fd: int) -> None:
        nonlocal seen
        if caller(site.count("<") + 1).startswith(site):
            seen += 1
            if not turn or seen % 2 == int(turn) % 2:
                return
        fsync(fd)

    os.fsync = selective  # type: ignore[assignment]


def clean_up_swapped() -> None:
    """The folders go before the reference."""

    def clean_up(self: Store) -> list[str]:
        with self.held() as record:
            changed = slots.clean_up(record)
            for path in self.slots.iterdir():
                if path.name not in changed.references:
                    path.rename(self.staging / f"{path.name}.gone")
            if changed != record:
                self._write(changed, volatile=False)
        for path in self.staging.glob("*.gone"):
            shutil.rmtree(path)
        return []

    Store.clean_up = clean_up  # type: ignore[method-assign]


def reference_first() -> None:
    """A slot is referred to before its folder is there."""
    adopt = Store.adopt

    def early(self: Store, unpacked: Path, name: str, slot: Slot) -> Record:
        self.commit(lambda record: slots.install(record, name, slot))
        return adopt(self, unpacked, name, slot)

    Store.adopt = early  # type: ignore[method-assign]


def in_place() -> None:
    """The record is written over."""

    def write(path: Path, content: bytes, mode: int = 0o640) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        os.write(fd, content)
        os.fsync(fd)
        os.close(fd)
        durable.sync_folder(path.parent)

    durable.write = write


FSYNCS = (
    "durable.write",
    "durable.sync_folder < durable.write",
    "durable.sync_folder < store.held",
    "durable.sync_folder < store._settled#1",
    "durable.sync_folder < store._settled#2",
    "durable.sync_folder < store.adopt#1",
    "durable.sync_folder < store.adopt#2",
    "archive._write",
    "durable.sync_folder < archive._write",
)
ORDERS = {
    "clean-up swapped": clean_up_swapped,
    "reference first": reference_first,
    "in place": in_place,
}


def main(root: str, run: str, marks: str, mutant: str = "") -> None:
    if mutant in ORDERS:
        ORDERS[mutant]()
    elif mutant:
        without_fsync(mutant)
    Device(Path(root), Path(run), Path(marks)).live()


if __name__ == "__main__":
    main(*sys.argv[1:])
