"""What the watchdog decides: a row for each thing that can go wrong, and for what must not be."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import config, slots, verdict
from common.messages import LaneReport
from common.slots import FACTORY, PASS, Lane, Record, Slot, Txn
from common.states import Phase, SlotState
from common.verdict import Counts
from services.watchdog import announce
from services.watchdog.facts import (
    Action,
    Asked,
    Camera,
    Death,
    Deaths,
    Down,
    Event,
    Feed,
    Group,
    Incident,
    Kill,
    Limits,
    Live,
    Mark,
    Memory,
    Observation,
    Restart,
    Restore,
    Seen,
    SetPace,
    Settings,
    Start,
    Transition,
    Wake,
    Watched,
)
from services.watchdog.policy import decide, transition

S = 1_000_000_000
NOW = 10_000 * S
A, B, BELT = "inference-main-a", "inference-main-b", "capture-belt"
OLD, NEW = "a" * 64, "c" * 64  # known good, candidate
MB = 1_000_000

SETTINGS = Settings(
    config.Watchdog(),
    {"main": config.Group("m", soak_s=100, prove_s=300)},
    {
        A: Limits(2.0, 60.0, 500 * MB, "main", "a"),
        B: Limits(2.0, 60.0, 500 * MB, "main", "b"),
        BELT: Limits(2.0, 10.0, 250 * MB),
        "updater": Limits(10.0, 10.0, 250 * MB),
    },
)


def record(
    a: str = OLD,
    b: str = OLD,
    live: str = "a",
    phase: Phase = Phase.NONE,
    tries: int = 2,
    lanes: int = 2,
    state: SlotState = SlotState.TESTING,
) -> Record:
    """Lane a runs as 1, lane b as 2; the candidate, where there is a change, is in lane b."""
    both = {"a": Lane(a, 1), "b": Lane(b, 2)}
    return Record(
        counter=5,
        live=live,
        epoch=5,
        lanes={name: both[name] for name in slots.LANES[:lanes]},
        known_good=OLD,
        txn=Txn(phase, "b" if lanes == 2 else "a", NEW) if phase is not Phase.NONE else Txn(),
        slots={
            OLD: Slot(SlotState.GOOD),
            **({NEW: Slot(state, tries)} if phase is not Phase.NONE else {}),
        },
    )


PROVING = record(b=NEW, phase=Phase.PROVING)
REQUESTED = record(b=NEW, phase=Phase.REQUESTED)
SOAK = record(b=NEW, phase=Phase.SOAK, live="b")
COLD_SOAK = record(a=NEW, phase=Phase.SOAK, lanes=1)


# Enough for every rule; all of it well.
MANY = {"offered": 5000, "shown": 5000, "inferred": 5000, "valid": 5000}


def report(run: int, slot: str, **changes: Any) -> LaneReport:
    fields = {"ready": True, "live": True, "judged": 100, "shown_ns": NOW - S} | MANY | changes
    return LaneReport(run=run, slot=slot, **fields)


def gone(seconds: float) -> dict[str, Any]:
    return {"pid": None, "gone_ns": round(NOW - seconds * S)}


def stands_still(seconds: float) -> dict[str, Any]:
    return {"progressed_ns": round(NOW - seconds * S)}


@dataclass
class Row:
    what: str
    orders: list[str]  # as `short` writes them; the rest is below
    record: Record = field(default_factory=record)
    memory: Memory = field(default_factory=Memory)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)  # what differs from well
    observed: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, Camera] = field(default_factory=lambda: {"belt": Camera(200, 5)})
    gate_failed: str = ""
    limits: verdict.Limits = field(default_factory=verdict.Limits)
    expected: tuple[float, ...] = ()


def fitting(record: Record) -> Settings:
    """The settings for as many lanes as the record has."""
    limits = {
        name: its
        for name, its in SETTINGS.processes.items()
        if not its.lane or its.lane in record.lanes
    }
    return msgspec.structs.replace(SETTINGS, processes=limits)


def observation(row: Row) -> Observation:
    processes: dict[str, Seen] = {}
    for name, limits in fitting(row.record).processes.items():
        well: dict[str, Any] = {
            "pid": 100 + len(processes),
            "spawned_ns": NOW - 1000 * S,
            "progressed_ns": NOW - S // 10,
            "sent_ns": NOW - S // 10,
            "begun": True,
        }
        if limits.lane:
            lane = row.record.lanes[limits.lane]
            well |= {"report": report(lane.run, lane.slot), "ready_ns": NOW - 900 * S}
        well |= row.processes.get(name, {})
        processes[name] = Seen() if well["pid"] is None else Seen(**well)
        if well["pid"] is None:
            processes[name] = Seen(gone_ns=well["gone_ns"])
    fields: dict[str, Any] = {
        "now_ns": NOW,
        "listening_ns": NOW - 1000 * S,
        "answered_ns": NOW - S,
        "supervisord": 0,
    }
    return Observation(
        **(fields | row.observed),
        processes=processes,
        groups={"main": Group(row.record, row.cameras, row.gate_failed, row.limits, row.expected)},
    )


def short(actions: tuple[Action, ...]) -> list[str]:
    words = []
    for action in actions:
        match action:
            case Kill(name) | Restart(name) | Start(name):
                words.append(f"{type(action).__name__.lower()} {name}")
            case Transition():
                words.append(f"{action.kind} {action.lane}".strip())
            case SetPace(value):
                words.append(f"pace {value}")
            case Event(code):
                words.append(f"event {code}")
            case Incident(process):
                words.append(f"incident {process}")
            case Feed():
                words.append("feed")
            case Wake():
                pass
    return words


HUNG_A = [f"kill {A}", "event process.hung", f"incident {A}"]
DIED_A = ["event process.died", f"incident {A}"]
DEATH_A = {"deaths": (Death(A, 100, NOW, False, "was killed by SIGSEGV", report(1, OLD)),)}
DEATH_B = {"deaths": (Death(B, 101, NOW, False, "was killed by SIGKILL", report(2, NEW)),)}


def soaked(before: Counts | None = None, seconds: float = 101, **counted: Any) -> dict[str, Any]:
    """A row's record, memory and candidate at the end of a soak."""
    return {
        "record": SOAK,
        "memory": watched(Phase.SOAK, seconds, start=Counts(2), before=before),
        "processes": {B: {"report": report(2, NEW, **counted)}},
    }


