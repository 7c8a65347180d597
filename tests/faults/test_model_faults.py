"""Faults of models, on the real system with a pretend accelerator: whatever a candidate or a live
model does, every frame is judged once, and the device finds its own way back."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from common import slots, supervisor, verdict
from common.archive import pack
from common.messages import Result
from common.paths import PROJECT, Paths
from common.slots import FACTORY, Record
from common.states import Phase, SlotState, Validity
from scripts.bench.lanes import Lanes
from services.capture.scene import Scene
from tests import fake_delegate
from tests.onnx_files import save
from tests.support import Journal, System, balanced, until

Start = Callable[[str], System]

RENDERED = 'source = "virtual"\nprerender = 60\nfps = 30'
CONFIG = """
[cameras.belt]
CAMERA
policy = "every"
slots = 64
stale_after_s = 10.0
[groups.main]
model = "MODEL"
load_s = 5.0
shadow_frames = 10
shadow_every = 2
soak_s = 2.0
prove_s = 60.0
[updates]
unsigned = true
"""
INSTALL = (sys.executable, "-m", "services.updater.install")
FACTORY_MODEL = f"{PROJECT}/models/factory"


class Line:
    """The real system, its record, its journal, and a workbench for bundles."""

    def __init__(
        self, start: Start, paths: Paths, folder: Path, device: Path, config: str = CONFIG
    ) -> None:
        self.paths, self.folder, self.device = paths, folder, device
        config = config.replace("MODEL", FACTORY_MODEL).replace("CAMERA", RENDERED)
        self.system = start(config)
        self.system.until_valid()
        self.lanes = Lanes(paths)
        self.store = self.lanes.store
        self.journal = Journal(paths, "belt")
        self.journal.until_more(1)
        self._release = 1

    def close(self) -> None:
        self.journal.stop()
        self.lanes.close()

    @property
    def record(self) -> Record:
        return self.store.read()

    def until_standby(self) -> None:
        self.lanes.until_standby(30)

    def lanes_on(self, slot: str) -> bool:
        return {lane.slot for lane in self.record.lanes.values()} == {slot}

    def decided_after(self, epoch: int) -> bool:
        return self.journal.results[-1].epoch > epoch

    def bundle(self, library: Path | None, limits: str = "", name: str = "candidate") -> Path:
        """A folder: the factory model, on the accelerator where there is a library."""
        self._release += 1
        path = self.folder / f"{name}-{self._release}"
        if library is not None:
            fake_delegate.bundle(path, library, cpu=False)
        else:
            shutil.copytree(FACTORY_MODEL, path)
        manifest = path / "manifest.toml"
        text = manifest.read_text().replace("release = 1", "release = 2")
        text = text.replace("release = 2", f"release = {self._release}")
        manifest.write_text(text + limits)
        return path

    def offer(self, bundle: Path) -> str:
        """Install it as a user does; returns its slot."""
        tar = bundle.with_suffix(".tar")
        pack(bundle, tar)
        known = set(self.record.slots)
        done = self.system.vigil("install", str(tar), timeout_s=60)
        assert done.returncode == 0, done.stderr
        (slot,) = set(self.record.slots) - known
        return slot

    def until_state(self, slot: str, state: SlotState, timeout_s: float = 60) -> Record:
        def reached() -> bool:
            known = self.record.slots.get(slot)
            return known is not None and known.state is state

        try:
            until(reached, timeout_s, f"slot {slot[:12]} is {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.record}\n{self.events()}") from error
        return self.record

    def verdicts(self, slot: str, count: int) -> Callable[[], Any]:
        """Those on a slot, once there are so many."""

        def noted() -> list[verdict.Verdict] | None:
            found = verdict.recorded(self.store.folder, slot)
            return found if len(found) >= count else None

        return noted

    def events(self, code: str = "") -> list[str]:
        """The texts of events, as they are logged."""
        texts = []
        for path in self.paths.logs.glob("*.log"):
            for line in path.read_text().splitlines():
                if line.startswith("{") and code in (event := json.loads(line)).get("code", ""):
                    texts.append(f"{event['process']}: {event['code']}: {event['text']}")
        return texts

    def stop(self, *, overrun: bool = False) -> list[Result]:
        """In good order; every frame was judged once, without a gap.

        `overrun`: nobody judged for longer than the ring is, and what came meanwhile was counted.
        """
        self.journal.until_more(10)
        account = self.system.stop()["cameras"]["belt"]
        results = self.journal.stop()
        sequences = sorted([*(result.sequence for result in results), *self.journal.missed])
        assert balanced(account)
        assert account["skipped"] == account["torn"] == 0
        assert overrun or account["overrun"] == 0
        assert sequences == list(range(sequences[0], sequences[-1] + 1)), "a gap, or twice"
        return results


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pretend accelerator's device: a file, whose content asks for faults."""
    path = tmp_path / "device"
    path.write_text("")
    monkeypatch.setenv("FAKE_DEVICE", str(path))
    return path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_delegate.build(tmp_path_factory.mktemp("delegate"))


