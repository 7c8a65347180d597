"""What `vigil tap replay` does: a recording speaks for the processes that sent it, and its pictures
come into rings again.

A name that is held, because that process runs here, is left to it: where lanes run, they judge the
pictures anew. Where none does, the recorded results are decided in the rings as a lane would.
"""

import argparse
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq

from common import bus
from common.bell import Bell, Ringer
from common.bus import Publisher
from common.config import Camera, Config, load
from common.errors import AlreadyRunningError, ConfigError, FencedError, NotRunningError
from common.frames import Ring, Shape, generations, remove_drained
from common.messages import Frame, Message, Result, Trigger, Truth
from common.paths import Paths
from common.processes import capture_name, lane_name, lanes, render, rendered_from
from common.recording import PIXELS, Pixels, Recorded, Recording, unpack
from common.service import lock
from common.states import Policy, Sight, Validity
from services.cli.listen import configuration

# Fields of messages that are moments of CLOCK_MONOTONIC; any other `_ns` is a duration.
MOMENTS = frozenset(
    (
        "at_ns",
        "captured_ns",
        "filled_ns",
        "progressed_ns",
        "sent_ns",
        "shown_ns",
        "since_ns",
        "wait_until_ns",
    )
)
LATE_NS = 50_000_000  # behind by more than this, what follows is late too: never in a burst
TICK_S = 0.1
PATIENCE_S = 30.0  # without a decision of a lane, before that is said
REMEMBERED = 1024  # frames whose numbers are known
NOT_WELL = 2
COUNTERS: dict[str, str] = {Validity.NOT_INFERRED: "not_inferred", Validity.FAILED: "failed"}

Number = tuple[int, int]  # of a frame: ring, sequence
M = TypeVar("M", bound=Message)


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    source = Recording(args.file)
    paths.make()
    with surroundings(paths, source) as config, ExitStack() as stack:
        stack.callback(source.close)
        replay = Replay(paths, config, source)
        stack.callback(replay.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, replay.stop))
        replay.play(args.speed, step=args.step, loop=args.loop)
        return replay.end()


@contextmanager
def surroundings(paths: Paths, source: Recording) -> Iterator[Config]:
    """The vigil.toml of what runs here; where there is none, the recorded one, which other commands
    then find as if its system ran."""
    if "VIGIL_CONFIG" in os.environ or rendered_from(paths):
        yield configuration(paths)
        return
    written, programs = paths.run / "recorded.toml", paths.programs / "vigil.conf"
    written.write_text(source.about.get("config", ""))
    try:
        config = load(written)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; the recorded vigil.toml can't be used, give --config"
        ) from error
    programs.write_text(render(config, paths))
    try:
        yield config
    finally:
        programs.unlink()
        written.unlink()


@dataclass
class Line:
    """A camera whose pictures are replayed."""

    name: str
    camera: Camera
    lanes: Ringer
    bell: Bell  # rung by lanes after each decision
    judged_here: bool  # a lane runs
    existed: bool  # before this replay
    ring: Ring | None = None
    numbers: dict[Number, Number] = field(default_factory=dict)  # as recorded -> here
    early: dict[Number, list[Recorded]] = field(default_factory=dict)  # heard before their frame

    def close(self) -> None:
        if self.ring is not None:
            self.ring.close()
        self.lanes.close()
        self.bell.close()


