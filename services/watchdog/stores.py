"""The records of all groups: read when they have changed, changed by one commit an order."""

import os
import time
from contextlib import suppress
from pathlib import Path

from common import slots, verdict
from common.errors import LockedError, StorageError, TransitionError
from common.processes import lanes
from common.service import Service
from common.slots import Record
from common.states import Phase, Severity
from common.store import Store
from common.verdict import Limits, Verdict
from services.watchdog import announce
from services.watchdog.facts import Transition
from services.watchdog.policy import transition

WAIT_S = 0.2  # for the lock; then the next look tries again
SAY_S = 60.0  # that the disk refuses, at most so often
CLEAN_S = 5.0  # after a verdict, when nobody waits
LATER_S = 60.0
LATELY_NS = 1_000_000_000
VERDICTS = ("abandon", "mark_good", "fail_soak", "take_over")
MEND = ("take_over", "give_way", "restore")  # between proven slots: may count in memory


class Stores:
    def __init__(self, service: Service) -> None:
        self._service = service
        config, paths = service.config, service.paths
        self._run = paths.run
        self._stores = {
            group: Store(paths, group, len(lanes(config, group)))
            for group in config.groups
            if config.cameras_of(group)
        }
        self.groups = list(self._stores)
        self._files = {
            name: (store.folder / "state.0", store.folder / "state.1", paths.run / f"state-{name}")
            for name, store in self._stores.items()
        }
        self._lanes = {group: len(lanes(config, group)) for group in self.groups}
        self._read: dict[str, tuple[list[tuple[int, int]], Record]] = {}
        self._held: dict[str, tuple[str, Limits, tuple[float, ...]]] = {}
        self._locked_ns: dict[str, tuple[int, int]] = {}  # a lock is not to be had: since, lately
        self._said_ns = 0
        now = time.monotonic_ns()
        self._clean_ns = dict.fromkeys(self._stores, now + round(CLEAN_S * 1e9))

    def record(self, group: str) -> Record:
        files = [_changed(path) for path in self._files[group]]
        known = self._read.get(group)
        if known is None or known[0] != files:
            known = files, slots.fitted(self._stores[group].read(), self._lanes[group])
            self._read[group] = known
        return known[1]

    def gate_failed(self, group: str) -> str:
        """Why the updater finds that the candidate does not pass its gates; "" if it does not."""
        slot = self.record(group).txn.slot
        if not slot:
            return ""
        try:
            named, _, reason = (self._run / f"gates-{group}").read_text().partition("\n")
        except FileNotFoundError:
            return ""
        return reason.strip() if named == slot else ""

    def expectations(self, group: str) -> tuple[Limits, tuple[float, ...]]:
        """What the slot under test is held to, and how its scores should lie."""
        slot = self.record(group).txn.slot
        if group not in self._held or self._held[group][0] != slot:
            self._held[group] = slot, Limits(), ()
            site = self._service.config.groups[group].gates
            with suppress(OSError, ValueError):  # none, the factory's, or gone: its lane says so
                path = self._stores[group].path(slot)
                self._held[group] = slot, *verdict.expectations(path, site)
        return self._held[group][1:]

    def commit(self, order: Transition) -> bool:
        """Carry out an order, and announce it; False where it did not come to pass."""
        store = self._stores[order.group]
        may_mend = order.kind in MEND and self.record(order.group).txn.phase is Phase.NONE
        seen: list[Record] = []

        def change(record: Record) -> Record:
            if may_mend and record.txn.phase is not Phase.NONE:
                raise TransitionError("a change of model has begun meanwhile")
            seen.append(record)
            return transition(record, order)

        try:
            after = store.commit(change, wait_s=WAIT_S, volatile=may_mend)
        except TransitionError:
            return False  # not applicable any more: what is right now is found at the next look
        except LockedError:
            now = time.monotonic_ns()
            since, lately = self._locked_ns.get(order.group, (now, now))
            self._locked_ns[order.group] = since if now - lately < LATELY_NS else now, now
            return False
        except StorageError as error:
            self._say(str(error))
            return False
        self._locked_ns.pop(order.group, None)
        for event in announce.events(order, seen[-1], after):
            self._service.event(event.code, event.severity, event.text, **event.data)
        if order.inputs:
            self._keep(order, seen[-1])
        if order.kind in VERDICTS:
            self._clean_ns[order.group] = time.monotonic_ns() + round(CLEAN_S * 1e9)
        return True

    def _keep(self, order: Transition, before: Record) -> None:
        """What a verdict rests on, for `vigil models --verdict`."""
        assert order.inputs
        slot = before.txn.slot
        given = Verdict(order.group, slot, order.reason, order.inputs, time.time())
        try:
            verdict.record(self._stores[order.group].folder, given)
        except StorageError as error:
            self._say(str(error))

    def stuck(self, group: str) -> int | None:
        """The pid that has held the record's lock for longer than a process may hang."""
        hang_ns = self._service.config.groups[group].hang_s * 1e9
        now = time.monotonic_ns()
        if now - self._locked_ns.get(group, (now, now))[0] < hang_ns:
            return None
        del self._locked_ns[group]
        return holder(self._stores[group].lock_path)

    def clean_up(self) -> None:
        """Drop the slots that nothing refers to, some time after a verdict."""
        now = time.monotonic_ns()
        for group, due in self._clean_ns.items():
            if now < due:
                continue
            self._clean_ns[group] = now + round(365 * 86400e9)
            try:
                self._stores[group].clean_up()
            except LockedError:
                self._clean_ns[group] = now + round(LATER_S * 1e9)
            except StorageError as error:
                self._say(str(error))

    def announce_problems(self) -> None:
        for store in self._stores.values():
            while store.problems:
                self._service.event("state.damaged", Severity.ERROR, store.problems.pop(0))

    def _say(self, problem: str) -> None:
        now = time.monotonic_ns()
        if now - self._said_ns > SAY_S * 1e9:
            self._said_ns = now
            self._service.event("state.not_written", Severity.CRITICAL, problem)


def _changed(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 - several times a second
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def holder(lock: Path) -> int | None:
    """Who holds a flock, from /proc/locks (proc(5))."""
    try:
        inode = str(lock.stat().st_ino)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
            return int(fields[4])
    return None
