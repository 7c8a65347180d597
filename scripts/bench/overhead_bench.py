"""The running system against the bare loop of its runtime, and against the loop people write.

In each round, one after the other, all on one runtime thread:

    bare    the runtime alone, on an input tensor that is ready
    system  capture (pictures of 720p rendered beforehand), lane, journal, under supervisord
    naive   one process: read a 720p MJPEG video, resize, convert, run, decode (the same decoder)
    video   the system on that video
    paced   the system at 30/s: slot filled -> result read by a subscriber in another process,
            less the median time of the bare runtime at 30/s

Keys: rate_vs_bare = system / bare; rate_vs_naive = video / naive; added_ms_p50, added_ms_p99 from
paced. engine_busy is the share of the system's time in which its runtime ran: what is missing to 1
is all that it waited, whatever else made the machine faster or slower meanwhile. ideal_vs_naive is
what perfect overlap of the naive loop's own stages on two cores would gain, of_ideal the part of it
that was reached. Figures are medians of the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zmq

from common import bus
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.messages import Result
from common.paths import PROJECT, Paths
from common.processes import lane_name
from scripts.bench.running import result_rate, running

WIDTH, HEIGHT = 1280, 720
PACE = 30.0
VIDEO = PROJECT.parent / "shared/data/video/bottle-detection.mp4"
VIDEO_FRAMES = 300


def bare_rate(model: Model, seconds: float) -> float:
    """Runs a second of the runtime alone; nothing of Vigil is in this loop."""
    run = bare_call(model)
    count, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        run()
        count += 1
    return count / spent


def bare_paced_ms(model: Model, seconds: float) -> float:
    """Median milliseconds of the runtime alone at PACE a second."""
    run = bare_call(model)
    times = []
    due = time.monotonic()
    for _ in range(round(seconds * PACE)):
        due += 1 / PACE
        time.sleep(max(0.0, due - time.monotonic()))
        started = time.monotonic()
        run()
        times.append((time.monotonic() - started) * 1e3)
    return statistics.median(times)


def bare_call(model: Model) -> Any:
    """The runtime's own call on the input as it is: `invoke`, or `run` with its array."""
    runtime: Any = model._runtime
    picture = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    model.prepare(picture, 0)
    model.infer(0)
    if hasattr(runtime, "_interpreter"):
        return runtime._interpreter.invoke
    feed = {runtime.input.name: runtime._buffers[0]}
    return lambda: runtime._session.run(None, feed)


def rate_and_infer_ms(paths: Paths, seconds: float) -> tuple[float, float]:
    """Results a second, and the median milliseconds that the runtime took for them."""
    with results_of(paths) as results:
        rate = result_rate(paths, "bench", seconds)
        times = [result.stages.compute_infer / 1e6 for result, _ in results()]
    return rate, statistics.median(times)


