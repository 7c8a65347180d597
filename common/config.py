"""vigil.toml, typed. Each error names file, line, key, value and what was expected."""

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from common.errors import ConfigError
from common.paths import PROJECT
from common.sources import SOURCES
from common.states import Policy

NAME = "[a-z0-9][a-z0-9_-]{0,31}"
Pixels = Annotated[int, Meta(ge=16, le=16384)]
Rate = Annotated[float, Meta(gt=0, le=1000)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Positive = Annotated[int, Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Camera(_Section, frozen=True):
    """[cameras.NAME]"""

    source: str
    path: str | None = None  # video file or folder, relative to vigil.toml
    size: tuple[Pixels, Pixels] | None = None  # width, height; a file's own where left out
    fps: Rate | Literal["source", "max"] = "source"
    loop: bool = True
    policy: Policy = Policy.LATEST
    slots: Annotated[int, Meta(ge=2, le=64)] = 4
    stale_after_s: Annotated[float, Meta(gt=0, le=3600)] = 1.0
    group: str = "main"
    seed: Annotated[int, Meta(ge=0)] = 1  # virtual: which scene
    prerender: Annotated[int, Meta(ge=0, le=1000)] = 0  # virtual: repeat so many frames
    gaps: Annotated[float, Meta(ge=0, le=1)] | None = None  # virtual: share of empty places
    memory_mb: Positive | None = None  # ceiling of the process; None: a share of the machine's


class Group(_Section, frozen=True):
    """[groups.NAME]: the cameras that share a model."""

    model: str  # bundle folder, relative to vigil.toml
    runtime: str | None = None  # None: the bundle's own order of preference
    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    spinning: bool = False
    memory_arena: bool = True
    score: Annotated[float, Meta(ge=0, le=1)] | None = None  # None: the bundle's own
    lanes: Annotated[int, Meta(ge=1, le=2)] = 2  # 1: no warm standby, models change cold
    hang_s: Seconds = 2.0  # without progress, or a decision, for so long: it hangs
    load_s: Seconds = 60.0  # from spawn to ready, model load and self-test included
    prove_s: Seconds = 600.0  # a candidate that has not passed its gates by then is bad
    shadow_frames: Annotated[int, Meta(ge=0)] = 100  # judged beside the live lane before hand-over
    shadow_every: Positive = 10  # the shadow judges every so many frames
    soak_s: Seconds = 600.0  # watched so long after the hand-over, then it is known good
    memory_mb: Positive | None = None  # ceiling of a lane; None: a share of the machine's


class Watchdog(_Section, frozen=True):
    """[watchdog]"""

    device: str | None = None  # the hardware watchdog, /dev/watchdog
    timeout_s: Annotated[int, Meta(ge=2, le=600)] = 15  # not fed for so long, the board restarts
    restarts: Positive = 5  # of a lane within window_s: its model gives way to the next
    window_s: Seconds = 60.0
    restore_s: Seconds = 600.0  # then the known-good one is tried again; doubles each time
    hot_c: float = 80.0  # fewer frames a second from here on
    cool_c: float = 70.0  # the full rate again from here on


class Updates(_Section, frozen=True):
    """[updates]"""

    unsigned: bool = False  # whether `vigil install` takes a bundle that nobody signed


@dataclass(frozen=True)
class Config:
    path: Path
    cameras: dict[str, Camera]
    groups: dict[str, Group]
    watchdog: Watchdog
    updates: Updates

    def cameras_of(self, group: str) -> list[str]:
        return [name for name, camera in self.cameras.items() if camera.group == group]

    def resolve(self, path: str) -> Path:
        """A path of the file, relative to the file's folder."""
        return self.path.parent / path


_TABLES = {
    "cameras": "[cameras.NAME]",
    "groups": "[groups.NAME]",
    "watchdog": "[watchdog]",
    "updates": "[updates]",
}


def from_environment() -> Config:
    return load(Path(os.environ.get("VIGIL_CONFIG", PROJECT / "vigil.toml")))


def load(path: Path) -> Config:
    """Read and check vigil.toml.

    Raises:
        ConfigError: it can't be read, is not TOML, or something in it is unknown, of the wrong
            type, out of range, or contradicts the rest.
    """
    path = path.absolute()
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    file = _File(path, text)
    for key, value in tree.items():
        if key not in _TABLES or not isinstance(value, dict):
            raise file.error((key,), value, f"one of the tables {', '.join(_TABLES.values())}")
    config = Config(
        path,
        file.tables(tree, "cameras", Camera),
        file.tables(tree, "groups", Group),
        file.table(tree, "watchdog", Watchdog),
        file.table(tree, "updates", Updates),
    )
    for name, camera in config.cameras.items():
        _check_camera(file, config, name, camera)
    return config


def _check_camera(file: "_File", config: Config, name: str, camera: Camera) -> None:
    at = ("cameras", name)
    kind = SOURCES.get(camera.source)
    if kind is None:
        raise file.error((*at, "source"), camera.source, f"one of {', '.join(SOURCES)}")
    if kind.needs_path and camera.path is None:
        raise file.error((*at, "source"), camera.source, "a path beside it")
    if not kind.needs_path and camera.path is not None:
        raise file.error((*at, "path"), camera.path, f"no path: a {kind.name} camera has none")
    if camera.group not in config.groups:
        raise file.error((*at, "group"), camera.group, f"one of {', '.join(config.groups)}")


T = TypeVar("T", bound=_Section)


@dataclass(frozen=True)
class _File:
    """The file as the user wrote it, to point at the place of an error."""

    path: Path
    text: str

    def tables(self, tree: dict[str, Any], section: str, row: type[T]) -> dict[str, T]:
        if not tree.get(section):
            raise ConfigError(f"{self.path}: has no [{section}.NAME] table; at least one is needed")
        rows = {}
        for name, table in tree[section].items():
            if not re.fullmatch(NAME, name):
                raise self.error((section, name), name, "a name of a-z, 0-9, _ and -, at most 32")
            if not isinstance(table, dict):
                raise self.error((section, name), table, f"a table [{section}.{name}]")
            rows[name] = self._convert((section, name), table, row)
        return rows

    def table(self, tree: dict[str, Any], section: str, row: type[T]) -> T:
        return self._convert((section,), tree.get(section, {}), row)

    def _convert(self, at: tuple[str, ...], table: dict[str, Any], row: type[T]) -> T:
        try:
            return msgspec.convert(table, row)
        except msgspec.ValidationError as error:
            raise self._explain(at, table, row, str(error)) from error

    def _explain(
        self, at: tuple[str, ...], table: dict[str, Any], row: type[T], message: str
    ) -> ConfigError:
        """msgspec's message, with the place where the user can mend it."""
        known = [field.name for field in msgspec.structs.fields(row)]
        if unknown := re.search(r"unknown field `(.+?)`", message):
            key = unknown[1]
            import difflib  # only here: each process loads this module

            near = difflib.get_close_matches(key, known, 1)
            right = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            return self.error((*at, key), table[key], f"a known key: {right}")
        if missing := re.search(r"missing required field `(.+?)`", message):
            return self.error(at, "", f"a key {missing[1]}")
        expected, _, place = message.partition(" - at `$.")
        key = re.split(r"[.\[`]", place)[0]
        expected = expected.removeprefix("Expected ").replace("`", "")
        if expected.startswith("Invalid enum value"):
            expected = _words(row, key)
        return self.error((*at, key), table.get(key, table), expected)

    def error(self, key: tuple[str, ...], value: object, expected: str) -> ConfigError:
        shown = "" if value == "" else f" = {json.dumps(value, default=str)}"
        line = self._line(key)
        return ConfigError(
            f"{self.path}{f', line {line}' if line else ''}: {'.'.join(key)}{shown}: "
            f"expected {expected}"
        )

    def _line(self, key: tuple[str, ...]) -> int | None:
        """The line of a key, or of what it is in; None where neither is written plainly."""
        table: tuple[str, ...] = ()
        nearest, line_of_it = 0, None
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]", line):
                written = table = _parts(header[1])
            elif assignment := re.match(r"\s*([\w.\"'-]+)\s*=", line):
                written = (*table, *_parts(assignment[1]))
            else:
                continue
            depth = min(len(written), len(key))
            if depth > nearest and written[:depth] == key[:depth]:
                nearest, line_of_it = depth, number
        return line_of_it


def _parts(key: str) -> tuple[str, ...]:
    return tuple(part.strip(" \"'") for part in key.split("."))


def _words(row: type[_Section], key: str) -> str:
    """What a key that takes words may say."""
    info = msgspec.inspect.type_info(row)
    assert isinstance(info, msgspec.inspect.StructType)
    kind = next(field.type for field in info.fields if field.name == key)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    words: list[object] = []
    for kind in kinds:
        if isinstance(kind, msgspec.inspect.EnumType):
            words += [member.value for member in kind.cls]
        elif isinstance(kind, msgspec.inspect.LiteralType):
            words += kind.values
    number = any(isinstance(kind, msgspec.inspect.FloatType) for kind in kinds)
    return f"{'a number or ' * number}one of {', '.join(json.dumps(word) for word in words)}"
