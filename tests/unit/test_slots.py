"""Each transition of the record of slots: where it may start, and what PROTOCOL's table says."""

from collections.abc import Callable

import msgspec
import pytest

from common import slots
from common.errors import TransitionError
from common.slots import BOOT_CAP, FACTORY, PASS, TRIES, Lane, Record, Slot, Txn
from common.states import Phase, SlotState

OLD, GOOD, NEW = "0" * 64, "1" * 64, "2" * 64
INSTALLED = Slot(SlotState.INSTALLED, name="new", version="2")


def base(lanes: int = 2) -> Record:
    """Both lanes run the known-good slot; one more is installed."""
    return Record(
        counter=10,
        live="a",
        epoch=10,
        lanes={name: Lane(GOOD, 8 + i) for i, name in enumerate(slots.LANES[:lanes])},
        known_good=GOOD,
        previous=OLD,
        slots={OLD: Slot(SlotState.GOOD), GOOD: Slot(SlotState.GOOD), NEW: INSTALLED},
        boot="boot 1",
    )


def proving(lanes: int = 2) -> Record:
    return slots.activate(base(lanes), NEW)


def loaded(lanes: int = 2) -> Record:
    """The candidate's process runs."""
    return slots.start(proving(lanes), "b" if lanes == 2 else "a")


def requested() -> Record:
    return slots.request(loaded())


def soaking(lanes: int = 2) -> Record:
    return slots.hand_over(requested()) if lanes == 2 else loaded(1)


def proven() -> Record:
    return slots.mark_good(soaking())


def going_back() -> Record:
    return slots.roll_back(base(), "by hand")


def bad(lanes: int = 2) -> Record:
    return slots.fail_soak(soaking(lanes), "it is wrong")


STATES: dict[str, Callable[[], Record]] = {
    "base": base,
    "proving": proving,
    "loaded": loaded,
    "requested": requested,
    "soaking": soaking,
    "proven": proven,
    "going back": going_back,
    "bad": bad,
    "one lane": lambda: base(1),
    "one lane soaking": lambda: soaking(1),
    "one lane bad": lambda: bad(1),
}

# transition -> the states it may start from; each other one is refused
ALLOWED: dict[str, tuple[Callable[[Record], Record], str]] = {
    "activate": (
        lambda r: slots.activate(r, NEW),
        "base, one lane",
    ),
    "discard": (lambda r: slots.discard(r, NEW), "base, going back, one lane"),
    "request": (slots.request, "proving, loaded"),
    "hand_over": (slots.hand_over, "requested, going back"),
    "abandon": (lambda r: slots.abandon(r, "too late"), "proving, loaded, requested, going back"),
    "mark_good": (slots.mark_good, "soaking, one lane soaking"),
    "fail_soak": (lambda r: slots.fail_soak(r, "wrong"), "soaking, one lane soaking"),
    "take_over": (
        lambda r: slots.take_over(r, r.other or "b", "it died"),
        "base, soaking, proven, going back, bad",
    ),
    "give_way": (
        lambda r: slots.give_way(r, r.live),
        "base, proving, loaded, requested, proven, going back, bad, one lane, one lane bad",
    ),
    "restore": (
        lambda r: slots.restore(r, r.other or r.live),
        "base, proven, bad, one lane, one lane bad",
    ),
    "install": (lambda r: slots.install(r, NEW, INSTALLED), "all but: bad, one lane bad"),
    "roll_back": (lambda r: slots.roll_back(r, "by hand"), "all but: "),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ALLOWED)
def test_where_a_transition_may_start(name: str, state: str) -> None:
    change, allowed = ALLOWED[name]
    record = STATES[state]()
    before = msgspec.json.encode(record)
    named = allowed.removeprefix("all but: ")
    may = (state in named.split(", ")) == (named == allowed)
    if may:
        check(change(record))
    else:
        with pytest.raises(TransitionError):
            change(record)
    assert msgspec.json.encode(record) == before


def check(record: Record) -> None:
    """What holds of every record."""
    used = [record.known_good, record.previous, *(lane.slot for lane in record.lanes.values())]
    assert not [slot for slot in used if record.state(slot) in (SlotState.BAD, None)]
    assert record.live in record.lanes
    assert record.proven(record.known_good)
    assert record.epoch <= record.counter
    assert all(lane.run <= record.counter for lane in record.lanes.values())
    for slot in record.slots.values():
        assert (slot.state is SlotState.BAD) == bool(slot.reason)
        assert slot.tries <= TRIES
        assert not slot.tries or slot.state is SlotState.TESTING
    trying = [lane.slot for lane in record.lanes.values() if lane.trying]
    assert trying in ([], [record.txn.slot])


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_sound(state: str) -> None:
    check(STATES[state]())


