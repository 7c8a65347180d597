"""The updater as a process: what it takes in, what it refuses, when it asks for the hand-over."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from common import slots, verdict
from common.archive import pack
from common.bus import Publisher
from common.digest import digest
from common.messages import Beat, LaneReport
from common.paths import PROJECT, Paths
from common.slots import Record
from common.states import Phase, ProcessState, SlotState, Validity
from common.store import Store
from tests import onnx_files
from tests.support import Journal, System, until

CONFIG = """
[cameras.belt]
source = "virtual"
fps = 5
[groups.main]
model = "nowhere"
shadow_frames = 20
[groups.main.gates]
latency_ratio = 1.5
[updates]
unsigned = true
"""
MANIFEST = onnx_files.manifest("colours", "2.1", 7)
LIMITS = "[limits]\nagreement = 0.8\nlatency_p99_ms = 10\n"


class Line:
    """A store, an inbox and an updater by itself."""

    def __init__(self, paths: Paths, scratch: Path) -> None:
        self.paths, self.scratch = paths, scratch
        self.config = paths.root / "vigil.toml"
        self.config.write_text(CONFIG)
        self.store = Store(paths, "main", 2)
        self.inbox = self.store.folder / "inbox"
        self.inbox.mkdir()
        self.log = paths.root / "updater.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._made = 0

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.updater.main"],
                cwd=PROJECT,
                env=os.environ | {"VIGIL_CONFIG": str(self.config)},
                stderr=log,
            )
        return self.process

    def bundle(self, manifest: str = MANIFEST, weight: float = 1) -> tuple[str, Path]:
        """Slot and tar of a small model."""
        self._made += 1
        folder = self.scratch / f"bundle-{self._made}"
        folder.mkdir()
        onnx_files.classifier(folder / "m.onnx", weight=weight)
        (folder / "manifest.toml").write_text(manifest)
        pack(folder, folder.with_suffix(".tar"))
        return digest(folder), folder.with_suffix(".tar")

    def offer(self, tar: Path, name: str = "") -> Path:
        return tar.rename(self.inbox / (name or tar.name))

    def events(self, code: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line.get("code") == code]

    def note(self, name: str, word: str) -> str:
        note = self.inbox / f"{name}.{word}"
        until(note.exists, 20, f"{note}\n{self.log.read_text()}")
        until(lambda: not (self.inbox / f"{name}.tar").exists(), 5, "the tar to go")
        return note.read_text().strip()

    def until_phase(self, phase: Phase) -> Record:
        until(lambda: self.store.read().txn.phase is phase, 20, f"{phase}")
        return self.store.read()


@pytest.fixture
def line(paths: Paths, tmp_path: Path) -> Iterator[Line]:
    one = Line(paths, tmp_path)
    yield one
    if one.process and one.process.poll() is None:
        one.process.kill()
        one.process.wait()


class Candidate:
    """Beats as those of a lane's process."""

    def __init__(self, line: Line, lane: str = "b") -> None:
        record = line.store.commit(lambda record: slots.start(record, lane))
        self.report = LaneReport(record.lanes[lane].run, record.lanes[lane].slot, True, False)
        self._name = f"inference-main-{lane}"
        self._endpoint = line.paths.endpoint(self._name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()

    def _beat(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        publisher = Publisher(context, self._endpoint)
        while not self._stop.wait(0.05):
            now = time.monotonic_ns()
            beat = Beat(self._name, 1, 1, ProcessState.RUNNING, 1, now, lane=self.report)
            publisher.publish(f"beat/{self._name}", beat)
        publisher.close()
        context.destroy(linger=0)

    def say(self, **changes: Any) -> None:
        fields = {name: getattr(self.report, name) for name in LaneReport.__struct_fields__}
        self.report = LaneReport(**fields | changes)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_a_good_bundle_is_installed_and_tested(line: Line) -> None:
    line.start()
    name, tar = line.bundle()
    line.offer(tar, "good.tar")
    assert line.note("good", "installed") == name
    record = line.until_phase(Phase.PROVING)
    assert (record.txn.lane, record.txn.slot) == ("b", name)
    slot = record.slots[name]
    assert (slot.state, slot.tries) == (SlotState.TESTING, 3)
    assert (slot.name, slot.version, slot.release) == ("colours", "2.1", 7)
    assert line.store.verifies(name)
    assert list(line.store.staging.iterdir()) == []
    assert [event["slot"] for event in line.events("model.testing")] == [name]
    # The next one waits until this one is judged.
    after, tar = line.bundle(weight=2)
    offered = line.offer(tar, "after.tar")
    with pytest.raises(AssertionError):
        until(lambda: not offered.exists(), 2, "nothing")
    line.store.commit(lambda record: slots.abandon(record, "the test says so"))
    assert line.note("after", "installed") == after
    assert line.until_phase(Phase.PROVING).txn.slot == after
    # A bad slot is never tested again.
    line.store.commit(lambda record: slots.abandon(record, "this too"))
    _, tar = line.bundle()
    line.offer(tar, "again.tar")
    assert "is bad (the test says so) and never runs again" in line.note("again", "refused")
    assert line.process is not None
    line.process.terminate()
    assert line.process.wait(10) == 0


def test_what_is_refused(line: Line) -> None:
    line.inbox.joinpath("folder.tar").mkdir()  # is in nobody's way
    line.start()
    torn = line.scratch / "torn.tar"
    torn.write_bytes(line.bundle()[1].read_bytes()[:1000])
    line.offer(torn)
    assert line.note("torn", "refused").startswith("torn.tar: is cut off at byte 1000")
    for name, manifest, words in (
        ("unreadable", "name = ", "manifest.toml: is no TOML"),
        ("wrong", MANIFEST.replace("7", "-1"), "manifest.toml: release = -1"),
        ("partial", MANIFEST.replace("m.onnx", "other.onnx"), "other.onnx"),
    ):
        line.offer(line.bundle(manifest)[1], f"{name}.tar")
        assert words in line.note(name, "refused")
    assert line.store.read().slots == {}
    assert list(line.store.slots.iterdir()) == []
    assert list(line.store.staging.iterdir()) == []
    told = [event["bundle"] for event in line.events("bundle.refused")]
    assert told[:4] == ["torn.tar", "unreadable.tar", "wrong.tar", "partial.tar"]


def test_an_unsigned_one_needs_leave(line: Line) -> None:
    line.config.write_text(CONFIG.replace("unsigned = true", "unsigned = false"))
    line.start()
    line.offer(line.bundle()[1], "a.tar")
    said = line.note("a", "refused")
    assert str(line.config) in said
    assert "updates.unsigned = true" in said


def test_no_room_is_said_once_and_the_bundle_stays(line: Line) -> None:
    process = line.start()
    until(lambda: (line.paths.run / "updater.ipc").exists(), 10, "the updater")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    name, tar = line.bundle(MANIFEST + "#" * 100_000)
    offered = line.offer(tar)
    until(lambda: line.events("bundle.delayed"), 20, "an event")
    assert "File too large" in line.events("bundle.delayed")[0]["text"]
    assert offered.exists()
    assert list(line.store.staging.iterdir()) == []
    process.kill()
    process.wait()
    line.start()
    assert line.until_phase(Phase.PROVING).txn.slot == name


def ended(process: psutil.Process) -> bool:
    try:
        return bool(
            process.status() == psutil.STATUS_ZOMBIE
        )  # nobody may be there to reap an orphan
    except psutil.NoSuchProcess:
        return True


def test_killed_at_any_time_it_goes_on(line: Line) -> None:
    """What is half unpacked goes, with the process that unpacks it."""
    name, tar = line.bundle()
    (line.store.staging / "incoming/deep").mkdir(parents=True)
    (line.store.staging / "incoming/deep/file").write_text("left")
    (line.inbox / ".b.tar.new").write_text("left")
    process = line.start()
    offered = line.offer(tar)
    child = until(lambda: psutil.Process(process.pid).children(), 20, "the child")[0]
    child.send_signal(signal.SIGSTOP)
    process.kill()
    process.wait()
    with suppress(psutil.NoSuchProcess):  # its parent's end was its own
        child.send_signal(signal.SIGCONT)
    until(lambda: ended(child), 5, "the child's end")
    assert offered.exists()
    line.start()
    assert line.until_phase(Phase.PROVING).txn.slot == name
    assert line.store.verifies(name)
    until(lambda: not list(line.store.staging.iterdir()), 5, "a clean staging")
    assert not (line.inbox / ".b.tar.new").exists()


def test_a_check_that_dies_is_a_refusal(line: Line) -> None:
    process = line.start()
    line.offer(line.bundle()[1], "a.tar")
    until(lambda: psutil.Process(process.pid).children(), 20, "the child")[0].kill()
    assert line.note("a", "refused") == "its install ended with status -9"


def candidate(line: Line, manifest: str = MANIFEST + LIMITS) -> tuple[str, Candidate]:
    line.start()
    name, tar = line.bundle(manifest)
    line.offer(tar)
    line.until_phase(Phase.PROVING)
    return name, Candidate(line)


def test_what_passes_its_gates_asks_for_the_hand_over(line: Line) -> None:
    name, lane = candidate(line)
    try:
        assert lane.report.slot == name
        right = lane.report.run
        lane.say(judged=100, agreement=0.9, infer_ms_p99=19.0, run=right - 1)  # its predecessor's
        with pytest.raises(AssertionError):
            until(lambda: line.store.read().txn.phase is not Phase.PROVING, 1.5, "nothing")
        lane.say(run=right, judged=19)  # too few
        with pytest.raises(AssertionError):
            until(lambda: line.store.read().txn.phase is not Phase.PROVING, 1.5, "nothing")
        lane.say(judged=20)
        assert line.until_phase(Phase.REQUESTED).txn.slot == name
        until(lambda: line.events("model.requested"), 5, "the event")
    finally:
        lane.stop()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"judged": 5, "failed": 1}, "1 of 5 frames could not be judged"),
        (
            {"judged": 20, "compared": 19, "agreement": 0.79},
            "agreement 0.790 with the live model over 19 frames",
        ),
        (
            {"judged": 20, "compared": 19, "agreement": 1.0, "latency_ratio": 1.6},
            "latency ratio 1.60 to the live model over 19 frames, at most 1.5",  # vigil.toml's own
        ),
    ],
)
def test_what_fails_its_gates_is_told_to_the_watchdog(
    line: Line, changes: dict[str, Any], reason: str
) -> None:
    name, lane = candidate(line)
    gates = line.paths.run / "gates-main"
    try:
        lane.say(**changes)
        until(gates.exists, 10, "the file")
        slot, said, end = gates.read_text().split("\n")
        assert (slot, end) == (name, "")
        assert reason in said
        assert line.store.read().txn.phase is Phase.PROVING, "the watchdog disposes"
        assert reason in until(lambda: line.events("model.gate_failed"), 5, "it")[0]["reason"]
        (given,) = verdict.recorded(line.store.folder, name)
        assert verdict.judge(given.inputs) == given.reason == said.strip()
        line.store.commit(lambda record: slots.abandon(record, said))
        until(lambda: not gates.exists(), 5, "nothing is under test any more")
    finally:
        lane.stop()


