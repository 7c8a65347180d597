"""Check vigil.toml before anything starts: each camera's source is opened, each group's model is
loaded and run, and the room for the frame rings is measured. A line for each thing."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from common import bus
from common import config as configs
from common.config import Camera, Config
from common.errors import ConfigError, RingError, SourceError, VigilError
from common.frames import Shape
from common.geometry import fit, outside
from common.messages import Beat, CameraReport
from common.paths import Paths
from common.processes import capture_name, processes
from common.sources import SOURCES, factory, redacted
from common.states import CameraState
from services.cli.listen import accepts, listener, newest_ring
from services.cli.text import number, size

RUNS = 10
HEAR_S = 2.0  # four beats

_EPILOG = """\
examples:
  vigil check                 the vigil.toml of this installation
  vigil check line4.toml      another one, before it is used

exit status: 0 all is right; 1 something is wrong, a line each on standard error
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a vigil.toml")


def run(args: argparse.Namespace) -> int:
    config = configs.load(args.file) if args.file else configs.from_environment()
    paths = Paths.from_environment()
    print(f"ok  {config.path}: {len(config.cameras)} cameras, {len(config.groups)} groups")
    shapes: dict[str, Shape] = {}
    beats = in_use(config, paths)
    results = [
        # Models first: GStreamer would bring another unwinder, and a runtime's exception a crash.
        *(_try(f"group {name}", partial(model, config, name)) for name in config.groups),
        *(_try(f"camera {name}", partial(camera_in_use, beats[name], paths, config, name, shapes)
               if name in beats else partial(camera, config, name, shapes))
          for name in config.cameras),
        _try("shared memory", partial(room, paths, shapes)),
        _try("sockets", partial(sockets, config, paths)),
        *([_try("updates", partial(updates, config))] if config.updates.root else ()),
    ]  # fmt: skip
    return 0 if all(results) else 1