# -- the table, row by row -----------------------------------------------------------------------


def test_first_commit_of_a_boot_gives_tries_back() -> None:
    record = loaded()
    assert record.slots[NEW].tries == TRIES - 1
    assert record.lanes["b"].trying
    after = slots.account_boot(record, "boot 2")
    assert (after.slots[NEW].tries, after.slots[NEW].unclean_boots) == (TRIES, 1)
    assert not after.lanes["b"].trying
    assert (after.boot, after.txn) == ("boot 2", record.txn)
    assert slots.account_boot(after, "boot 2") == after


def test_unclean_boots_are_capped() -> None:
    record = proving()
    for boot in range(BOOT_CAP):
        assert record.state(NEW) is SlotState.TESTING
        record = slots.account_boot(slots.start(record, "b"), f"boot {2 + boot}")
    assert record.slots[NEW].state is SlotState.BAD
    assert record.slots[NEW].reason == "2 boots in a row ended uncleanly while it was tried"
    assert (record.lanes["b"].slot, record.txn) == (GOOD, Txn())
    check(record)


def test_a_boot_in_which_nothing_was_tried_costs_nothing() -> None:
    for make in STATES.values():
        record = make()
        if not any(lane.trying for lane in record.lanes.values()):
            expected = msgspec.structs.replace(record, boot="boot 2")
            assert slots.account_boot(record, "boot 2") == expected


def test_an_unclean_boot_in_soak_goes_back_with_one_lane() -> None:
    record = soaking(1)
    record = slots.start(slots.account_boot(record, "boot 2"), "a")
    assert record.lanes["a"].slot == NEW
    record = slots.account_boot(record, "boot 3")
    assert (record.state(NEW), record.lanes["a"].slot) == (SlotState.BAD, GOOD)
    check(record)


def test_start_draws_a_run_and_an_epoch_if_live() -> None:
    record = slots.start(base(), "a")
    assert (record.counter, record.lanes["a"].run, record.epoch) == (11, 11, 11)
    record = slots.start(base(), "b")
    assert (record.counter, record.lanes["b"].run, record.epoch) == (11, 11, 10)
    assert not record.lanes["b"].trying


def test_start_takes_a_try_before_an_unproven_slot_loads() -> None:
    record = proving()
    for left in (2, 1, 0):
        record = slots.start(record, "b")
        assert (record.lanes["b"].slot, record.slots[NEW].tries) == (NEW, left)
        assert record.lanes["b"].trying
    record = slots.start(record, "b")
    assert (record.lanes["b"].slot, record.lanes["b"].trying) == (GOOD, False)
    assert record.txn.phase is Phase.PROVING  # the verdict is the watchdog's
    record = slots.abandon(record, "its tries are used up")
    assert record.slots[NEW].reason == "its tries are used up"
    check(record)


@pytest.mark.parametrize(
    ("broken", "slot"),
    [
        ((), NEW),
        ((NEW,), GOOD),
        ((NEW, GOOD), OLD),
        ((NEW, GOOD, OLD), FACTORY),
        ((NEW, GOOD, OLD, FACTORY), PASS),
        ((GOOD,), NEW),
    ],
)
def test_start_goes_down_the_chain_of_what_verifies(broken: tuple[str, ...], slot: str) -> None:
    record = slots.start(proving(), "b", broken)
    assert record.lanes["b"].slot == slot
    assert record.lanes["b"].trying == (slot == NEW)
    assert slots.start(proving(), "b", broken).slots[NEW].tries == TRIES - (slot == NEW)


def test_the_chain_passes_over_what_is_not_proven() -> None:
    record = base()
    odd = msgspec.structs.replace(record, slots={**record.slots, OLD: Slot(SlotState.BAD)})
    assert odd.chain(after=GOOD) == FACTORY
    assert record.chain(after=GOOD) == OLD
    assert record.chain(after=OLD) == FACTORY
    assert record.chain(after=FACTORY) == PASS
    assert record.chain(after=PASS) == PASS
    assert record.chain(after="unknown") == GOOD
    assert Record(lanes={"a": Lane()}).chain(after=FACTORY) == PASS


