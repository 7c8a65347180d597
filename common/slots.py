"""Who should be live, on which model: the durable record and its transitions, all pure.

A slot is an unpacked bundle, named by its sha256; two more need no folder of their own: `FACTORY`,
the bundle that vigil.toml names, and `PASS`, no model at all (frames flow, none is judged).
Each transition takes a record and returns the next one, or raises `TransitionError` where it may
not start; `common.store` makes each one commit. The protocol was explored by a model checker:
change a transition only together with it.
"""

from collections.abc import Collection

import msgspec

from common.errors import TransitionError
from common.states import Phase, SlotState

FACTORY, PASS = "factory", "pass-through"
LANES = ("a", "b")
TRIES = 3
BOOT_CAP = 2  # boots in a row that ended uncleanly while a slot was tried
SAFE_MARGIN = 1000  # how far the counter jumps where its last value may be lost


class Lane(msgspec.Struct, frozen=True):
    slot: str = FACTORY
    run: int = 0  # its current process
    trying: bool = False  # a try of an unproven slot is outstanding


class Txn(msgspec.Struct, frozen=True):
    """The change of model under way."""

    phase: Phase = Phase.NONE
    lane: str = ""
    slot: str = ""


class Slot(msgspec.Struct, frozen=True):
    state: SlotState
    tries: int = 0  # remaining
    unclean_boots: int = 0
    reason: str = ""  # why it is bad; stays listed after clean-up
    name: str = ""  # of the manifest, for people
    version: str = ""
    release: int = 0


class Record(msgspec.Struct, frozen=True):
    counter: int = 0  # source of run and epoch numbers, only grows
    live: str = "a"
    epoch: int = 0
    lanes: dict[str, Lane] = {}
    known_good: str = FACTORY
    previous: str = FACTORY
    txn: Txn = Txn()
    slots: dict[str, Slot] = {}
    boot: str = ""  # boot id of the last boot accounted for

    @property
    def other(self) -> str | None:
        """The lane that is not live, where there are two."""
        return next((lane for lane in self.lanes if lane != self.live), None)

    def state(self, slot: str) -> SlotState | None:
        """None where the record does not know it."""
        if slot in (FACTORY, PASS):
            return SlotState.GOOD
        known = self.slots.get(slot)
        return known.state if known else None

    def proven(self, slot: str) -> bool:
        return self.state(slot) is SlotState.GOOD

    def usable(self, slot: str) -> bool:
        """Whether a lane may load it: proven, or being tested with tries left."""
        trying = self.state(slot) is SlotState.TESTING and self.slots[slot].tries > 0
        return self.proven(slot) or trying

    @property
    def references(self) -> set[str]:
        """The slots whose folders must stay. One that is not tested yet stays as well."""
        used = {self.known_good, self.previous, self.txn.slot}
        used |= {lane.slot for lane in self.lanes.values()}
        waiting = {n for n, slot in self.slots.items() if slot.state is SlotState.INSTALLED}
        return (used | waiting) - {FACTORY, PASS, ""}

    def chain(self, broken: Collection[str] = (), after: str | None = None) -> str:
        """The first proven slot that is not broken: known good, previous, factory, pass-through."""
        order = list(dict.fromkeys((self.known_good, self.previous, FACTORY, PASS)))
        if after in order:
            order = order[order.index(after) + 1 :]
        return next((s for s in order if self.proven(s) and s not in broken), PASS)

    def choose(self, lane: str, broken: Collection[str] = ()) -> str:
        """What a lane that starts loads; `broken`: slots whose files do not verify."""
        slot = self.lanes[lane].slot
        return slot if self.usable(slot) and slot not in broken else self.chain(broken)


def fitted(record: Record, lanes: int) -> Record:
    """The record for so many lanes; a change that the missing one was part of is over."""
    names = LANES[:lanes]
    if tuple(record.lanes) == names:
        return record
    kept = {name: record.lanes.get(name, Lane(record.chain())) for name in names}
    record = msgspec.structs.replace(record, lanes=kept)
    if record.txn.lane and record.txn.lane not in kept:
        if not record.proven(record.txn.slot):  # not its fault: it may be tested again
            record = _slot(record, record.txn.slot, state=SlotState.INSTALLED)
        record = msgspec.structs.replace(record, txn=Txn())
    return record if record.live in kept else _live(record, names[0])


def account_boot(record: Record, boot: str) -> Record:
    """Before any other judgement of a boot: give back outstanding tries; count unclean boots."""
    if record.boot == boot:
        return record
    record = msgspec.structs.replace(record, boot=boot)
    for name, lane in record.lanes.items():
        if not lane.trying:
            continue
        record = _lane(_given_back(record, lane.slot), name, trying=False)
        slot = record.slots[lane.slot]
        if slot.state is SlotState.TESTING:
            boots = slot.unclean_boots + 1
            record = _slot(record, lane.slot, unclean_boots=boots)
            if boots >= BOOT_CAP:
                record = _ended(
                    record, f"{boots} boots in a row ended uncleanly while it was tried"
                )
    return record


