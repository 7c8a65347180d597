"""Whether a candidate may ask to go live, from what its lane says of itself."""

import tomllib
from pathlib import Path

from common.config import Group
from common.messages import LaneReport
from common.slots import Record
from common.states import Phase

# In the shadow it shares the machine with the live lane; its self-test has held it to its limit.
SHADOW_SLACK = 2.0

Limits = dict[str, float]


def limits(slot: Path) -> Limits:
    """[limits] of an installed slot's manifest; it was checked when it was installed.

    Raises:
        OSError, ValueError: it can't be read any more.
    """
    return dict(tomllib.loads((slot / "manifest.toml").read_text()).get("limits", {}))


def proving(record: Record, report: LaneReport | None) -> bool:
    """Whether the report is of the candidate's own process, ready."""
    txn = record.txn
    if txn.phase is not Phase.PROVING or report is None or not report.ready:
        return False
    lane = record.lanes[txn.lane]
    return (report.slot, report.run) == (txn.slot, lane.run) and lane.slot == txn.slot


def judge(report: LaneReport, group: Group, limits: Limits) -> tuple[bool, str]:
    """Whether the candidate has passed, and why it never will; neither while it is too early."""
    if report.failed:
        return False, f"{report.failed} of {report.judged} frames could not be judged"
    if report.judged < group.shadow_frames:
        return False, ""
    least = limits.get("agreement")
    if report.judged and least is not None and report.agreement < least:
        return False, (
            f"agreement {report.agreement:.3f} with the live model over {report.judged} frames, "
            f"wanted {least:g}"
        )
    most = limits.get("latency_p99_ms")
    if most is not None and report.infer_ms_p99 > SHADOW_SLACK * most:
        return False, (
            f"latency p99 {report.infer_ms_p99:.1f} ms in the shadow, wanted {most:g} ms, at most "
            f"{SHADOW_SLACK:g} times that there"
        )
    return True, ""
