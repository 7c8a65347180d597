"""Whether a candidate may ask to go live, from what its lane says of itself."""

from pathlib import Path

from common import verdict
from common.config import Group
from common.messages import LaneReport
from common.slots import Record
from common.states import Phase
from common.verdict import Limits, Proof


def limits(slot: Path, group: Group) -> Limits:
    """What an installed slot is held to in its group.

    Raises:
        OSError, ValueError: its manifest can't be read any more.
    """
    return verdict.expectations(slot, group.gates)[0]


def proving(record: Record, report: LaneReport | None) -> bool:
    """Whether the report is of the candidate's own process, ready."""
    txn = record.txn
    if txn.phase is not Phase.PROVING or report is None or not report.ready:
        return False
    lane = record.lanes[txn.lane]
    return (report.slot, report.run) == (txn.slot, lane.run) and lane.slot == txn.slot


def judge(report: LaneReport, group: Group, limits: Limits) -> tuple[Proof, str | None]:
    """What the verdict rests on, and why the candidate is refused; "" if it has passed, None while
    it is too early."""
    inputs = verdict.proof(report, group.shadow_frames, limits)
    return inputs, verdict.judge(inputs)
