"""The power is cut, or the updater killed, at each instant of a device's life of signed updates:
good ones, a bad one, a wrongly signed one, one withdrawn, one that is offered no longer, rotations.

(a) From every state the disk may then be in (`disk_states`), what was promised stands: no floor of
time, versions or releases is lower, no slot that was bad is usable, the record and every note
loads, a model is there whole; and the life goes on to its end. (b) Killed before any of its system
calls, it comes to the same end. (c) With an fsync left out, or an order swapped, (a) finds it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import slots
from common.digest import digest
from common.paths import PROJECT, Paths
from common.slots import FACTORY, Record
from common.states import SlotState
from common.store import Store, parse
from common.updates import HISTORY, Status
from scripts.bench.fleet_bench import BAD
from scripts.repository import Repository
from services.updater import budget, floors, life
from services.updater.channel import Custom
from tests.faults.disk_states import STRACE, Cut, Tree, cuts
from tests.faults.test_power_cuts import KILLED_AT, place
from tests.servers.updates import Server
from tests.updates import device as updates
from tests.updates import test_metadata_power_cuts as metadata
from tests.updates.update_programs import MUTANTS, Life, Promise

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, to see the order of system calls"
)
WRONG = "0" * 64  # signed as the content of release 4
BROKEN = b"?" * 20_000  # what a mirror has for release 2 at first
# The states of the repository, first and last, that each process lives through.
PARTS = ((0, 2), (3, 4), (5, 6), (7, 9))
MOST = 256  # states of the disk at one instant, see `cuts`
# These with each commit, the other mutants are slow.
OFTEN = {
    "durable.write < floors.save", "durable.write < life.save", "download.sync",
    "durable.sync_folder < store.adopt", "floors last",
}  # fmt: skip


class Owner:
    """Publishes what happens in a life, a copy of the repository each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "states", folder / "scratch"
        now = datetime.now(UTC) - timedelta(hours=12)
        self.repo = Repository.init(folder / "repository", [folder / "keys"], now=now)
        self.count, self.slots = 0, set[str]()
        self.release(1)
        self.keep()
        self.release(2)
        self.tar(self.keep(), 2).write_bytes(BROKEN)
        self.repo.rotate(["root", "timestamp"])
        self.keep()
        self.release(3, BAD)
        self.keep()
        self.sign_wrongly(4)
        self.keep()
        self.release(5)
        self.keep()
        self.repo.withdraw("stable", "parts", 5, "it misses cracks", fallback=2)
        self.keep()
        before = self.repo.channel("stable")
        self.release(6)
        tar = self.tar(self.keep(), 6)
        tar.write_bytes(tar.read_bytes()[:6000])  # still on its way to the mirror
        with self.repo._changing() as state:
            serial = self.repo._channel(state, "stable").serial
            self.repo._put(state, "stable", msgspec.structs.replace(before, serial=serial))
        self.keep()
        self.repo.rotate(["targets", "snapshot"])
        self.release(6)
        self.keep()
        tars = self.repo.targets.glob("bundles/parts/*/*.tar")
        self.tars = {tar.name.partition(".")[0]: tar.read_bytes() for tar in tars}

    def keep(self) -> Path:
        copy = self.folder / str(self.count)
        shutil.copytree(self.repo.folder, copy)
        self.count += 1
        assert self.repo.now is not None
        self.repo.now += timedelta(hours=1)
        return copy

    def tar(self, folder: Path, release: int) -> Path:
        [tar] = folder.glob(f"targets/bundles/parts/{release}/*.tar")
        return tar

    def release(self, release: int, more: str = "") -> None:
        tar = updates.bundle(self.scratch, release, more=more)
        self.slots.add(digest(tar.with_suffix("")))
        self.repo.add_bundles(tar)
        self.repo.set_channel("stable", "main", "parts", release)

    def sign_wrongly(self, release: int) -> None:
        """Its content is not what is signed."""
        content = updates.bundle(self.scratch, release).read_bytes()
        custom = Custom(name="parts", version=f"1.{release}", release=release, profile="any",
                        slot=WRONG, published=datetime.now(UTC))  # fmt: skip
        path = f"bundles/parts/{release}/any.tar"
        updates.sign(self.repo, path, content, msgspec.to_builtins(custom))
        self.repo.set_channel("stable", "main", "parts", release)


