"""What test_metadata_power_cuts.py cuts short: a device that follows a repository through several
states of it. `python -m tests.updates.metadata_programs ROOT STATES MARKS [MUTANT]`.

STATES/0, 1, … are copies of the repository. STATES/floors gets each version of the floors, a line
each, before it is written; MARKS the number of the line that was acted on.
"""

import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from common import durable
from services.updater import floors
from services.updater.floors import Floors
from services.updater.sources import FolderSource
from services.updater.trust import Trust
from tests.faults.power_cut_programs import without_fsync

NOW = datetime(2026, 12, 1, tzinfo=UTC)
FSYNCS = (
    "durable.write < floors.save",
    "durable.sync_folder < durable.write",
    "durable.sync_folder < trust.__init__#1",
    "durable.sync_folder < trust.__init__#2",
)


def open_trust(root: Path, states: Path, number: int) -> Trust:
    anchor = (states / "0/metadata/1.root.json").read_bytes()
    source = FolderSource(states / str(number))
    return Trust(root / "updates", anchor, source, clock=NOW.timestamp, built_s=0)


def numbers(states: Path) -> list[int]:
    return sorted(int(path.name) for path in states.iterdir() if path.name.isdecimal())


def line(of: Floors) -> bytes:
    return msgspec.json.encode(of)


class Device:
    def __init__(self, root: Path, states: Path, marks: Path) -> None:
        self.root, self.states = root, states
        self.marks = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        save = floors.save

        def noted(folder: Path, new: Floors) -> None:
            with (states / "floors").open("ab") as file:
                file.write(line(new) + b"\n")
            save(folder, new)

        floors.save = noted  # type: ignore[assignment]

    def mark(self, trust: Trust) -> None:
        lines = (self.states / "floors").read_bytes().splitlines()
        os.write(self.marks, b"%d\n" % (lines.index(line(trust.floors)) + 1))

    def live(self) -> None:
        for number in numbers(self.states):
            if number == 3:
                self.die_unsynced(number)
            with open_trust(self.root, self.states, number) as trust:
                trust.refresh()
                self.mark(trust)
                trust.channel("stable")
                self.mark(trust)
                if number % 2:
                    trust.raise_release("main/parts", number)
                    self.mark(trust)

    def die_unsynced(self, number: int) -> None:
        """Killed between the rename and the sync of new floors; the next one acts on them."""
        child = os.fork()
        if child == 0:
            with open_trust(self.root, self.states, number) as trust:
                sync = durable.sync_folder

                def die(folder: Path) -> None:
                    if folder == trust.folder:
                        os.kill(os.getpid(), signal.SIGKILL)
                    sync(folder)

                durable.sync_folder = die
                trust.refresh()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(root: str, states: str, marks: str, mutant: str = "") -> None:
    if mutant:
        without_fsync(mutant)
    Device(Path(root), Path(states), Path(marks)).live()


if __name__ == "__main__":
    main(*sys.argv[1:])
