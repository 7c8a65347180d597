"""The line as a whole: real cameras and models under supervisord, as scripts/run starts it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from common.frames import Ring, generations
from common.paths import PROJECT, Paths
from tests import onnx_files
from tests.support import Journal, System, balanced, until

Start = Callable[[str], System]

VIRTUAL = f"""
[cameras.belt]
source = "virtual"
fps = 20
[groups.main]
model = "{PROJECT}/models/factory"
"""


def video(path: Path, model: Path, **keys: str) -> str:
    extra = "\n".join(f"{key} = {value}" for key, value in keys.items())
    return f"""
[cameras.line]
source = "video"
path = "{path}"
fps = "max"
loop = false
policy = "every"
{extra}
[groups.main]
model = "{model}"
"""


def test_default_runs_and_reports(paths: Paths) -> None:
    """The shipped vigil.toml: results within 5 s where nothing has to be set up any more."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.runner", "--seconds", "8"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert balanced(report["cameras"]["belt"])
    assert report["cameras"]["belt"]["inferred"] >= 10
    assert report["results_per_s"] > 5
    assert 0 < report["first_valid_s"] < 60
    assert "vigil status" in done.stdout
    assert not paths.run.exists(), "left behind in shared memory"


def test_stale_results_are_not_valid(paths: Paths) -> None:
    """Frames older than the limit are judged, but say so; a line without a valid result fails."""
    config = paths.root / "vigil.toml"
    config.write_text(VIRTUAL.replace("fps = 20", "fps = 20\nstale_after_s = 0.0001"))
    journal = Journal(paths, "belt")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.runner", "--seconds", "5", "--config", config],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    results = journal.stop()
    assert done.returncode == 1
    assert "no valid result" in done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["first_valid_s"] is None
    assert report["cameras"]["belt"]["inferred"] > 0
    assert {result.validity for result in results} == {"stale"}
    assert all("s old" in result.reason for result in results)


def test_every_frame_of_a_video(system: Start, paths: Paths, shared_data: Path) -> None:
    """1,189 frames of a bottling line through SSD MobileNet: each judged once, counts as known."""
    model = shared_data / "models/tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    line = system(video(shared_data / "video/bottle-detection.mp4", model))
    journal = Journal(paths, "line")
    until(lambda: len(journal.results) >= 1189, 110, "every frame judged")
    results = journal.stop()
    report = line.stop()["cameras"]["line"]
    assert report == {"captured": 1189, "inferred": 1189} | dict.fromkeys(
        ("not_inferred", "failed", "skipped", "torn", "overrun", "in_flight"), 0
    )
    assert [result.sequence for result in results] == list(range(1, 1190))
    known = json.loads((shared_data / "expected/video_counts.json").read_text())
    counts = known["bottle-detection.mp4"]["counts"]["ssd"]
    seen = {
        frame: sum(i.label == "bottle" and i.score >= 0.5 for i in results[int(frame)].items)
        for frame in counts
    }
    # Near the threshold one detection more or less is the processor's; most are exact.
    assert all(abs(seen[frame] - counts[frame]) <= 1 for frame in counts), (seen, counts)
    assert sum(seen[frame] == counts[frame] for frame in counts) >= 9, (seen, counts)


def test_pictures_of_changing_size(system: Start, paths: Paths, shared_data: Path) -> None:
    """A folder whose pictures differ in size: the ring is made anew, no picture is lost."""
    pictures = sorted((shared_data / "images/coco").glob("*.jpg"))
    model = shared_data / "models/tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    config = video(shared_data / "images/coco", model).replace('"video"', '"folder"')
    journal = Journal(paths, "line")
    line = system(config)
    until(lambda: len(journal.results) >= len(pictures), 60, "every picture judged")
    report = line.stop()["cameras"]["line"]
    results = journal.stop()
    assert report["inferred"] == report["captured"] == len(pictures)
    assert [result.sequence for result in results] == list(range(1, len(pictures) + 1))
    for path, result in zip(pictures, results, strict=True):
        picture = cv2.imread(str(path))
        assert picture is not None
        height, width = picture.shape[:2]
        for item in result.items:
            assert item.box is not None
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
    assert len(journal.rings) > 1


