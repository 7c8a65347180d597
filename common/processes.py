"""One table: every kind of process on the device, and the supervisord programs made from it.

supervisord.conf holds what is the same on every device; the programs (one capture a camera, a lane
or two a group, one watchdog and updater) are rendered into the run folder, which it includes.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.paths import PROJECT, Paths
from common.slots import LANES


@dataclass(frozen=True)
class Kind:
    """A row: one kind of process."""

    name: str
    module: str
    per: str  # "camera", "lane" (of a group) or "device"
    role: str  # extra of pyproject.toml that holds what it imports
    priority: (
        int  # supervisord starts low numbers first and stops them last: lanes judge to the end
    )
    start_s: float  # from spawn to its first progress, model load included
    stop_s: float  # from SIGTERM to SIGKILL
    settle_s: int  # dead before it ran so long: supervisord backs off
    environment: str = ""  # as supervisord reads it


# Large arrays go back to the system when they are freed; the default keeps up to 64 MB of them.
_GIVE_BACK = 'MALLOC_MMAP_THRESHOLD_="131072",MALLOC_TRIM_THRESHOLD_="131072"'

KINDS = (
    Kind("inference", "services.inference.main", "lane", "onnx or litert", 100, 60.0, 5.0, 0),
    Kind("capture", "services.capture.main", "camera", "vision", 200, 10.0, 5.0, 1, _GIVE_BACK),
    Kind("updater", "services.updater.main", "device", "updates", 300, 10.0, 5.0, 1),
    Kind("watchdog", "services.watchdog.main", "device", "", 400, 10.0, 5.0, 0),
)


@dataclass(frozen=True)
class Process:
    name: str  # capture-belt, inference-main-a: also its lock, endpoint and log
    kind: Kind
    arguments: tuple[str, ...]


def processes(config: Config) -> list[Process]:
    """Every process that should run under this configuration."""
    rows = []
    for kind in KINDS:
        for arguments in _instances(kind, config):
            rows.append(Process("-".join((kind.name, *arguments)), kind, arguments))
    return rows


def _instances(kind: Kind, config: Config) -> list[tuple[str, ...]]:
    if kind.per == "camera":
        return [(camera,) for camera in config.cameras]
    if kind.per == "lane":
        return [
            (group, lane)
            for group in config.groups
            if config.cameras_of(group)
            for lane in lanes(config, group)
        ]
    return [()]


def lanes(config: Config, group: str) -> tuple[str, ...]:
    """The lanes of a group."""
    return LANES[: config.groups[group].lanes]


def lane_name(group: str, lane: str) -> str:
    return f"inference-{group}-{lane}"


def record_bell(group: str, lane: str) -> str:
    """Bell of a lane that is rung when its group's record has changed."""
    return f"{lane_name(group, lane)}.record"


def capture_name(camera: str) -> str:
    return f"capture-{camera}"


def render(config: Config, paths: Paths) -> str:
    """The supervisord programs for a vigil.toml, which the first line names."""
    programs = (
        _PROGRAM.format(
            name=process.name,
            # -OO: without docstrings numpy and the rest take 2 MB less in each process.
            command=_escaped(
                shlex.join([sys.executable, "-OO", "-m", process.kind.module, *process.arguments])
            ),
            project=_escaped(PROJECT),
            priority=process.kind.priority,
            settle_s=process.kind.settle_s,
            stop_s=round(process.kind.stop_s),
            environment=process.kind.environment,
            log=_escaped(paths.logs / f"{process.name}.log"),
        )
        for process in processes(config)
    )
    return "\n".join((f"{_RENDERED_FROM}{config.path}", *programs))


def _escaped(value: object) -> str:
    """As supervisord reads it, which expands `%`."""
    return str(value).replace("%", "%%")


def rendered_from(paths: Paths) -> Path | None:
    """The vigil.toml of the programs in the run folder; None where there are none."""
    try:
        first = (paths.programs / "vigil.conf").read_text().partition("\n")[0]
    except (FileNotFoundError, PermissionError):
        return None
    return Path(first.removeprefix(_RENDERED_FROM)) if first.startswith(_RENDERED_FROM) else None


_RENDERED_FROM = "; from "
_PROGRAM = """\
[program:{name}]
command={command}
directory={project}
priority={priority}
autorestart=true
startsecs={settle_s}
startretries=100
stopwaitsecs={stop_s}
environment={environment}
redirect_stderr=true
stdout_logfile={log}
stdout_logfile_maxbytes=1MB
stdout_logfile_backups=1
"""
