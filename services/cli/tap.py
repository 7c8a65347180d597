"""Look inside a running system: its topics, their messages and rates, the newest picture."""

import argparse
import fnmatch
import inspect
import json
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from common import bus
from common.bus import Stream
from common.errors import ConfigError, NotRunningError
from common.messages import Message, Result
from common.paths import Paths
from common.states import Validity
from services.cli.listen import Expected, configuration, listener, topics
from services.cli.text import number, seconds, size, table, yes

Add = Callable[..., argparse.Action]

TICK_S = 0.2
NOT_WELL = 2

_EPILOG = """\
examples:
  vigil tap list                          every topic: owner, rates, age
  vigil tap dump result | head -3         decisions, as JSON lines
  vigil tap dump 'beat/*' event           a glob, and another topic
  vigil tap rate result/belt              a line a second
  vigil tap picture belt out.png          what it sees, with boxes
  vigil tap record a.mcap --pixels jpeg   everything, until Ctrl-C
  vigil tap replay a.mcap --step          the same again, a frame for each Enter
"""
_TOPIC = "a topic, its beginning, or a pattern such as '*/belt'; all where left out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, what: str, run: Callable[[argparse.Namespace], int]) -> Add:
        one = commands.add_parser(name, help=what, description=inspect.getdoc(run))
        one.set_defaults(tap=run)
        return one.add_argument

    add = command("list", "each topic: owner, rate expected and seen, bytes, age", run_list)
    add("--seconds", type=float, default=2.0, metavar="N", help="listen so long (2)")
    for name, what, run in (
        ("dump", "messages as JSON, one a line", run_dump),
        ("rate", "messages and bytes of each topic, a line a second", run_rate),
    ):
        add = command(name, what, run)
        add("topics", nargs="*", metavar="TOPIC", help=_TOPIC)
        add("--seconds", type=float, metavar="N", help="end after so long")
        if run is run_dump:
            add("--count", type=int, metavar="N", help="end after so many messages")
    add = command("picture", "the newest judged frame, with boxes and labels", run_picture)
    add("camera", metavar="CAMERA", help="its name in vigil.toml")
    add("out", type=Path, metavar="OUT.png", help=".png or .jpg")
    add = command("record", "everything that is said, and seen, into a file", record)
    add("file", type=Path, metavar="FILE", help="a new file, by custom .mcap")
    add("--pixels", choices=("lossless", "jpeg"), help="the pictures too; else messages only")
    add("--cameras", metavar="A,B", help="pictures of these only")
    add("--seconds", type=float, metavar="N", help="end after so long")
    add = command("replay", "a recording into the same topics and rings", replay)
    add("file", type=Path, metavar="FILE", help="what `vigil tap record` wrote")
    add("--speed", type=speed, default=1.0, metavar="X", help="times as fast as it was, or max")
    add("--step", action="store_true", help="the next frame at each Enter")
    add("--loop", action="store_true", help="again and again, until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    status: int = args.tap(args)
    return status


def run_list(args: argparse.Namespace) -> int:
    """Listen for a while, then list each topic that there is or should be: who sends it, how fast
    it should and does come, and how old its newest message is."""
    paths = Paths.from_environment()
    config = configuration(paths)
    expected = topics(config)
    tally = Tally(expected)
    with listener(config, paths, [""]) as listening:
        for at, topic, body in listening.hear(args.seconds):
            tally.add(at, topic, body)
    now = time.monotonic_ns()
    rows = []
    for topic in (*expected, *(topic for topic in tally.streams if topic not in expected)):
        row = expected.get(topic)
        stream = tally.streams.get(topic, Stream(None))
        rate, volume = stream.rate_seen(now, args.seconds)
        age = stream.age_s(now)
        rows.append(
            (
                topic,
                row.owner if row else "unknown",
                number(row.rate, "/s") if row else "-",
                number(rate, "/s") if age is not None else "-",
                f"{size(volume)}/s" if age is not None else "-",
                seconds(age) if age is not None else "not seen",
            )
        )
    print("\n".join(table(("TOPIC", "OWNER", " EXPECTED", " SEEN", " BYTES", " AGE"), rows)))
    return tally.end()


def run_dump(args: argparse.Namespace) -> int:
    """Print messages as JSON objects, one a line, until --count, --seconds or Ctrl-C."""
    paths = Paths.from_environment()
    config = configuration(paths)
    wanted = select_topics(args.topics, topics(config))
    tally = Tally(topics(config))
    until = None if args.seconds is None else time.monotonic_ns() + round(args.seconds * 1e9)
    reader = select.poll()
    reader.register(sys.stdout, 0)  # only whether whoever reads has gone
    with listener(config, paths, wanted) as listening:
        while until is None or time.monotonic_ns() < until:
            for at, topic, body in listening.hear(_tick(until)):
                if topic not in wanted:
                    continue
                line = tally.add(at, topic, body)
                sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
                sys.stdout.flush()
                if args.count is not None and tally.messages >= args.count:
                    return tally.end()
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in reader.poll(0)):
                raise BrokenPipeError
    if not tally.messages:
        raise NotRunningError(f"nothing arrived in {args.seconds:g} s on {', '.join(wanted)}")
    return tally.end()


