"""`vigil tap record` beside a real system, and `vigil tap replay` of what it wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import pytest

from common import bus
from common.frames import Ring
from common.messages import Item, Result
from common.paths import PROJECT, Paths
from common.recording import Pixels, Recording, unpack
from common.service import lock
from services.capture.scene import Scene
from services.cli.record import DISK_LEFT_MB
from tests.support import Journal, System, until

FPS = 20
CONFIG = f"""
# once it was rtsp://admin:s3cret@10.0.0.9/
[cameras.belt]
source = "virtual"
fps = {FPS}
size = [320, 240]
policy = "every"
slots = 64  # for a recorder that gets the processor late: it goes last
[groups.main]
model = "{PROJECT}/models/factory"
lanes = 1
"""
DESK = f"""
[cameras.belt]
source = "recording"
path = "FILE"
fps = "max"
loop = false
policy = "every"
[cameras.again]
source = "recording"
path = "FILE"
recorded = "belt"
loop = false
policy = "every"
[groups.main]
model = "{PROJECT}/models/factory"
lanes = 1
"""
SLOW = """
import sys
from services.cli import main, record
record.WAITING_BYTES = record.MESSAGE_ROOM
sys.exit(main.main(sys.argv[1:]))
"""
VIGIL = (sys.executable, "-m", "services.cli.main")


@dataclass
class Recorded:
    """A real system, running, and what was recorded of it."""

    system: System
    lossless: Path
    output: str  # of the recorder
    results: dict[int, Result]  # of the journal

    def start(self, *arguments: str, command: tuple[str, ...] = VIGIL) -> subprocess.Popen[str]:
        environment = os.environ | {"VIGIL_ROOT": str(self.system.paths.root)}
        environment.pop("VIGIL_CONFIG", None)
        return subprocess.Popen(
            [*command, "tap", "record", *arguments],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    root = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIGIL_ROOT", str(root))
        patch.delenv("VIGIL_RUN", raising=False)
        paths = Paths.from_environment()
        paths.make()
        system = System(paths, CONFIG)
    try:
        system.until_valid()
        journal = Journal(paths, "belt")
        found = Recorded(system, root / "lossless.mcap", "", {})
        recorder = found.start(str(found.lossless), "--pixels", "lossless", "--seconds", "2")
        found.output, errors = recorder.communicate(timeout=30)
        assert (recorder.returncode, errors) == (0, "")
        found.results = {result.sequence: result for result in journal.stop()}
        yield found
    finally:
        system.kill()
        subprocess.run(["rm", "-rf", paths.run], check=True)


@pytest.fixture
def replay(paths: Paths) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`vigil tap replay` under a root of its own, where nothing runs."""
    started: list[subprocess.Popen[str]] = []

    def start(file: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [*VIGIL, "tap", "replay", str(file), *arguments]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def judged(path: Path) -> list[tuple[Pixels, tuple[Item, ...] | None]]:
    """The pictures of a recording, and what was found in them, where that was recorded."""
    recording = Recording(path)
    messages = [(m.topic, m.body) for m in recording.messages()]
    recording.close()
    results = [bus.decode(*message) for message in messages if message[0] == "result/belt"]
    items = {(r.ring, r.sequence): r.items for r in results if isinstance(r, Result)}
    pictures = [unpack(body)[0] for topic, body in messages if topic == "pixels/belt"]
    return [(pixels, items.get((pixels.ring, pixels.sequence))) for pixels in pictures]


def agree(path: Path, results: list[Result]) -> None:
    """What was found now in each picture is what was found when it was recorded."""
    known = [items for _, items in judged(path)]
    assert len(results) == len(known) >= FPS
    pairs = [(r.items, items) for r, items in zip(results, known, strict=True) if items is not None]
    assert len(pairs) >= len(known) - 2
    assert sum(bool(items) for _, items in pairs) > FPS // 2
    assert [new for new, _ in pairs] == [old for _, old in pairs]


def test_recorded_as_it_was(recorded: Recorded) -> None:
    """Each message byte for byte, each picture bit for bit, no password."""
    recording = Recording(recorded.lossless)
    messages = list(recording.messages())
    recording.close()
    assert recording.problems == []
    assert recording.cameras == ["belt"]
    assert "rtsp://***@10.0.0.9/" in recording.about["config"]
    assert b"s3cret" not in recorded.lossless.read_bytes()
    topics = {message.topic: message.process for message in messages}
    assert topics["result/belt"] == "inference-main-a"
    assert topics["frame/belt"] == topics["pixels/belt"] == topics["truth/belt"] == "capture-belt"
    assert {f"beat/{name}" for name in recording.processes} <= topics.keys()
    results = [message.body for message in messages if message.topic == "result/belt"]
    first = bus.decode("result/belt", results[0])
    assert isinstance(first, Result)
    expected = [recorded.results[first.sequence + i] for i in range(len(results))]
    assert results == [bus.encode(result) for result in expected]
    pictures = [unpack(message.body) for message in messages if message.topic == "pixels/belt"]
    assert len(pictures) >= FPS
    assert f"{len(pictures)} pictures of belt" in recorded.output
    assert recording.counts["pictures of belt"] == str(len(pictures))
    scene = Scene(320, 240, seed=1)
    for pixels, picture in pictures[:: len(pictures) // 5]:
        # A frame that found the ring full was rendered and has no number.
        rendered = (scene.render(pixels.sequence - 1 + overrun)[0] for overrun in range(100))
        assert any(np.array_equal(picture, one) for one in rendered)
    at = [message.at_ns for message in messages if message.topic != "pixels/belt"]
    assert at == sorted(at)


def larger(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size > size


def test_recorders_that_end_otherwise(recorded: Recorded, tmp_path: Path) -> None:
    """Ctrl-C ends in good order; killed, it leaves what it had; too slow, it says what is missing;
    where the disk has no room to spare, it does not begin. The system does not notice."""
    stopped, killed, slow = (tmp_path / f"{name}.mcap" for name in ("stopped", "killed", "slow"))
    recorders = [
        recorded.start(str(stopped), "--pixels", "jpeg"),
        recorded.start(str(killed), "--pixels", "lossless"),
        recorded.start(
            str(slow), "--pixels", "lossless", command=(sys.executable, "-c", SLOW)
        ),
    ]  # fmt: skip
    try:
        for path, size in ((stopped, 100_000), (killed, 3_000_000), (slow, 10_000)):
            until(partial(larger, path, size), 30, f"{path} grows")
        for recorder in (recorders[0], recorders[2]):
            recorder.send_signal(signal.SIGINT)
        recorders[1].kill()
        said = [recorder.communicate(timeout=20) for recorder in recorders]
    finally:
        for recorder in recorders:
            recorder.kill()
    assert [recorder.returncode for recorder in recorders] == [0, -signal.SIGKILL, 2]
    whole, cut = Recording(stopped), Recording(killed)
    assert whole.problems == []
    assert int(whole.counts["messages"]) > 10
    assert any("cut off after" in problem for problem in cut.problems)
    found = [message.topic for message in cut.messages()]
    assert found.count("pixels/belt") >= 10
    assert cut.problems[1:] == []
    missing = Recording(slow)
    assert {m.topic for m in missing.messages()} >= {"frame/belt", "result/belt"}
    assert "pixels/belt" not in {m.topic for m in missing.messages()}
    left = "pictures of belt, which came faster than they were written"
    assert int(missing.counts[f"left out: {left}"]) >= 5
    assert left in said[2][1]
    for recording in (whole, cut, missing):
        recording.close()
    journal = Journal(recorded.system.paths, "belt")
    journal.until_more(10)
    assert {result.validity for result in journal.stop()} == {"valid"}


def test_no_room_to_record(recorded: Recorded, tmp_path: Path) -> None:
    command = (
        "unshare", "-rm", "sh", "-c",
        f'mount -t tmpfs -o size=4m none {tmp_path} && echo mounted && exec "$@"', "sh", *VIGIL,
    )  # fmt: skip
    recorder = recorded.start(str(tmp_path / "a.mcap"), command=command)
    output, errors = recorder.communicate(timeout=20)
    if output != "mounted\n":
        pytest.skip(f"needs a mount namespace of its own: {errors.strip()[-200:]}")
    assert recorder.returncode == 1
    assert f"4.2 MB are free; recording stops at {DISK_LEFT_MB:.0f} MB" in errors
    assert len(errors.splitlines()) == 1


def test_judged_again_bit_for_bit(
    recorded: Recorded, system: Callable[[str], System], paths: Paths
) -> None:
    """Twice through a lane, and both times what the recorded lane had found."""
    system(DESK.replace("FILE", str(recorded.lossless)))
    journals = [Journal(paths, name) for name in ("belt", "again")]
    pictures = len(judged(recorded.lossless))
    until(lambda: all(len(j.results) >= pictures for j in journals), 40, "every frame judged")
    for journal in journals:
        agree(recorded.lossless, journal.stop())


def test_replayed_where_nothing_runs(
    recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], paths: Paths
) -> None:
    """Step by step: the recorded messages, pictures and decisions, for whoever looks."""
    known = judged(recorded.lossless)
    one = replay(recorded.lossless, "--step", "--loop")
    assert one.stdin is not None
    assert one.stdout is not None
    step(one.stdin, one.stdout)
    dump = vigil("tap", "dump", "result", "--count", "1")
    steps = 1
    while dump.poll() is None and steps < 1000:
        step(one.stdin, one.stdout)
        steps += 1
    line, errors = dump.communicate(timeout=20)
    assert errors == ""
    result = json.loads(line)
    now = time.monotonic_ns()
    assert 0 < now - result["captured_ns"] < 60e9
    assert result["ring"] == 1
    assert 1 <= result["sequence"] <= steps
    boxes = [(i["label"], i["score"], tuple(i["box"])) for i in result["items"]]
    assert boxes in [[(i.label, i.score, i.box) for i in items or ()] for _, items in known]
    with Ring.open(paths.rings, paths.accounts, "belt", 1) as ring:
        seen = unpack(bus.encode(known[(steps - 1) % len(known)][0]))[1]
        assert bytes(ring.pixels(steps) or b"") == seen.tobytes()
    picture = paths.root / "seen.png"
    shown, errors = vigil("tap", "picture", "belt", str(picture)).communicate(timeout=20)
    assert errors == ""
    assert "valid, factory" in shown
    assert cv2.imread(str(picture)).shape == (240, 320, 3)  # type: ignore[union-attr]
    status, _ = vigil("status", "--json", "--seconds", "0.1").communicate(timeout=20)
    told = json.loads(status)
    camera = told["cameras"][0]
    assert (camera["name"], camera["validity"]) == ("belt", "valid")
    assert camera["account"]["captured"] == steps
    assert camera["account"]["inferred"] >= steps * 9 // 10
    assert [row["name"] for row in told["processes"]] == [
        "inference-main-a", "capture-belt", "updater", "watchdog",
    ]  # fmt: skip
    output, errors = one.communicate(timeout=20)  # the end of its input
    assert f"{steps} pictures of belt" in output
    assert not list(paths.rings.iterdir()), "pictures were left in shared memory"
    assert not (paths.programs / "vigil.conf").exists()


def step(stdin: IO[str], stdout: IO[str]) -> None:
    stdin.write("\n")
    stdin.flush()
    assert stdout.readline().startswith("belt: ")


def vigil(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*VIGIL, *arguments], cwd=PROJECT, stdout=pipe, stderr=pipe, text=True)


def test_replayed_at_the_recorded_speed(
    recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], paths: Paths
) -> None:
    """Every moment moves by the same; where the machine is late, by more, never by less."""
    journal = Journal(paths, "belt")
    started = time.monotonic_ns()
    replay(recorded.lossless).communicate(timeout=60)
    took_s = (time.monotonic_ns() - started) / 1e9
    results = journal.stop()
    recording = Recording(recorded.lossless)
    assert took_s >= recording.seconds > 1.5
    recording.close()
    recorded_at = [p.captured_ns for p, items in judged(recorded.lossless) if items is not None]
    assert len(results) >= FPS
    gaps = [b.captured_ns - a.captured_ns for a, b in pairwise(results)]
    known = [b - a for a, b in pairwise(recorded_at)][: len(gaps)]
    late = [gap - before for gap, before in zip(gaps, known, strict=True)]
    assert min(late) >= 0
    assert late.count(0) > len(late) // 2
    assert all(result.captured_ns > started for result in results)


