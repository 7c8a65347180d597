"""What `vigil tap record` does: it listens to every process, looks into the rings, and writes.

One thread hears and copies, another packs and writes. What waits between them is bounded; what
finds no room there is left out and counted, so that a slow disk disturbs nobody.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType

import msgspec
import numpy as np
import zmq

from common import bus
from common.bus import Subscriber
from common.config import Config
from common.errors import ConfigError, RingError, StorageError
from common.frames import Ring
from common.messages import Frame
from common.paths import Paths
from common.processes import processes
from common.recording import PIXELS, Pixels, RecordingWriter, encode, without_passwords
from common.states import Sight
from services.cli.listen import configuration, require_running
from services.cli.text import number, size

TICK_S = 0.2
CHUNK_S = 1.0  # at the longest between what happens and what a power cut leaves of it
WAITING_BYTES = 64 << 20  # between the two threads
MESSAGE_ROOM = 8 << 20  # of which pictures leave so much to messages
DISK_LEFT_MB = 16.0  # is not recorded upon: the system needs room too
NOT_WELL = 2


@dataclass(frozen=True)
class Item:
    process: str
    topic: str
    at_ns: int
    body: bytes
    pixels: Pixels | None = None  # to be packed: their data is what is in the ring


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    cameras = args.cameras.split(",") if args.cameras else list(config.cameras)
    for name in cameras:
        if name not in config.cameras:
            raise ConfigError(f"no camera {name}; {config.path} has {', '.join(config.cameras)}")
    recorder = Recorder(paths, config, args, cameras if args.pixels else [])
    before = {n: signal.signal(n, recorder.stop) for n in (signal.SIGINT, signal.SIGTERM)}
    os.nice(10)  # whoever is watched goes first
    try:
        return recorder.run(args.seconds)
    finally:
        for number_, handler in before.items():
            signal.signal(number_, handler)


class Recorder:
    def __init__(
        self, paths: Paths, config: Config, args: argparse.Namespace, cameras: list[str]
    ) -> None:
        self._paths, self._cameras = paths, cameras
        self._names = [process.name for process in processes(config)]
        require_running(paths, self._names)
        self._lossless = args.pixels == "lossless"
        self._folder = args.file.absolute().parent
        self._stopping = False
        self._rings: dict[str, Ring] = {}
        self._newest: dict[str, int] = {}  # sequence heard of, by camera
        self.counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        # Each has one writer, so neither needs a lock.
        self._put = self._taken = 0
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        self._error: StorageError | None = None
        about = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "started_ns": str(time.monotonic_ns()),
            "boot_wall_s": f"{time.time() - time.monotonic():.3f}",  # wall clock at 0 ns
            "processes": " ".join(self._names),
            "pixels": " ".join(cameras),
            "config_path": str(config.path),
            "config": without_passwords(config.path.read_text(encoding="utf-8")),
        }
        self._check_disk()
        self._writer = RecordingWriter(args.file, about)

    def stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self, seconds: float | None) -> int:
        started = time.monotonic_ns()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        # A socket each: a message does not say who sent it.
        heard = {
            name: Subscriber(context, [self._paths.endpoint(name)], [""]) for name in self._names
        }
        poller = zmq.Poller()
        for one in heard.values():
            poller.register(one.socket, zmq.POLLIN)
        thread = threading.Thread(target=self._write)
        thread.start()
        problem: StorageError | None = None
        try:
            while not self._stopping and problem is None:
                left_s = TICK_S
                if seconds is not None:
                    left_s = min(left_s, seconds - (time.monotonic_ns() - started) / 1e9)
                    if left_s <= 0:
                        break
                poller.poll(round(left_s * 1000))
                self._hear(heard)
                problem = self._error or self._full_disk()
        finally:
            self._queue.put(None)
            thread.join()
            for one in heard.values():
                one.close()
            context.destroy(linger=0)
            for ring in self._rings.values():
                ring.close()
        if self._error:
            raise self._error
        counts = {**self.counts, **{f"left out: {w}": n for w, n in self._left_out.items()}}
        written = self._writer.end({what: str(count) for what, count in counts.items()})
        self._report((time.monotonic_ns() - started) / 1e9, written)
        if problem:
            raise problem
        return NOT_WELL if self._left_out else 0

    def _report(self, seconds: float, written: int) -> None:
        said = [f"{number(seconds)} s", size(written), f"{self.counts['messages']} messages"]
        said += [
            f"{self.counts[f'pictures of {camera}']} pictures of {camera}"
            for camera in self._cameras
        ]
        print(f"{self._writer.path}: {', '.join(said)}")
        for what, count in self._left_out.items():
            print(f"vigil: left out: {count} {what}", file=sys.stderr)

    # -- hearing -----------------------------------------------------------------------------

    def _hear(self, heard: dict[str, Subscriber]) -> None:
        """Everything that has arrived."""
        for process, one in heard.items():
            for topic, body in one.drain():
                at_ns = time.monotonic_ns()
                self._add(Item(process, topic, at_ns, body))
                kind, _, what = topic.partition("/")
                if kind == "frame":
                    self._frame(process, what, at_ns, body)

    def _frame(self, process: str, camera: str, at_ns: int, body: bytes) -> None:
        try:
            frame = bus.decode(f"frame/{camera}", body)
        except msgspec.DecodeError:
            return
        assert isinstance(frame, Frame)
        missed = frame.sequence - self._newest.get(camera, frame.sequence) - 1
        if missed > 0:
            self._left_out[f"frames of {camera}, whose messages came too fast"] += missed
        self._newest[camera] = frame.sequence
        if camera not in self._cameras:
            return
        ring = self._ring(camera, frame.ring)
        view = ring.pixels(frame.sequence) if ring else None
        if ring is None or view is None:
            self._left_out[f"pictures of {camera}, overwritten before they were copied"] += 1
            return
        if self._waiting + len(view) > WAITING_BYTES - MESSAGE_ROOM:
            self._left_out[f"pictures of {camera}, which came faster than they were written"] += 1
            return
        data = bytes(view)
        if not ring.intact(frame.sequence):
            self._left_out[f"pictures of {camera}, torn"] += 1
            return
        pixels = Pixels(
            frame.ring, frame.sequence, frame.captured_ns, frame.filled_ns, Sight(frame.sight),
            frame.trigger, ring.shape.width, ring.shape.height, "bgr.zst", data, ring.shape.view,
        )  # fmt: skip
        self._add(Item(process, f"{PIXELS}/{camera}", at_ns, data, pixels))

    def _ring(self, camera: str, generation: int) -> Ring | None:
        ring = self._rings.get(camera)
        if ring is None or ring.generation != generation:
            if ring is not None:
                self._rings.pop(camera).close()
            try:
                ring = Ring.open(self._paths.rings, self._paths.accounts, camera, generation)
            except RingError:
                return None
            self._rings[camera] = ring
        return ring

    def _add(self, item: Item) -> None:
        if self._waiting + len(item.body) > WAITING_BYTES:
            self._left_out["messages, which came faster than they were written"] += 1
            return
        what = f"pictures of {item.topic.partition('/')[2]}" if item.pixels else "messages"
        self.counts[what] += 1
        self._put += len(item.body)
        self._queue.put(item)

    @property
    def _waiting(self) -> int:
        """Bytes between the two threads."""
        return self._put - self._taken

    def _full_disk(self) -> StorageError | None:
        try:
            self._check_disk()
        except StorageError as error:
            return error
        return None

    def _check_disk(self) -> None:
        free_mb = shutil.disk_usage(self._folder).free / 1e6
        if free_mb < DISK_LEFT_MB:
            raise StorageError(
                f"{self._folder}: {free_mb:.1f} MB are free; recording stops at {DISK_LEFT_MB:.0f} "
                "MB, so that the system keeps room. What was recorded before is complete"
            )

    # -- writing, on a thread of its own -----------------------------------------------------

    def _write(self) -> None:
        flushed = time.monotonic_ns()
        try:
            while (item := self._queue.get()) is not None:
                body = item.body if item.pixels is None else bus.encode(self._packed(item.pixels))
                self._writer.add(item.process, item.topic, item.at_ns, body)
                self._taken += len(item.body)
                if item.at_ns - flushed > CHUNK_S * 1e9:
                    self._writer.flush()
                    flushed = time.monotonic_ns()
        except StorageError as error:
            self._error = error

    def _packed(self, pixels: Pixels) -> Pixels:
        picture = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
        encoding, data = encode(picture, lossless=self._lossless)
        return msgspec.structs.replace(pixels, encoding=encoding, data=data)
