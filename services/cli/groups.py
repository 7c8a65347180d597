"""What `vigil status` knows of a group's lanes, its change of model, and the last incidents: from
the record, the lanes' own reports and the watchdog's file."""

import time
from pathlib import Path

import msgspec

from common.config import Config
from common.messages import Beat
from common.paths import Paths
from common.processes import lane_name
from common.slots import PASS, Record
from common.states import Phase
from common.updates import GroupReport
from services.cli.models import SlotStatus, read_record, role, short
from services.cli.text import seconds
from services.cli.update import read_report

SHOWN = 5  # incidents
PATIENCE_S = 30.0  # beyond what a change of model may take


class LaneStatus(msgspec.Struct):
    process: str
    role: str  # live, standby or candidate, as the record has it
    slot: str
    run: int
    ready: bool = False  # warm, and its self-test passed: by its own report
    degraded: str = ""
    refused: str = ""
    judged: int = 0
    failed: int = 0
    compared: int = 0  # frames, of a candidate in the shadow
    agreement: float | None = None
    score_shift: float | None = None
    latency_ratio: float | None = None
    infer_ms_p99: float | None = None
    trying: bool = False  # its slot is not proven yet


class GroupStatus(msgspec.Struct):
    name: str
    live: str
    epoch: int
    known_good: str
    previous: str
    phase: str
    candidate: str
    standby: bool  # whether a second lane could take over at once
    lanes: list[LaneStatus]
    problems: list[str] = []
    slots: list[SlotStatus] = []  # installed ones
    update: GroupReport | None = None  # as the updater says


class Incident(msgspec.Struct):
    """As the watchdog writes it."""

    at_ns: int
    wall_s: float
    process: str
    what: str
    outcome: str
    recovery_ms: float | None = None  # from the failure to the next valid result
    age_s: float | None = None


def incidents(paths: Paths) -> tuple[list[Incident], str]:
    """The newest ones, newest last, and what is wrong with the file."""
    path = paths.run / "incidents.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[Incident])[-SHOWN:]
    except FileNotFoundError:
        return [], ""
    except (OSError, msgspec.MsgspecError) as error:
        return [], f"{path}: can't be read: {error}"
    now = time.monotonic_ns()
    for one in found:
        one.age_s = (now - one.at_ns) / 1e9
    return found, ""


def group(
    config: Config,
    paths: Paths,
    name: str,
    beats: dict[str, Beat],
    uptimes: dict[str, float],
) -> GroupStatus:
    """
    Args:
        beats: the newest of each process that is alive.
        uptimes: seconds since the start of each process that runs.
    """
    record = read_record(config, paths, name)
    rows = [_lane(record, name, lane, beats) for lane in record.lanes]
    standby = any(row.ready and row.role == "standby" for row in rows)
    txn = record.txn
    row = GroupStatus(
        name, record.live, record.epoch, record.known_good, record.previous, txn.phase, txn.slot,
        standby, rows,
    )  # fmt: skip
    row.slots = [
        SlotStatus(slot, one.state, one.tries, one.name, one.version, one.release, one.reason)
        for slot, one in record.slots.items()
    ]
    report = read_report(paths)
    row.update = report.groups.get(name) if report else None
    row.problems = [*_problems(row), *_change(record, config, paths, name, uptimes)]
    if row.update and row.update.age_level:
        row.problems.append(f"group {name}: its model is {seconds(row.update.age_s)} old")
    return row


def _lane(record: Record, group: str, lane: str, beats: dict[str, Beat]) -> LaneStatus:
    name, now = lane_name(group, lane), record.lanes[lane]
    row = LaneStatus(name, role(record, lane), now.slot, now.run, trying=now.trying)
    beat = beats.get(name)
    report = beat.lane if beat else None
    if report is None or report.run != now.run or report.slot != now.slot:
        return row  # nothing is known of this process yet
    row.ready, row.degraded, row.refused = report.ready, report.degraded, report.refused
    row.judged, row.failed = report.judged, report.failed
    row.infer_ms_p99 = report.infer_ms_p99 if report.judged else None
    if row.role == "candidate" and report.judged:
        row.compared, row.agreement = report.compared, report.agreement
        row.score_shift, row.latency_ratio = report.score_shift, report.latency_ratio
    return row


def _problems(row: GroupStatus) -> list[str]:
    found = [f"{lane.process}: degraded: {lane.degraded}" for lane in row.lanes if lane.degraded]
    found += [f"{lane.process}: refused: {lane.refused}" for lane in row.lanes if lane.refused]
    live = next(lane for lane in row.lanes if lane.process == lane_name(row.name, row.live))
    if live.slot == PASS:
        found.append(f"group {row.name}: no model is live: frames pass unjudged")
    if len(row.lanes) > 1 and not row.standby and row.phase == Phase.NONE:
        found.append(f"group {row.name}: no warm standby")
    return found


def _change(
    record: Record, config: Config, paths: Paths, name: str, uptimes: dict[str, float]
) -> list[str]:
    """What is wrong with the change of model under way. Its candidate's process started after the
    change did, so the change is at least as old."""
    txn, settings = record.txn, config.groups[name]
    if txn.phase is Phase.NONE:
        return []
    found = []
    slot, _, reason = _text(paths.run / f"gates-{name}").partition("\n")
    if slot == txn.slot:
        found.append(f"group {name}: slot {short(slot)} has not passed its gates: {reason.strip()}")
    limit_s = settings.load_s + settings.prove_s + PATIENCE_S
    if txn.phase is Phase.SOAK:
        limit_s += settings.soak_s
    age_s = uptimes.get(lane_name(name, txn.lane), 0.0)
    if len(record.lanes) > 1 and age_s > limit_s:
        found.append(
            f"group {name}: slot {short(txn.slot)} has been {txn.phase} or before for "
            f"{seconds(age_s)}, and nobody judges it: does a camera show something, and does the "
            "watchdog run?"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