def test_lanes_that_run_judge_anew(
    recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], paths: Paths
) -> None:
    """A lane beside the replay: it decides, every frame, and finds what was found before."""
    config = paths.root / "vigil.toml"
    config.write_text(CONFIG.replace('"every"', '"latest"'))
    lane = subprocess.Popen(
        [sys.executable, "-m", "services.inference.main", "main", "a"],
        cwd=PROJECT,
        env=os.environ | {"VIGIL_CONFIG": str(config)},
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: paths.bell("inference-main-a").exists(), 30, "the lane works")
        journal = Journal(paths, "belt")
        _, errors = replay(
            recorded.lossless, "--speed", "max", "--config", str(config)
        ).communicate(timeout=60)
        pictures = len(judged(recorded.lossless))
        until(lambda: len(journal.results) >= pictures, 10, "what was decided is read")
        results = journal.stop()
    finally:
        lane.terminate()
        lane.wait(20)
    assert "inference-main-a runs here and is not replayed" in errors
    assert [result.sequence for result in results] == list(range(1, pictures + 1))
    agree(recorded.lossless, results)


def test_who_runs_here_is_left_alone(
    recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], paths: Paths
) -> None:
    held = lock(paths, "capture-belt")
    try:
        one = replay(recorded.lossless, "--speed", "max")
        output, errors = one.communicate(timeout=20)
    finally:
        os.close(held)
    assert one.returncode == 0
    assert "capture-belt runs here and is not replayed" in errors
    assert "pictures" not in output
    assert not list(paths.rings.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_that_is_stopped(
    number: int, recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], paths: Paths
) -> None:
    """Nothing stays in shared memory."""
    one = replay(recorded.lossless, "--step")
    assert one.stdin is not None
    assert one.stdout is not None
    step(one.stdin, one.stdout)
    assert list(paths.rings.iterdir())
    one.send_signal(number)
    assert one.wait(20) == 0
    assert not list(paths.rings.iterdir())
    assert not (paths.programs / "vigil.conf").exists()


@pytest.mark.parametrize("what", ["cut", "text", "speed"])
def test_replay_says_what_is_wrong(
    what: str, recorded: Recorded, replay: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    path = tmp_path / "bad.mcap"
    path.write_bytes(recorded.lossless.read_bytes()[:2_000_000] if what == "cut" else b"Hello")
    one = replay(path, "--speed", "0" if what == "speed" else "max")
    output, errors = one.communicate(timeout=20)
    assert "Traceback" not in errors
    if what == "cut":
        assert one.returncode == 2
        assert "cut off after" in errors
        assert "pictures of belt" in output
    elif what == "text":
        assert one.returncode == 1
        assert errors.startswith(f"vigil: {path}: is no recording: it begins with b'Hello'")
    else:
        assert one.returncode == 64
        assert "--speed" in errors
