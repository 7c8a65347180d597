"""The `vigil` command, run as a user runs it: what it says, and how it says that it can't."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from common import processes
from common.engine.matching import iou
from common.errors import RingError
from common.frames import Shape
from common.messages import Item, TruthItem
from common.paths import PROJECT, Paths
from services.cli import check, text
from services.cli.truth import Score, compare
from tests.support import System, until

VIGIL = (sys.executable, "-m", "services.cli.main")
GOOD = """
[cameras.belt]
source = "virtual"
fps = 20
[groups.main]
model = "nowhere"
"""
FACTORY = GOOD.replace("nowhere", f"{PROJECT}/models/factory")

# A process of the system that publishes what the test says, with a ring and a beat that are real.
PROCESS = """
import sys
from common.frames import Ring, Shape
from common.messages import CameraReport, Frame
from common.service import Service, main
from common.states import ProcessState
import select, time

def body(service):
    ring = Ring.attach(service.paths.rings, service.paths.accounts, "belt", Shape(64, 48))
    while not service.stopping:
        ring.begin()[:] = bytes(64 * 48 * 3)
        now = time.monotonic_ns()
        sequence = ring.publish(now, now)
        service.progressed()
        service.beat(ProcessState.RUNNING, camera=CameraReport("streaming", now))
        service.publish("frame/belt", Frame(ring.generation, sequence, now, now))
        service.publish_bytes("truth/belt", b"\\xc1 of another version")
        select.select([service.wake_fd], [], [], 0.05)

main("capture-belt", body)
"""


def vigil(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VIGIL, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=30
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It exits non-zero, with exactly one plain line that holds the words."""
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vigil: ")
    for word in words:
        assert word in lines[0]


def width(path: Path) -> int:
    picture = cv2.imread(str(path))
    assert picture is not None
    return int(picture.shape[1])