@pytest.fixture
def line(system: Start, paths: Paths, tmp_path: Path, device: Path) -> Iterator[Line]:
    one = Line(system, paths, tmp_path, device)
    yield one
    one.close()


def add_samples(bundle: Path, *, right: bool = True) -> Path:
    """Pictures of the scene with what is there; or with what is elsewhere."""
    folder = bundle / "samples"
    folder.mkdir()
    scene, rows = Scene(640, 480, seed=3), []
    for index in range(0, 80, 10):
        picture, truth = scene.render(index)
        cv2.imwrite(str(folder / f"{index}.png"), picture)
        shift = 0.0 if right else 300.0
        items = [
            {"label": item.label, "box": [value + shift for value in item.box]} for item in truth
        ]
        rows.append({"file": f"{index}.png", "items": items})
    (folder / "samples.json").write_text(json.dumps(rows))
    return bundle


def made(folder: Path, nodes: list[Any], constants: dict[str, Any]) -> Path:
    """A bundle of an ONNX classifier whose logits are `means` and then `nodes`."""
    folder.mkdir()
    nodes = [("ReduceMean", ["x"], ["means"], {"axes": [2, 3], "keepdims": 0}), *nodes]
    save(folder / "model.onnx", nodes, (1, 3), constants=constants)
    (folder / "manifest.toml").write_text(
        'name = "made"\nversion = "1"\nrelease = 9\ntask = "classification"\n'
        '[[variants]]\nruntime = "onnxruntime"\nfile = "model.onnx"\n'
        '[input]\nresize = "stretch"\ncolour = "rgb"\nscale = 255\nlayout = "nchw"\n'
        '[decoder]\nkind = "classification"\nactivation = "softmax"\n'
    )
    return folder


def nan_bundle(folder: Path) -> Path:
    return made(folder, [("Mul", ["means", "nan"], ["y"], {})], {"nan": np.float32("nan")})


def huge_bundle(folder: Path) -> Path:
    """It wants 1.4 TB when it runs."""
    nodes = [
        ("ConstantOfShape", ["shape"], ["huge"], {}),
        ("ReduceMean", ["huge"], ["mean"], {"keepdims": 0}),
        ("Add", ["means", "mean"], ["y"], {}),
    ]
    return made(folder, nodes, {"shape": np.array([600_000, 600_000])})


# What the device does to a candidate before its hand-over, and what it is called bad for.
ASKED = {
    "crashes at load": ("FAKE_CRASH=create", "tries are used up"),
    "hangs at load": ("FAKE_HANG=create", "tries are used up"),
    "crashes in a native call": ("FAKE_CRASH=invoke\nFAKE_AFTER=60", "tries are used up"),
    "hangs in a native call": ("FAKE_HANG=invoke\nFAKE_AFTER=20", "tries are used up"),
    "is ten times slower": ("FAKE_SLOW_MS=120", "latency p99"),
    "detects nothing": ("FAKE_BLIND=1", "accuracy"),
}


