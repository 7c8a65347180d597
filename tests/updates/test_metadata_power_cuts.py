"""The power is cut at each instant while a device follows a repository, root rotation included.

From every state that the disk may then be in (`disk_states`) the floors are there, no lower than
what was acted on, and the next check succeeds. With any fsync left out, that is found.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from common.errors import UntrustedError, VigilError
from scripts.repository import Repository
from services.updater import floors
from services.updater.floors import Floors
from tests.faults.disk_states import Cut, Tree, cuts, trace
from tests.updates.metadata_programs import FSYNCS, NOW, line, numbers, open_trust

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, to see the order of system calls"
)


# What each state of the repository is made by; without a rotation by a new channel.
ROTATED: list[list[str]] = [[], [], ["root", "timestamp"], [], ["targets", "snapshot", "timestamp"]]


@contextmanager
def place() -> Iterator[Path]:
    """A folder in memory."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


def published(folder: Path) -> Path:
    """The repository as it was, one state after the other."""
    repo = Repository.init(folder / "repo", [folder / "keys"], now=NOW - timedelta(hours=9))

    def publish() -> None:
        assert repo.now is not None
        repo.now += timedelta(hours=1)
        with repo._changing() as state:
            repo._put(state, "stable", repo._channel(state, "stable", new=True))

    for number, rotated in enumerate(ROTATED):
        repo.rotate(rotated) if rotated else publish()
        shutil.copytree(repo.folder, folder / "states" / str(number))
    return folder / "states"


@pytest.fixture(scope="module")
def states() -> Iterator[Path]:
    with place() as folder:
        yield published(folder)


class Life:
    """One run of the program, in an empty folder."""

    def __init__(self, states: Path, folder: Path, mutant: str = "") -> None:
        self.states, self.folder = states, folder
        self.paths = (folder / "log", folder / "root", folder / "marks")
        log, root, marks = self.paths
        root.mkdir()
        noted = states / "floors"
        noted.unlink(missing_ok=True)
        program = [sys.executable, "-m", "tests.updates.metadata_programs"]
        more = [mutant] if mutant else []
        assert trace([*program, str(root), str(states), str(marks), *more], log) == 0
        self.known = [line(Floors()), *noted.read_bytes().splitlines()]

    def left_behind(self) -> Iterator[Cut]:
        """What power cuts may leave of it."""
        return cuts(*self.paths)

    def faults(self, found: Iterable[Cut], *, go_on: bool = False) -> Iterator[str]:
        for cut in found:
            if why := self.fault(cut, self.folder / "cut", go_on=go_on):
                yield why

    def fault(self, cut: Cut, root: Path, *, go_on: bool = False) -> str:
        """What is wrong with a state, in words; empty where nothing is."""
        shutil.rmtree(root, ignore_errors=True)
        build(cut.tree, root)
        found, damaged = floors.load(root / "updates")
        if damaged:
            return f"{damaged} are damaged"
        if self.known.index(line(found)) < cut.mark:
            return f"floors {cut.mark} were acted on, {self.known.index(line(found))} are there"
        if not go_on:
            return ""
        first, *_, last = numbers(self.states)
        if cut.mark:
            with open_trust(root, self.states, first) as trust:
                try:
                    trust.refresh()
                    if self.known.index(line(trust.floors)) < cut.mark:
                        return "an old state of the repository lowers the floors"
                except UntrustedError:
                    pass
        with open_trust(root, self.states, last) as trust:
            try:
                trust.refresh()
                trust.channel("stable")
            except VigilError as error:
                return f"the next check fails: {error}"
            if trust.problems or trust.floors.serials["stable"].value != 3:
                return f"{trust.problems or trust.floors}"
        return ""


def build(tree: Tree, root: Path) -> None:
    root.mkdir()
    for path, content in tree.items():  # a folder comes before what is in it
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


@pytest.fixture(scope="module")
def life(states: Path) -> Iterator[Life]:
    with place() as folder:
        yield Life(states, folder)


@pytest.fixture(scope="module")
def left(life: Life) -> list[Cut]:
    """The different states, each with the newest mark that it has to hold to."""
    return list({cut.key: cut for cut in life.left_behind()}.values())


def test_no_power_cut_lowers_a_floor(life: Life, left: list[Cut]) -> None:
    print(f"{len(left)} states")
    assert len(left) > 100
    assert list(life.faults(left)) == []


def test_updates_go_on_after_any_power_cut(life: Life, left: list[Cut]) -> None:
    assert list(life.faults(left, go_on=True)) == []


@pytest.mark.parametrize("mutant", FSYNCS)
def test_each_fsync_is_needed(states: Path, mutant: str) -> None:
    with place() as folder:
        life = Life(states, folder, mutant)
        assert next(life.faults(life.left_behind()), "") != ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_metadata_that_was_left_torn_is_fetched_again(states: Path) -> None:
    with place() as folder:
        life = Life(states, folder, "durable.write < trust._persist_file")
        torn = list({cut.key: cut for cut in life.left_behind()}.values())
        assert list(life.faults(torn[::20], go_on=True)) == []
