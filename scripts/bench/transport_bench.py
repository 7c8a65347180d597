"""Moving pictures between two processes: Vigil's ring with its bell against three other ways.

    ring      common.frames, with a bell and a message on common.bus: paced under `latest`; flat
              out under `every`, where the reader also decides each frame: the writer waits for it
    zmq       the whole picture over ZeroMQ, PUSH to PULL, copy=False at both ends
    imagezmq  that library, as it comes (request and reply), over the same kind of socket
    queue     multiprocessing.Queue, which pickles

Every way starts and ends with the same: the producer copies a picture into what it sends (the slot
of the ring; a new array for the others, which keep it until it is sent), and the consumer reads
every byte once, in place, summing 64-bit words, about as fast as memory is read: a dearer use would
only hide the difference. No way loses a picture; each has a few on their way.

Figures, medians of interleaved rounds. At 30 pictures a second: `latency_ms`, p50 from before the
copy to after the sum, and `cpu_ms` a picture, of both processes with all their threads. Flat out:
`rate`, pictures a second. cpu_vs_zmq and rate_vs_zmq are of 720p.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.measure import Figures, interleaved, report
from scripts.bench.transport_ways import SLOTS, WAYS, Link, Picture, Receiver, Sender

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920)}
PACE = 30.0
WARM_UP = 12
LAST = 0  # the stamp of the last picture
TIMEOUT_S = 60.0
SPAWN = multiprocessing.get_context("spawn")


def produce(way: str, link: Link, seconds: float, out: Connection, ready: Any) -> None:
    """Send at PACE or flat out; tells the CPU seconds after the warm-up."""
    picture: Picture = np.random.default_rng(1).integers(0, 256, (*link.size, 3), np.uint8)
    sender: Sender = WAYS[way][0](link)
    ready.wait(TIMEOUT_S)
    due = time.monotonic()
    for _ in range(WARM_UP):
        sender.send(picture, time.monotonic_ns())
        due += 1 / PACE
        time.sleep(max(0.0, due - time.monotonic()))
    cpu, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        sender.send(picture, time.monotonic_ns())
        if link.paced:
            due += 1 / PACE
            time.sleep(max(0.0, due - time.monotonic()))
    out.send(time.process_time() - cpu)
    sender.send(picture, LAST)
    ready.wait(TIMEOUT_S)  # until it has arrived


def consume(way: str, link: Link, seconds: float, out: Connection, ready: Any) -> None:
    """Receive; tells CPU seconds, seconds, and the latencies in milliseconds."""
    receiver: Receiver = WAYS[way][1](link)
    ready.wait(TIMEOUT_S)
    latencies: list[float] = []
    for number in itertools.count(1):
        stamp, picture = receiver.receive()
        if stamp == LAST:
            break
        np.add.reduce(picture.reshape(-1).view(np.uint64))
        receiver.done()
        if number == WARM_UP:
            cpu, started = time.process_time(), time.monotonic()
        elif number > WARM_UP:
            latencies.append((time.monotonic_ns() - stamp) / 1e6)
    out.send((time.process_time() - cpu, time.monotonic() - started, latencies))
    ready.wait(TIMEOUT_S)


def run(way: str, size: tuple[int, int], seconds: float) -> Figures:
    """One way, once paced and once flat out, each in two fresh processes."""
    cpu_s, _, latencies = transfer(way, size, seconds, paced=True)
    _, spent_s, flat_out = transfer(way, size, seconds, paced=False)
    return {
        "cpu_ms": cpu_s / len(latencies) * 1e3,
        "latency_ms": statistics.median(latencies),
        "rate": len(flat_out) / spent_s,
    }


def transfer(
    way: str, size: tuple[int, int], seconds: float, *, paced: bool
) -> tuple[float, float, list[float]]:
    """CPU seconds of both ends, seconds, latencies in milliseconds, after the warm-up."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vigil-bench-") as folder:
        link = Link(Path(folder), size, paced, SPAWN.Queue(SLOTS))
        ready = SPAWN.Barrier(2)
        sent, taken = SPAWN.Pipe(duplex=False), SPAWN.Pipe(duplex=False)
        ends = [
            SPAWN.Process(target=end, args=(way, link, seconds, pipe[1], ready))
            for end, pipe in ((produce, sent), (consume, taken))
        ]
        for process in ends:
            process.start()
        try:
            if not (sent[0].poll(TIMEOUT_S) and taken[0].poll(TIMEOUT_S)):
                raise TimeoutError(f"{way}: nothing measured within {TIMEOUT_S:.0f} s")
            cpu_s, (other_cpu_s, spent_s, latencies) = sent[0].recv(), taken[0].recv()
        finally:
            for process in ends:
                process.join(5)
                process.kill()
    return cpu_s + other_cpu_s, spent_s, latencies


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/transport", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=0.8, help="of each part of each run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases = {
        f"{way} {name}": partial(run, way, size, arguments.seconds)
        for name, size in SIZES.items()
        for way in WAYS
    }
    found = interleaved(cases, arguments.rounds)
    for case, figures in found.items():
        print(f"{case:16}", *(f"{key} {value:8.2f}" for key, value in figures.items()))
    ring, zmq = found["ring 720p"], found["zmq 720p"]
    report(
        {
            "cpu_vs_zmq": round(ring["cpu_ms"] / zmq["cpu_ms"], 3),
            "rate_vs_zmq": round(ring["rate"] / zmq["rate"], 2),
            **{
                f"{case.replace(' ', '_')}_{key}": round(value, 2)
                for case, figures in found.items()
                for key, value in figures.items()
            },
        }
    )


if __name__ == "__main__":
    main()