class Nursery:
    """A process that has loaded all that lives need, and lives each in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.updates.update_programs"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT,
            env=os.environ | {"SSL_CERT_FILE": "/dev/null"},  # the system's take long to load
        )  # fmt: skip

    def live(self, its: Life, *strace: str) -> int:
        """
        Args:
            strace: a command to trace it by.

        Returns:
            Its exit status.
        """
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(its, enc_hook=str) + b"\n")
        self._process.stdin.flush()
        pid = self._said()
        tracer = None
        if strace:
            tracer = subprocess.Popen([*strace, "-p", str(pid)], stderr=subprocess.PIPE)
            assert tracer.stderr
            assert b"attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        status = self._said()
        if tracer:
            tracer.communicate()
        return status

    def _said(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class World:
    """A repository, a web server that shows one of its states, and who lives there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.owner = Owner(folder)
        self.served = self.owner.folder / "now"
        self.server, self.nursery = Server(self.owner.folder), Nursery()

    def close(self) -> None:
        self.nursery.close()
        self.server.close()

    def life(self, **kind: Any) -> Life:
        """A new one, on an empty disk."""
        self.count += 1
        its = Life(self.folder / f"life-{self.count}", self.served, **kind)
        its.root.mkdir(parents=True)
        (its.folder / "boot").write_text("1")
        (its.folder / "root.json").write_bytes(self.owner.repo.anchor)
        url = f'url = "{self.server.url}/{self.served.name}"\n'
        (its.folder / "vigil.toml").write_text(updates.CONFIG + url)
        return its


@contextmanager
def world() -> Iterator[World]:
    with place() as folder, closing(World(folder)) as one:
        yield one


def summary(its: Life) -> tuple[Any, ...]:
    """What a life has come to."""
    store = Store(Paths(its.root, its.folder / "run"), "main", 2)
    record, folder = slots.clean_up(store.read()), its.root / "updates"
    assert all(store.verifies(slot) for slot in record.references)
    noted, _ = life.load(folder / "txn-main.json")
    told = {(s.release, s.step, s.outcome) for s in life.history(folder / HISTORY)}
    return (
        record.known_good, record.previous, record.txn,
        {name: lane.slot for name, lane in record.lanes.items()},
        {name: (slot.state, slot.reason) for name, slot in record.slots.items()},
        noted, floors.load(folder), sorted(path.name for path in (folder / "partial").iterdir()),
        {one for one in told if one[1] == "good" or one[2] == "failed"},
    )  # fmt: skip


