"""A model on an accelerator, here a pretended one: found, busy, lost, back."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.runtimes import AcceleratorBusyError, CannotRunError, Options
from common.errors import AcceleratorLostError, ModelError
from common.messages import Item
from common.paths import PROJECT
from services.capture.scene import Scene
from services.inference import engines
from services.inference.engines import Backoff, Engines
from tests import fake_delegate
from tests.support import until

PICTURE = Scene(seed=3, defects=1.2).render(90)[0]
LOADS = """
import sys
from pathlib import Path
from common.engine.bundle import open_bundle
from common.engine.model import Model
model = Model.load(open_bundle(Path(sys.argv[1])), lock_folder=Path(sys.argv[2]))
print(model.accelerator or model.fallback_reason, flush=True)
for line in sys.stdin:
    model.warm_up(1)
    print("inferred", flush=True)
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_delegate.build(tmp_path_factory.mktemp("accelerator"))


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "device"
    path.touch()
    monkeypatch.setenv("FAKE_DEVICE", str(path))
    return path


@pytest.fixture
def bundle(tmp_path: Path, library: Path, device: Path) -> Path:
    return fake_delegate.bundle(tmp_path / "bundle", library)


@pytest.fixture
def make(
    tmp_path: Path, library: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engines]]:
    """Loaded engines, that look for a lost accelerator without pauses."""
    monkeypatch.setattr(engines, "FIRST_S", 0.0)
    made: list[Engines] = []

    def start(*, load: bool = True, **choices: Any) -> Engines:
        path = fake_delegate.bundle(tmp_path / "bundle", library, **choices)
        made.append(Engines(open_bundle(path), Options(), None, tmp_path))
        made[-1]._backoff = Backoff(pause_s=0.0)
        if load:
            made[-1].load()
        return made[-1]

    yield start
    device.unlink(missing_ok=True)  # ends what hangs
    for one in made:
        one.close()


def judge(model: Model | None) -> list[Item]:
    assert model is not None
    geometry = model.prepare(PICTURE, 0)
    return model.decode(model.infer(0), geometry)


def brought_back(lane: Engines) -> Model:
    model = until(lane.retry, 10, "the accelerator is back")
    assert isinstance(model, Model)
    return model


# -- a model on an accelerator ----------------------------------------------------------------


def test_results_are_those_of_the_cpu(bundle: Path) -> None:
    opened = open_bundle(bundle)
    model, other = Model.load(opened), Model.load(opened, accelerator=False)
    assert (model.accelerator, model.fallback_reason) == ("libfakedelegate.so", "")
    assert "on libfakedelegate.so" in model.runtime
    assert (other.accelerator, other.fallback_reason) == ("", "")
    assert judge(model) == judge(other) != []
    model.close()
    other.close()


def test_the_operators_are_really_run_by_the_device(bundle: Path, device: Path) -> None:
    model = Model.load(open_bundle(bundle))
    device.write_text("FAKE_BLIND=1\n")
    assert judge(model) == []
    device.write_text("FAKE_SLOW_MS=50\nFAKE_AFTER=3\n")
    started = time.monotonic()
    for _ in range(4):
        judge(model)
    assert time.monotonic() - started > 0.1
    model.close()