def _try(subject: str, check: Callable[[], str]) -> bool:
    """Say what a check found; what it finds wrong does not keep the others from being made."""
    try:
        print(f"ok  {subject}: {check()}", flush=True)
    except VigilError as error:
        print(f"vigil: {subject}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def camera(config: Config, name: str, shapes: dict[str, Shape]) -> str:
    """Open a camera's source; its ring's shape goes into `shapes`."""
    row = config.cameras[name]
    path = config.resolve(row.path) if row.path is not None else None
    source = factory(row.source)(row, path)
    try:
        format = source.open()
    finally:
        source.close()
    fps = _fps(row, name, format.fps)
    shape = fit((format.width, format.height), row.crop, row.rotate, row.flip, row.scale)
    shapes[name] = Shape(*shape.size, 3, row.slots, row.policy, shape.view)
    if problems := outside(row.polygons, format.width, format.height):
        raise ConfigError("; ".join(problems))
    where = f" {path}" if path else ""
    return f"{row.source}{where}, {format.width}x{format.height} at {fps}, {row.policy}"


def in_use(config: Config, paths: Paths) -> dict[str, CameraReport]:
    """What capture says of each device or stream that it has now: most take one user only."""
    names = {}
    for name, row in config.cameras.items():
        endpoint = Path(paths.endpoint(capture_name(name)).removeprefix("ipc://"))
        if SOURCES[row.source].live and SOURCES[row.source].place and accepts(endpoint):
            names[f"beat/{capture_name(name)}"] = name
    heard: dict[str, CameraReport] = {}
    if names:
        with listener(config, paths, names) as listening:
            for _, topic, body in listening.hear(HEAR_S):
                with suppress(msgspec.DecodeError):  # of another version
                    beat = bus.decode(topic, body)
                    if topic in names and isinstance(beat, Beat) and beat.camera is not None:
                        heard[names[topic]] = beat.camera
                if len(heard) == len(names):
                    break
    return heard


def camera_in_use(
    report: CameraReport, paths: Paths, config: Config, name: str, shapes: dict[str, Shape]
) -> str:
    """A camera as its capture process has it; its ring's shape goes into `shapes`."""
    if ring := newest_ring(paths, name):
        with ring:
            shapes[name] = ring.shape
    row = config.cameras[name]
    text = f"{row.source}, in use by {capture_name(name)}: {report.state}"
    if report.state != CameraState.STREAMING or report.problem:
        raise SourceError(f"{text}, {report.problem or report.reason}")
    return f"{text}, {report.format}, {row.policy}"


def _fps(row: Camera, name: str, own: float | None) -> str:
    if row.fps == "max":
        return "full speed"
    if isinstance(row.fps, float):
        return f"{row.fps:g}/s"
    if own is None:
        raise ConfigError(
            f'fps = "source", but a {row.source} has no rate of its own; expected a number of '
            f'frames a second, or "max", in [cameras.{name}]'
        )
    return f"{own:g}/s"


def model(config: Config, name: str) -> str:
    """Load a group's model as its lane would, and run it on a grey picture."""
    from common.engine.bundle import open_bundle
    from common.engine.model import Model
    from common.engine.runtimes import Options

    group = config.groups[name]
    bundle = open_bundle(config.resolve(group.model), score=group.score)
    cache = Paths.from_environment().root / "engines"
    options = Options(group.threads, group.spinning, group.memory_arena, cache)
    loaded = Model.load(bundle, options, group.runtime)
    loaded.warm_up()
    started = time.monotonic_ns()
    loaded.warm_up(RUNS)
    run_ms = (time.monotonic_ns() - started) / 1e6 / RUNS
    loaded.close()
    cameras = ", ".join(config.cameras_of(name)) or "no camera"
    said = [
        f"{loaded.name} {loaded.version or '-'} (release {loaded.release}, {loaded.slot})",
        f"{loaded.task} on {loaded.runtime}",
        f"{number(run_ms)} ms a picture",
        f"for {cameras}",
    ]
    if loaded.fallback_reason:
        said.append(f"instead of a preferred one: {loaded.fallback_reason}")
    return ", ".join(said)


def room(paths: Paths, shapes: dict[str, Shape]) -> str:
    """Whether the tmpfs of the run folder has room for all rings; those that exist are in it."""
    needed = sum(shape.file_bytes for shape in shapes.values())
    existing = [path for path in paths.rings.glob("*") if path.name.rpartition(".")[0] in shapes]
    held = sum(path.stat().st_blocks * 512 for path in existing)
    folder = next(path for path in (paths.run, *paths.run.parents) if path.exists())
    volume = os.statvfs(folder)
    free = volume.f_bavail * volume.f_frsize + held
    if needed > free:
        raise RingError(
            f"the frame rings need {size(needed)}, {size(free)} are free in {folder}: make that "
            "tmpfs larger, or use fewer slots or smaller pictures"
        )
    return f"{size(needed)} for frame rings, {size(free)} free in {folder}"


def sockets(config: Config, paths: Paths) -> str:
    """Whether the run folder's path leaves room for the name of each process."""
    rows = processes(config)
    for process in rows:
        paths.endpoint(process.name)
    return f"{len(rows)} processes, in {paths.run}"


def updates(config: Config) -> str:
    """Whether the files that signed updates rest on are there."""
    rows = config.updates
    assert rows.root is not None
    anchor = config.resolve(rows.root)
    try:
        kind = msgspec.json.decode(anchor.read_bytes(), type=_Anchor).signed["_type"]
        if rows.ca is not None:
            config.resolve(rows.ca).read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: can't be read: {error.strerror}") from error
    except (msgspec.MsgspecError, KeyError):
        kind = "not metadata"
    if kind != "root":
        raise ConfigError(
            f"{anchor}: is {kind}; expected the first root.json of the repository that is to be "
            "trusted"
        )
    where = redacted(rows.url) if rows.url else "the inbox or a stick"
    return f"channel {rows.channel} from {where}, trusting {anchor}"


class _Anchor(msgspec.Struct):
    signed: dict[str, Any]
