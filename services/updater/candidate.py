"""One group's bundles that nobody signed, and its candidate: tested, judged by its gates, and asked
for. Everything known of it is in the record, the inbox and the beats of the lanes."""

import shutil
import time
from contextlib import suppress
from functools import partial

from common import durable, slots, verdict
from common.errors import LockedError, StorageError, TransitionError
from common.messages import Beat, LaneReport
from common.processes import lane_name
from common.service import Service
from common.slots import Record
from common.states import Phase, Severity, SlotState
from common.store import Store
from common.verdict import Proof, Verdict
from services.updater import gates
from services.updater.children import Child, Outcome
from services.updater.inbox import Inbox

FRESH_S = 3.0  # a beat older than this says nothing
INSTALL_S = 300.0  # for one bundle
RETRY_S = 30.0  # where the disk or the lock was not to be had


class Candidate:
    def __init__(self, service: Service, group: str) -> None:
        self._service, self.group = service, group
        self._settings = service.config.groups[group]
        self.store = Store(service.paths, group, self._settings.lanes)
        self._inbox = Inbox(self.store.folder / "inbox")
        self._gates = service.paths.run / f"gates-{group}"  # read by the watchdog
        self._failed = ""  # the candidate whose failure was told
        self._retry = 0.0  # when to look at the inbox again
        self._delayed = ""
        for left in self.store.staging.glob("*"):
            if left.suffix != ".gone":
                shutil.rmtree(left, ignore_errors=True)
        with suppress(StorageError, LockedError):  # else before the next bundle is unpacked
            self.store.clean_up()

    @property
    def free(self) -> bool:
        """Whether no slot is under test, and none waits for it."""
        record = self.store.read()
        waits = any(slot.state is SlotState.INSTALLED for slot in record.slots.values())
        return not waits and record.txn.phase is Phase.NONE

    def next_bundle(self) -> Child | None:
        """Begin with the oldest bundle of the inbox, if it is its turn."""
        tar = self._inbox.oldest() if time.monotonic() >= self._retry else None
        if tar is None:
            return None
        if not self._service.config.updates.unsigned:
            config = self._service.config.path
            self._settle(
                tar.name,
                Outcome.REFUSED,
                f"nobody signed it; {config}: set updates.unsigned = true to take it all the same",
            )
            return None
        if not self.free:
            return None
        return Child(
            "services.updater.install", self.group, str(tar),
            limit_s=INSTALL_S, settle=partial(self._settle, tar.name),
        )  # fmt: skip

    def _settle(self, name: str, outcome: Outcome, said: str) -> None:
        """What became of a bundle of the inbox."""
        tar, service = self._inbox.folder / name, self._service
        if outcome is Outcome.LATER:
            self.delay("bundle.delayed", f"{name}: not installed yet: {said}")
            return
        self._delayed = ""
        if outcome is not Outcome.DONE:
            text = f"{name}: refused: {said}"
            service.event("bundle.refused", Severity.ERROR, text, bundle=name, reason=said)
            self._inbox.settle(tar, "refused", said)
        else:
            text = f"{name}: installed as slot {said[:12]}"
            service.event("bundle.installed", Severity.INFO, text, bundle=name, slot=said)
            self._inbox.settle(tar, "installed", said)

    def delay(self, code: str, text: str) -> None:
        """Leave the inbox alone for a while; say why, once."""
        self._retry = time.monotonic() + RETRY_S
        if text != self._delayed:
            self._service.event(code, Severity.WARNING, text)
        self._delayed = text

    def look(self, record: Record, beats: dict[str, Beat], may_begin: bool) -> None:
        """Bring the change of model on by what the record and the lanes say.

        Args:
            may_begin: whether a test may, now.
        """
        if record.txn.phase is Phase.NONE:
            self._gates.unlink(missing_ok=True)
            self._failed = ""
            for name, slot in record.slots.items():
                if slot.state is not SlotState.INSTALLED:
                    continue
                if may_begin:
                    self.store.commit(partial(slots.activate, name=name))
                    what = f"{slot.name} {slot.version} (release {slot.release}, {name[:12]})"
                    self._service.event(
                        "model.testing", Severity.INFO, f"{what} is under test", slot=name
                    )
                return
        elif record.txn.phase is Phase.PROVING:
            beat = beats.get(lane_name(self.group, record.txn.lane))
            if beat and time.monotonic_ns() - beat.sent_ns < FRESH_S * 1e9 and beat.lane:
                self._prove(record, beat.lane)

    def _prove(self, record: Record, report: LaneReport) -> None:
        slot = record.txn.slot
        if slot == self._failed or not gates.proving(record, report):
            return
        try:
            limits = gates.limits(self.store.path(slot), self._settings)
        except (OSError, ValueError) as error:
            inputs = Proof(fact=f"its manifest can't be read: {error}")
            reason: str | None = inputs.fact
        else:
            inputs, reason = gates.judge(report, self._settings, limits)
        if reason is None:
            return
        given = Verdict(self.group, slot, reason, inputs, time.time())
        verdict.record(self.store.folder, given)
        if reason == "":

            def change(now: Record) -> Record:
                if not gates.proving(now, report):
                    raise TransitionError(f"slot {slot[:12]} is not the candidate any more")
                return slots.request(now)

            self.store.commit(change)
            text = f"slot {slot[:12]} has passed its gates after {report.judged} frames"
            self._service.event("model.requested", Severity.INFO, text, slot=slot)
        else:
            durable.write(self._gates, f"{slot}\n{reason}\n".encode())
            self._failed = slot
            text = f"slot {slot[:12]} has not passed its gates: {reason}"
            self._service.event(
                "model.gate_failed", Severity.WARNING, text, slot=slot, reason=reason
            )

    def told(self) -> None:
        """Announce what the store found wrong."""
        while self.store.problems:
            self._service.event("state.damaged", Severity.ERROR, self.store.problems.pop(0))