def test_gone_at_load_the_next_variant_is_used(
    bundle: Path, device: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device.unlink()
    capfd.readouterr()
    model = Model.load(open_bundle(bundle))
    gc.collect()
    assert model.accelerator == ""
    assert f"libfakedelegate.so: there is no device {device}" in model.fallback_reason
    assert not model.accelerator_busy
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(CannotRunError, match="there is no device"):
        Model.load(open_bundle(bundle), accelerator=True)
    model.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("libnone.so.1", "accelerator libnone.so.1: .*cannot open shared object file"),
        ("/nowhere/libnone.so", "accelerator /nowhere/libnone.so: .*cannot open"),
        ("libm.so.6", "accelerator libm.so.6: is no TFLite delegate"),
    ],
)
def test_libraries_that_are_none(
    tmp_path: Path, name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = open_bundle(fake_delegate.bundle(tmp_path / "bundle", name))
    capfd.readouterr()
    with pytest.raises(CannotRunError, match=reason):
        Model.load(opened, accelerator=True)
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("/a/lib.so", "lib.so/../x.so"), "expected the name of a system library"),
        (("/a/lib.so", ""), "expected the name of a system library"),
        (('"litert"', '"onnxruntime"'), "runtime onnxruntime takes no delegate"),
        (('delegate = "/a/lib.so"', ""), "`exclusive` is for an accelerator"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    path = fake_delegate.bundle(tmp_path / "bundle", "/a/lib.so", exclusive=True)
    manifest = path / "manifest.toml"
    manifest.write_text(manifest.read_text().replace(*change, 1))
    with pytest.raises(ModelError, match=reason):
        open_bundle(path)


def test_a_library_in_the_bundle_is_refused(tmp_path: Path, bundle: Path, library: Path) -> None:
    inside = bundle / "lib.so"
    inside.write_bytes(library.read_bytes())
    outside = tmp_path / "link.so"
    outside.symlink_to(inside)
    for name in (inside, outside):
        fake_delegate.bundle(bundle, name)
        with pytest.raises(ModelError, match="lies in the bundle"):
            Model.load(open_bundle(bundle))


def test_a_compiled_model_is_tried_where_a_delegate_may_run_it(
    tmp_path: Path, shared_data: Path, library: Path, device: Path
) -> None:
    path = fake_delegate.bundle(tmp_path / "bundle", library)
    compiled = shared_data / "models/edgetpu/mobilenet_v1_0.25_128_quant_edgetpu.tflite"
    (path / fake_delegate.MODEL).write_bytes(compiled.read_bytes())
    with pytest.raises(CannotRunError, match=r"has no use for this model"):
        Model.load(open_bundle(path))


def test_lost_while_running(bundle: Path, device: Path) -> None:
    """The error says so, and who keeps it does not keep the device."""
    model = Model.load(open_bundle(bundle))
    judge(model)
    device.unlink()
    with pytest.raises(AcceleratorLostError, match=rf"failed: fake device {device} is gone$") as it:
        model.infer(0)
    interpreter = weakref.ref(model._runtime._interpreter)  # type: ignore[attr-defined]
    delegate = weakref.ref(interpreter()._delegates[0])  # type: ignore[union-attr]
    model.close()
    assert interpreter() is None
    assert delegate() is None
    assert it.value.__context__ is None


@pytest.mark.parametrize("fault", ["FAKE_CRASH=create", "FAKE_CRASH=invoke", "FAKE_CRASH=frame"])
def test_a_crash_in_a_native_call_ends_the_process(
    tmp_path: Path, bundle: Path, device: Path, fault: str
) -> None:
    device.write_text(fault + "\n")
    code = (
        LOADS + "model.prepare(__import__('numpy').full((240, 320, 3), [255, 0, 255], 'u1'), 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "model.infer(0)", bundle, tmp_path],
        cwd=PROJECT, input="", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGSEGV
    assert ("libfakedelegate.so" in done.stdout) == (fault == "FAKE_CRASH=frame")


# -- exclusive accelerators -------------------------------------------------------------------


def test_another_process_has_it_until_it_dies(tmp_path: Path, library: Path, device: Path) -> None:
    path = fake_delegate.bundle(tmp_path / "bundle", library, exclusive=True)
    other = subprocess.Popen(
        [sys.executable, "-c", LOADS, path, tmp_path],
        cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "libfakedelegate.so\n"
        model = Model.load(open_bundle(path), lock_folder=tmp_path)
        assert (model.accelerator, model.exclusive, model.accelerator_busy) == ("", False, True)
        assert "libfakedelegate.so: in use by another process" in model.fallback_reason
        with pytest.raises(AcceleratorBusyError):
            Model.load(open_bundle(path), accelerator=True, lock_folder=tmp_path)
        model.close()
        other.kill()
    model = Model.load(open_bundle(path), lock_folder=tmp_path)
    assert (model.accelerator, model.exclusive) == ("libfakedelegate.so", True)
    model.close()


def test_a_failed_load_leaves_the_lock(tmp_path: Path, library: Path, device: Path) -> None:
    opened = open_bundle(fake_delegate.bundle(tmp_path / "bundle", library, exclusive=True))
    device.unlink()
    for _ in range(2):
        with pytest.raises(CannotRunError, match="there is no device"):
            Model.load(opened, accelerator=True, lock_folder=tmp_path)
    device.touch()
    Model.load(opened, accelerator=True, lock_folder=tmp_path).close()


def test_one_lane_leaves_it_to_the_other(make: Callable[..., Engines]) -> None:
    live, candidate = make(exclusive=True), make(exclusive=True)
    assert live.holds_accelerator
    assert (candidate.busy, candidate.holds_accelerator) == (True, False)
    assert [code for code, _ in candidate.notices] == ["accelerator.busy"]
    assert "in use by another process" in candidate.degraded
    expected = judge(live.model)
    live.give_up_accelerator()
    assert judge(live.model) == judge(candidate.model) == expected
    assert "left to another process" in live.degraded
    assert live.retry() is None
    candidate.adopt(brought_back(candidate))
    assert (candidate.degraded, candidate.busy, live.holds_accelerator) == ("", False, False)
    live.want_accelerator()
    until(lambda: live.retry() is None and live.busy, 10, "it is found busy")
    candidate.close()
    live.adopt(brought_back(live))
    assert live.holds_accelerator
    assert judge(live.model) == expected


def test_given_up_before_the_first_load(make: Callable[..., Engines]) -> None:
    standby = make(load=False, exclusive=True)
    standby.give_up_accelerator()
    standby.load()
    assert (standby.model and standby.model.accelerator, standby.notices) == ("", [])
    standby.want_accelerator()
    standby.adopt(brought_back(standby))
    assert standby.model is not None
    assert standby.model.exclusive
    assert standby.notices == []


def test_given_up_while_it_is_looked_for(make: Callable[..., Engines], device: Path) -> None:
    lane = make(exclusive=True)
    device.unlink()
    with pytest.raises(AcceleratorLostError) as it:
        judge(lane.model)
    assert lane.lost(it.value)
    device.write_text("FAKE_HANG=create\n")
    until(lambda: lane.retry() is None and lane.holds_accelerator, 10, "it is looked for")
    lane.give_up_accelerator()
    assert not lane.holds_accelerator
    device.write_text("")
    lane.want_accelerator()
    lane.adopt(brought_back(lane))  # what was begun before is closed, else this found it busy


def test_without_a_cpu_variant_it_is_kept(make: Callable[..., Engines]) -> None:
    lane = make(exclusive=True, cpu=False)
    lane.give_up_accelerator()
    assert lane.model is not None
    assert lane.model.accelerator
    assert not lane.holds_accelerator  # nobody should try again
    assert "no variant for any runtime on the CPU" in lane.notices[0][1]
    lane.want_accelerator()
    assert lane.holds_accelerator


def test_what_is_not_exclusive_is_not_given_up(make: Callable[..., Engines]) -> None:
    one, two = make(), make()
    one.give_up_accelerator()
    assert one.model is not None
    assert two.model is not None
    assert one.model.accelerator == two.model.accelerator == "libfakedelegate.so"
    assert not one.holds_accelerator


# -- lost and back ----------------------------------------------------------------------------


def lose(lane: Engines, device: Path) -> bool:
    device.unlink()
    with pytest.raises(AcceleratorLostError) as it:
        judge(lane.model)
    return lane.lost(it.value)


@pytest.mark.parametrize("exclusive", [False, True])
def test_lost_and_back(make: Callable[..., Engines], device: Path, exclusive: bool) -> None:
    lane = make(exclusive=exclusive)
    expected = judge(lane.model)
    assert lose(lane, device)
    assert judge(lane.model) == expected
    assert "is gone" in lane.degraded
    until(lambda: lane.retry() is None and "there is no device" in lane.degraded, 10, "a failure")
    assert judge(lane.model) == expected
    device.touch()
    model = brought_back(lane)
    assert judge(lane.model) == judge(model) == expected  # both are there until it is adopted
    lane.adopt(model)
    assert judge(lane.model) == expected
    assert lane.degraded == ""
    assert lane.retry() is None
    assert [code for code, _ in lane.notices] == ["accelerator.lost", "accelerator.back"]


def test_absent_at_the_start_and_found_later(make: Callable[..., Engines], device: Path) -> None:
    device.unlink()
    lane = make()
    assert lane.model is not None
    assert "there is no device" in lane.degraded
    assert [code for code, _ in lane.notices] == ["accelerator.lost"]
    device.touch()
    lane.adopt(brought_back(lane))
    assert lane.degraded == ""


def test_lost_without_a_cpu_variant(make: Callable[..., Engines], device: Path) -> None:
    lane = make(cpu=False)
    assert not lose(lane, device)
    assert lane.model is None
    assert "is gone; " in lane.degraded
    device.touch()
    lane.adopt(brought_back(lane))
    assert judge(lane.model)


def test_a_device_that_hangs_stops_neither_judging_nor_stopping(
    make: Callable[..., Engines], device: Path
) -> None:
    """Its library is waited for without the interpreter's lock."""
    lane = make()
    lose(lane, device)
    device.write_text("FAKE_HANG=create\n")
    until(lambda: lane.retry() is None and lane._attempting, 10, "an attempt")
    for _ in range(5):
        judge(lane.model)
        assert lane.retry() is None
    assert sum(thread.name == "accelerator" for thread in threading.enumerate()) == 1
    started = time.monotonic()
    lane.close()
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize(
    ("ran_s", "pauses"),
    [(0.0, [2, 4, 8, 16, 32, 60, 60]), (59.0, [2, 4]), (60.0, [2, 4])],
)
def test_backoff_doubles_up_to_a_minute(ran_s: float, pauses: list[float]) -> None:
    backoff = Backoff()
    backoff.lost(1000.0 + ran_s, 1000.0)
    found = [backoff.due_s - 1000.0 - ran_s]
    for _ in pauses[1:]:
        now_s = backoff.due_s + 1
        backoff.failed(now_s)
        found.append(backoff.due_s - now_s)
    assert found == pauses
    pause_s = backoff.pause_s
    back_s = backoff.due_s
    backoff.lost(back_s + ran_s, back_s)
    assert backoff.due_s - back_s - ran_s == (2 if ran_s >= 60 else pause_s)


def test_memory_does_not_grow_with_each_loss(make: Callable[..., Engines], device: Path) -> None:
    lane = make()
    process = psutil.Process()

    def cycles(count: int) -> float:
        for _ in range(count):
            assert lose(lane, device)
            judge(lane.model)
            device.touch()
            lane.adopt(brought_back(lane))
            judge(lane.model)
            lane.notices.clear()
        return float(process.memory_info().rss) / 1e6

    seen_mb = [cycles(15)]  # what the allocator keeps for the next time
    descriptors = process.num_fds()
    seen_mb += [cycles(15) for _ in range(3)]
    # A leak shows in each span; other libraries' threads in this process may still grow in one.
    assert min(after - before for before, after in pairwise(seen_mb)) < 1.5, seen_mb
    assert process.num_fds() == descriptors
