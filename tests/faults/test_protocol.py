"""PROTOCOL's properties hold of the real transitions, grants, fences and journal, through every
interleaving within the bounds of each scenario; and what is broken on purpose is found."""

import msgspec
import pytest

from common import frames, slots
from common.frames import Ring
from common.paths import Paths
from common.slots import Record
from common.states import Policy
from services.inference.seat import Seat
from tests.faults.explorer import Budget, Scenario, explore

CRASH, RUN = "crash at load", "crash on a frame"

SMALL = {
    "crash": Scenario(frames=(2,), budget=Budget(kill=2)),
    "zombie": Scenario(frames=(2,), budget=Budget(stop=1, cont=1, suspect=1)),
    "orphan": Scenario(frames=(2,), budget=Budget(orphan=1, suspect=1)),
    "two cameras": Scenario(frames=(1, 1), budget=Budget(suspect=1)),
    "latest": Scenario(frames=(3,), policy=Policy.LATEST, budget=Budget(suspect=1)),
    "power": Scenario(frames=(1,), candidates=("ok",), budget=Budget(power=1)),
    "update": Scenario(frames=(1,), candidates=("ok",), budget=Budget(kill=1)),
    "update, wrong": Scenario(frames=(1,), candidates=("wrong",), budget=Budget(kill=1)),
    "update, dies at load": Scenario(frames=(1,), candidates=(CRASH,), budget=Budget(kill=1)),
    "update, dies live": Scenario(frames=(1,), candidates=(RUN,), budget=Budget(kill=1)),
    "update, hangs": Scenario(frames=(1,), candidates=("hang",), budget=Budget(kill=1)),
    "update, stopped": Scenario(
        frames=(1,), candidates=("ok",), budget=Budget(deadline=1, stop=1, cont=1)
    ),
    "hangs the board": Scenario(frames=(1,), candidates=("board",), budget=Budget(power=1)),
    "planned": Scenario(frames=(1,), candidates=("ok",), budget=Budget(plan=2)),
    "planned, power": Scenario(frames=(1,), candidates=(CRASH,), budget=Budget(plan=1, power=1)),
    "two updates": Scenario(frames=(1,), candidates=("ok", "wrong"), budget=Budget(kill=1)),
    "known good fails": Scenario(frames=(1,), good=CRASH, budget=Budget(kill=1, flip=1, restore=1)),
    "known good fails, update": Scenario(
        frames=(1,), good=CRASH, candidates=("ok",), budget=Budget(kill=1, restore=1)
    ),
    "flipped bit": Scenario(frames=(1,), candidates=("wrong",), budget=Budget(kill=1, flip=1)),
    "fresh": Scenario(frames=(1,), fresh=True, candidates=("wrong",), budget=Budget(suspect=1)),
    "killer frame": Scenario(frames=(2,), killer=1, budget=Budget(suspect=1)),
    "killer frame, update": Scenario(frames=(1,), killer=1, candidates=("ok",)),
    "by hand": Scenario(frames=(1,), candidates=("ok",), budget=Budget(back=1, suspect=1)),
    "by hand, wrong": Scenario(frames=(1,), candidates=("wrong",), budget=Budget(back=2)),
    "by hand, to what fails": Scenario(
        frames=(1,), good=CRASH, candidates=("ok",), budget=Budget(back=1)
    ),
    "by hand, one lane": Scenario(
        frames=(1,), lanes=1, candidates=("ok",), budget=Budget(back=2, power=1)
    ),
    "one lane": Scenario(frames=(1,), lanes=1, candidates=("ok",), budget=Budget(kill=1, power=1)),
    "one lane, wrong": Scenario(
        frames=(1,), lanes=1, candidates=("wrong",), budget=Budget(kill=1, power=1)
    ),
    "one lane, dies": Scenario(
        frames=(1,), lanes=1, candidates=(CRASH, RUN), budget=Budget(kill=1, power=1)
    ),
}
LARGE = {
    "crash": Scenario(frames=(4,), slots=3, budget=Budget(kill=2, suspect=1)),
    "zombie": Scenario(frames=(2,), budget=Budget(kill=1, stop=2, cont=2, suspect=1)),
    "orphan": Scenario(frames=(2,), budget=Budget(kill=1, orphan=1, suspect=1)),
    "two cameras": Scenario(frames=(2, 1), budget=Budget(kill=1, suspect=1)),
    "latest": Scenario(
        frames=(3,), policy=Policy.LATEST, budget=Budget(kill=1, stop=1, cont=1, suspect=1)
    ),
    "power": Scenario(frames=(1,), candidates=("ok",), budget=Budget(power=2, kill=1, plan=1)),
    "update": Scenario(frames=(2,), candidates=("ok",), budget=Budget(kill=2)),
    "update, wrong": Scenario(
        frames=(2,), candidates=("wrong",), budget=Budget(kill=1, stop=1, cont=1)
    ),
    "update, dies live": Scenario(
        frames=(1,), candidates=(RUN,), budget=Budget(kill=1, suspect=1)
    ),
    "update, two cameras": Scenario(frames=(1, 1), candidates=("ok",), budget=Budget(kill=1)),
    "two updates": Scenario(frames=(1,), candidates=("ok", "ok"), budget=Budget(kill=2)),
    "by hand": Scenario(frames=(1,), candidates=("ok",), budget=Budget(back=2, kill=2)),
    "known good fails": Scenario(
        frames=(1,), good=CRASH, candidates=("wrong",),
        budget=Budget(kill=1, flip=1, power=1, restore=1),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of a few short entries, no padding: a state holds the bytes of its rings."""
    monkeypatch.setattr(frames, "JOURNAL", 4)
    monkeypatch.setattr(frames, "ENTRY_BYTES", 64)
    monkeypatch.setattr(frames, "RESULT_BYTES", 24)
    monkeypatch.setattr(frames, "_PAGE", 8)


@pytest.mark.parametrize("name", SMALL)
def test_holds(paths: Paths, name: str) -> None:
    found = explore(paths, SMALL[name])
    print(f"{name}: {found.states} states, {found.edges} steps, {found.settled} settled")
    assert not found.why, (found.why, found.trace)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LARGE)
def test_holds_within_wider_bounds(paths: Paths, name: str) -> None:
    found = explore(paths, LARGE[name])
    print(f"{name}: {found.states} states, {found.edges} steps, {found.settled} settled")
    assert not found.why, (found.why, found.trace)


# -- what is broken on purpose -------------------------------------------------------------------


def no_fence_check(patch: pytest.MonkeyPatch) -> None:
    decide = Ring.decide

    def broken(ring: Ring, sequence: int, epoch: int, *rest: object) -> None:
        decide(ring, sequence, ring.fence, *rest)  # type: ignore[arg-type]

    patch.setattr(Ring, "decide", broken)


def no_camera_lock(patch: pytest.MonkeyPatch) -> None:
    def broken(ring: Ring, epoch: int, *, wait: bool = True) -> bool:
        ring._words[frames._FENCE] = max(epoch, ring.fence)
        return True

    patch.setattr(Ring, "raise_fence", broken)


def decided_before_the_entry(patch: pytest.MonkeyPatch) -> None:
    decide = Ring.decide

    def broken(ring: Ring, sequence: int, *rest: object) -> None:
        before, order = bytes(ring._map), ring._order
        ring._order = lambda: None  # type: ignore[assignment]
        try:
            decide(ring, sequence, *rest)  # type: ignore[arg-type]
        finally:
            ring._order = order
        after = bytes(ring._map)
        ring._map[:] = before
        ring._words[frames._DECIDED] = sequence
        ring._order()
        ring._map[:] = after

    patch.setattr(Ring, "decide", broken)


def any_slot(patch: pytest.MonkeyPatch) -> None:
    def mine(seat: Seat) -> bool:
        return seat.record.lanes[seat.lane].run == seat.run

    patch.setattr(Seat, "mine", property(mine))


def no_run_check(patch: pytest.MonkeyPatch) -> None:
    def mine(seat: Seat) -> bool:
        return seat.record.lanes[seat.lane].slot == seat.slot

    patch.setattr(Seat, "mine", property(mine))


def no_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "_live", lambda record, lane: msgspec.structs.replace(record, live=lane))


def takeover_to_anyone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "take_over", lambda record, lane, reason: slots._live(record, lane))


def no_try(patch: pytest.MonkeyPatch) -> None:
    start = slots.start

    def broken(record: Record, lane: str, broken: tuple[str, ...] = ()) -> Record:
        after = start(record, lane, broken)
        return msgspec.structs.replace(after, slots=record.slots)

    patch.setattr(slots, "start", broken)


def a_try_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Record, "usable", lambda record, slot: record.state(slot) is not None)


def no_refund(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "_given_back", lambda record, slot: record)


def no_refund_at_a_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "stop", lambda record, lane, run: record)


def no_boot_cap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots, "BOOT_CAP", 99)


def the_lane_keeps_a_bad_slot(patch: pytest.MonkeyPatch) -> None:
    ended = slots._ended

    def broken(record: Record, reason: str) -> Record:
        return msgspec.structs.replace(ended(record, reason), lanes=record.lanes)

    patch.setattr(slots, "_ended", broken)


def slots_not_verified(patch: pytest.MonkeyPatch) -> None:
    choose = Record.choose
    patch.setattr(Record, "choose", lambda record, lane, broken=(): choose(record, lane))


MUTANTS = {
    no_fence_check: SMALL["zombie"],
    no_camera_lock: SMALL["zombie"],
    decided_before_the_entry: SMALL["crash"],
    any_slot: SMALL["one lane, wrong"],
    no_run_check: SMALL["orphan"],
    no_epoch: SMALL["zombie"],
    takeover_to_anyone: SMALL["update"],
    no_try: SMALL["update, dies at load"],
    a_try_too_many: SMALL["update, dies at load"],
    no_refund: SMALL["planned, power"],
    no_refund_at_a_stop: Scenario(frames=(1,), candidates=("ok",), budget=Budget(plan=3)),
    no_boot_cap: SMALL["hangs the board"],
    the_lane_keeps_a_bad_slot: SMALL["update, wrong"],
    slots_not_verified: SMALL["flipped bit"],
}


@pytest.mark.parametrize("breakage", MUTANTS)
def test_what_is_broken_is_found(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, breakage: object
) -> None:
    assert callable(breakage)
    breakage(monkeypatch)
    found = explore(paths, MUTANTS[breakage])
    print(f"{found.why}, after {found.states} states: {', '.join(found.trace)}")
    assert found.why


BROKEN = {
    "stale grant": Scenario(
        frames=(1,), candidates=("wrong",), budget=Budget(kill=1), stale_grant=True
    ),
    "judged before the boot is accounted for": Scenario(
        frames=(1,), candidates=(CRASH,), budget=Budget(power=1), unaccounted=True
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_processes_do_wrong_is_found(paths: Paths, name: str) -> None:
    found = explore(paths, BROKEN[name])
    print(f"{found.why}, after {found.states} states: {', '.join(found.trace)}")
    assert found.why
