"""Connections to a camera that break again and again: what they leave in its capture process.

A real server (tests/servers) ends the connection, as soon as the real capture process has got some
frames of it; that process is started as supervisord starts it. rss_growth_kb_per_100 is the slope,
by least squares, of its resident memory over the reconnects after the first 100; fd_growth its open
files at the end less those after the first 100. Each source is measured in a process of its own;
the last line has the worst of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import zmq

from common import bus
from common.messages import Beat
from common.paths import PROJECT, Paths
from scripts.bench.lanes import until
from scripts.bench.measure import Figures, report
from tests.servers.running import MJPEG, RTSP, Server

WARM_UP = 100
FRAMES = 3  # of each connection, before it is ended
URLS = {"rtsp": "rtsp://127.0.0.1:{}/h264", "mjpeg": "http://127.0.0.1:{}/steady"}
SERVERS = {"rtsp": RTSP, "mjpeg": MJPEG}
CONFIG = f"""
[cameras.gate]
source = "SOURCE"
url = "URL"
reconnect_max_s = 0.02
[groups.main]
model = "{PROJECT}/models/factory"
"""
# As common/processes.py and supervisord.conf have it.
MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OPENBLAS_NUM_THREADS": "1",
}


class Ear:
    """What the capture process says of itself."""

    def __init__(self, paths: Paths, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        topics = "frame/gate", "beat/capture-gate"
        self._socket = bus.Subscriber(context, [paths.endpoint("capture-gate")], topics)
        self.frames = self.reconnects = 0

    def hear(self) -> None:
        self._socket.wait(0.02)
        for topic, body in self._socket.drain():
            if topic == "frame/gate":
                self.frames += 1
                continue
            beat = bus.decode(topic, body)
            if isinstance(beat, Beat) and beat.camera:
                self.reconnects = beat.camera.reconnects

    def frames_after(self, reconnects: int) -> None:
        """Wait for some frames of the connection of that number."""
        before = -1

        def heard() -> bool:
            nonlocal before
            self.hear()
            if before < 0 and self.reconnects >= reconnects:
                before = self.frames
            return 0 <= before <= self.frames - FRAMES

        until(heard, 30, f"frames of connection {reconnects}")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def capture(source: str, url: str) -> Iterator[tuple[psutil.Process, Ear]]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "vigil.toml"
        config.write_text(CONFIG.replace("SOURCE", source).replace("URL", url))
        paths = Paths.under(Path(folder))
        paths.make()
        environment = os.environ | MEMORY | {"VIGIL_ROOT": folder, "VIGIL_CONFIG": str(config)}
        environment.pop("VIGIL_RUN", None)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        process = subprocess.Popen(
            [sys.executable, "-OO", "-m", "services.capture.main", "gate"],
            cwd=PROJECT,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            with closing(Ear(paths, context)) as ear:
                yield psutil.Process(process.pid), ear
        finally:
            process.terminate()
            process.wait()
            context.destroy(linger=0)
            subprocess.run(["rm", "-rf", paths.run], check=True)


def measure(source: str, count: int) -> Figures:
    with (
        closing(Server(*SERVERS[source])) as server,
        capture(source, URLS[source].format(server.port)) as (process, ear),
    ):
        ear.frames_after(0)
        places, rss_kb, files = [], [], []
        for place in range(1, count + 1):
            server.tell("drop")
            ear.frames_after(place)
            if place >= WARM_UP:
                places.append(place)
                rss_kb.append(process.memory_info().rss / 1024)
                files.append(process.num_fds())
            if place % 100 == 0:
                print(
                    f"{source} {place}/{count}: {rss_kb[-1]:.0f} kB, {files[-1]} files", flush=True
                )
        return {
            "reconnects": ear.reconnects,
            "rss_growth_kb_per_100": 100 * statistics.linear_regression(places, rss_kb).slope,
            "fd_growth": files[-1] - files[0],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/reconnect", description=__doc__)
    parser.add_argument("--source", choices=SERVERS, action="append", help="default: each")
    parser.add_argument("--reconnects", type=int, default=1000, metavar="N")
    arguments = parser.parse_args()
    sources = arguments.source or list(SERVERS)
    figures = {source: measure(source, arguments.reconnects) for source in sources}
    worst = {
        "reconnects": min(one["reconnects"] for one in figures.values()),
        "rss_growth_kb_per_100": max(one["rss_growth_kb_per_100"] for one in figures.values()),
        "fd_growth": max(one["fd_growth"] for one in figures.values()),
    }
    each = {
        f"{source}_{key}": value for source, one in figures.items() for key, value in one.items()
    }
    rounded = {key: round(value, 1) for key, value in (worst | each).items()}
    report({**rounded, "source": "+".join(sources)})


if __name__ == "__main__":
    main()