def run_rate(args: argparse.Namespace) -> int:
    """Print a line for each topic every second: is it alive, on time, its newest message valid?"""
    paths = Paths.from_environment()
    config = configuration(paths)
    expected = topics(config)
    wanted = select_topics(args.topics, expected)
    tally = Tally(expected)
    width = max(map(len, wanted))
    until = None if args.seconds is None else time.monotonic_ns() + round(args.seconds * 1e9)
    head = f"{'TOPIC':{width}}  {'RATE':>9}  {'EXPECTED':>9}  {'BYTES':>9}  ALIVE  ON TIME  VALID"
    print(head, flush=True)
    with listener(config, paths, wanted) as listening:
        while until is None or time.monotonic_ns() < until:
            for at, topic, body in listening.hear(_tick(until, 1.0)):
                tally.add(at, topic, body)
            now = time.monotonic_ns()
            for topic in wanted:
                stream = tally.streams.get(topic, Stream(expected[topic].rate))
                rate, volume = stream.rate_seen(now)
                seen = bool(stream.arrivals)
                print(
                    f"{topic:{width}}  {number(rate, '/s'):>9}  "
                    f"{number(expected[topic].rate, '/s'):>9}  {size(volume) + '/s':>9}  "
                    f"{yes(stream.alive(now)):5}  {yes(stream.on_time(now)):7}  "
                    f"{yes(stream.valid) if seen else '-'}",
                    flush=True,
                )
    return tally.end()


def run_picture(args: argparse.Namespace) -> int:
    """Write the newest judged frame with its boxes and labels; its caption says what it is worth:
    how old the frame is, and whether its result is valid."""
    from services.cli import picture

    paths = Paths.from_environment()
    print(picture.save(configuration(paths), paths, args.camera, args.out))
    return 0


def record(args: argparse.Namespace) -> int:
    """Write every message to FILE (MCAP), and with --pixels the pictures, until --seconds or
    Ctrl-C. `vigil tap replay`, or a camera with source = "recording", plays it."""
    from services.cli import record

    return record.run(args)


def replay(args: argparse.Namespace) -> int:
    """Send the messages of FILE again, under the names of the processes that sent them, and put its
    pictures into rings; ages and times are as if it happened now. Lanes that run here judge the
    pictures anew, each of them; without lanes, the recorded results count."""
    from services.cli import replay

    return replay.run(args)


def speed(text: str) -> float | None:
    """None: as fast as it goes."""
    if text == "max":
        return None
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _tick(until: int | None, tick_s: float = TICK_S) -> float:
    if until is None:
        return tick_s
    return min(tick_s, max(0.0, (until - time.monotonic_ns()) / 1e9))


def select_topics(patterns: list[str], expected: dict[str, Expected]) -> list[str]:
    """The topics that one of the patterns names, begins or matches; all where there is none.

    Raises:
        ConfigError: a pattern finds none.
    """
    if not patterns:
        return list(expected)
    for pattern in patterns:
        if not any(_matches(topic, pattern) for topic in expected):
            raise ConfigError(f"no topic {pattern}; there are {', '.join(expected)}")
    return [topic for topic in expected if any(_matches(topic, p) for p in patterns)]


def _matches(topic: str, pattern: str) -> bool:
    return topic.startswith(pattern) or fnmatch.fnmatchcase(topic, pattern)


class Tally:
    """Counts messages by topic; one that can't be decoded is counted too, and never the end."""

    def __init__(self, expected: dict[str, Expected]) -> None:
        self._expected = expected
        self.streams: dict[str, Stream] = {}
        self.messages = 0
        self.undecoded: dict[str, int] = {}

    def add(self, at: int, topic: str, body: bytes) -> dict[str, Any]:
        """Count a message; returns it as plain values, or what is wrong with it."""
        self.messages += 1
        line: dict[str, Any]
        try:
            message = bus.decode(topic, body)
        except msgspec.DecodeError as error:
            self.undecoded[topic] = self.undecoded.get(topic, 0) + 1
            line, valid = {"topic": topic, "undecodable": str(error), "bytes": len(body)}, False
        else:
            line = {"topic": topic, **plain(message)}
            valid = not isinstance(message, Result) or message.validity == Validity.VALID
        if topic not in self.streams:
            row = self._expected.get(topic)
            self.streams[topic] = Stream(row.rate if row else None)
        self.streams[topic].seen(at, len(body), valid=valid)
        return line

    def end(self) -> int:
        """Report what could not be decoded; the exit status."""
        for topic, count in self.undecoded.items():
            print(f"vigil: {topic}: {count} messages could not be decoded", file=sys.stderr)
        return NOT_WELL if self.undecoded else 0


def plain(value: Any) -> Any:
    """A message as JSON shows it best: fields by name (on the wire they have only places)."""
    if isinstance(value, Message):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return value
