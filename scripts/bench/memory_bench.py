"""Proportional set size (PSS) of each process of the running system, in MB.

One 640x480 virtual camera, drawn live at 15/s, and a LiteRT MobileNet (the shared MobileNetV2 where
it is at hand, else the factory model), after some seconds of results. Shared pages, the ring's
among them, are divided by the kernel between the processes that map them (/proc/PID/smaps_rollup).

Keys: pss_mb by process; capture_inference_mb, capture and one lane; one_lane_mb and two_lanes_mb,
everything with supervisord; watchdog_cpu_percent of a core; and one_script_mb, what one process
takes that only reads a video and runs the same model on it, with the same libraries and nothing of
Vigil.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from common.paths import PROJECT, Paths
from scripts.bench.lanes import Lanes, Processes
from scripts.bench.running import result_rate, running

MOBILENET = PROJECT.parent / "shared/data/models/tflite/mobilenet_v2_1.0_224_quant.tflite"
FACTORY = PROJECT / "models/factory"
VIDEO = PROJECT.parent / "shared/data/video/bottle-detection.mp4"
SCRIPT = """
import sys, cv2
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
place = interpreter.get_input_details()[0]
_, height, width, _ = place["shape"]
video = cv2.VideoCapture(sys.argv[2])
for _ in range(100):
    picture = cv2.resize(video.read()[1], (width, height))
    interpreter.set_tensor(place["index"], cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)[None])
    interpreter.invoke()
print("ready", flush=True)
sys.stdin.read()
"""


def pss_mb(paths: Paths) -> dict[str, float]:
    """PSS by process, named as in the table of processes."""
    supervisord = psutil.Process(int((paths.run / "supervisord.pid").read_text()))
    found = {"supervisord": supervisord.pid}
    for child in supervisord.children():
        module, *arguments = child.cmdline()[3:]
        found["-".join((module.split(".")[1], *arguments))] = child.pid
    return {name: _pss_mb(pid) for name, pid in found.items()}


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no PSS of process {pid}")


def one_script_mb() -> float | None:
    """PSS of the script above; None without the shared data."""
    if not (MOBILENET.exists() and VIDEO.exists()):
        return None
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, MOBILENET, VIDEO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as script:
        assert script.stdout is not None
        script.stdout.readline()
        return _pss_mb(script.pid)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/memory", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of results before each look")
    arguments = parser.parse_args()
    model = arguments.model or (MOBILENET if MOBILENET.exists() else FACTORY)
    config = f"""
    [cameras.bench]
    source = "virtual"
    size = [640, 480]
    fps = 15
    [groups.main]
    model = "{model.absolute()}"
    runtime = "litert"
    """
    rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    shares = []
    for _ in range(arguments.rounds):
        for lanes, rows in rounds.items():
            with running(f"{config}lanes = {lanes}\n") as paths:
                Lanes(paths, lanes).until_standby()
                watchdog = Processes(paths).all()["watchdog"]
                before, started = sum(watchdog.cpu_times()[:2]), time.monotonic()
                result_rate(paths, "bench", arguments.seconds)
                used = sum(watchdog.cpu_times()[:2]) - before
                shares.append(100 * used / (time.monotonic() - started))
                rows.append(pss_mb(paths))
            print({name: round(value, 1) for name, value in rows[-1].items()})
    median = {name: statistics.median(row[name] for row in rounds[2]) for name in rounds[2][0]}
    alone = one_script_mb()
    both = median["capture-bench"] + statistics.median(r["inference-main-a"] for r in rounds[1])
    report = {
        "model": model.name,
        "pss_mb": {name: round(value, 1) for name, value in median.items()},
        "capture_inference_mb": round(both, 1),
        "one_lane_mb": round(statistics.median(sum(row.values()) for row in rounds[1]), 1),
        "two_lanes_mb": round(statistics.median(sum(row.values()) for row in rounds[2]), 1),
        "watchdog_cpu_percent": round(statistics.median(shares), 2),
        "one_script_mb": None if alone is None else round(alone, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