def test_a_planned_stop_costs_no_try() -> None:
    record = proving()
    for _ in range(10):
        record = slots.start(record, "b")
        record = slots.stop(record, "b", record.lanes["b"].run)
        assert (record.slots[NEW].tries, record.lanes["b"].trying) == (TRIES, False)
        check(record)


def test_a_stop_that_comes_late_or_twice_gives_nothing_back() -> None:
    record = slots.start(loaded(), "b")
    assert slots.stop(record, "b", record.lanes["b"].run - 1) == record
    assert slots.stop(record, "c", record.lanes["b"].run) == record
    stopped = slots.stop(record, "b", record.lanes["b"].run)
    assert slots.stop(stopped, "b", record.lanes["b"].run) == stopped
    ended = slots.abandon(record, "too late")
    assert slots.stop(ended, "b", record.lanes["b"].run) == ended


def test_activate() -> None:
    record = proving()
    assert record.slots[NEW].state is SlotState.TESTING
    assert record.slots[NEW].tries == TRIES
    assert record.txn == Txn(Phase.PROVING, "b", NEW)
    assert record.lanes["b"] == Lane(NEW, 9)
    assert (record.live, record.epoch, record.lanes["a"]) == ("a", 10, Lane(GOOD, 8))
    with pytest.raises(TransitionError, match="unknown, not installed"):
        slots.activate(base(), "3" * 64)
    for name, state in ((OLD, "good"), (FACTORY, "good"), (PASS, "good")):
        with pytest.raises(TransitionError, match=f"{state}, not installed"):
            slots.activate(base(), name)


def test_activate_takes_the_lane_that_is_not_live() -> None:
    record = slots.activate(slots.take_over(base(), "b", "it died"), NEW)
    assert record.txn.lane == "a"


def test_with_one_lane_the_candidate_starts_in_soak() -> None:
    record = proving(1)
    assert record.txn == Txn(Phase.SOAK, "a", NEW)
    started = slots.start(record, "a")
    assert started.epoch == started.lanes["a"].run == 11
    good = slots.mark_good(started)
    assert (good.known_good, good.previous, good.txn) == (NEW, GOOD, Txn())
    gone = slots.fail_soak(started, "wrong")
    assert (gone.live, gone.epoch, gone.lanes["a"].slot) == ("a", 12, GOOD)
    for record in (started, good, gone):
        check(record)


def test_discard_forgets_what_was_never_tested() -> None:
    after = slots.discard(base(), NEW)
    assert NEW not in after.slots
    assert NEW not in after.references
    assert slots.install(after, NEW, INSTALLED) == base()


def test_hand_over() -> None:
    before, record = requested(), slots.hand_over(requested())
    assert (record.live, record.epoch, record.counter) == ("b", 12, 12)
    assert record.epoch > max(before.epoch, *(lane.run for lane in before.lanes.values()))
    assert record.txn == Txn(Phase.SOAK, "b", NEW)


def test_no_hand_over_to_a_lane_that_fell_back_to_another_slot() -> None:
    record = requested()
    for _ in range(TRIES):
        record = slots.start(record, "b")
    assert record.lanes["b"].slot == GOOD
    with pytest.raises(TransitionError, match="lane b has another slot"):
        slots.hand_over(record)
    assert slots.abandon(record, "tries").state(NEW) is SlotState.BAD


@pytest.mark.parametrize("state", ["proving", "loaded", "requested"])
def test_abandon(state: str) -> None:
    before, record = STATES[state](), slots.abandon(STATES[state](), "too slow")
    assert record.slots[NEW].state is SlotState.BAD
    assert record.slots[NEW].reason == "too slow"
    assert record.lanes["b"].slot == GOOD
    assert not record.lanes["b"].trying
    assert (record.live, record.epoch, record.txn) == ("a", before.epoch, Txn())


def test_take_over() -> None:
    record = slots.take_over(base(), "b", "it died")
    assert (record.live, record.epoch, record.txn) == ("b", 11, Txn())
    assert record.slots == base().slots


def test_a_takeover_never_promotes_an_unproven_model() -> None:
    for record in (proving(), loaded(), requested()):
        with pytest.raises(TransitionError, match="not proven"):
            slots.take_over(record, "b", "it died")
    for lane in ("a", "c"):
        with pytest.raises(TransitionError, match="can't take over"):
            slots.take_over(base(), lane, "it died")


def test_a_takeover_in_soak_is_a_verdict() -> None:
    record = slots.take_over(soaking(), "a", "it died")
    assert (record.live, record.epoch) == ("a", 13)
    assert record.slots[NEW].reason == "it died"
    assert (record.lanes["b"].slot, record.txn) == (GOOD, Txn())