class Disk:
    """A folder that becomes one state of the disk after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._tree = folder, Tree()

    def become(self, tree: Tree) -> None:
        was, self._tree = self._tree, tree
        for path in reversed(list(was)):  # what is in a folder goes before it
            if path not in tree or (tree[path] is None) != (was[path] is None):
                one = self.folder / path
                one.rmdir() if was[path] is None else one.unlink()
                del was[path]
        for path, content in tree.items():
            if path not in was and content is None:
                (self.folder / path).mkdir()
            elif content is not None and was.get(path) != content:
                (self.folder / path).write_bytes(content)


class Lived:
    """One life, each part of it by a process of its own; what it came to in each, and what power
    cuts may leave of it."""

    def __init__(self, where: World, mutant: str = "") -> None:
        self.world, self.its = where, where.life(mutant=mutant)
        last = MUTANTS.get(mutant, len(PARTS))
        its, self.log, self.ends = self.its, self.its.folder / "log", list[tuple[Any, ...]]()
        for part, states in enumerate(PARTS[: last + 1]):
            its.first, its.last = states
            shutil.copytree(its.root, its.folder / str(part))
            assert where.nursery.live(its, *STRACE, "-A", "-o", str(self.log)) == 0
            self.ends.append(summary(its))
        lines = (its.folder / "promises").read_bytes().splitlines()
        self.promises = [Promise(0), *(msgspec.json.decode(line, type=Promise) for line in lines)]
        self.floors = list(dict.fromkeys(str(one.floors) for one in self.promises))

    def cuts(self) -> Iterator[Cut]:
        # `durable.write` empties a new file that it finds.
        return cuts(self.log, self.its.root, self.its.folder / "marks", MOST, unread=(".new",))

    def left(self) -> list[Cut]:
        """The different states, each with the newest mark that it has to hold to."""
        return list({cut.key: cut for cut in self.cuts()}.values())

    def fault(self, cut: Cut, root: Path) -> str:
        """What is wrong with a state that lies in `root`; empty where nothing is."""
        promise, folder = self.promises[cut.mark], root / "updates"
        found, damaged = floors.load(folder)
        if damaged:
            return f"floors: {damaged} are damaged"
        if self.floors.index(str(found)) < self.floors.index(str(promise.floors)):
            return f"floors: {promise.floors} were acted on, {found} are there"
        versions = [(0, Record(lanes={}))]
        for path in (root / "models/main").glob("state.?"):
            try:
                versions.append(parse(path.read_bytes()))
            except ValueError:
                return f"record: {path.name} is damaged"
        sequence, record = max(versions, key=lambda version: version[0])
        if sequence < promise.sequence:
            return f"record: version {promise.sequence} was told, {sequence} is the newest"
        if usable := [slot for slot in promise.bad if record.state(slot) is not SlotState.BAD]:
            return f"record: slot {usable[0][:6]} was bad, and is not any more"
        slot = record.slots.get(record.known_good)
        if max(found.releases.get("main/parts", 0), slot.release if slot else 0) < promise.release:
            return f"floors: release {promise.release} was good, and may be gone below"
        if unsigned := record.slots.keys() - self.world.owner.slots:
            return f"slots: {unsigned} were never signed"
        loaded = {record.chain(), *map(record.choose, record.lanes)} - {FACTORY}
        for name in record.references | loaded:
            place = f"models/main/slots/{name}"
            if place in cut.twice or not (root / place).is_dir() or digest(root / place) != name:
                return f"slots: {name[:6]} is referred to and not whole"
        return self.damage(cut, folder, promise)

    def damage(self, cut: Cut, folder: Path, promise: Promise) -> str:
        """Of the updater's own notes."""
        noted, problem = life.load(folder / "txn-main.json")
        if problem or not promise.refused <= noted.refused.keys():
            return problem or f"txn: {promise.refused} were refused, {noted.refused} are there"
        if (told := folder / HISTORY).exists():
            try:
                count = len(msgspec.json.decode(told.read_bytes(), type=list[Status]))
            except msgspec.MsgspecError as error:
                return f"history: {error}"
            if count < promise.statuses:
                return f"history: {promise.statuses} were told, {count} are there"
        spent = budget._Spent()
        if (path := folder / "budget.json").exists():
            try:
                spent = msgspec.json.decode(path.read_bytes(), type=budget._Spent)
            except msgspec.MsgspecError as error:
                return f"budget: {error}"
        for sha256, moved in promise.moved.items():
            known = noted.update is not None and noted.update.sha256 == sha256
            if known and spent.updates.get(sha256, 0) < moved:
                return f"budget: {moved} bytes were moved, {spent.updates} are counted"
        for note in (folder / "partial").glob("*.synced"):
            synced = int(note.read_bytes())
            right = self.world.owner.tars[note.stem][:synced]
            file = folder / "partial" / note.stem
            if file.exists() and file.read_bytes()[:synced] not in (right, BROKEN[:synced]):
                return f"partial: {synced} bytes are synced, and are not there"
        return ""

    def stuck(self, cut: Cut) -> str:
        """What keeps the life from going on, from that state of the disk."""
        its = self.world.life(first=self.promises[cut.mark].state)
        (its.folder / "boot").write_text("2")
        Disk(its.root).become(cut.tree)
        part = next(n for n, (_, last) in enumerate(PARTS) if its.first <= last)
        return self.differs(its, part)

    def differs(self, its: Life, part: int) -> str:
        """What a life that goes on to the end of a part comes to that it should not."""
        its.last = PARTS[part][1]
        try:
            if status := self.world.nursery.live(its):
                return f"it ends with {status}"
            pairs = zip(summary(its), self.ends[part], strict=True)
            return next(
                (f"{found}, expected {right}" for found, right in pairs if found != right), ""
            )
        finally:
            shutil.rmtree(its.folder)

    def kill_points(self) -> list[tuple[int, str, int]]:
        """Each system call that changes something: part of the life, its name and turn."""
        calls: dict[str, Counter[str]] = {}
        points = []
        here = "".join(f"\\x{byte:02x}" for byte in os.fsencode(self.its.root))
        for line in self.log.read_text().splitlines():
            pid, call, *_ = re.split(r"[ (]+", line)
            counter = calls.setdefault(pid, Counter())
            counter[call] += 1
            if call in KILLED_AT and (here in line or call == "pwrite64"):
                points.append((len(calls) - 1, call, counter[call]))
        return points

    def killed(self, part: int, call: str, turn: int) -> str:
        """Kill it before that call, let it go on; what is wrong then."""
        its = self.world.life()
        its.first, its.last = PARTS[part]
        its.root.rmdir()
        shutil.copytree(self.its.folder / str(part), its.root)
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={turn}"]
        status = self.world.nursery.live(its, "strace", "-f", "-o", "/dev/null", *inject)
        where = f"killed before {call} {turn} of part {part}"
        if status != -signal.SIGKILL:
            return f"{where}: ended with {status} instead"
        if (told := its.folder / "promises").exists() and (lines := told.read_bytes().splitlines()):
            its.first = msgspec.json.decode(lines[-1], type=Promise).state
        why = self.differs(its, part)
        return f"{where}: {why}" if why else ""

    def faults(self, found: Iterable[Cut], *, first: bool = False) -> list[str]:
        """What is wrong with states: of each that is bad its fault, or of the first one only."""
        bad = []
        with place() as folder:
            disk = Disk(folder)
            for cut in found:
                disk.become(cut.tree)
                if why := self.fault(cut, folder):
                    bad.append(why)
                    if first:
                        break
        return bad