REAL = f"""
[cameras.belt]
source = "virtual"
fps = 15
policy = "every"
[groups.main]
model = "{PROJECT}/models/factory"
shadow_frames = 10
shadow_every = 1
prove_s = 20
soak_s = 3
[updates]
unsigned = true
"""


def factory(scratch: Path, name: str, release: int, score: float = 0.4, limits: str = "") -> Path:
    """The factory model as another release."""
    folder = scratch / name
    shutil.copytree(PROJECT / "models/factory", folder)
    manifest = (folder / "manifest.toml").read_text()
    manifest = manifest.replace("release = 1", f"release = {release}")
    manifest = manifest.replace("score = 0.4", f"score = {score}")
    (folder / "manifest.toml").write_text(f"{manifest}\n[limits]\n{limits}\n")
    pack(folder, scratch / f"{name}.tar")
    return scratch / f"{name}.tar"


def test_on_the_real_system(system: Callable[[str], System], paths: Paths, tmp_path: Path) -> None:
    """A good model comes in, a blind one does not, and the operator goes back; every frame is
    decided once."""
    line = system(REAL)
    journal = Journal(paths, "belt")
    line.until_valid()
    until(lambda: line.vigil("status").returncode == 0, 30, "a warm standby")
    done = line.vigil("install", str(factory(tmp_path, "good", 2)), "--wait", timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is known good now" in done.stdout
    until(lambda: line.vigil("status").returncode == 0, 30, "a warm standby")
    blind = factory(tmp_path, "blind", 3, score=0.99, limits="agreement = 0.9")
    done = line.vigil("install", str(blind), "--wait", timeout_s=60)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("bad: ")
    assert last.endswith("is live")
    assert "release 2" in last
    done = line.vigil("rollback", "--wait", timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "factory is known good now" in done.stdout
    journal.until_more(30)
    results = journal.stop()
    line.stop()
    sequences = [result.sequence for result in results]
    assert sequences == list(range(1, len(results) + 1))
    releases = [release for release, _ in groupby(result.release for result in results)]
    assert releases == [1, 2, 1]
    assert {result.validity for result in results} <= {Validity.VALID, Validity.STALE}