@pytest.mark.parametrize(
    ("mine", "lost", "known_good", "may"),
    [
        (FACTORY, GOOD, GOOD, False),
        (FACTORY, PASS, GOOD, True),
        (FACTORY, FACTORY, GOOD, True),
        (FACTORY, FACTORY, FACTORY, True),
        (FACTORY, NEW, GOOD, True),  # not proven
        (PASS, FACTORY, FACTORY, False),
        (PASS, PASS, GOOD, False),
        (GOOD, FACTORY, GOOD, True),
        (OLD, GOOD, GOOD, True),
    ],
)
def test_what_may_take_over_from_what(mine: str, lost: str, known_good: str, may: bool) -> None:
    record = msgspec.structs.replace(
        base(), lanes={"a": Lane(lost, 8), "b": Lane(mine, 9)}, known_good=known_good
    )
    if may:
        assert slots.take_over(record, "b", "it died").live == "b"
    else:
        with pytest.raises(TransitionError):
            slots.take_over(record, "b", "it died")


def test_mark_good_gives_both_lanes_the_proven_slot() -> None:
    record = proven()
    assert record.slots[NEW] == msgspec.structs.replace(INSTALLED, state=SlotState.GOOD)
    assert (record.known_good, record.previous, record.txn) == (NEW, GOOD, Txn())
    assert {lane.slot for lane in record.lanes.values()} == {NEW}
    assert (record.live, record.epoch) == ("b", 12)


def test_fail_soak_goes_back_to_the_other_lane() -> None:
    record = bad()
    assert (record.live, record.epoch, record.txn) == ("a", 13, Txn())
    assert record.slots[NEW].reason == "it is wrong"
    assert record.lanes["b"].slot == GOOD


def test_give_way_goes_down_the_chain() -> None:
    record, seen = base(), []
    while record.lanes["a"].slot != PASS:
        record = slots.give_way(record, "a")
        seen.append(record.lanes["a"].slot)
        check(record)
    assert seen == [OLD, FACTORY, PASS]
    assert record.lanes["b"].slot == GOOD
    with pytest.raises(TransitionError, match="nothing left"):
        slots.give_way(record, "a")
    assert slots.restore(slots.take_over(record, "b", "better"), "a").lanes["a"].slot == GOOD


def test_the_live_lane_gives_way_while_a_candidate_proves_itself() -> None:
    record = slots.give_way(requested(), "a")
    assert record.lanes["a"].slot == OLD
    assert record.txn == Txn(Phase.REQUESTED, "b", NEW)
    record = slots.mark_good(slots.hand_over(record))
    assert {lane.slot for lane in record.lanes.values()} == {NEW}
    check(record)
    record = slots.fail_soak(slots.hand_over(slots.give_way(requested(), "a")), "wrong")
    assert (record.live, record.lanes["a"].slot, record.lanes["b"].slot) == ("a", OLD, GOOD)
    check(record)


def test_an_unproven_slot_does_not_give_way_by_counting_deaths() -> None:
    with pytest.raises(TransitionError, match="not proven"):
        slots.give_way(loaded(), "b")


def test_restore_leaves_the_live_lane_and_a_change_under_way_alone() -> None:
    with pytest.raises(TransitionError, match="lane a is live"):
        slots.restore(base(), "a")
    with pytest.raises(TransitionError, match="under test"):
        slots.restore(proving(), "b")


# -- going back by hand --------------------------------------------------------------------------


def test_roll_back_is_a_hand_over_and_what_was_left_does_not_return() -> None:
    record = going_back()
    assert record.txn == Txn(Phase.REQUESTED, "b", OLD)
    assert (record.live, record.state(OLD)) == ("a", SlotState.GOOD)
    record = slots.start(record, "b")
    assert not record.lanes["b"].trying
    record = slots.mark_good(slots.hand_over(record))
    assert (record.known_good, record.previous) == (OLD, FACTORY)
    assert {lane.slot for lane in record.lanes.values()} == {OLD}
    assert (record.state(GOOD), record.slots[GOOD].reason) == (SlotState.BAD, "rolled back")
    check(record)
    record = slots.mark_good(slots.hand_over(slots.roll_back(record, "again")))
    assert (record.known_good, record.previous) == (FACTORY, FACTORY)
    check(record)
    with pytest.raises(TransitionError, match="nothing to go back to"):
        slots.roll_back(record, "once more")