def figures(every: int) -> dict[str, int]:
    """How many states there are, here and while metadata is followed, and how many are bad.

    Args:
        every: from each so-manieth state the life goes on.
    """
    with place() as folder:
        states = metadata.published(folder)
        followed = metadata.Life(states, folder)
        found = {cut.key: cut for cut in followed.left_behind()}.values()
        bad = list(followed.faults(found, go_on=True))
    with world() as one:
        lived = Lived(one)
        left = lived.left()
        bad += lived.faults(left) or [why for cut in left[::every] if (why := lived.stuck(cut))]
    for why in bad:
        print(why, file=sys.stderr)
    return {
        "crash_states": len(found) + len(left),
        "crash_states_bad": len(bad),
        "floor_lowered": sum("floors" in why for why in bad),
    }


@pytest.fixture(scope="module")
def the_world() -> Iterator[World]:
    with world() as one:
        yield one


@pytest.fixture(scope="module")
def lived(the_world: World) -> Lived:
    return Lived(the_world)


@pytest.fixture(scope="module")
def left(lived: Lived) -> list[Cut]:
    return lived.left()


def some(of: list[Any], count: int) -> list[Any]:
    """An even sample."""
    return of[:: len(of) // count]


def test_no_power_cut_takes_back_what_an_update_has_told(lived: Lived, left: list[Cut]) -> None:
    print(f"{len(left)} states")
    assert len(left) > 1000
    assert lived.faults(left) == []


def test_updates_go_on_after_a_power_cut(lived: Lived, left: list[Cut]) -> None:
    assert [why for cut in some(left, 8) if (why := lived.stuck(cut))] == []


def test_an_updater_killed_before_a_system_call_goes_on(lived: Lived) -> None:
    points = lived.kill_points()
    assert len(points) > 1000
    assert [why for point in some(points, 6) if (why := lived.killed(*point))] == []


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=() if m in OFTEN else pytest.mark.slow) for m in MUTANTS]
)
def test_each_fsync_and_each_order_is_needed(the_world: World, mutant: str) -> None:
    one = Lived(the_world, mutant)
    assert one.faults(one.cuts(), first=True) != []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_updates_go_on_after_any_power_cut(lived: Lived, left: list[Cut]) -> None:
    assert [why for cut in left if (why := lived.stuck(cut))] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_updater_killed_before_any_system_call_goes_on(lived: Lived) -> None:
    assert [why for point in lived.kill_points() if (why := lived.killed(*point))] == []
