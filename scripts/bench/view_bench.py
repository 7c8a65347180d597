"""What one viewer of `vigil view` costs the lane that judges at full rate.

One 640x480 virtual camera, rendered beforehand, under `every` at fps = "max"; the shared
MobileNetV2 where it is at hand, else the factory model, which is so fast that no core has any time.
In each round: results a second with `vigil view` and somebody who looks, against the mean of those
just before and just after, with no viewer at all. Who looks is a client that asks exactly as the
page does (a picture as soon as the last is there, ten a second at most, and the status once a
second) at the lowest priority: a browser would be on another machine.

Keys: view_cost, the share of the rate that is lost (median of the rounds); view_rss_mb, of the
command while somebody looks; pictures_per_s that the client got, and encoded_per_s.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from common.paths import PROJECT, Paths
from scripts.bench.measure import Figures, report
from scripts.bench.memory_bench import FACTORY, MOBILENET
from scripts.bench.running import result_rate, running

CONFIG = """
[cameras.bench]
source = "virtual"
size = [640, 480]
fps = "max"
prerender = 30
policy = "every"
[groups.main]
model = "MODEL"
"""
PERIOD_S = 0.1  # of page.js
STATUS_S = 1.0
SETTLE_S = 3.0  # the first status and picture cost more


class Page:
    """Asks as page.js does, on two connections that stay."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self.pictures = self.encoded = 0
        self._threads = [threading.Thread(target=t) for t in (self._look, self._watch)]
        for thread in self._threads:
            thread.start()

    def _look(self) -> None:
        _give_way()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)
        after = ""
        while not self._stop.is_set():
            asked = time.monotonic()
            connection.request("GET", f"/api/picture/bench?width=960{after}")
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                self.pictures += 1
                after = f"&after={json.loads(answer.headers['Vigil-Picture'])['id']}"
                self._stop.wait(max(0.0, PERIOD_S - (time.monotonic() - asked)))
        connection.close()

    def _watch(self) -> None:
        _give_way()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)
        while not self._stop.is_set():
            connection.request("GET", "/api/status")
            self.encoded = json.loads(connection.getresponse().read())["encoded"]
            self._stop.wait(STATUS_S)
        connection.close()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _give_way() -> None:
    """The lowest priority, for this thread alone; what the process starts keeps its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


@contextmanager
def looked_at(paths: Paths) -> Iterator[tuple[Page, psutil.Process]]:
    command = [sys.executable, "-m", "services.cli.main", "--root", str(paths.root), "view"]
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as viewer:
        assert viewer.stdout is not None
        found = re.search(r":(\d+)/", viewer.stdout.readline())
        assert found is not None
        page = Page(int(found[1]))
        try:
            yield page, psutil.Process(viewer.pid)
        finally:
            page.close()
            viewer.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/view", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="of results in each case")
    arguments = parser.parse_args()
    seconds = arguments.seconds
    model = arguments.model or (MOBILENET if MOBILENET.exists() else FACTORY)

    with running(CONFIG.replace("MODEL", str(model.absolute()))) as paths:

        def alone() -> Figures:
            time.sleep(SETTLE_S)
            return {"rate": result_rate(paths, "bench", seconds)}

        def viewed() -> Figures:
            with looked_at(paths) as (page, viewer):
                time.sleep(SETTLE_S)
                pictures, encoded, used = page.pictures, page.encoded, sum(viewer.cpu_times()[:2])
                rate = result_rate(paths, "bench", seconds)
                return {
                    "rate": rate,
                    "pictures_per_s": (page.pictures - pictures) / seconds,
                    "encoded_per_s": (page.encoded - encoded) / seconds,
                    "cpu_percent": 100 * (sum(viewer.cpu_times()[:2]) - used) / seconds,
                    "rss_mb": viewer.memory_info().rss / 1e6,
                }

        before, rounds = alone()["rate"], []
        for number in range(arguments.rounds):
            print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
            seen, after = viewed(), alone()["rate"]
            beside = (before + after) / 2
            rounds.append({**seen, "alone": beside, "cost": 1 - seen["rate"] / beside})
            before = after
    found = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    report(
        {
            "model": model.name,
            "view_cost": round(found["cost"], 4),
            "view_rss_mb": round(found["rss_mb"], 1),
            "results_per_s": round(found["alone"], 1),
            "pictures_per_s": round(found["pictures_per_s"], 1),
            "encoded_per_s": round(found["encoded_per_s"], 1),
            "viewer_cpu_percent": round(found["cpu_percent"], 1),
        }
    )


if __name__ == "__main__":
    main()