def test_a_roll_back_that_does_not_work_leaves_everything_as_it_was() -> None:
    for record in (
        slots.abandon(going_back(), "too late"),
        slots.fail_soak(slots.hand_over(going_back()), "dark"),
        slots.take_over(slots.hand_over(going_back()), "a", "it died"),
    ):
        assert (record.known_good, record.previous, record.live) == (GOOD, OLD, "a")
        assert record.state(OLD) is record.state(GOOD) is SlotState.GOOD
        assert record.lanes["b"].slot == GOOD
        check(record)


def test_roll_back_ends_the_change_under_way_first() -> None:
    for state in ("proving", "loaded", "requested", "soaking"):
        record = slots.roll_back(STATES[state](), "by hand")
        assert (record.slots[NEW].reason, record.live) == ("by hand", "a")
        check(record)


def test_roll_back_with_one_lane() -> None:
    record = slots.start(slots.roll_back(base(1), "by hand"), "a")
    assert (record.txn, record.lanes["a"].slot) == (Txn(Phase.SOAK, "a", OLD), OLD)
    record = slots.mark_good(record)
    assert (record.known_good, record.state(GOOD)) == (OLD, SlotState.BAD)
    check(record)


# -- installing, forgetting, fitting -------------------------------------------------------------


def test_a_bad_slot_never_comes_back() -> None:
    record = slots.clean_up(bad())
    assert record.slots[NEW].reason == "it is wrong"
    with pytest.raises(TransitionError, match=r"is bad \(it is wrong\) and never runs again"):
        slots.install(record, NEW, INSTALLED)
    with pytest.raises(TransitionError, match="bad, not installed"):
        slots.activate(record, NEW)
    forced = msgspec.structs.replace(record, lanes={"a": Lane(NEW, 8), "b": Lane(NEW, 9)})
    assert slots.start(forced, "a").lanes["a"].slot == GOOD


def test_install_is_the_same_twice() -> None:
    record = slots.install(base(), "3" * 64, INSTALLED)
    assert record.references == {OLD, GOOD, NEW, "3" * 64}
    assert slots.install(record, "3" * 64, Slot(SlotState.INSTALLED)) == record


@pytest.mark.parametrize("state", STATES)
def test_what_is_in_use_stays_referenced(state: str) -> None:
    record = STATES[state]()
    cleaned = slots.clean_up(record)
    assert cleaned.references == record.references
    assert slots.clean_up(cleaned) is cleaned
    assert record.references >= {record.known_good, record.previous} - {FACTORY}
    assert record.references >= {lane.slot for lane in record.lanes.values()}
    check(cleaned)
    assert {n for n, slot in cleaned.slots.items() if slot.state is not SlotState.BAD} == (
        record.references - {n for n, slot in record.slots.items() if slot.state is SlotState.BAD}
    )


def test_clean_up_forgets_what_is_not_referenced() -> None:
    record = proven()
    assert record.references == {NEW, GOOD}
    assert set(slots.clean_up(record).slots) == {NEW, GOOD}
    assert bad().references == {OLD, GOOD}
    assert set(slots.clean_up(bad()).slots) == {OLD, GOOD, NEW}


def test_the_record_fits_the_lanes_that_are_configured() -> None:
    fresh = slots.fitted(Record(), 2)
    assert fresh.lanes == {"a": Lane(), "b": Lane()}
    assert slots.fitted(fresh, 2) is fresh
    for make in (proving, loaded, requested, soaking):
        one = slots.fitted(make(), 1)
        assert (one.live, set(one.lanes), one.txn) == ("a", {"a"}, Txn())
        assert one.state(NEW) is SlotState.INSTALLED  # not its fault
        check(msgspec.structs.replace(one, slots=slots.activate(one, NEW).slots))
    assert slots.fitted(soaking(), 1).epoch > soaking().epoch
    back = slots.fitted(going_back(), 1)
    assert (back.txn, back.state(OLD)) == (Txn(), SlotState.GOOD)
    assert slots.fitted(soaking(1), 2).lanes["b"].slot == GOOD
    assert slots.fitted(base(1), 2).lanes["b"] == Lane(GOOD)


def test_the_next_update_after_each_end() -> None:
    third = "3" * 64
    for record in (proven(), bad(), slots.abandon(loaded(), "slow")):
        record = slots.install(slots.clean_up(record), third, INSTALLED)
        record = slots.activate(record, third)
        record = slots.start(record, record.txn.lane)
        record = slots.mark_good(slots.hand_over(slots.request(record)))
        assert record.known_good == third
        check(slots.clean_up(record))
