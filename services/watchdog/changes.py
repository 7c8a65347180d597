"""A change of model as it is followed and judged: what the lanes had counted when it began, whether
its time runs, what a verdict rests on. Pure, as the policy that asks."""

import msgspec

from common import config, verdict
from common.messages import LaneReport
from common.slots import Record
from common.states import Phase
from common.verdict import Counts, Inputs
from services.watchdog.facts import Group, Transition, Watched

S = 1_000_000_000
IDLE_NS = 5 * S  # no frame that showed something for so long: a candidate's time stands still
CHANCES = 2  # so many times the frames a candidate needs have come by


def note(
    watched: Watched | None,
    record: Record,
    reports: dict[str, LaneReport],
    ready: bool,
    now_ns: int,
) -> Watched | None:
    """What to remember of the change under way; None where there is none.

    Args:
        reports: of the lanes.
        ready: whether the candidate is.
    """
    txn = record.txn
    if txn.phase is Phase.NONE:
        return None
    known = watched if watched and watched.slot == txn.slot else None
    soaks = txn.phase is Phase.SOAK
    if known is None or soaks != (known.phase == Phase.SOAK):
        watched = Watched(txn.slot, txn.phase, now_ns)
        if not soaks:
            live = reports.get(record.live)
            before = verdict.counts(live) if live else Counts()
            return msgspec.structs.replace(watched, before=before)
        mine, other = reports.get(txn.lane), reports.get(record.other or "")
        if mine and mine.slot != txn.slot:  # the only lane, and its process has still to go
            mine, other = None, mine
        start = verdict.counts(mine) if mine else Counts()
        then = known.before if known and known.before else Counts()
        over = verdict.since(verdict.counts(other), then) if other else None
        return msgspec.structs.replace(watched, start=start, before=over)
    if soaks:
        return known
    live = reports.get(record.live)
    idle = ready and (live is None or now_ns - live.shown_ns > IDLE_NS)
    if idle and not known.idle_ns:
        return msgspec.structs.replace(known, idle_ns=now_ns)
    if known.idle_ns and not idle:
        since_ns = known.since_ns + now_ns - known.idle_ns
        return msgspec.structs.replace(known, since_ns=since_ns, idle_ns=0)
    return known


def had_its_chance(
    watched: Watched, settings: config.Group, live: LaneReport | None, ready: bool
) -> bool:
    """Whether a candidate whose time is over is to blame for it: it is not ready, or more than
    enough frames came by. On a line that is slow, or stands still, it waits."""
    if not ready:
        return True
    if watched.idle_ns or live is None:
        return False
    offered = verdict.since(verdict.counts(live), watched.before or Counts()).offered
    return offered >= CHANCES * settings.shadow_frames * settings.shadow_every


def proof(now: Group, settings: config.Group, report: LaneReport | None, fact: str) -> Inputs:
    return verdict.proof(report, settings.shadow_frames, now.limits, fact)


def soak(
    watched: Watched, now: Group, settings: config.Group, report: LaneReport | None,
    *, fact: str, over: bool,
) -> verdict.Soak:  # fmt: skip
    """What the soak is judged by.

    One that was proven before, and is gone back to, is not measured again. Good needs frames that
    were judged: on a line that stands still over the weekend the soak waits. It does not where no
    camera has given any since the start: nothing is at stake there, and the next model has to be
    able to come.

    Args:
        report: of the process that the record has for it, if it is that one's.
        fact: what is bad enough by itself.
        over: whether its time is.
    """
    counted = verdict.since(verdict.counts(report), watched.start) if report else Counts()
    if now.record.proven(watched.slot):
        return verdict.Soak(fact, over, now=counted)
    frames = max(1, settings.shadow_frames) if now.cameras else 0
    return verdict.Soak(
        fact, over, frames, now.limits, counted, watched.before, now.expected, settings.score
    )


def order(group: str, kind: str, lane: str, inputs: Inputs) -> Transition:
    """The transition that a verdict is."""
    return Transition(group, kind, lane, verdict.judge(inputs) or "", inputs)