# -- lanes ---------------------------------------------------------------------------------------


def start(record: Record, lane: str, broken: Collection[str] = ()) -> Record:
    """A lane's process, before it loads anything: the slot, a try where it is unproven, a run."""
    slot = record.choose(lane, broken)
    trying = not record.proven(slot)
    if trying:
        record = _slot(record, slot, tries=record.slots[slot].tries - 1)
    run = record.counter + 1
    record = _lane(record, lane, slot=slot, run=run, trying=trying)
    epoch = run if record.live == lane else record.epoch
    return msgspec.structs.replace(record, counter=run, epoch=epoch)


def stop(record: Record, lane: str, run: int) -> Record:
    """A lane's process stops in good order: that costs no try."""
    now = record.lanes.get(lane)
    if now is None or now.run != run or not now.trying:
        return record
    return _lane(_given_back(record, now.slot), lane, trying=False)


# -- updater -------------------------------------------------------------------------------------


def install(record: Record, name: str, slot: Slot) -> Record:
    """A verified bundle is unpacked: its folder is referenced from now on."""
    known = record.slots.get(name)
    if known is not None and known.state is SlotState.BAD:
        raise TransitionError(f"slot {name[:12]} is bad ({known.reason}) and never runs again")
    if known is not None:
        return record
    return _slots(record, {**record.slots, name: slot})


def activate(record: Record, name: str) -> Record:
    """Test an installed slot in the idle lane; where there is one lane, it starts in soak."""
    _require(record.txn.phase is Phase.NONE, f"slot {record.txn.slot[:12]} is under test")
    state = record.state(name)
    _require(
        state is SlotState.INSTALLED and name in record.slots,
        f"slot {name[:12]} is {state or 'unknown'}, not installed",
    )
    lane = record.other or record.live
    record = _slot(record, name, state=SlotState.TESTING, tries=TRIES, unclean_boots=0)
    phase = Phase.PROVING if record.other else Phase.SOAK
    record = _lane(record, lane, slot=name, trying=False)
    return msgspec.structs.replace(record, txn=Txn(phase, lane, name))


def discard(record: Record, name: str) -> Record:
    """An installed slot that was never tested is not wanted any more."""
    state = record.state(name)
    _require(
        state is SlotState.INSTALLED and name in record.slots,
        f"slot {name[:12]} is {state or 'unknown'}, not installed",
    )
    return _slots(record, {key: slot for key, slot in record.slots.items() if key != name})


def request(record: Record) -> Record:
    """The candidate passed its gates."""
    _require(record.txn.phase is Phase.PROVING, f"nothing proves itself: {record.txn.phase}")
    _require(record.live != record.txn.lane, f"lane {record.txn.lane} is live already")
    txn = msgspec.structs.replace(record.txn, phase=Phase.REQUESTED)
    return msgspec.structs.replace(record, txn=txn)


# -- watchdog ------------------------------------------------------------------------------------


def hand_over(record: Record) -> Record:
    """The candidate becomes live; its soak begins."""
    txn = record.txn
    _require(txn.phase is Phase.REQUESTED, f"no hand-over is requested: {txn.phase}")
    _require(record.lanes[txn.lane].slot == txn.slot, f"lane {txn.lane} has another slot")
    record = _live(record, txn.lane)
    return msgspec.structs.replace(record, txn=msgspec.structs.replace(txn, phase=Phase.SOAK))


def abandon(record: Record, reason: str) -> Record:
    """Before the hand-over: tries exhausted, gates failed, or too late."""
    _require(
        record.txn.phase in (Phase.PROVING, Phase.REQUESTED),
        f"nothing to abandon: {record.txn.phase}",
    )
    return _ended(record, reason)


def take_over(record: Record, lane: str, reason: str) -> Record:
    """The live lane is dead or stalled, the other one ready with a proven model."""
    _require(lane in record.lanes and lane != record.live, f"lane {lane} can't take over")
    slot, lost = record.lanes[lane].slot, record.lanes[record.live].slot
    _require(record.proven(slot) and slot != PASS, f"slot {slot[:12]} is not proven")
    better = lost not in (FACTORY, PASS) and record.proven(lost)
    _require(
        slot != FACTORY or record.known_good == FACTORY or not better,
        f"lane {record.live} has a better slot than {slot}",
    )
    was, record = record.live, _live(record, lane)
    if record.txn.phase is Phase.SOAK and record.txn.lane == was:
        record = _ended(record, reason)
    return record


