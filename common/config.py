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
from common.sources import PLACES, SOURCES, redacted
from common.states import Policy

NAME = "[a-z0-9][a-z0-9_-]{0,31}"
_NAMES = "a name of a-z, 0-9, _ and -, at most 32"
Pixels = Annotated[int, Meta(ge=16, le=16384)]
Rate = Annotated[float, Meta(gt=0, le=1000)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Positive = Annotated[int, Meta(gt=0)]
Grey = Annotated[float, Meta(ge=0, le=255)]
Share = Annotated[float, Meta(gt=0, le=1)]
Point = tuple[float, float]  # x, y in pixels of the camera's own full picture
WINDOW = r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d"
Polygon = Annotated[tuple[Point, ...], Meta(min_length=3, max_length=64)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Zone(_Section, frozen=True):
    """[cameras.NAME.zones.NAME]: results name it where an item's anchor lies in it."""

    points: Polygon
    anchor: Literal["center", "bottom"] = "center"  # of the box: its middle, or where it stands


class TriggerOptions(_Section, frozen=True):
    """[cameras.NAME.trigger]: only frames that a trigger asks for are taken, one for each."""

    by: Literal["message", "motion"]
    delay_s: Annotated[float, Meta(ge=0, le=60)] = 0.0  # from the trigger to the frame
    zone: str | None = None  # motion: what is watched; None: the whole picture
    share: Share = 0.05  # motion: of the watched pixels that have to differ
    level: Grey = 25.0  # motion: grey levels that a pixel has to differ by


class Camera(_Section, frozen=True):
    """[cameras.NAME]"""

    source: str
    path: str | None = None  # video, folder, recording; relative to vigil.toml
    device: str | None = None  # v4l2: /dev/video0, or a link of /dev/v4l/by-id
    url: str | None = None  # rtsp, mjpeg; may hold user:password, which no message ever shows
    pipeline: str | None = None  # gstreamer: as gst-launch takes it, without a sink
    size: tuple[Pixels, Pixels] | None = None  # width, height; the source's own where left out
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
    recorded: str | None = None  # recording: which camera of it; None: the only one
    format: Annotated[str, Meta(min_length=4, max_length=4)] | None = None  # v4l2: MJPG, YUYV ...
    controls: dict[str, int | bool | str] = {}  # v4l2: {exposure_time_absolute = 100}
    transport: Literal["tcp", "udp"] = "tcp"  # rtsp
    open_s: Seconds = 5.0  # to connect, first frame included
    no_frame_s: Seconds = 2.0  # without a frame for so long: stalled
    lost_s: Seconds = 10.0  # and for so long: the connection is given up and made anew
    reconnect_max_s: Seconds = 15.0  # longest pause between two tries
    frozen_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0  # the same frame for so long; 0: never
    dark_level: Grey | None = None  # mean brightness under it: dark. None: 8 if live, else 0
    dark_spread: Grey | None = None  # standard deviation under it: covered. None: 2 if live, else 0
    rotate: Literal[0, 90, 180, 270] = 0  # degrees clockwise, after the crop
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"  # after the rotation
    crop: tuple[int, int, Positive, Positive] | None = None  # x, y, width, height
    scale: Share = 1.0
    masks: tuple[Polygon, ...] = ()  # blackened before anybody sees the picture
    zones: dict[str, Zone] = {}
    trigger: TriggerOptions | None = None

    @property
    def polygons(self) -> dict[str, Polygon]:
        """Every one that has to lie in the picture, by the key it stands under."""
        zones = {f"zones.{name}": zone.points for name, zone in self.zones.items()}
        return zones | {f"masks[{index}]": mask for index, mask in enumerate(self.masks)}


class Gates(_Section, frozen=True):
    """[groups.NAME.gates]: what a candidate has to reach here; where its manifest is stricter, that
    counts."""

    agreement: Annotated[float, Meta(ge=0, le=1)] | None = None  # share of frames decided alike
    score_shift: Share | None = None  # mean change of score, either way, at most
    latency_ratio: Annotated[float, Meta(gt=0)] | None = None  # to the live model's, at most


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
    prove_s: Seconds = 600.0  # with frames to judge: has it not passed its gates by then, it is bad
    shadow_frames: Annotated[int, Meta(ge=0)] = 100  # judged beside the live lane before hand-over
    shadow_every: Positive = 10  # the shadow judges every so many frames
    soak_s: Seconds = 600.0  # watched so long after the hand-over, then it is known good
    memory_mb: Positive | None = None  # ceiling of a lane; None: a share of the machine's
    gates: Gates = Gates()


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
    root: str | None = None  # the trust anchor: the first root.json. None: no signed updates
    url: str | None = None  # of the repository; None: only from the inbox, or a medium
    ca: str | None = None  # PEM of the server's authority, where it is not a public one
    channel: str = "stable"
    device: str | None = None  # its id in rollouts; None: made from /etc/machine-id
    profile: str = "any"  # which build of a bundle it takes
    check_s: Seconds = 3600.0  # mean time between two checks
    rate_kb_s: Positive | None = None  # most of a download
    update_mb: Positive | None = None  # most that one update may move, failures included
    daily_mb: Positive | None = None  # most that a day may move
    stall_s: Seconds = 30.0  # a server that sends nothing for so long is left
    download: tuple[str, ...] = ()  # "22:00-05:30", local time; (): always
    activate: tuple[str, ...] = ()  # when a new model may begin to prove itself
    warn_days: Annotated[float, Meta(gt=0)] | None = None  # a model older than this: a warning
    escalate_days: Annotated[float, Meta(gt=0)] | None = None  # and than this: critical


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


# Tables inside of tables; those of `_NAMED` have names of their own.
_NESTED: dict[type[_Section], dict[str, type[_Section]]] = {
    Camera: {"trigger": TriggerOptions, "zones": Zone},
    Group: {"gates": Gates},
}
_NAMED = {"zones"}

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
    updates = config.updates
    if updates.url and not updates.root:
        raise file.error(("updates", "url"), updates.url, "a root beside it: whom to trust")
    for key in ("channel", "profile"):
        if not re.fullmatch(NAME, getattr(updates, key)):
            raise file.error(("updates", key), getattr(updates, key), _NAMES)
    for key in ("download", "activate"):
        for window in getattr(updates, key):
            if not re.fullmatch(WINDOW, window):
                raise file.error(("updates", key), window, 'times of day such as "22:00-05:30"')
    return config


def _check_camera(file: "_File", config: Config, name: str, camera: Camera) -> None:
    at = ("cameras", name)
    kind = SOURCES.get(camera.source)
    if kind is None:
        raise file.error((*at, "source"), camera.source, f"one of {', '.join(SOURCES)}")
    for place in PLACES:
        value = getattr(camera, place)
        if place == kind.place and value is None:
            raise file.error((*at, "source"), camera.source, f"a {place} beside it")
        if place != kind.place and value is not None:
            raise file.error((*at, place), value, f"no {place}: a {kind.name} camera has none")
    defaults = Camera(kind.name)
    for other in SOURCES.values():
        for key in set(other.keys) - set(kind.keys):
            if (value := getattr(camera, key)) != getattr(defaults, key):
                raise file.error((*at, key), value, f"no {key}: only a {other.name} camera has one")
    for zone in camera.zones:
        if not re.fullmatch(NAME, zone):
            raise file.error((*at, "zones", zone), zone, _NAMES)
    trigger = camera.trigger
    if trigger and trigger.zone and trigger.zone not in camera.zones:
        known = ", ".join(camera.zones) or "none: there is no [cameras.NAME.zones.NAME]"
        raise file.error((*at, "trigger", "zone"), trigger.zone, f"one of the zones, {known}")
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
                raise self.error((section, name), name, _NAMES)
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
        for key, kind in _NESTED.get(row, {}).items():
            inner = table.get(key)
            tables = inner if key in _NAMED and isinstance(inner, dict) else {"": inner}
            for name, nested in tables.items() if f"$.{key}" in message else ():
                try:
                    if isinstance(nested, dict):
                        self._convert((*at, key, *filter(None, (name,))), nested, kind)
                except ConfigError as error:
                    return error
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
        shown = "" if value == "" else f" = {redacted(json.dumps(value, default=str))}"
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
