"""Proportional set size (PSS) of each process of the running system, in MB.

One 640x480 virtual camera, drawn live at 15/s, and a LiteRT MobileNet (the shared MobileNetV2 where
it is at hand, else the factory model), after some seconds of results. Shared pages, the ring's
among them, are divided by the kernel between the processes that map them (/proc/PID/smaps_rollup).

Keys: pss_mb by process; capture_inference_mb, the two together; total_mb with supervisord; and
one_script_mb, what one process takes that only reads a video and runs the same model on it, with
the same libraries and nothing of Vigil.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import psutil

from common.paths import PROJECT, Paths
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
    rounds = []
    for _ in range(arguments.rounds):
        with running(config) as paths:
            result_rate(paths, "bench", arguments.seconds)
            rounds.append(pss_mb(paths))
        print({name: round(value, 1) for name, value in rounds[-1].items()})
    median = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    services = sum(value for name, value in median.items() if name != "supervisord")
    alone = one_script_mb()
    report = {
        "model": model.name,
        "pss_mb": {name: round(value, 1) for name, value in median.items()},
        "capture_inference_mb": round(services, 1),
        "total_mb": round(services + median["supervisord"], 1),
        "one_script_mb": None if alone is None else round(alone, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