@pytest.mark.timeout(240)
def test_a_candidate_that_fails_its_proof_never_decides(line: Line, library: Path) -> None:
    """One after the other, on one system: each is bad for its own reason, none is ever live."""
    epoch = line.record.epoch
    limits = "[limits]\naccuracy = 0.7\nlatency_p99_ms = 100\n"
    for what, (content, reason) in ASKED.items():
        bundle = add_samples(line.bundle(library, limits))
        line.device.write_text(content)
        slot = line.offer(bundle)
        record = line.until_state(slot, SlotState.BAD)
        assert reason in record.slots[slot].reason, what
        assert (record.live, record.known_good, record.epoch) == ("a", FACTORY, epoch), what
        assert not line.store.path(slot).exists() or line.record.references.isdisjoint({slot})
        line.device.write_text("")
        again = line.system.vigil("install", str(bundle.with_suffix(".tar")), timeout_s=60)
        assert again.returncode == 1, "a bad release is not tried again"
        assert "bad" in again.stderr
    # Without samples to fail on: the live lane, in whose shadow it runs, sees more, and sooner.
    for content, limit in (
        ("FAKE_BLIND=1", "agreement = 0.8"),
        ("FAKE_SLOW_MS=60", "latency_ratio = 2"),
    ):
        line.device.write_text(content)
        slot = line.offer(line.bundle(library, f"[limits]\n{limit}\n"))
        reason = line.until_state(slot, SlotState.BAD).slots[slot].reason
        assert reason.startswith(limit.split(" =")[0].replace("_", " "))
        (given,) = verdict.recorded(line.store.folder, slot)
        assert verdict.judge(given.inputs) == given.reason == reason
    for bundle, reason in (
        (add_samples(line.bundle(None, limits), right=False), "accuracy"),
        (nan_bundle(line.folder / "nan"), "NaN"),
        (huge_bundle(line.folder / "huge"), "alloc"),
    ):
        record = line.until_state(slot := line.offer(bundle), SlotState.BAD)
        assert reason in record.slots[slot].reason
    line.until_standby()
    results = line.stop()
    assert {result.validity for result in results} == {Validity.VALID}
    assert {result.model for result in results} == {"factory"}


@pytest.mark.parametrize("content", ["FAKE_CRASH=invoke", "FAKE_HANG=invoke"])
def test_a_candidate_that_fails_in_soak(line: Line, library: Path, content: str) -> None:
    """The lane that stayed warm takes over at the first frame that is not judged."""
    slot = line.offer(line.bundle(library))
    until(lambda: line.record.txn.phase is Phase.SOAK, 30, "the hand-over")
    until(lambda: line.journal.results[-1].release > 1, 10, "the candidate decides")
    line.device.write_text(content)
    record = line.until_state(slot, SlotState.BAD, 20)
    assert record.known_good == FACTORY
    assert record.lanes[record.live].slot == FACTORY
    until(lambda: line.journal.results[-1].release == 1, 10, "the old lane decides")
    line.until_standby()
    status = json.loads(line.system.vigil("status", "--json").stdout)
    assert any(incident["recovery_ms"] is not None for incident in status["incidents"])
    results = line.stop()
    assert {result.validity for result in results} == {Validity.VALID}
    ages = [result.age_ns / 1e9 for result in results]
    assert max(ages) < 5.0, "the longest that a frame has waited"


def test_a_candidate_that_becomes_slow_in_soak(
    system: Start, paths: Paths, tmp_path: Path, device: Path, library: Path
) -> None:
    """Too slow for its camera it skips frames that the model before did not."""
    config = CONFIG.replace('policy = "every"\nslots = 64', 'policy = "latest"')
    line = Line(system, paths, tmp_path, device, config)
    slot = line.offer(line.bundle(library))
    until(lambda: line.record.txn.phase is Phase.SOAK, 30, "the hand-over")
    device.write_text("FAKE_SLOW_MS=120")
    record = line.until_state(slot, SlotState.BAD, 20)
    given = until(line.verdicts(slot, 2), 5, "its verdict, noted after it took effect")[1]
    line.close()
    assert record.slots[slot].reason.startswith("it decided "), given
    assert record.lanes[record.live].slot == FACTORY
    counted = given.inputs.now
    faster = msgspec.structs.replace(counted, shown=counted.offered)
    assert verdict.judge(given.inputs) == given.reason
    assert verdict.judge(msgspec.structs.replace(given.inputs, now=faster)) == ""