def test_a_fall_back_is_an_event_and_shows_in_every_result(
    system: Start, paths: Paths, shared_data: Path
) -> None:
    """OpenVINO, preferred here, lacks an operator of this model; ONNX Runtime has it."""
    bundle = paths.root / "bundle"
    bundle.mkdir(parents=True)
    shutil.copy(shared_data / "models/onnx/mobilenet_v2_quant.onnx", bundle / "m.onnx")
    content = onnx_files.manifest("m", "1", 1).replace(
        "[[variants]]", '[[variants]]\nruntime = "openvino"\nfile = "m.onnx"\n[[variants]]'
    )
    (bundle / "manifest.toml").write_text(content + 'activation = "softmax"\n')
    journal = Journal(paths, "line")
    pictures = shared_data / "images/coco"
    line = system(video(pictures, bundle).replace('"video"', '"folder"'))
    until(lambda: len(journal.results) >= len(list(pictures.glob("*.jpg"))), 60, "every picture")
    log = "".join(path.read_text() for path in paths.logs.glob("inference*.log"))
    line.stop()
    results = journal.stop()
    assert {result.validity for result in results} <= {"degraded", "stale"}  # read at once
    assert all("OpenVINO can't load it" in result.reason for result in results)
    assert {result.runtime.split()[0] for result in results} == {"onnxruntime"}
    events = [json.loads(row) for row in log.splitlines() if row.startswith("{")]
    codes = [event["code"] for event in events if event["process"] == "inference-main-a"]
    assert codes.count("model.fallback") == codes.count("model.loaded") == 1


def test_two_cameras_are_served_fairly(system: Start, paths: Paths, shared_data: Path) -> None:
    model = shared_data / "models/tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    config = f"""
    [cameras.left]
    source = "virtual"
    prerender = 4
    fps = 150
    [cameras.right]
    source = "virtual"
    prerender = 4
    fps = 150
    seed = 2
    [groups.main]
    model = "{model}"
    """
    line = system(config)
    line.until_valid()

    def counts() -> tuple[int, int]:
        left, right = (inferred(paths, camera) for camera in ("left", "right"))
        return left, right

    until(lambda: min(counts()) >= 10, 60, "results of each camera")
    first = counts()
    until(lambda: min(counts()) >= min(first) + 100, 60, "100 more results of each camera")
    left, right = (now - then for now, then in zip(counts(), first, strict=True))
    assert abs(left - right) <= 2 + 0.1 * max(left, right)
    report = line.stop()
    for account in report["cameras"].values():
        assert balanced(account)
        assert account["skipped"] > 0, "the cameras offered more than the engine could take"


def inferred(paths: Paths, camera: str) -> int:
    existing = generations(paths.rings, camera)
    if not existing:
        return 0
    with Ring.open(paths.rings, paths.accounts, camera, existing[-1]) as ring:
        return ring.account().inferred


def test_overrun_on_a_live_camera(system: Start, paths: Paths) -> None:
    """`every` on a live camera that is faster than the engine: frames are counted, not hidden."""
    line = system(VIRTUAL.replace("fps = 20", 'fps = 900\nprerender = 4\npolicy = "every"'))
    line.until_valid()
    until(lambda: inferred(paths, "belt") >= 50, 60, "50 results")
    account = line.stop()["cameras"]["belt"]
    assert balanced(account)
    assert account["overrun"] > 0
    assert account["skipped"] == account["torn"] == 0


def test_a_second_copy_is_refused(system: Start) -> None:
    first = system(VIRTUAL)
    first.until_valid()
    second = subprocess.run(
        [sys.executable, "-m", "scripts.runner"], cwd=PROJECT, capture_output=True, text=True
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "already runs" in second.stderr
    assert balanced(first.stop()["cameras"]["belt"])


@pytest.mark.parametrize("name", ["capture-belt", "inference-main-a"])
def test_a_second_process_of_a_name_is_refused(system: Start, paths: Paths, name: str) -> None:
    line = system(VIRTUAL)
    line.until_valid()
    kind, *arguments = name.split("-")
    second = subprocess.run(
        [sys.executable, "-m", f"services.{kind}.main", *arguments],
        cwd=PROJECT,
        env=line.environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 1
    assert "already runs" in json.loads(second.stderr)["text"]
    before = inferred(paths, "belt")
    until(lambda: inferred(paths, "belt") > before + 5, 10, "the first goes on")