@contextmanager
def results_of(paths: Paths) -> Iterator[Callable[[], Iterator[tuple[Result, int]]]]:
    """Subscribe to the results: what has come, each with the time at which it was read here."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber = bus.Subscriber(context, [paths.endpoint(lane_name("main", "a"))], ["result/"])

    def come() -> Iterator[tuple[Result, int]]:
        subscriber.wait(0.1)
        for topic, body in subscriber.drain():
            now = time.monotonic_ns()
            result = bus.decode(topic, body)
            assert isinstance(result, Result)
            yield result, now

    yield come
    context.destroy(linger=0)


def naive_stages(model: Model, video: Path, seconds: float) -> tuple[float, dict[str, float]]:
    """Rate of the loop people write, and its mean milliseconds a stage."""
    runtime: Any = model._runtime
    spec = model.input
    spent = dict.fromkeys(("read", "prepare", "infer", "decode"), 0.0)
    capture = cv2.VideoCapture(str(video))
    geometry = model.prepare(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0)
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        times = [time.monotonic()]
        ok, picture = capture.read()
        if not ok:
            capture.open(str(video))
            continue
        times.append(time.monotonic())
        if spec.resize == "stretch":
            tensor = cv2.resize(picture, (spec.width, spec.height))
        else:
            tensor = letterbox(picture, spec.width, spec.height, spec.resize == "letterbox")
        if spec.colour == "rgb":
            tensor = cv2.cvtColor(tensor, cv2.COLOR_BGR2RGB)
        values: Any = tensor
        if spec.dtype == np.float32:
            values = tensor.astype(np.float32)
            if spec.mean is not None or spec.scale is not None:
                values = (values - np.array(spec.mean or 0, "f4")) / np.array(spec.scale or 1, "f4")
        if spec.layout == "nchw":
            values = values.transpose(2, 0, 1)
        values = np.ascontiguousarray(values[None], dtype=spec.dtype)
        times.append(time.monotonic())
        if hasattr(runtime, "_interpreter"):
            interpreter = runtime._interpreter
            interpreter.set_tensor(runtime._index, values)
            interpreter.invoke()
            outputs = [
                interpreter.get_tensor(entry["index"]) for entry in interpreter.get_output_details()
            ]
        else:
            outputs = runtime._session.run(None, {runtime.input.name: values})
        times.append(time.monotonic())
        model.decode(outputs, geometry)
        times.append(time.monotonic())
        count += 1
        for stage, (begin, end) in zip(spent, pairwise(times), strict=True):
            spent[stage] += end - begin
    rate = count / (time.monotonic() - started)
    return rate, {stage: total / count * 1e3 for stage, total in spent.items()}


def letterbox(picture: Any, width: int, height: int, centred: bool) -> Any:
    ratio = min(width / picture.shape[1], height / picture.shape[0])
    small = cv2.resize(picture, (int(picture.shape[1] * ratio), int(picture.shape[0] * ratio)))
    padded = np.full((height, width, 3), 114, np.uint8)
    top = (height - small.shape[0]) // 2 if centred else 0
    left = (width - small.shape[1]) // 2 if centred else 0
    padded[top : top + small.shape[0], left : left + small.shape[1]] = small
    return padded


def added_ms(paths: Paths, seconds: float, bare_ms: float) -> tuple[float, float]:
    """p50 and p99 of slot filled -> result read here, less `bare_ms`."""
    added = []
    deadline = time.monotonic() + seconds
    with results_of(paths) as results:
        while time.monotonic() < deadline:
            for result, now in results():
                filled_ns = result.captured_ns + result.stages.decode
                added.append((now - filled_ns) / 1e6 - bare_ms)
    cuts = statistics.quantiles(added, n=100)
    return cuts[49], cuts[98]


def scaled_video(folder: Path) -> Path:
    """The shared video, scaled to 720p MJPEG, as a USB camera would give it."""
    path = folder / "720p.avi"
    source = cv2.VideoCapture(str(VIDEO))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (WIDTH, HEIGHT))
    for _ in range(VIDEO_FRAMES):
        ok, picture = source.read()
        assert ok, f"{VIDEO} can't be read"
        writer.write(cv2.resize(picture, (WIDTH, HEIGHT)))
    writer.release()
    return path


def config(model: Path, camera: str) -> str:
    return f"""
[cameras.bench]
{camera}
[groups.main]
model = "{model}"
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/overhead", description=__doc__)
    parser.add_argument("model", type=Path, help="a bundle, or a bare .onnx or .tflite")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="each measurement's time")
    arguments = parser.parse_args()
    path = arguments.model.absolute()
    cv2.setNumThreads(1)
    model = Model.load(open_bundle(path))
    model.warm_up()
    rendered = f'source = "virtual"\nsize = [{WIDTH}, {HEIGHT}]\nprerender = 16'
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        video = scaled_video(Path(folder))
        for number in range(arguments.rounds):
            row: dict[str, float] = {}
            before = bare_rate(model, arguments.seconds / 2)
            with running(config(path, f'{rendered}\nfps = "max"\npolicy = "every"')) as paths:
                row["system"], infer_ms = rate_and_infer_ms(paths, arguments.seconds)
            # On both sides of the system's: these machines drift.
            row["bare"] = (before + bare_rate(model, arguments.seconds / 2)) / 2
            row["engine_busy"] = row["system"] * infer_ms / 1e3
            row["naive"], stages = naive_stages(model, video, arguments.seconds)
            row |= {f"naive_{stage}_ms": value for stage, value in stages.items()}
            source = f'source = "video"\npath = "{video}"\nfps = "max"\npolicy = "every"'
            with running(config(path, source)) as paths:
                row["video"] = result_rate(paths, "bench", arguments.seconds)
            bare_ms = bare_paced_ms(model, arguments.seconds)
            with running(config(path, f"{rendered}\nfps = {PACE}")) as paths:
                row["added_p50"], row["added_p99"] = added_ms(paths, arguments.seconds * 2, bare_ms)
            row["bare_paced_ms"] = bare_ms
            total = sum(stages.values())
            row["ideal_vs_naive"] = total / max(stages["infer"], stages["read"], total / 2)
            row["rate_vs_bare"] = row["system"] / row["bare"]
            row["rate_vs_naive"] = row["video"] / row["naive"]
            row["of_ideal"] = row["rate_vs_naive"] / row["ideal_vs_naive"]
            rounds.append(row)
            print(f"round {number + 1}:", {key: round(value, 3) for key, value in row.items()})
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    print(
        json.dumps(
            {
                "model": path.name,
                "runtime": model.runtime,
                "rounds": len(rounds),
                **{key: round(value, 3) for key, value in median.items()},
                "added_ms_p50": round(median["added_p50"], 3),
                "added_ms_p99": round(median["added_p99"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