def test_a_release_that_drifts_a_good_one_and_back_by_hand(line: Line) -> None:
    """One is not as sure as its manifest says, which shows in soak. The other: handed over without
    a gap, soaked, good; the standby follows; then gone back from."""
    bundle = line.bundle(None, name="drifting")
    manifest = bundle / "manifest.toml"
    manifest.write_text(f"confidence = {[0.0] * 4 + [1.0] + [0.0] * 5}\n{manifest.read_text()}")
    slot = line.offer(bundle)
    record = line.until_state(slot, SlotState.BAD)
    reason = record.slots[slot].reason
    assert "confidence has drifted" in reason
    assert (record.known_good, record.lanes[record.live].slot) == (FACTORY, FACTORY)
    until(line.verdicts(slot, 2), 5, "its verdicts")
    assert any(reason in text for text in line.events("model.rolled_back"))
    done = line.system.vigil("models", "--verdict", slot)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"judged again: bad: {reason}" in done.stdout
    line.until_standby()
    slot = line.offer(line.bundle(None))
    record = line.until_state(slot, SlotState.GOOD)
    assert {lane.slot for lane in record.lanes.values()} == {slot} == {record.known_good}
    line.until_standby()
    shown = line.system.vigil("models").stdout
    assert f"known good {slot[:12]}, previous factory" in shown
    done = line.system.vigil("rollback", "--wait", timeout_s=60)
    assert done.returncode == 0, done.stderr
    record = line.until_state(slot, SlotState.BAD)
    assert record.known_good == FACTORY
    line.until_standby()
    results = line.stop()
    releases = [result.release for result in results]
    changes = [new for old, new in pairwise(releases) if old != new]
    assert changes == [2, 1, 3, 1]
    assert {result.validity for result in results} == {Validity.VALID}


def test_a_bit_flip_in_the_known_good_slot(line: Line) -> None:
    """It is seen at the next load; the next of the chain is used, and said."""
    slot = line.offer(line.bundle(None))
    line.until_state(slot, SlotState.GOOD)
    line.until_standby()
    file = line.store.path(slot) / "model.int8.tflite"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    for lane in "ab":
        victim = line.system.process(f"inference-main-{lane}")
        assert victim is not None
        victim.kill()
    until(lambda: len(line.events("slot.damaged")) >= 2, 20, "both lanes have seen it")
    until(lambda: line.journal.results[-1].release == 1, 20, "the factory model decides")
    assert {result.validity for result in line.stop()} == {Validity.VALID}


def test_a_proven_model_that_keeps_dying(
    system: Start, paths: Paths, tmp_path: Path, device: Path, library: Path
) -> None:
    """Its lanes give way to the factory's; later it is tried again, and is well."""
    config = CONFIG + "[watchdog]\nrestarts = 2\nrestore_s = 8.0\n"
    line = Line(system, paths, tmp_path, device, config)
    slot = line.offer(line.bundle(library))
    line.until_state(slot, SlotState.GOOD)
    line.until_standby()
    device.write_text("FAKE_CRASH=invoke")
    until(lambda: line.lanes_on(FACTORY), 60, "both lanes give way")
    until(lambda: line.journal.results[-1].release == 1, 40, "the factory model decides")
    assert line.events("model.gave_way")
    device.write_text("")
    until(lambda: line.journal.results[-1].release == 2, 40, "the known-good one decides again")
    assert line.events("model.restored")
    assert line.record.known_good == slot
    results = line.stop(overrun=True)
    line.close()
    # A frame that was in the engine at two of the deaths is not tried a third time.
    assert sum(result.validity == Validity.FAILED for result in results) <= 2
    assert {r.validity for r in results} <= {Validity.VALID, Validity.FAILED, Validity.STALE}


def test_both_state_records_damaged(line: Line) -> None:
    """Set aside, and begun anew with the factory model; numbers that were given out stay so."""
    epoch = line.record.epoch
    for name in ("state.0", "state.1"):
        (line.store.folder / name).write_bytes(b"\0" * 100)
    victim = line.system.process(f"inference-main-{line.record.live}")
    assert victim is not None
    victim.kill()
    until(lambda: line.record.epoch > epoch + slots.SAFE_MARGIN, 20, "a record anew")
    line.until_standby()
    assert line.events("state.damaged")
    assert {result.validity for result in line.stop()} == {Validity.VALID}