def mark_good(record: Record) -> Record:
    """Soak passed. The other lane follows, so that it is a standby with the same model."""
    txn = record.txn
    _require(txn.phase is Phase.SOAK, f"nothing soaks: {txn.phase}")
    _require(record.live == txn.lane, f"lane {txn.lane} is not live")
    _require(record.lanes[txn.lane].slot == txn.slot, f"lane {txn.lane} has another slot")
    left = record.known_good
    if record.proven(txn.slot):  # gone back to: what was left does not return
        if left not in (FACTORY, PASS):
            record = _slot(record, left, state=SlotState.BAD, reason="rolled back")
        previous = record.previous if record.previous != txn.slot else FACTORY
    else:
        record = _slot(record, txn.slot, state=SlotState.GOOD, tries=0, unclean_boots=0)
        previous = left
    for name in record.lanes:
        record = _lane(record, name, slot=txn.slot, trying=False)
    return msgspec.structs.replace(record, known_good=txn.slot, previous=previous, txn=Txn())


def fail_soak(record: Record, reason: str) -> Record:
    """Soak failed: back to known good, where there are two lanes in the other one."""
    _require(record.txn.phase is Phase.SOAK, f"nothing soaks: {record.txn.phase}")
    if record.live == record.txn.lane:
        record = _live(record, record.other or record.live)
    return _ended(record, reason)


def give_way(record: Record, lane: str) -> Record:
    """A proven slot keeps dying: the lane goes on to the next of the chain."""
    slot = record.lanes[lane].slot
    _require(record.proven(slot), f"slot {slot[:12]} is not proven")
    _require(slot != PASS, f"lane {lane} has nothing left to give way to")
    if record.txn.phase is not Phase.NONE and record.txn.lane == lane:
        record = _ended(record, "it keeps dying")
    return _lane(record, lane, slot=record.chain(after=slot), trying=False)


def restore(record: Record, lane: str) -> Record:
    """Much later: a lane that gave way tries the known-good slot again."""
    _require(record.txn.phase is Phase.NONE, f"slot {record.txn.slot[:12]} is under test")
    _require(lane != record.live or record.other is None, f"lane {lane} is live")
    return _lane(record, lane, slot=record.known_good, trying=False)


def roll_back(record: Record, reason: str) -> Record:
    """By hand: end the change under way, else go back to the previous slot, else to the factory's.
    Going back is a hand-over too: the target starts in the idle lane, proven as it is."""
    if record.txn.phase in (Phase.PROVING, Phase.REQUESTED):
        return abandon(record, reason)
    if record.txn.phase is Phase.SOAK:
        return fail_soak(record, reason)
    left = record.known_good
    _require(left != FACTORY, "the factory model is live; there is nothing to go back to")
    target = record.chain(after=left)
    lane = record.other or record.live
    phase = Phase.REQUESTED if record.other else Phase.SOAK
    record = _lane(record, lane, slot=target, trying=False)
    return msgspec.structs.replace(record, txn=Txn(phase, lane, target))


def clean_up(record: Record) -> Record:
    """Forget slots that nothing refers to; only then may their folders go. Bad ones stay listed."""
    kept = {
        name: slot
        for name, slot in record.slots.items()
        if slot.state is SlotState.BAD or name in record.references
    }
    return record if len(kept) == len(record.slots) else _slots(record, kept)


# -- parts of transitions ------------------------------------------------------------------------


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise TransitionError(otherwise)


def _lane(record: Record, name: str, **changes: object) -> Record:
    lane = msgspec.structs.replace(record.lanes[name], **changes)
    return msgspec.structs.replace(record, lanes={**record.lanes, name: lane})


def _slot(record: Record, name: str, **changes: object) -> Record:
    slot = msgspec.structs.replace(record.slots[name], **changes)
    return _slots(record, {**record.slots, name: slot})


def _slots(record: Record, slots: dict[str, Slot]) -> Record:
    return msgspec.structs.replace(record, slots=slots)


def _live(record: Record, lane: str) -> Record:
    epoch = record.counter + 1
    return msgspec.structs.replace(record, counter=epoch, live=lane, epoch=epoch)


def _given_back(record: Record, slot: str) -> Record:
    if record.state(slot) is not SlotState.TESTING or slot not in record.slots:
        return record
    return _slot(record, slot, tries=record.slots[slot].tries + 1)


def _ended(record: Record, reason: str) -> Record:
    """The change of model is over, and not well: its slot is bad, unless it was proven before."""
    txn = record.txn
    if txn.slot and not record.proven(txn.slot):
        record = _slot(record, txn.slot, state=SlotState.BAD, tries=0, reason=reason)
    if txn.lane in record.lanes and record.lanes[txn.lane].slot == txn.slot:
        record = _lane(record, txn.lane, slot=record.known_good, trying=False)
    return msgspec.structs.replace(record, txn=Txn())
