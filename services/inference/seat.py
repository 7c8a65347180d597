"""A lane's place in the record of slots: what it loads, whether it is live, when it has to go."""

import tomllib
from collections.abc import Collection
from contextlib import suppress

from common import slots
from common.errors import LockedError, StorageError
from common.frames import Ring
from common.service import Service
from common.slots import Record
from common.states import Phase, Severity
from common.store import Change, Store


class Seat:
    def __init__(self, service: Service, group: str, lane: str) -> None:
        self._service = service
        self.lane = lane
        self.store = Store(service.paths, group, service.config.groups[group].lanes)
        self.record: Record = self.store.read()
        self.load_s = service.config.groups[group].load_s
        self._exclusive = ("", False)  # a slot, and whether it needs an accelerator for itself
        self.slot = ""
        self.run = 0

    def take(self, broken: Collection[str]) -> str:
        """Before anything is loaded: choose a slot whose files verify, take a try where it is
        unproven, draw a run number. Returns the slot.

        Raises:
            LockedError, StorageError: the record can't be had.
        """
        broken = set(broken)
        while True:
            self.record = self.store.read()
            slot = self.record.choose(self.lane, broken)
            if not self.store.verifies(slot):
                text = f"slot {slot[:12]}: its files are not what its name says; it is not used"
                self._service.event("slot.damaged", Severity.ERROR, text, slot=slot)
                broken.add(slot)
                continue
            proven = self.record.proven(slot)
            try:
                self.record = self.store.commit(self._start(slot, broken), volatile=proven)
            except StorageError as error:
                if proven:
                    raise
                # A try that can't be noted is not taken.
                self._service.event("state.unwritable", Severity.ERROR, str(error))
                broken.add(slot)
                continue
            mine = self.record.lanes[self.lane]
            if mine.slot == slot:
                self.slot, self.run = slot, mine.run
                self.announce_problems()
                return slot

    def _start(self, slot: str, broken: Collection[str]) -> Change:
        def change(record: Record) -> Record:
            started = slots.start(record, self.lane, broken)
            # What was verified and what is chosen now may differ: then look again.
            return started if started.lanes[self.lane].slot == slot else record

        return change

    def refresh(self) -> None:
        self.record = self.store.read()

    @property
    def unproven(self) -> bool:
        return not self.record.proven(self.slot)

    @property
    def mine(self) -> bool:
        """Whether the record still has this process and its slot here; else it has to go."""
        now = self.record.lanes.get(self.lane)
        return now is not None and (now.run, now.slot) == (self.run, self.slot)

    @property
    def live(self) -> bool:
        return self.mine and self.record.live == self.lane

    @property
    def candidate(self) -> bool:
        """Whether this lane's model is to prove itself beside the live one."""
        txn = self.record.txn
        proving = txn.phase in (Phase.PROVING, Phase.REQUESTED)
        return self.mine and proving and (txn.lane, txn.slot) == (self.lane, self.slot)

    @property
    def wanted_by_candidate(self) -> bool:
        """Whether another lane's candidate needs the accelerator that only one can have."""
        txn = self.record.txn
        if txn.phase is Phase.NONE or txn.lane == self.lane or txn.slot == self.slot:
            return False
        if self._exclusive[0] != txn.slot:
            path = self.store.path(txn.slot) / "manifest.toml"
            with suppress(OSError, tomllib.TOMLDecodeError):
                rows = tomllib.loads(path.read_text()).get("variants", [])
                self._exclusive = txn.slot, any(row.get("exclusive") for row in rows)
        return self._exclusive == (txn.slot, True)

    def raise_fence(self, ring: Ring) -> int:
        """Take the right to decide in a ring; returns its epoch, 0 where this lane may not, or
        not yet: then ask again soon."""
        try:
            with self.store.held(0.0) as record:
                self.record = record
                if self.live and ring.raise_fence(record.epoch, wait=False):
                    return record.epoch
        except LockedError:
            pass
        return 0

    def leave(self) -> None:
        """Stop in good order: an outstanding try is given back."""
        now = self.store.read().lanes.get(self.lane)
        if now is not None and now.trying and now.run == self.run:
            self.store.commit(lambda record: slots.stop(record, self.lane, self.run))

    def announce_problems(self) -> None:
        while self.store.problems:
            text = self.store.problems.pop(0)
            self._service.event("state.damaged", Severity.ERROR, text)