def test_a_killer_without_watchdog_and_updater(line: Line, library: Path) -> None:
    """A model that kills its process at load runs out of tries and gives way all the same."""
    bundle = line.bundle(library)
    for name in ("watchdog", "updater"):
        supervisor.stop(line.paths, name)
    line.device.write_text("FAKE_CRASH=create")
    pack(bundle, line.folder / "bundle.tar")
    done = subprocess.run(
        [*INSTALL, str(os.getpid()), "main", line.folder / "bundle.tar"],
        cwd=PROJECT,
        env=line.system.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (slot,) = line.record.slots
    if line.record.txn.phase is Phase.NONE:
        line.store.commit(lambda record: slots.activate(record, slot))
    until(lambda: line.record.lanes["b"].slot == FACTORY, 40, "the lane gives way")
    assert line.record.slots[slot].tries == 0
    assert {result.validity for result in line.stop()} == {Validity.VALID}


def test_a_watchdog_that_dies_in_the_middle_of_everything(line: Line) -> None:
    """Killed again and again while a release is installed, proven, handed over and soaked, and
    while the live lane dies: the change comes to its end all the same."""
    dice = random.Random(1)
    slot = line.offer(line.bundle(None))
    kills = 0

    def good() -> bool:
        nonlocal kills
        if dice.random() < 0.1 and (watchdog := line.system.process("watchdog")):
            watchdog.kill()
            kills += 1
        return line.record.slots[slot].state is SlotState.GOOD

    until(good, 90, "the release is good")
    assert kills > 3
    for delay in range(6):
        line.until_standby()
        lane, watchdog = line.record.live, line.system.process("watchdog")
        victim = line.system.process(f"inference-main-{lane}")
        assert victim is not None
        assert watchdog is not None
        epoch = line.record.epoch
        victim.kill()
        reads = [line.record for _ in range(delay)]  # some 100 us each: a later moment each time
        watchdog.kill()
        assert len(reads) == delay
        until(partial(line.decided_after, epoch), 20, "somebody decides")
    assert {result.validity for result in line.stop()} == {Validity.VALID}


class TestAccelerator:
    """The model that vigil.toml names is on the accelerator, an exclusive one."""

    @pytest.fixture
    def start(
        self, system: Start, paths: Paths, tmp_path: Path, device: Path, library: Path
    ) -> Iterator[Callable[..., Line]]:
        started: list[Line] = []

        def start(memory_mb: int = 2000, camera: str = "", **options: bool) -> Line:
            bundle = fake_delegate.bundle(tmp_path / "bundle", library, **options)
            config = CONFIG.replace("MODEL", str(bundle))
            config = config.replace("CAMERA", camera or RENDERED)
            config = config.replace("load_s", f"memory_mb = {memory_mb}\nload_s")
            started.append(Line(system, paths, tmp_path, device, config))
            return started[-1]

        yield start
        for one in started:
            one.close()

    def test_gone_and_back(self, start: Callable[..., Line], tmp_path: Path) -> None:
        """Some frames are dark: who is put back is judged before those that nobody judges."""
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for index in range(12):
            picture = np.zeros((480, 640, 3), np.uint8)
            if index % 2:
                picture, _ = Scene(640, 480, seed=3).render(index)
            cv2.imwrite(str(pictures / f"{index:02}.bmp"), picture)
        source = f'source = "folder"\npath = "{pictures}"\nfps = "max"\ndark_level = 8'
        line = start(camera=source, exclusive=True)
        line.device.unlink()
        newest = line.journal.results
        until(lambda: newest[-1].validity == Validity.DEGRADED, 10, "the CPU")
        assert not line.events("inference-main-a: stopped")
        line.device.write_text("")
        until(lambda: newest[-1].validity == Validity.VALID, 20, "the accelerator")
        assert line.events("accelerator.lost")
        assert line.events("accelerator.back")
        seen = {result.validity for result in line.stop()}
        assert seen == {Validity.VALID, Validity.DEGRADED, Validity.NOT_INFERRED}

    def test_gone_without_a_cpu_variant(self, start: Callable[..., Line]) -> None:
        """Frames flow, none is judged, and each says so; never "nothing there"."""
        line = start(cpu=False)
        line.device.unlink()
        until(lambda: line.journal.results[-1].validity == Validity.NOT_INFERRED, 10, "said so")
        assert not line.journal.results[-1].items
        assert "pass-through" in line.journal.results[-1].reason
        line.device.write_text("")
        until(lambda: line.journal.results[-1].validity == Validity.VALID, 20, "the accelerator")
        seen = {result.validity for result in line.stop()}
        assert seen == {Validity.VALID, Validity.NOT_INFERRED}

    def test_a_segmentation_fault_in_a_native_call(self, start: Callable[..., Line]) -> None:
        """Each lane in turn dies on the accelerator; after the third death it is left alone, and
        the CPU variant goes on judging. The model has no part in it and does not give way."""
        line = start(exclusive=True)
        line.until_standby()
        line.device.write_text("FAKE_CRASH=invoke")
        strikes = partial(line.events, "accelerator.lost")
        until(lambda: any("one after the other" in text for text in strikes()), 30, "left alone")
        line.until_standby()
        line.journal.until_more(90)
        results = line.stop()
        # A frame that is in the engine at two of the deaths is not tried a third time.
        assert sum(result.validity == Validity.FAILED for result in results) <= 1
        assert {r.validity for r in results[-60:]} == {Validity.DEGRADED}
        assert {result.model for result in results} == {"accelerated"}

    def test_one_frame_that_kills_whoever_judges_it(
        self, start: Callable[..., Line], tmp_path: Path
    ) -> None:
        """It kills both lanes, is committed as failed, and not tried a third time."""
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for index in range(90):
            picture, _ = Scene(640, 480, seed=3).render(index)
            if index == 60:
                picture[:40, :40] = (255, 0, 255)
            cv2.imwrite(str(pictures / f"{index:03}.png"), picture)
        line = start(camera=f'source = "folder"\npath = "{pictures}"\nloop = false\nfps = 30')
        line.device.write_text("FAKE_CRASH=frame")
        until(lambda: line.journal.results[-1].sequence == 90, 30, "all are judged")
        line.journal.stop()
        line.system.stop()
        results = line.journal.results
        failed = [result.sequence for result in results if result.validity == Validity.FAILED]
        assert failed == [61]
        assert "killed the process twice" in results[60 - results[0].sequence + 1].reason
        assert [r.sequence for r in results] == list(range(results[0].sequence, 91))
        assert len(set(line.lanes.record.slots)) == 0, "the model is not blamed"
        assert line.record.known_good == FACTORY

    def test_a_leak_in_a_native_library(self, start: Callable[..., Line]) -> None:
        """A planned restart in good time: the other lane takes over first, no frame is lost."""
        line = start(memory_mb=300)
        line.until_standby()
        victim = line.system.process(f"inference-main-{line.record.live}")
        assert victim is not None
        line.device.write_text("FAKE_LEAK_MB=10")
        victim.wait(20)
        line.device.write_text("")
        line.until_standby()
        (said, *_) = line.events("process.memory")
        assert "300 may be" in said
        assert {result.validity for result in line.stop()} == {Validity.VALID}

    def test_lent_to_a_candidate(self, start: Callable[..., Line], library: Path) -> None:
        """While it proves itself on the accelerator, the live lane judges on the CPU variant."""
        line = start(exclusive=True)
        line.until_standby()
        bundle = line.bundle(library)
        fake_delegate.bundle(bundle, library, exclusive=True)
        manifest = bundle / "manifest.toml"
        manifest.write_text(manifest.read_text().replace("release = 2", "release = 3"))
        slot = line.offer(bundle)
        line.until_state(slot, SlotState.GOOD)
        until(lambda: line.journal.results[-1].validity == Validity.VALID, 20, "the accelerator")
        results = line.stop()
        assert {result.validity for result in results} == {Validity.VALID, Validity.DEGRADED}
        assert {r.release for r in results if r.validity == Validity.DEGRADED} == {2}
        assert results[-1].release == 3
