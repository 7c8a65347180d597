"""The power is cut, or a process killed, at each instant of a life of a device's models.

(a) From every state the disk may then be in, a record is found that is not older than what was
promised, and every slot it refers to is there, whole. (b) Killed before any of its system calls,
the same program goes on to the same end. (c) With any fsync left out, or an order swapped, (a)
finds it.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.paths import PROJECT, Paths
from common.states import SlotState
from common.store import Store, parse
from tests.faults.disk_states import TRACED, Cut, Tree, cuts, trace
from tests.faults.power_cut_programs import BUNDLES, FSYNCS, ORDERS, Device, finished

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, to see the order of system calls"
)
KILLED_AT = (
    "write", "pwrite64", "ftruncate", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir",
)  # fmt: skip


@contextmanager
def place() -> Iterator[Path]:
    """A folder in memory."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


@dataclass
class Life:
    """Where one run of the program keeps what."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def marks(self) -> Path:
        return self.folder / "marks"

    def command(self, mutant: str = "") -> list[str]:
        self.root.mkdir(exist_ok=True)
        program = [sys.executable, "-m", "tests.faults.power_cut_programs"]
        run = self.folder / "run"
        return [*program, str(self.root), str(run), str(self.marks), *([mutant] if mutant else [])]

    def run(self, *prefix: str) -> int:
        return subprocess.run([*prefix, *self.command()], cwd=PROJECT).returncode

    def device(self) -> Device:
        return Device(self.root, self.folder / "run", self.marks)


def left_behind(mutant: str = "") -> Iterator[Cut]:
    """What power cuts may leave of a life."""
    with place() as folder:
        life = Life(folder)
        log = folder / "log"
        assert trace(life.command(mutant), log) == 0
        device = life.device()
        assert finished(device.store.read(), device.names)
        yield from cuts(log, life.root, life.marks)


def states() -> list[Cut]:
    """The different ones, each with the newest mark that it has to hold to."""
    return list({cut.key: cut for cut in left_behind()}.values())


def build(tree: Tree, root: Path) -> None:
    root.mkdir()
    for path, content in tree.items():  # a folder comes before what is in it
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def fault(cut: Cut, folder: Path, *, go_on: bool = False) -> str:
    """What is wrong with a state, in words; empty where nothing is. With `go_on`, whether such a
    life can also be lived to its end from here."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    life = Life(folder)
    build(cut.tree, life.root)
    paths = Paths(life.root, folder / "run")
    paths.make()
    store = Store(paths, "main", 2, "boot 2")
    sequences = [0]
    for path in store.folder.glob("state.?"):
        try:
            sequences.append(parse(path.read_bytes())[0])
        except ValueError:
            return f"{path.name} is damaged"
    if max(sequences) < cut.mark:
        return f"version {cut.mark} was promised, {max(sequences)} is the newest"
    with store.held() as record:
        pass
    listed = {name for name, slot in record.slots.items() if slot.state is not SlotState.BAD}
    for slot in record.references | listed:
        if f"models/main/slots/{slot}" in cut.twice:
            return f"the folder of slot {slot[:6]} has two names"
        if not store.verifies(slot):
            return f"slot {slot[:6]} is referred to and not whole"
    for lane in record.lanes:
        slot = record.choose(lane)
        if record.state(slot) is SlotState.BAD or not store.verifies(slot):
            return f"lane {lane} would load {slot[:6]}"
    if store.problems:
        return store.problems[0]
    if go_on:
        for name in BUNDLES:
            for end in (".tar", ".digest"):
                (folder / f"{name}{end}").write_bytes((folder.parent / f"{name}{end}").read_bytes())
        device = life.device()
        device.die_unsynced = lambda: None  # type: ignore[method-assign]
        device.live()
        if not finished(device.store.read(), device.names):
            return "it does not come to its end"
        if not all(device.store.verifies(slot) for slot in device.store.read().references):
            return "it comes to its end with a slot that is not whole"
    return ""


def faults(found: Iterable[Cut], *, go_on: bool = False, first: bool = False) -> list[str]:
    """What is wrong with states: of each that is bad its fault, or of the first one only."""
    bad = []
    with place() as folder:
        Life(folder).device()  # packs the bundles
        for cut in found:
            if why := fault(cut, folder / "state", go_on=go_on):
                bad.append(why)
                if first:
                    break
    return bad


def kill_points() -> list[tuple[str, int]]:
    """Each system call of a life that changes something: its name and its turn."""
    with place() as folder:
        log = folder / "log"
        assert trace(Life(folder).command(), log) == 0
        calls = [line.split()[1].partition("(")[0] for line in log.read_text().splitlines()]
    return [(call, n + 1) for call in KILLED_AT for n in range(calls.count(call))]


def killed(call: str, turn: int) -> str:
    """Kill the program before its call of that kind and turn, let it go on; what is wrong then."""
    with place() as folder:
        life = Life(folder)
        inject = f"inject={call}:signal=KILL:when={turn}"
        quiet = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
        if (status := life.run(*quiet)) not in (0, -signal.SIGKILL, 128 + signal.SIGKILL):
            return f"before {call} {turn}: ended with {status} instead of being killed"
        if life.run() != 0:
            return f"killed before {call} {turn} it can't go on"
        device = life.device()
        record = device.store.read()
        if not finished(record, device.names):
            return f"killed before {call} {turn} it does not come to its end: {record}"
        if not all(device.store.verifies(slot) for slot in record.references):
            return f"killed before {call} {turn}: a slot is not whole"
        if left := [path.name for path in device.store.staging.iterdir()]:
            return f"killed before {call} {turn}: {left} is left"
    return ""


@needs_strace
def test_no_power_cut_leaves_a_device_worse_off() -> None:
    found = states()
    assert faults(found) == []
    print(f"{len(found)} states")
    assert len(found) >= 50


@needs_strace
def test_a_life_goes_on_after_a_power_cut() -> None:
    assert faults(states()[::7], go_on=True) == []


@needs_strace
@pytest.mark.parametrize("mutant", [*FSYNCS, *ORDERS])
def test_each_fsync_and_each_order_is_needed(mutant: str) -> None:
    assert faults(left_behind(mutant), first=True) != []


@needs_strace
def test_a_process_killed_before_a_system_call_goes_on() -> None:
    points = kill_points()
    assert len(points) > 100
    assert [why for point in points[::16] if (why := killed(*point))] == []


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_process_killed_before_any_system_call_goes_on() -> None:
    assert [why for point in kill_points() if (why := killed(*point))] == []


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_life_goes_on_after_any_power_cut() -> None:
    assert faults(states(), go_on=True) == []


def test_the_kinds_of_system_calls_are_all_swept() -> None:
    assert set(TRACED) - set(KILLED_AT) == {"openat", "fdatasync"}
