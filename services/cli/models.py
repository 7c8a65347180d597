"""The models of each group: which lane is live, what changes, and every slot with its state."""

import argparse
import tomllib
from pathlib import Path

import msgspec

from common import verdict
from common.config import Config
from common.errors import ConfigError, StorageError
from common.paths import Paths
from common.slots import FACTORY, PASS, Record, fitted
from common.states import Phase, SlotState
from common.store import Store
from services.cli.listen import configuration
from services.cli.text import size, table

NOT_THE_SAME = 2

_EPILOG = """\
examples:
  vigil models                                 as a table
  vigil models --verdict 0123456789ab          what it was judged by, and judged by that once more
  vigil models --json | jq '.[0].slots'        for a program
"""


class SlotStatus(msgspec.Struct):
    slot: str
    state: str
    tries: int
    name: str
    version: str
    release: int
    reason: str  # why it is bad


class SlotRow(SlotStatus):
    bytes: int | None  # on disk; None where its folder is gone


class LaneRow(msgspec.Struct):
    lane: str
    role: str
    slot: str
    run: int
    trying: bool


class GroupRow(msgspec.Struct):
    group: str
    live: str
    epoch: int
    known_good: str
    previous: str
    phase: str
    candidate: str
    lanes: list[LaneRow]
    slots: list[SlotRow]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="one JSON array")
    parser.add_argument(
        "--verdict", metavar="SLOT", help="why a slot is good or bad; 2 if it is not so now"
    )


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    if args.verdict is not None:
        return _verdicts(config, paths, args.verdict, as_json=args.json)
    rows = [_group(config, paths, name) for name in config.groups]
    if args.json:
        print(msgspec.json.encode(rows).decode())
    else:
        print("\n\n".join("\n".join(_screen(row)) for row in rows))
    return 0


def _verdicts(config: Config, paths: Paths, slot: str, *, as_json: bool) -> int:
    """The recorded verdicts on a slot, and what the same rules say to their inputs now.

    Raises:
        StorageError: there is none, or one can't be read.
    """
    folders = [paths.models(group) for group in config.groups]
    found = [given for folder in folders for given in verdict.recorded(folder, slot)]
    if not found:
        raise StorageError(f"{folders[0].parent}: no verdict on a slot {slot or '(none given)'}")
    again = [verdict.judge(given.inputs) for given in found]
    if as_json:
        rows = [{"verdict": v, "again": now} for v, now in zip(found, again, strict=True)]
        print(msgspec.json.encode(rows).decode())
    else:
        for given, now in zip(found, again, strict=True):
            print(msgspec.json.format(msgspec.json.encode(given.inputs)).decode())
            print(f"group {given.group}, slot {short(given.slot)}: {_outcome(given.reason)}")
            print(f"judged again: {_outcome(now)}\n")
    same = all(now == given.reason for given, now in zip(found, again, strict=True))
    return 0 if same else NOT_THE_SAME


def _outcome(reason: str | None) -> str:
    return "too early to tell" if reason is None else f"bad: {reason}" if reason else "good"


def find_group(config: Config, name: str | None) -> str:
    """The group of that name; without one, the only one, or `main`.

    Raises:
        ConfigError: there is no such group, or no telling which.
    """
    wanted = name or (next(iter(config.groups)) if len(config.groups) == 1 else "main")
    if wanted not in config.groups:
        known = ", ".join(config.groups)
        raise ConfigError(f"{config.path}: no group {wanted}; give --group, one of {known}")
    return wanted


def read_record(config: Config, paths: Paths, group: str) -> Record:
    """A group's record, for looking only: nothing is made where nothing has run yet."""
    lanes = config.groups[group].lanes
    if not paths.models(group).is_dir():
        return fitted(Record(lanes={}), lanes)
    return Store(paths, group, lanes).read()


def short(slot: str) -> str:
    return slot if slot in (FACTORY, PASS) else slot[:12]


def titled(record: Record, slot: str) -> str:
    """A slot for people: parts 1.3 (release 7, 0123456789ab)."""
    known = record.slots.get(slot)
    if known is None:
        return short(slot)
    name = f"{known.name} {known.version}".strip()
    return f"{name} (release {known.release}, {short(slot)})"


def role(record: Record, lane: str) -> str:
    """live, standby, or candidate: what the record has a lane for."""
    if record.live == lane:
        return "live"
    return "candidate" if record.txn.lane == lane and record.txn.slot else "standby"


def _group(config: Config, paths: Paths, group: str) -> GroupRow:
    record = read_record(config, paths, group)
    folder = paths.models(group) / "slots"
    lanes = [
        LaneRow(name, role(record, name), lane.slot, lane.run, lane.trying)
        for name, lane in record.lanes.items()
    ]
    slots = [_factory(config.resolve(config.groups[group].model))]
    slots += [
        SlotRow(
            name, slot.state, slot.tries, slot.name, slot.version, slot.release, slot.reason,
            _bytes(folder / name),
        )
        for name, slot in record.slots.items()
    ]  # fmt: skip
    txn = record.txn
    return GroupRow(
        group, record.live, record.epoch, record.known_good, record.previous, txn.phase, txn.slot,
        lanes, slots,
    )  # fmt: skip


def _factory(path: Path) -> SlotRow:
    """The bundle that vigil.toml names, as far as its manifest can be read."""
    said = {}
    try:
        said = tomllib.loads((path / "manifest.toml").read_text())
        reason = ""
    except (OSError, ValueError) as error:
        reason = "" if path.is_file() else f"can't be read: {error}"
    name, version = str(said.get("name", path.stem)), str(said.get("version", ""))
    release = said.get("release", 0)
    return SlotRow(FACTORY, SlotState.GOOD, 0, name, version, release, reason, _bytes(path))


def _bytes(path: Path) -> int | None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) if files else None


def _screen(row: GroupRow) -> list[str]:
    change = "none"
    if row.phase != Phase.NONE:
        change = f"{row.phase}, slot {short(row.candidate)}"
    lines = [
        f"group {row.group}: lane {row.live} is live, epoch {row.epoch}; "
        f"known good {short(row.known_good)}, previous {short(row.previous)}; "
        f"change of model: {change}",
        "",
    ]
    lines += table(
        ("LANE", "ROLE", "SLOT", " RUN", "TRYING"),
        [
            (lane.lane, lane.role, short(lane.slot), str(lane.run), "yes" if lane.trying else "-")
            for lane in row.lanes
        ],
    )
    lines.append("")
    lines += table(
        ("SLOT", "STATE", " TRIES", "MODEL", " RELEASE", " SIZE", "WHY BAD"),
        [
            (short(slot.slot), slot.state, str(slot.tries), f"{slot.name} {slot.version}".strip(),
             str(slot.release), size(slot.bytes), slot.reason or "-")
            for slot in row.slots
        ],
    )  # fmt: skip
    return lines