class Replay:
    def __init__(self, paths: Paths, config: Config, source: Recording) -> None:
        self._paths, self._config, self._source = paths, config, source
        self._stack = ExitStack()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._stack.callback(self._context.destroy, linger=0)
        self._publishers: dict[str, Publisher] = {}
        self._stopping = False
        self._shift = 0  # from recorded moments to those of now, ns
        self.counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        for name in source.processes:
            self._speak_for(name)
        held = [name for name in source.processes if name not in self._publishers]
        if held:
            say(f"{', '.join(held)} runs here and is not replayed")
        self._lines = {
            name: self._line(name) for name in source.cameras if self._replayable(name, config)
        }

    def _speak_for(self, name: str) -> None:
        try:
            held = lock(self._paths, name)
        except AlreadyRunningError:
            return
        self._stack.callback(os.close, held)
        publisher = Publisher(self._context, self._paths.endpoint(name))
        self._stack.callback(publisher.close)
        self._publishers[name] = publisher

    def _replayable(self, camera: str, config: Config) -> bool:
        if camera not in config.cameras:
            say(f"no [cameras.{camera}] in {config.path}: its pictures are not replayed")
        return camera in config.cameras and capture_name(camera) in self._publishers

    def _line(self, name: str) -> Line:
        camera = self._config.cameras[name]
        names = [lane_name(camera.group, lane) for lane in lanes(self._config, camera.group)]
        line = Line(
            name,
            camera,
            Ringer(map(self._paths.bell, names)),
            Bell(self._paths.bell(capture_name(name))),
            any(not self._free(lane) for lane in names),
            bool(generations(self._paths.rings, name)),
        )
        self._stack.callback(self._remove, line)
        self._stack.callback(line.close)
        return line

    def _free(self, process: str) -> bool:
        """Whether no process of that name runs here, this one left aside."""
        if process in self._publishers:
            return True
        try:
            os.close(lock(self._paths, process))
        except AlreadyRunningError:
            return False
        return True

    def _remove(self, line: Line) -> None:
        """Leave no picture in shared memory that nobody needs."""
        if not line.existed and not line.judged_here:
            for generation in generations(self._paths.rings, line.name):
                (self._paths.rings / f"{line.name}.{generation}").unlink()
            (self._paths.accounts / line.name).unlink(missing_ok=True)

    def stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    # -- time --------------------------------------------------------------------------------

    def play(self, speed: float | None, *, step: bool, loop: bool) -> None:
        """
        Args:
            speed: how many times as fast as recorded; None: without a pause.
            step: each line on standard input lets the next frame come, and what follows it.
        """
        while True:
            played = self._play_once(None if step else speed, step)
            for line in self._lines.values():
                self._wait_for_lane(line, lambda ring: ring.decided == ring.written)
            if not loop or not played:
                return
            for line in self._lines.values():  # in the next round they are others
                line.numbers.clear()
                line.early.clear()

    def _play_once(self, speed: float | None, step: bool) -> bool:
        """Whether to go on: something was played, and neither a signal nor the end of standard
        input came."""
        start = first = -1
        for message in self._source.messages():
            if step and self._is_frame(message) and not self._enter():
                return False
            self._make_room(message)
            if self._stopping:
                return False
            now = time.monotonic_ns()
            if start < 0:
                start, first = now, message.at_ns
            due = now if speed is None else start + round((message.at_ns - first) / speed)
            if now - due > LATE_NS:
                start, due = start + now - due, now
            self._sleep_until(due)
            self._shift = due - message.at_ns
            self._send(message)
            if step and self._is_frame(message):
                at_s = (message.at_ns - first) / 1e9
                print(f"{message.topic.partition('/')[2]}: {at_s:.3f} s", flush=True)
        return start >= 0

    def _sleep_until(self, due: int) -> None:
        while (left := due - time.monotonic_ns()) > 0 and not self._stopping:
            time.sleep(min(left / 1e9, TICK_S))

    def _enter(self) -> bool:
        """Wait for a line on standard input; False at its end, or when asked to stop."""
        byte = b" "
        while byte not in (b"", b"\n") and not self._stopping:
            if select.select([sys.stdin], [], [], TICK_S)[0]:
                byte = os.read(sys.stdin.fileno(), 1)
        return byte == b"\n"

    def _is_frame(self, message: Recorded) -> bool:
        """Whether this is what shows a camera's next frame: its pixels where they were recorded."""
        kind, _, camera = message.topic.partition("/")
        return kind == (PIXELS if camera in self._source.cameras else "frame")

    def _shifted(self, message: M) -> M:
        changed: dict[str, object] = {}
        for name in message.__struct_fields__:
            value = getattr(message, name)
            if name in MOMENTS and value:
                changed[name] = value + self._shift
            elif isinstance(value, Message):
                changed[name] = self._shifted(value)
        return msgspec.structs.replace(message, **changed) if changed else message

    # -- messages ----------------------------------------------------------------------------

    def _send(self, recorded: Recorded) -> None:
        kind, _, what = recorded.topic.partition("/")
        line = self._lines.get(what)
        if kind == PIXELS:
            if line is not None:
                self._show(line, recorded)
            return
        publisher = self._publishers.get(recorded.process)
        if publisher is None or (kind == "frame" and what in self._source.cameras):
            return
        try:
            message = self._shifted(bus.decode(recorded.topic, recorded.body))
        except msgspec.DecodeError:  # of another version: those who hear it may know it
            publisher.publish_bytes(recorded.topic, recorded.body)
            self.counts["messages"] += 1
            return
        if isinstance(message, Result | Truth | Trigger) and what in self._source.cameras:
            if line is None or (isinstance(message, Result) and line.judged_here):
                return
            here = self._renumbered(line, message)
            if here is None:  # two processes: a result may be heard before its frame
                line.early.setdefault((message.ring, message.sequence), []).append(recorded)
                self._forget(line.early)
                return
            if isinstance(here, Result) and kind == "result":
                self._decide(line, here)
            message = here
        publisher.publish(recorded.topic, message)
        self.counts["messages"] += 1

    def _renumbered(
        self, line: Line, message: Result | Truth | Trigger
    ) -> Result | Truth | Trigger | None:
        """With the numbers that its frame has here; None where that was not replayed (yet)."""
        if not message.sequence:
            return message  # a trigger that no frame answers
        here = line.numbers.get((message.ring, message.sequence))
        if here is None:
            return None
        ring, sequence = here
        if not isinstance(message, Result):
            return msgspec.structs.replace(message, ring=ring, sequence=sequence)
        assert line.ring is not None
        epoch = max(1, line.ring.fence)
        return msgspec.structs.replace(message, ring=ring, sequence=sequence, epoch=epoch)

    def _decide(self, line: Line, result: Result) -> None:
        """As the lane did that was recorded."""
        ring = line.ring
        if ring is None or ring.generation != result.ring:
            return  # of the size before
        kind = COUNTERS.get(result.validity, "inferred")
        try:
            ring.raise_fence(result.epoch)
            ring.decide(result.sequence, result.epoch, 0, 0, kind, bus.encode(result))
        except FencedError:
            self._left_out[f"results of {ring.camera} that came too late to be decided"] += 1

    # -- pictures ----------------------------------------------------------------------------

    def _make_room(self, recorded: Recorded) -> None:
        kind, _, what = recorded.topic.partition("/")
        if kind == PIXELS and (line := self._lines.get(what)):
            self._wait_for_lane(line, lambda ring: not ring.full)

    def _show(self, line: Line, recorded: Recorded) -> None:
        """Put a picture into the ring, and tell of it as capture does."""
        pixels, picture = unpack(recorded.body)
        ring = self._fitting(line, pixels)
        frame = self._shifted(
            Frame(
                ring.generation, 0, pixels.captured_ns, pixels.filled_ns, pixels.sight,
                pixels.trigger,
            )
        )  # fmt: skip
        np.frombuffer(ring.begin(), np.uint8)[:] = picture.reshape(-1)
        sequence = ring.publish(
            frame.captured_ns, frame.filled_ns, Sight(frame.sight), frame.trigger
        )
        line.lanes.ring()
        line.numbers[pixels.ring, pixels.sequence] = ring.generation, sequence
        self._forget(line.numbers)
        frame = msgspec.structs.replace(frame, sequence=sequence)
        self._publishers[capture_name(line.name)].publish(f"frame/{line.name}", frame)
        self.counts[f"pictures of {line.name}"] += 1
        for message in line.early.pop((pixels.ring, pixels.sequence), ()):
            self._send(message)

    def _forget(self, numbers: dict[Number, Any]) -> None:
        """What is kept is bounded."""
        if len(numbers) > REMEMBERED:
            del numbers[next(iter(numbers))]

    def _fitting(self, line: Line, pixels: Pixels) -> Ring:
        """The ring for such pictures. Lanes that run here judge each of them; recorded results
        may have gaps, which `every` does not know."""
        policy = Policy.EVERY if line.judged_here else Policy.LATEST
        shape = Shape(pixels.width, pixels.height, 3, line.camera.slots, policy, pixels.view)
        if line.ring is None or line.ring.shape != shape:
            if line.ring is not None:
                line.ring.close()
            rings, accounts = self._paths.rings, self._paths.accounts
            remove_drained(rings, accounts, line.name, keep=1)
            line.ring = Ring.attach(rings, accounts, line.name, shape)
        return line.ring

    def _wait_for_lane(self, line: Line, ready: Callable[[Ring], bool]) -> None:
        """Until a lane that runs here has decided enough."""
        ring = line.ring
        if ring is None or not line.judged_here:
            return
        decided, since = ring.decided, time.monotonic_ns()
        while not ready(ring) and not self._stopping:
            select.select([line.bell.fd], [], [], TICK_S)
            line.bell.heard()
            if ring.decided != decided:
                decided, since = ring.decided, time.monotonic_ns()
            elif time.monotonic_ns() - since > PATIENCE_S * 1e9:
                raise NotRunningError(
                    f"{line.name}: its lanes have decided nothing for {PATIENCE_S:.0f} s; see "
                    "vigil status"
                )

    # -- the end -----------------------------------------------------------------------------

    def end(self) -> int:
        """Say what was replayed and what was not; the exit status."""
        said = [f"{count} {what}" for what, count in self.counts.items()]
        print(f"{self._source.path}: {', '.join(said) or 'nothing'} replayed")
        left_out = [f"left out: {count} {what}" for what, count in self._left_out.items()]
        for line in self._lines.values():
            if line.early:
                left_out.append(
                    f"left out: what was said of {len(line.early)} frames without pictures"
                )
        for problem in (*self._source.problems, *left_out):
            say(f"{self._source.path}: {problem}")
        return NOT_WELL if self._source.problems else 0

    def close(self) -> None:
        self._stack.close()


def say(text: str) -> None:
    print(f"vigil: {text}", file=sys.stderr, flush=True)
