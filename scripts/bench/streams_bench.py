"""1 to 16 cameras share one engine thread, offering 1.2 times what it can take.

Cameras are virtual, 640x480, rendered beforehand, under `latest`; the model is the shared
MobileNetV2 where it is at hand, else the factory's. Each number of cameras is a round of its own,
with the bare loop of the runtime (on a tensor that is ready) before and after it.

Keys, by number of cameras: total_vs_bare = results of all cameras / bare; fairness, Jain's index
of results by camera: (sum x)^2 / (n sum x^2). Their worst are total_vs_bare and fairness of the
last line. mb_per_camera is the growth, by least squares, of what all processes but captures
have resident (RSS), less what of it is rings: PSS would fall as more captures share libraries.
"""

import argparse
import statistics
import time
from pathlib import Path

import cv2

from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.paths import Paths
from scripts.bench.lanes import Processes
from scripts.bench.measure import report
from scripts.bench.memory_bench import FACTORY, MOBILENET
from scripts.bench.overhead_bench import bare_rate
from scripts.bench.running import account, running

CAMERAS = (1, 2, 4, 8, 16)
OFFERED = 1.2


def config(model: Path, cameras: int, fps: float) -> str:
    camera = f'source = "virtual"\nprerender = 4\nfps = {fps:.3f}\nstale_after_s = 5'
    rows = [f"[cameras.c{number}]\n{camera}\nseed = {number + 1}" for number in range(cameras)]
    return "\n".join((*rows, f'[groups.main]\nmodel = "{model}"'))


def rates(paths: Paths, cameras: int, seconds: float) -> list[float]:
    """Results a second of each camera."""
    names = [f"c{number}" for number in range(cameras)]
    before, started = [account(paths, name).inferred for name in names], time.monotonic()
    time.sleep(seconds)
    after, spent = [account(paths, name).inferred for name in names], time.monotonic() - started
    return [(now - then) / spent for now, then in zip(after, before, strict=True)]


def beyond_rings_mb(paths: Paths) -> float:
    """RSS of all services but captures, without their mappings of rings."""
    total_kb = 0
    for name, process in Processes(paths).all().items():
        if name.startswith("capture-"):
            continue
        in_ring = False
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                in_ring = str(paths.rings) in line
            elif word == "Rss:" and not in_ring:
                total_kb += int(rest.split()[0])
    return total_kb * 1024 / 1e6


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/streams", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="each measurement's time")
    arguments = parser.parse_args()
    path = (arguments.model or (MOBILENET if MOBILENET.exists() else FACTORY)).absolute()
    cv2.setNumThreads(1)
    model = Model.load(open_bundle(path))
    model.warm_up()
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in CAMERAS}
    for number in range(arguments.rounds):
        for count in CAMERAS:
            before = bare_rate(model, arguments.seconds / 2)
            with running(config(path, count, OFFERED * before / count)) as paths:
                seen = rates(paths, count, arguments.seconds)
                memory = beyond_rings_mb(paths)
            bare = (before + bare_rate(model, arguments.seconds / 2)) / 2
            row = {"total_vs_bare": sum(seen) / bare, "fairness": jain(seen), "mb": memory}
            rounds[count].append(row)
            print(number + 1, count, {key: round(value, 3) for key, value in row.items()})
    median = {
        count: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for count, rows in rounds.items()
    }
    slope = statistics.linear_regression(CAMERAS, [median[count]["mb"] for count in CAMERAS]).slope
    report(
        {
            "model": path.name,
            "by_cameras": {
                count: {key: round(value, 3) for key, value in row.items()}
                for count, row in median.items()
            },
            "total_vs_bare": round(min(row["total_vs_bare"] for row in median.values()), 3),
            "fairness": round(min(row["fairness"] for row in median.values()), 4),
            "mb_per_camera": round(slope, 2),
        }
    )


if __name__ == "__main__":
    main()