# What the model before did while this one proved itself: one frame in ten was skipped.
BEFORE = Counts(1, 900, 0, 1000, 900, 900, 890, (), 10.0)
HELD = verdict.Limits(latency_ratio=1.2, latency_p99_ms=50.0)
SURE = (0.0,) * 8 + (0.2, 0.8)  # scores expected
AS_SURE, LESS_SURE = (0,) * 8 + (100, 400), (0,) * 6 + (150, 150, 100, 100)
DOWN = Down(NOW - S, False, "was killed by SIGKILL")


def watched(phase: Phase, seconds: float = 10, **changes: Any) -> Memory:
    since_ns = round(NOW - seconds * S)
    fields = {"start": Counts(2, 50)} if phase is Phase.SOAK else {"before": Counts(1)}
    return Memory(
        watched={"main": Watched(NEW, phase, since_ns, **fields | changes)},
        live={"main": Live(5, round(NOW - seconds * S))},
    )


ROWS = [
    Row("all is well", ["feed"]),
    # -- inference crashes
    Row(
        "live lane dies, standby ready: it takes over at once",
        [*DIED_A, "take_over b", "feed"],
        processes={A: gone(0)},
        observed=DEATH_A,
    ),
    Row(
        "live lane is back, but not ready, when the standby gets ready: it takes over",
        ["take_over b", "feed"],
        memory=Memory(down={A: DOWN}),
        processes={A: {"report": None, "ready_ns": 0, "begun": False, "spawned_ns": NOW - S}},
    ),
    Row(
        "live lane dies, no standby: nothing can take over",
        [*DIED_A, "feed"],
        processes={A: gone(0), B: {"ready_ns": 0}},
        observed=DEATH_A,
    ),
    Row(
        "standby dies: nothing to change",
        ["event process.died", f"incident {B}", "feed"],
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "died", report(2, OLD)),)},
    ),
    Row(
        "live lane dies while a candidate is proving: never an unproven slot",
        [*DIED_A, "feed"],
        record=PROVING,
        processes={A: gone(0)},
        observed=DEATH_A,
        memory=watched(Phase.PROVING),
    ),
    Row(
        "live lane dies; the standby was started by nobody the record knows: no takeover",
        [*DIED_A, "feed"],
        processes={A: gone(0), B: {"report": report(77, OLD)}},
        observed=DEATH_A,
    ),
    Row(
        "live lane dies; the standby loaded another slot than recorded: no takeover",
        [*DIED_A, "feed"],
        processes={A: gone(0), B: {"report": report(2, FACTORY)}},
        observed=DEATH_A,
    ),
    Row(
        "live lane dies; the standby has only pass-through: no takeover",
        [*DIED_A, "feed"],
        record=record(b=PASS),
        processes={A: gone(0)},
        observed=DEATH_A,
        memory=Memory(restores={"main": Restore(NOW + S, 1)}),
    ),
    Row(
        "live lane dies; the standby has the factory's, the live one a better: it is waited for",
        [*DIED_A, "feed"],
        record=record(b=FACTORY),
        processes={A: gone(0)},
        observed=DEATH_A,
        memory=Memory(restores={"main": Restore(NOW + S, 1)}),
    ),
    Row(
        "live lane was replaced while no watchdog ran",
        [*DIED_A, "take_over b", "feed"],
        memory=Memory(pids={A: 77}),
        processes={A: {"report": None, "ready_ns": 0, "spawned_ns": NOW - S, "begun": False}},
    ),
    Row(
        "live lane is not there when the watchdog starts",
        ["take_over b", f"start {A}", "feed"],
        processes={A: gone(2)},
    ),
    Row(
        "live lane leaves in good order: the standby takes over, no incident",
        ["take_over b", "feed"],
        processes={A: gone(0)},
        observed={"deaths": (Death(A, 100, NOW, True, "ended", report(1, OLD)),)},
    ),
    # -- a process hangs
    Row(
        "live lane makes no progress: killed, and the other takes over in the same step",
        [*HUNG_A, "take_over b", "feed"],
        processes={A: stands_still(2.1)},
    ),
    Row("short of the deadline: nothing", ["feed"], processes={A: stands_still(1.9)}),
    Row(
        "killed once: not again while it dies",
        ["take_over b", "feed"],
        memory=Memory(killed={A: Mark(100, NOW - S)}),
        processes={A: stands_still(3)},
    ),
    Row(
        "a declared wait: no kill",
        ["feed"],
        processes={A: stands_still(50) | {"wait_until_ns": NOW + S}},
    ),
    Row(
        "a declared wait is over",
        [*HUNG_A, "take_over b", "feed"],
        processes={A: stands_still(50) | {"wait_until_ns": NOW - 1}},
    ),
    Row(
        "hang at load, before the first beat",
        [f"kill {B}", "event process.hung", f"incident {B}", "feed"],
        processes={
            B: {
                "report": None,
                "ready_ns": 0,
                "begun": False,
                "spawned_ns": NOW - 61 * S,
                "progressed_ns": 0,
            },
        },
    ),
    Row(
        "loads for long, within the limit",
        ["feed"],
        processes={
            B: {
                "report": None,
                "ready_ns": 0,
                "begun": False,
                "spawned_ns": NOW - 59 * S,
                "progressed_ns": 0,
            },
        },
    ),
    Row(
        "capture hangs",
        [f"kill {BELT}", "event process.hung", f"incident {BELT}", "feed"],
        processes={BELT: stands_still(2.1)},
    ),
    Row("the updater has more time", ["feed"], processes={"updater": stands_still(9)}),
    Row(
        "the watchdog itself was away: nobody is judged by old beats",
        ["feed"],
        processes={A: stands_still(30), BELT: stands_still(30)},
        observed={"listening_ns": NOW - S},
    ),
    Row(
        "frames wait, none is decided, though the lane says it is well",
        [*HUNG_A, "take_over b", "feed"],
        cameras={"belt": Camera(200, 5, NOW - 3 * S)},
        memory=Memory(live={"main": Live(5, NOW - 100 * S)}),
    ),
    Row(
        "frames wait, but the lane has only just become live",
        ["feed"],
        cameras={"belt": Camera(200, 5, NOW - 3 * S)},
        memory=Memory(live={"main": Live(4, NOW - 100 * S)}),
    ),
    Row(
        "frames wait while the live lane loads",
        ["feed"],
        cameras={"belt": Camera(200, 5, NOW - 30 * S)},
        memory=Memory(live={"main": Live(5, NOW - 100 * S)}),
        processes={A: {"ready_ns": 0, "wait_until_ns": NOW + 20 * S}},
    ),
    # -- a change of model
    Row("a candidate proves itself", ["feed"], record=PROVING, memory=watched(Phase.PROVING)),
    Row(
        "candidate refused by its self-test",
        ["abandon", "feed"],
        record=PROVING,
        processes={B: {"report": report(2, NEW, ready=False, refused="3 of 8"), "ready_ns": 0}},
    ),
    Row(
        "candidate that does not pass the updater's gates",
        ["abandon", "feed"],
        record=PROVING,
        gate_failed="agreement 0.2",
    ),
    Row(
        "a refusal of an earlier process is none of this one",
        ["feed"],
        record=PROVING,
        processes={B: {"report": report(1, NEW, ready=False, refused="3 of 8"), "ready_ns": 0}},
    ),
    Row(
        "candidate crashes, tries left",
        ["event process.died", f"incident {B}", "feed"],
        record=PROVING,
        processes={B: gone(0)},
        observed=DEATH_B,
    ),
    Row(
        "candidate crashes, tries used up",
        ["event process.died", f"incident {B}", "abandon", "feed"],
        record=record(b=NEW, phase=Phase.PROVING, tries=0),
        processes={B: gone(0)},
        observed=DEATH_B,
    ),
    Row(
        "candidate is on its last try",
        ["feed"],
        record=record(b=NEW, phase=Phase.PROVING, tries=0),
        processes={B: {"ready_ns": 0, "report": None}},
    ),
    Row(
        "candidate's lane went on with another slot",
        ["abandon", "feed"],
        record=record(b=OLD, phase=Phase.PROVING, tries=0),
    ),
    Row(
        "candidate too late",
        ["abandon", "feed"],
        record=PROVING,
        memory=watched(Phase.PROVING, 301),
    ),
    Row(
        "candidate late, and the camera is blind: its time stands still",
        ["feed"],
        record=PROVING,
        memory=watched(Phase.PROVING, 301),
        processes={A: {"report": report(1, OLD, shown_ns=NOW - 6 * S)}},
    ),
    Row(
        "candidate late, and nobody is live who could decide",
        ["feed"],
        record=PROVING,
        memory=watched(Phase.PROVING, 301),
        processes={A: {"report": None, "ready_ns": 0, "begun": False, "spawned_ns": NOW - S}},
    ),
    Row(
        "candidate late, but the line is slow: fewer frames came than twice what it needs",
        ["feed"],
        record=PROVING,
        memory=watched(Phase.PROVING, 301, before=Counts(1, offered=3001)),
    ),
    Row(
        "candidate late, not even ready, whatever the camera shows",
        ["abandon", "feed"],
        record=PROVING,
        memory=watched(Phase.PROVING, 301),
        processes={
            A: {"report": report(1, OLD, shown_ns=NOW - 6 * S)},
            B: {"report": report(2, NEW, ready=False), "ready_ns": 0},
        },
    ),
    Row(
        "candidate takes too much memory",
        ["abandon", "feed"],
        record=PROVING,
        processes={B: {"rss_bytes": 600 * MB}},
    ),
    Row("requested and ready: hand-over", ["hand_over b", "feed"], record=REQUESTED),
    Row(
        "requested, not ready",
        ["feed"],
        record=REQUESTED,
        processes={B: {"ready_ns": 0}},
    ),
    Row(
        "requested, but another process of that lane is ready",
        ["feed"],
        record=REQUESTED,
        processes={B: {"report": report(9, NEW)}},
    ),
    # -- soak
    Row("soak goes on", ["feed"], record=SOAK, memory=watched(Phase.SOAK)),
    Row(
        "soak passed",
        ["mark_good b", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, 101),
    ),
    Row(
        "soak passed, but a camera is not fenced yet",
        ["feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, 101),
        cameras={"belt": Camera(200, 4)},
    ),
    Row(
        "soak passed, but too little was judged: the line stands still over the weekend",
        ["feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, 101, start=Counts(2, inferred=4901)),
    ),
    Row(
        "soak passed without any frame: no camera has given one since the start",
        ["mark_good b", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, 101, start=Counts(2, inferred=5000)),
        cameras={},
    ),
    Row(
        "soak passed, as good as the model before",
        ["mark_good b", "feed"],
        **soaked(BEFORE, shown=3700, inferred=3700, valid=3500, infer_ms_p99=17.9, scores=AS_SURE),
        limits=HELD,
        expected=SURE,
    ),
    Row(
        "it skips more frames than the model before",
        ["fail_soak", "feed"],
        **soaked(BEFORE, shown=3500, inferred=3500, valid=3500),
    ),
    Row(
        "it skips more frames, but they are few so far",
        ["feed"],
        **soaked(BEFORE, 99, shown=2000, inferred=2000, valid=2000),
    ),
    Row(
        "more of its results are stale than of the model before",
        ["fail_soak", "feed"],
        **soaked(BEFORE, valid=4500),
    ),
    Row(
        "many are stale, as they were before",
        ["mark_good b", "feed"],
        **soaked(msgspec.structs.replace(BEFORE, valid=450), valid=2500),
    ),
    Row(
        "slower than its manifest says",
        ["fail_soak", "feed"],
        **soaked(None, infer_ms_p99=51.0),
        limits=HELD,
    ),
    Row(
        "slower than the model before",
        ["fail_soak", "feed"],
        **soaked(BEFORE, infer_ms_p99=18.1),
        limits=HELD,
    ),
    Row(
        "less sure than its manifest says",
        ["fail_soak", "feed"],
        **soaked(None, scores=LESS_SURE),
        expected=SURE,
    ),
    Row(
        "less sure than its manifest says, of a few items",
        ["mark_good b", "feed"],
        **soaked(None, scores=(0,) * 7 + (40, 30, 29)),
        expected=SURE,
    ),
    Row(
        "one that is gone back to was proven: it is not measured again",
        ["mark_good b", "feed"],
        **soaked(BEFORE, shown=1, inferred=0, valid=0, scores=LESS_SURE)
        | {"record": record(b=NEW, phase=Phase.SOAK, live="b", state=SlotState.GOOD)},
        limits=HELD,
        expected=SURE,
    ),
    Row(
        "candidate dies in soak: the old lane takes over, which says bad",
        ["event process.died", f"incident {B}", "take_over a", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: gone(0)},
        observed=DEATH_B,
    ),
    Row(
        "candidate dies in soak, the old lane is not ready",
        ["event process.died", f"incident {B}", "fail_soak", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: gone(0), A: {"ready_ns": 0}},
        observed=DEATH_B,
    ),
    Row(
        "candidate hangs in soak",
        [f"kill {B}", "event process.hung", f"incident {B}", "take_over a", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: stands_still(3)},
    ),
    Row(
        "candidate is stopped in good order in soak: no verdict",
        ["feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, True, "ended", report(2, NEW)),)},
    ),
    Row(
        "candidate is stopped in good order in soak, and does not come back",
        ["take_over a", "feed"],
        record=SOAK,
        memory=msgspec.structs.replace(
            watched(Phase.SOAK, 90), down={B: Down(NOW - 61 * S, True, "died: exit status 0")}
        ),
        processes={B: {"ready_ns": 0, "report": None}},
    ),
    Row(
        "the board starts in soak, and the candidate is not there yet: no verdict",
        [f"start {B}", "feed"],
        record=SOAK,
        processes={B: gone(5)},
    ),
    Row(
        "candidate fails too often",
        ["fail_soak", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, start=Counts(2)),
        processes={B: {"report": report(2, NEW, judged=100, failed=4)}},
    ),
    Row(
        "candidate fails now and then",
        ["feed"],
        record=SOAK,
        memory=watched(Phase.SOAK, start=Counts(2)),
        processes={B: {"report": report(2, NEW, judged=1000, failed=20)}},
    ),
    Row(
        "candidate says that it is too slow",
        ["fail_soak", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: {"report": report(2, NEW, refused="p99 90 ms, 20 may be")}},
    ),
    Row(
        "candidate leaks in soak",
        ["fail_soak", "feed"],
        record=SOAK,
        memory=watched(Phase.SOAK),
        processes={B: {"rss_bytes": 600 * MB}},
    ),
    Row(
        "candidate's lane went on with another slot in soak",
        ["fail_soak", "feed"],
        record=record(b=OLD, live="b", phase=Phase.SOAK),
        memory=watched(Phase.SOAK),
    ),
    Row(
        "one lane: the old process leaves for the candidate",
        ["feed"],
        record=COLD_SOAK,
        processes={A: gone(0)},
        observed={"deaths": (Death(A, 100, NOW, None, "died", report(1, OLD)),)},
    ),
    Row(
        "one lane: the candidate dies",
        [*DIED_A, "fail_soak", "feed"],
        record=COLD_SOAK,
        processes={A: gone(0)},
        observed={"deaths": (Death(A, 100, NOW, False, "died", report(1, NEW)),)},
    ),
    Row(
        "a refused candidate ends with an error after its slot was taken from it: no death",
        ["feed"],
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "exit status 1", report(2, NEW)),)},
    ),
    # -- too many restarts
    Row(
        "a proven slot keeps dying: its lane gives way",
        ["event process.died", f"incident {B}", "give_way b", f"incident {B}", "feed"],
        memory=Memory(deaths={B: Deaths(OLD, tuple(NOW - i * S for i in range(5)))}),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "died", report(2, OLD)),)},
    ),
    Row(
        "with only pass-through behind it, a model that judged between its deaths stays",
        ["event process.died", f"incident {B}", "feed"],
        record=record(b=FACTORY),
        memory=Memory(
            deaths={B: Deaths(FACTORY, tuple(NOW - i * S for i in range(5)))},
            restores={"main": Restore(NOW + S, 1)},
        ),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "died", report(2, FACTORY)),)},
    ),
    Row(
        "one that never got to judge gives way even to pass-through",
        ["event process.died", f"incident {B}", "give_way b", f"incident {B}", "feed"],
        record=record(b=FACTORY),
        memory=Memory(
            deaths={B: Deaths(FACTORY, tuple(NOW - i * S for i in range(5)))},
            restores={"main": Restore(NOW + S, 1)},
        ),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "died", report(2, FACTORY, judged=0)),)},
    ),
    Row(
        "as many deaths, but not within the window",
        ["event process.died", f"incident {B}", "feed"],
        memory=Memory(deaths={B: Deaths(OLD, tuple(NOW - 61 * i * S for i in range(1, 6)))}),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, False, "died", report(2, OLD)),)},
    ),
    Row(
        "stops in good order are no deaths",
        ["feed"],
        memory=Memory(deaths={B: Deaths(OLD, tuple(NOW - i * S for i in range(5)))}),
        processes={B: gone(0)},
        observed={"deaths": (Death(B, 101, NOW, True, "ended", report(2, OLD)),)},
    ),
    Row(
        "deaths on a slot that the lane has left do not count",
        ["feed"],
        memory=Memory(deaths={B: Deaths(FACTORY, tuple(NOW - i * S for i in range(9)))}),
    ),
    Row(
        "pass-through has nothing to give way to",
        ["feed"],
        record=record(b=PASS),
        memory=Memory(
            deaths={B: Deaths(PASS, tuple(NOW - i * S for i in range(9)))},
            restores={"main": Restore(NOW + S, 1)},
        ),
    ),
    Row(
        "known good is tried again, in the lane that is not live",
        ["restore b", "feed"],
        record=record(a=FACTORY, b=FACTORY),
        memory=Memory(restores={"main": Restore(NOW - S, 600)}),
    ),
    Row(
        "known good is tried again in the only lane",
        ["restore a", "feed"],
        record=record(a=FACTORY, lanes=1),
        memory=Memory(restores={"main": Restore(NOW - S, 600)}),
    ),
    Row(
        "not yet",
        ["feed"],
        record=record(a=FACTORY, b=FACTORY),
        memory=Memory(restores={"main": Restore(NOW + S, 600)}),
    ),
    Row(
        "known good is ready beside a worse one: it takes over",
        ["take_over b", "feed"],
        record=record(a=FACTORY),
        memory=Memory(restores={"main": Restore(NOW + S, 600)}),
    ),
    Row(
        "known good is not ready yet",
        ["feed"],
        record=record(a=FACTORY),
        memory=Memory(restores={"main": Restore(NOW + S, 600)}),
        processes={B: {"ready_ns": 0}},
    ),
    # -- memory
    Row(
        "the live lane leaks: the other takes over first",
        ["take_over b", "feed"],
        processes={A: {"rss_bytes": 600 * MB}},
    ),
    Row(
        "the standby leaks",
        ["event process.memory", f"restart {B}", "feed"],
        processes={B: {"rss_bytes": 600 * MB}},
    ),
    Row(
        "the live lane leaks and stands alone",
        ["event process.memory", f"restart {A}", "feed"],
        processes={A: {"rss_bytes": 600 * MB}, B: {"ready_ns": 0}},
    ),
    Row(
        "capture leaks",
        ["event process.memory", f"restart {BELT}", "feed"],
        processes={BELT: {"rss_bytes": 300 * MB}},
    ),
    Row(
        "told to stop: once",
        ["feed"],
        memory=Memory(planned={BELT: Mark(102, NOW - S)}),
        processes={BELT: {"rss_bytes": 300 * MB}},
    ),
    Row(
        "told to stop, and does not",
        [f"kill {BELT}", "event process.hung", f"incident {BELT}", "feed"],
        memory=Memory(planned={BELT: Mark(102, NOW - 11 * S)}),
        processes={BELT: {"rss_bytes": 300 * MB}},
    ),
    # -- supervisord's states
    Row("just died: supervisord sees to it", ["feed"], processes={BELT: gone(1.4)}),
    Row(
        "FATAL, BACKOFF, or a clock that jumped: started by order",
        [f"start {BELT}", "feed"],
        processes={BELT: gone(1.6)},
    ),
    Row(
        "asked for, and waited for",
        ["feed"],
        memory=Memory(asked={BELT: Asked(NOW - 9 * S, NOW + S, 4)}),
        processes={BELT: gone(10)},
    ),
    Row(
        "asked for again",
        [f"start {BELT}", "feed"],
        memory=Memory(asked={BELT: Asked(NOW - 9 * S, NOW - S, 4)}),
        processes={BELT: gone(10)},
    ),
    # -- heat, devices
    Row(
        "too hot",
        ["pace 0.5", "event board.hot", "feed"],
        observed={"temperatures_c": {"cpu": 81.0}},
    ),
    Row(
        "still too hot after a while",
        ["pace 0.25", "event board.hot", "feed"],
        memory=Memory(pace=0.5, paced_ns=NOW - 31 * S),
        observed={"temperatures_c": {"cpu": 81.0}},
    ),
    Row(
        "still too hot, but not for long",
        ["feed"],
        memory=Memory(pace=0.5, paced_ns=NOW - 20 * S),
        observed={"temperatures_c": {"cpu": 81.0}},
    ),
    Row(
        "no slower than an eighth",
        ["feed"],
        memory=Memory(pace=0.125, paced_ns=NOW - 99 * S),
        observed={"temperatures_c": {"cpu": 99.0}},
    ),
    Row(
        "neither hot nor cool: hysteresis",
        ["feed"],
        memory=Memory(pace=0.5, paced_ns=NOW - 99 * S, cool_ns=NOW - 50 * S),
        observed={"temperatures_c": {"cpu": 75.0}},
    ),
    Row(
        "cool for a while",
        ["pace 1.0", "event board.cool", "feed"],
        memory=Memory(pace=0.5, paced_ns=NOW - 99 * S, cool_ns=NOW - 31 * S),
        observed={"temperatures_c": {"cpu": 60.0, "gpu": 69.0}},
    ),
    Row(
        "a Coral at -89.7 C is lost, not cold",
        ["event device.lost", "feed"],
        observed={"lost": ("apex_0",)},
    ),
    Row(
        "said once",
        ["feed"],
        memory=Memory(lost=("apex_0",)),
        observed={"lost": ("apex_0",)},
    ),
    Row("it is back", ["event device.back", "feed"], memory=Memory(lost=("apex_0",))),
    # -- the hardware watchdog
    Row(
        "a process survives its SIGKILL: not fed",
        ["event watchdog.starved"],
        memory=Memory(killed={BELT: Mark(102, NOW - 6 * S)}),
        processes={BELT: stands_still(9)},
    ),
    Row(
        "said once that it is not fed",
        [],
        memory=Memory(
            killed={BELT: Mark(102, NOW - 6 * S)}, starved="capture-belt (pid 102) does not die"
        ),
        processes={BELT: stands_still(9)},
    ),
    Row(
        "a pid may take some time to die",
        ["feed"],
        memory=Memory(killed={BELT: Mark(102, NOW - 4 * S)}),
        processes={BELT: stands_still(9)},
    ),
    Row(
        "supervisord does not answer",
        ["event watchdog.starved"],
        observed={"answered_ns": NOW - 11 * S},
    ),
    Row(
        "a process was there after it was asked for, and died again",
        ["feed"],
        memory=Memory(asked={BELT: Asked(0, NOW + S, 60)}),
        processes={BELT: gone(0.1)},
    ),
    Row(
        "a process can't be started",
        ["event watchdog.starved"],
        memory=Memory(asked={BELT: Asked(NOW - 61 * S, NOW + S, 60)}),
        processes={BELT: gone(63)},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_what_is_decided(row: Row) -> None:
    given_memory = msgspec.json.encode(row.memory)
    memory, actions = decide(fitting(row.record), row.memory, observation(row))
    assert short(actions) == row.orders
    assert isinstance(actions[-1], Wake)
    assert actions[-1].at_ns > NOW
    assert msgspec.json.encode(row.memory) == given_memory  # what was given stays as it was
    # A watchdog that is killed now, and started again, remembers the same.
    assert msgspec.json.decode(msgspec.json.encode(memory), type=Memory) == memory


def test_each_order_is_one_that_the_record_allows_and_is_announced() -> None:
    """A verdict carries what it rests on, and follows from that."""
    codes = set()
    for row in ROWS:
        _, actions = decide(fitting(row.record), row.memory, observation(row))
        for order in (action for action in actions if isinstance(action, Transition)):
            after = transition(row.record, order)
            codes |= {event.code for event in announce.events(order, row.record, after)}
            judged = after.txn != row.record.txn and not row.gate_failed
            if judged and order.kind != "hand_over":
                kept = msgspec.json.decode(msgspec.json.encode(order.inputs), type=verdict.Inputs)
                assert verdict.judge(kept) == order.reason, row.what
    assert codes == {
        "model.handed_over", "model.abandoned", "model.good", "model.bad", "model.rolled_back",
        "lane.took_over", "model.gave_way", "model.restored",
    }  # fmt: skip


def test_the_restart_of_a_watchdog_changes_no_deadline() -> None:
    """The deadline of a candidate, and a soak, go on from when they were first seen."""
    memory, _ = decide(SETTINGS, Memory(), observation(Row("", [], record=PROVING)))
    kept = msgspec.json.decode(msgspec.json.encode(memory), type=Memory)
    later = Row("", [], record=PROVING, observed={"now_ns": NOW + 299 * S})
    later.processes = {n: {"progressed_ns": NOW + 400 * S} for n in SETTINGS.processes}
    later.processes[A]["report"] = report(1, OLD, offered=9000, shown_ns=NOW + 400 * S)
    later.observed["answered_ns"] = NOW + 400 * S
    assert short(decide(SETTINGS, kept, observation(later))[1]) == ["feed"]
    later.observed["now_ns"] = NOW + 301 * S
    assert short(decide(SETTINGS, kept, observation(later))[1]) == ["abandon", "feed"]


def test_a_candidate_s_time_stands_still_while_nothing_is_shown() -> None:
    """And runs again from there: 200 s of 300, an hour in the dark, then 100 s are left."""
    memory = watched(Phase.PROVING, 200)

    def look(after_s: float, shown_s: float, **its: Any) -> list[str]:
        nonlocal memory
        now = NOW + round(after_s * S)
        live = report(1, OLD, shown_ns=NOW + round(shown_s * S))
        well = {"progressed_ns": now, "sent_ns": now}
        row = Row("", [], record=PROVING, processes={n: dict(well) for n in SETTINGS.processes})
        row.processes[A]["report"] = live
        row.processes[B] |= its
        row.observed = {"now_ns": now, "answered_ns": now, "listening_ns": now}
        memory, actions = decide(SETTINGS, memory, observation(row))
        return short(actions)

    assert look(6, 0) == ["feed"]
    assert look(3600, 0) == ["feed"]
    assert look(3606, 3606) == ["feed"]
    assert look(3699, 3699) == ["feed"]
    assert look(3701 + 5, 3701 + 5) == ["abandon", "feed"]


def test_the_lanes_are_counted_from_the_hand_over() -> None:
    """What the old one did until then is what the new one is measured by."""

    def look(record: Record, memory: Memory, old: dict[str, Any], new: dict[str, Any]) -> Memory:
        row = Row("", [], record=record)
        row.processes = {A: {"report": report(1, OLD, **old)}, B: {"report": report(2, NEW, **new)}}
        return decide(SETTINGS, memory, observation(row))[0]

    nothing = dict.fromkeys(MANY, 0)
    memory = look(PROVING, Memory(), {"offered": 1000, "shown": 600}, nothing)
    memory = look(PROVING, memory, {"offered": 1500, "shown": 900}, nothing | {"judged": 30})
    memory = look(REQUESTED, memory, {"offered": 2000, "shown": 1200}, nothing | {"judged": 40})
    memory = look(SOAK, memory, {"offered": 2100, "shown": 1260}, nothing | {"judged": 41})
    memory = look(SOAK, memory, {"offered": 2100, "shown": 1260}, {"judged": 900})
    its = memory.watched["main"]
    assert its.before is not None
    assert (its.before.offered, its.before.shown) == (1100, 660)
    assert (its.start.run, its.start.judged) == (2, 41)
    # With one lane the process that has to go says how it was.
    row = Row("", [], record=COLD_SOAK, processes={A: {"report": report(1, OLD, shown=4000)}})
    memory, _ = decide(fitting(COLD_SOAK), Memory(), observation(row))
    its = memory.watched["main"]
    assert (its.start, its.before and its.before.shown) == (Counts(), 4000)


def test_asking_for_a_start_backs_off_to_a_minute() -> None:
    memory, waits, now = Memory(), [], NOW
    row = Row("", [], processes={BELT: gone(5)})
    for _ in range(9):
        memory, _ = decide(SETTINGS, memory, observation(row))
        waits.append((memory.asked[BELT].next_ns - now) / S)
        now = memory.asked[BELT].next_ns + 1
        row.observed = {"now_ns": now, "answered_ns": now, "listening_ns": now}
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_waiting_for_known_good_doubles() -> None:
    row = Row("", [], memory=Memory(restores={"main": Restore(NOW + S, 600)}))
    row.memory = msgspec.structs.replace(
        row.memory, deaths={B: Deaths(OLD, tuple(NOW - i * S for i in range(6)))}
    )
    memory, actions = decide(fitting(row.record), row.memory, observation(row))
    assert "give_way b" in short(actions)
    assert memory.restores["main"] == Restore(NOW + 1200 * S, 1200)


RECORDS = st.sampled_from([
    record(), record(b=PASS), record(a=FACTORY), record(b=FACTORY), record(live="b"),
    record(a=FACTORY, lanes=1), PROVING, REQUESTED, SOAK, COLD_SOAK,
    record(b=OLD, phase=Phase.SOAK, live="b"), record(b=NEW, phase=Phase.PROVING, tries=0),
])  # fmt: skip
TIMES = st.sampled_from([0, NOW - 100 * S, NOW - 61 * S, NOW - 3 * S, NOW - S // 10, NOW])
SLOTS = st.sampled_from([OLD, NEW, FACTORY, PASS])
REPORTS = st.none() | st.builds(
    LaneReport, st.integers(1, 3), SLOTS, st.booleans(), st.booleans(),
    refused=st.sampled_from(["", "3 of 8"]), judged=st.integers(0, 9), failed=st.integers(0, 9),
)  # fmt: skip
SEEN = st.builds(
    Seen, pid=st.sampled_from([None, 100, 101]), spawned_ns=TIMES, gone_ns=TIMES,
    progressed_ns=TIMES, wait_until_ns=TIMES, sent_ns=TIMES, begun=st.booleans(),
    rss_bytes=st.sampled_from([0, 900 * MB]), report=REPORTS, ready_ns=TIMES,
)  # fmt: skip
MEMORIES = st.builds(
    Memory,
    pids=st.dictionaries(st.sampled_from([A, B]), st.integers(100, 102)),
    killed=st.dictionaries(st.sampled_from([A, B]), st.builds(Mark, st.just(100), TIMES)),
    down=st.dictionaries(
        st.sampled_from([A, B]), st.builds(Down, TIMES, st.booleans(), st.just("died"))
    ),
    deaths=st.dictionaries(
        st.sampled_from([A, B]),
        st.builds(Deaths, SLOTS, st.lists(TIMES, max_size=9).map(tuple)),
    ),
    restores=st.dictionaries(st.just("main"), st.builds(Restore, TIMES, st.just(600.0))),
    watched=st.dictionaries(
        st.just("main"), st.builds(Watched, SLOTS, st.sampled_from(list(Phase)), TIMES)
    ),
)


@given(RECORDS, st.fixed_dictionaries(dict.fromkeys(SETTINGS.processes, SEEN)), MEMORIES, TIMES)
def test_whatever_is_seen_orders_are_possible(
    record: Record, processes: dict[str, Seen], memory: Memory, undecided_ns: int
) -> None:
    """Never an error, never an order that the record refuses, never an unproven takeover."""
    settings = fitting(record)
    processes = {name: seen for name, seen in processes.items() if name in settings.processes}
    deaths = tuple(
        Death(name, 100, NOW, None, "died", seen.report)
        for name, seen in processes.items()
        if seen.pid is None and memory.pids.get(name)
    )
    seen = Observation(
        NOW, NOW - 1000 * S, NOW, 0, processes,
        {"main": Group(record, {"belt": Camera(9, 5, undecided_ns)})}, deaths,
    )  # fmt: skip
    remembered, actions = decide(settings, memory, seen)
    orders = [action for action in actions if isinstance(action, Transition)]
    assert len(orders) <= 1  # one at a time, each seen through before the next
    for order in orders:
        after = transition(record, order)
        if order.kind == "take_over":
            assert record.proven(record.lanes[after.live].slot)
    kills = [action.name for action in actions if isinstance(action, Kill)]
    assert len(kills) == len(set(kills))
    again = [a for a in decide(settings, remembered, seen)[1] if isinstance(a, Kill)]
    assert not again  # once a pid