@pytest.fixture
def config(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vigil.toml of the test's own, named by the environment."""
    file = paths.root / "vigil.toml"
    file.write_text(GOOD)
    monkeypatch.setenv("VIGIL_CONFIG", str(file))
    return file


@pytest.fixture
def capture(config: Path, paths: Paths) -> Iterator[subprocess.Popen[bytes]]:
    """One process alone, without supervisord, that also sends what nobody can decode."""
    with subprocess.Popen([sys.executable, "-c", PROCESS], cwd=PROJECT) as process:
        until(lambda: any(paths.rings.glob("belt.*")), 10, "a ring")
        yield process
        process.terminate()
        process.wait(10)


BROKEN = GOOD.replace("fps", "fpz")


@pytest.mark.parametrize(
    ("toml", "arguments", "words"),
    [
        (GOOD, "status", ["nothing runs under", "scripts/run"]),
        (GOOD, "status --json", ["nothing runs under"]),
        (GOOD, "tap list", ["nothing runs under"]),
        (GOOD, "tap dump", ["nothing runs under"]),
        (GOOD, "tap rate result", ["nothing runs under"]),
        (GOOD, "tap picture belt out.png", ["belt", "no frame yet"]),
        (GOOD, "tap dump resultt", ["no topic resultt", "result/belt", "beat/capture-belt"]),
        (GOOD, "tap rate result/other", ["no topic result/other"]),
        (GOOD, "tap picture other out.png", ["no camera other", "belt"]),
        (GOOD, "tap picture belt out.gif", ["out.gif", ".png"]),
        (BROKEN, "check", ["vigil.toml, line 4", "fpz", "did you mean fps?"]),
        (BROKEN, "status", ["line 4", "fpz"]),
        (BROKEN, "tap list", ["line 4", "fpz"]),
        (BROKEN, "render", ["line 4", "fpz"]),
        ("cameras = [", "check", ["is not TOML"]),
        ("", "status", ["no [cameras.NAME] table"]),
        (GOOD, "check absent.toml", ["absent.toml", "can't be read"]),
        (GOOD, "--config absent.toml status", ["absent.toml", "can't be read"]),
        (GOOD, "check --config absent.toml", ["absent.toml", "can't be read"]),
        (GOOD, "--root /nowhere status", ["nothing runs under /nowhere"]),
        (GOOD, "--root /proc/absent render", ["/proc/absent", "can't be made"]),
    ],
)
def test_errors_are_one_line(config: Path, toml: str, arguments: str, words: list[str]) -> None:
    config.write_text(toml)
    refused(vigil(*arguments.split()), *words)


@pytest.mark.parametrize(
    "arguments", ["", "stat", "tap", "tap lst", "status --fast", "tap picture"]
)
def test_wrong_usage_is_one_line(arguments: str) -> None:
    done = vigil(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1)
    assert "--help" in done.stderr


@pytest.mark.parametrize(
    "command", ["", "check", "status", "tap", "tap list", "tap dump", "tap rate", "tap picture",
                "run-model", "render", "models", "install", "rollback", "view", "engines"],
)  # fmt: skip
def test_help_teaches(command: str) -> None:
    done = vigil(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: vigil {command}".rstrip() in done.stdout
    assert "example" in done.stdout or command.startswith("tap ")


def imported(*arguments: str) -> set[str]:
    """The modules in memory after a command has run."""
    code = (
        "import sys\nfrom services.cli.main import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    return set(done.stderr.split())


HEAVY = {"numpy", "cv2", "onnxruntime", "ai_edge_litert", "openvino", "supervisor"}


def test_light_commands_import_nothing_heavy(capture: subprocess.Popen[bytes]) -> None:
    assert not imported("--help") & (HEAVY | {"zmq", "msgspec"})
    for command in (["status"], ["models"], ["tap", "list"], ["tap", "dump", "--count", "1"]):
        modules = imported(*command)
        assert "common.bus" in modules
        assert not modules & HEAVY, command
    assert not imported("engines") & (HEAVY | {"zmq", "msgspec"})


def test_check_reports_all_that_is_wrong(config: Path, tmp_path: Path) -> None:
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures/one.png"), np.full((24, 32, 3), 90, np.uint8))
    config.write_text(f"""
[cameras.absent]
source = "video"
path = "absent.mp4"
[cameras.page]
source = "video"
path = "{tmp_path}/page.mp4"
[cameras.rateless]
source = "folder"
path = "{tmp_path}/pictures"
[cameras.good]
source = "folder"
path = "{tmp_path}/pictures"
fps = 2
[groups.main]
model = "absent"
[updates]
root = "{tmp_path}/pictures/one.png"
""")
    done = vigil("check")
    assert done.returncode == 1
    wrong = [line for line in done.stderr.splitlines() if line.startswith("vigil: ")]
    assert [line.split(": ")[1] for line in wrong] == [
        "group main", "camera absent", "camera page", "camera rateless", "updates",
    ]  # fmt: skip
    assert "no such file" in wrong[1]
    assert "no rate of its own" in wrong[3]
    assert "expected the first root.json" in wrong[4]
    assert "ok  camera good: folder" in done.stdout
    assert "32x24 at 2/s" in done.stdout
    assert "for frame rings" in done.stdout


def test_check_runs_a_real_model(config: Path, shared_data: Path) -> None:
    model = shared_data / "models/tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    config.write_text(GOOD.replace("nowhere", str(model)))
    done = vigil("check")
    assert done.returncode == 0, done.stderr
    assert "camera belt: virtual, 640x480 at 20/s" in done.stdout
    assert "detection on litert" in done.stdout
    assert "ms a picture, for belt" in done.stdout


def test_check_measures_the_room(paths: Paths) -> None:
    with pytest.raises(RingError, match="make that tmpfs larger"):
        check.room(paths, {"belt": Shape(1_000_000, 1_000_000)})


def test_render_replaces_what_was_there(config: Path, paths: Paths) -> None:
    (paths.programs / "old.conf").write_text("[program:old]\ncommand=true\n")
    done = vigil("render")
    assert done.returncode == 0
    assert [path.name for path in paths.programs.iterdir()] == ["vigil.conf"]
    programs = (paths.programs / "vigil.conf").read_text()
    assert "[program:capture-belt]" in programs
    assert "[program:inference-main-a]" in programs
    assert processes.rendered_from(paths) == config


def test_what_nobody_can_decode_is_counted(capture: subprocess.Popen[bytes]) -> None:
    done = vigil("tap", "dump", "truth", "frame", "--count", "20")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 20
    bad = [line for line in lines if "undecodable" in line]
    assert {line["topic"] for line in bad} == {"truth/belt"}
    assert {line["topic"] for line in lines} == {"truth/belt", "frame/belt"}
    assert done.returncode == 2
    assert done.stderr == f"vigil: truth/belt: {len(bad)} messages could not be decoded\n"
    listed = vigil("tap", "list")
    assert listed.returncode == 2
    assert "truth/belt: " in listed.stderr


def test_one_process_alone(capture: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """No supervisord, no lane, no result: told apart, each plainly."""
    done = vigil("status")
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("NOT WELL") == 1
    problems = done.stdout.partition("NOT WELL")[2]
    assert "supervisord does not answer" in problems
    assert "inference-main-a: not running" in problems
    assert "belt: no result yet" in problems
    assert "messages could not be decoded" in problems
    assert "capture-belt" not in problems
    done = vigil("tap", "dump", "result", "--seconds", "0.3")
    refused(done, "nothing arrived in 0.3 s on result/belt")
    done = vigil("tap", "picture", "belt", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    assert "not judged yet" in done.stdout
    assert width(tmp_path / "out.png") == 64
    refused(vigil("tap", "picture", "belt", "/proc/out.png"), "/proc/out.png", "can't be written")


def test_dump_ends_with_its_reader(capture: subprocess.Popen[bytes]) -> None:
    """`| head -1`: it ends by itself and says nothing, even where no message follows."""
    for topic in ("frame", "beat/inference-main-a"):
        with subprocess.Popen(
            [*VIGIL, "tap", "dump", topic],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as dump:
            assert dump.stdout is not None
            assert dump.stderr is not None
            if topic == "frame":
                assert json.loads(dump.stdout.readline())["topic"] == "frame/belt"
            dump.stdout.close()
            assert dump.wait(10) == 141
            assert dump.stderr.read() == b""


def test_interrupt(capture: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(
        [*VIGIL, "tap", "rate", "frame"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job, which this may be part of, ignores SIGINT.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as rate:
        assert rate.stdout is not None
        assert rate.stderr is not None
        rate.stdout.readline()
        assert b"frame/belt" in rate.stdout.readline()
        rate.send_signal(signal.SIGINT)
        assert rate.wait(10) == 130
        assert rate.stderr.read() == b""


def test_every_command_on_the_running_system(
    system: Callable[[str], System], paths: Paths, tmp_path: Path
) -> None:
    line = system(FACTORY + "hang_s = 30\n")
    line.until_valid()
    until(lambda: line.vigil("status").returncode == 0, 30, "all is well")
    status = json.loads(line.vigil("status", "--json", "--seconds", "3").stdout)
    assert status["well"]
    assert status["problems"] == []
    names = ["inference-main-a", "inference-main-b", "capture-belt", "updater", "watchdog"]
    assert [row["name"] for row in status["processes"]] == names
    for row in status["processes"]:
        assert row["alive"]
        assert row["restarts"] == 0
        assert 0 < row["uptime_s"] < 120
        assert row["rss_bytes"] > 10e6
        if row["name"] in ("inference-main-a", "capture-belt"):
            assert row["work_per_s"] == pytest.approx(20, rel=0.3)
    (main,) = status["groups"]
    assert (main["phase"], main["standby"]) == ("none", True)
    assert [lane["role"] for lane in main["lanes"]] == ["live", "standby"]
    assert status["incidents"] == []
    (belt,) = status["cameras"]
    assert belt["state"] == "streaming"
    for stream in (belt["frames"], belt["results"]):
        assert stream["alive"]
        assert stream["on_time"]
        assert stream["per_s"] == pytest.approx(20, rel=0.2)
    assert belt["valid"]
    assert 0 < belt["frame_age_s"] < 1
    assert 0 < belt["latency_p50_ms"] <= belt["latency_max_ms"]
    account = belt["account"]
    assert account["captured"] == sum(account.values()) - account["captured"]
    assert len(belt["model"]["slot"]) == 12
    assert belt["frames_compared"] > 20
    assert 0 < belt["stages_ms"]["compute_infer"] < belt["stages_ms"]["total"]
    assert (belt["size"], belt["format"]) == ([640, 480], "640x480 15/s")
    assert belt["given_per_s"] == pytest.approx(20, rel=0.2)
    assert 0 < belt["state_s"] < 120
    assert belt["precision"] > 0.8
    assert belt["recall"] > 0.8

    # Without VIGIL_CONFIG it finds what the system was started with.
    del line.environment["VIGIL_CONFIG"]
    screen = line.vigil("status").stdout
    assert "All is well." in screen
    assert "COMPUTE INFER" in screen
    assert belt["model"]["name"] in screen

    listed = line.vigil("tap", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    rows = {row.split()[0]: row for row in listed.stdout.splitlines()[1:]}
    seldom = {"event", "health", "shadow/belt", "trigger/belt"}
    always = {"frame/belt", "result/belt", "truth/belt", *(f"beat/{name}" for name in names)}
    assert set(rows) == seldom | always
    assert "inference-main-a" in rows["result/belt"]
    assert all("not seen" not in rows[topic] for topic in always)

    dumped = line.vigil("tap", "dump", "*/belt", "--count", "30").stdout.splitlines()
    messages = [json.loads(row) for row in dumped]
    assert len(messages) == 30
    result = next(message for message in messages if message["topic"] == "result/belt")
    assert result["validity"] == "valid"
    assert result["stages"]["total"] > result["stages"]["compute_infer"] > 0

    rates = line.vigil("tap", "rate", "result", "--seconds", "2").stdout.splitlines()
    assert len(rates) == 3
    assert rates[-1].split()[-3:] == ["yes", "yes", "yes"]

    out = tmp_path / "out.png"
    told = line.vigil("tap", "picture", "belt", str(out)).stdout
    assert "valid" in told
    assert "not judged" not in told
    assert width(out) == 640

    lane = line.process("inference-main-a")
    assert lane is not None
    lane.send_signal(signal.SIGSTOP)
    done = line.vigil("status")
    lane.send_signal(signal.SIGCONT)
    assert done.returncode == 2
    problems = done.stdout.partition("NOT WELL")[2]
    assert f"inference-main-a: no beat for 1.5 s (pid {lane.pid})" in problems
    assert "belt: no result for" in problems
    assert "capture-belt" not in problems
    line.stop()
    refused(line.vigil("status"), "nothing runs under")


def test_picture_is_whole_at_any_rate(paths: Paths) -> None:
    """A writer flat out in a small ring: what is given out is always one frame, never two."""
    from common.frames import Ring
    from services.cli.picture import newest

    code = """
import sys, time
from pathlib import Path
from common.frames import Ring, Shape
rings, accounts = map(Path, sys.argv[1:])
ring = Ring.create(rings, accounts, "fast", Shape(1280, 720, 3, 2))
pictures = [bytes([value]) * (1280 * 720 * 3) for value in range(251)]
while True:
    ring.begin()[:] = pictures[(ring.written + 1) % 251]
    ring.publish(*[time.monotonic_ns()] * 2)
"""
    arguments = (str(paths.rings), str(paths.accounts))
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=PROJECT) as writer:
        try:
            until(lambda: any(paths.rings.glob("fast.*")), 10, "a ring")
            with Ring.open(paths.rings, paths.accounts, "fast", 1) as ring:
                until(lambda: ring.written > 300, 20, "frames")
                for _ in range(50):
                    result, picture, caption = newest(ring)
                    assert result is None
                    sequence = int(caption.split()[2].rstrip(","))
                    assert bool((picture == sequence % 251).all()), caption
        finally:
            writer.kill()


def boxes(*rows: tuple[str, float, float]) -> tuple[Item, ...]:
    """Squares of 10 pixels: label, x, score."""
    return tuple(Item(label, score, 0, (x, 40.0, x + 10, 50.0)) for label, x, score in rows)


@pytest.mark.parametrize(
    ("items", "counts"),
    [
        ((), (0, 0, 2)),
        ((("nut", 20, 0.9), ("nut", 60, 0.8)), (2, 2, 2)),
        ((("nut", 23, 0.9),), (1, 1, 2)),  # IoU 7/13
        ((("nut", 24, 0.9),), (0, 1, 2)),  # IoU 6/14
        ((("bolt", 20, 0.9),), (0, 1, 2)),
        ((("nut", 20, 0.9), ("nut", 21, 0.8)), (1, 2, 2)),  # one thing is found once
        ((("nut", 0, 0.9), ("nut", 90, 0.9)), (0, 0, 2)),  # cut by the edge: neither way
    ],
)
def test_compare(items: tuple[tuple[str, float, float], ...], counts: tuple[int, ...]) -> None:
    truth = [TruthItem("nut", (x, 40.0, x + 10, 50.0)) for x in (20.0, 60.0)]
    assert compare(boxes(*items), truth, (0, 0, 100, 100)) == counts


def test_iou() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_score_joins_whichever_comes_first() -> None:
    score = Score((0, 0, 100, 100))
    truth = [TruthItem("nut", (20.0, 40.0, 30.0, 50.0))]
    assert (score.precision, score.recall) == (None, None)
    score.add_truth((1, 7), truth)
    score.add_items((1, 7), boxes(("nut", 20, 0.9)))
    score.add_items((1, 8), boxes(("nut", 20, 0.9), ("nut", 50, 0.5)))
    score.add_items((2, 9), boxes(("nut", 20, 0.9)))  # its truth never comes
    assert (score.frames, score.precision, score.recall) == (1, 1.0, 1.0)
    score.add_truth((1, 8), truth)
    assert score.frames == 2
    assert score.precision == pytest.approx(2 / 3)
    for sequence in range(10, 3000):
        score.add_items((1, sequence), ())
    assert len(score._items) == 512, "what never finds its other half is bounded"


def test_table_aligns() -> None:
    rows = text.table(("NAME", " RATE", "STATE"), [("a", "1.0", "ok"), ("longer", "100", "bad")])
    assert rows == ["NAME    RATE  STATE", "a        1.0  ok", "longer   100  bad"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0412, "41 ms"), (2.34, "2.3 s"), (300, "5 min"), (11_160, "3.1 h"), (1_036_800, "12 d")],
)
def test_seconds(value: float, shown: str) -> None:
    assert text.seconds(value) == shown
