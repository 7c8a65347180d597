"""A device's updater in the test's own process, one turn at a time: its ways, its children's work,
a real record, a real repository and web server. Lanes and watchdog are the test's to play."""

from pathlib import Path

from common import config, slots
from common.slots import Record
from common.states import Phase
from common.store import Store
from scripts.bench.fleet_bench import Here, Teller
from services.updater.candidate import Candidate
from services.updater.children import Child
from services.updater.signed import Signed
from tests.updates.device import Device

TURNS = 20


class Desk(Device):
    def __init__(self, root: Path, anchor: bytes, url: str, updates: str = "") -> None:
        super().__init__(root, anchor, url, updates)
        self.begin()

    def begin(self) -> None:
        """As a new process of the updater does."""
        self.service = Teller(self.paths, config.load(self.config))
        groups = self.service.config.groups
        self.candidates = {group: Candidate(self.service, group) for group in groups}
        work = type("Work", (Here,), {"service": self.service})
        self.signed = Signed(self.service, self.candidates, work)
        self.signed._next_s = float("inf")

    def work(self) -> None:
        """A check that is due, and what follows from it until there is nothing left to do."""
        self.signed._next_s = 0.0
        for _ in range(TURNS):
            if not self.turn():
                return
        raise AssertionError(f"does not come to rest: {self.signed.ways}")

    def turn(self) -> Child | None:
        """One turn of the updater's loop; the child that it had at work, if there was one."""
        child = self.signed.next_child()
        if child and (settle := child.ended()):
            settle()
        for name, candidate in self.candidates.items():
            record = candidate.store.read()
            way = self.signed.ways[name]
            way.observe(record)
            candidate.look(record, {}, way.may_activate)
        self.signed.report()
        return child

    def judge(self, to: Phase | None = None, store: Store | None = None) -> Record:
        """Play lanes and watchdog: a candidate passes all tests, up to a phase of its own."""
        store = store or self.store
        changes = {
            Phase.PROVING: lambda now: slots.request(slots.start(now, now.txn.lane)),
            Phase.REQUESTED: slots.hand_over,
            Phase.SOAK: slots.mark_good,
        }
        while (record := store.read()).txn.phase not in (Phase.NONE, to):
            store.commit(changes[record.txn.phase])
        return record

    def told(self, code: str) -> list[dict[str, str]]:
        return [data for one, data in self.service.events if one == code]
