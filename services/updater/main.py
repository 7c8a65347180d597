"""Updater: takes offered bundles in, and asks for the hand-over once a candidate has proven itself.

It only proposes: the watchdog alone calls a model good or bad. Everything it knows is in the
record, the inbox and the beats of the lanes, so that it may be restarted at any instant.
"""

import shutil
import time
from contextlib import suppress
from functools import partial

import msgspec
import zmq

from common import bus, durable, slots
from common.bus import Subscriber
from common.errors import LockedError, StorageError, TransitionError
from common.messages import Beat, LaneReport
from common.processes import lane_name, lanes
from common.service import Service, main
from common.slots import Record
from common.states import Phase, ProcessState, Severity, SlotState
from common.store import Store
from services.updater import gates
from services.updater.inbox import RETRY_S, Child, Inbox, Outcome

TICK_S = 0.5
FRESH_S = 3.0  # a beat older than this says nothing


class Updater:
    """One group's bundles and candidate."""

    def __init__(self, service: Service, group: str) -> None:
        self._service, self._group = service, group
        self._settings = service.config.groups[group]
        self._store = Store(service.paths, group, self._settings.lanes)
        self._inbox = Inbox(self._store.folder / "inbox")
        self._gates = service.paths.run / f"gates-{group}"  # read by the watchdog
        self._failed = ""  # the candidate whose failure was told
        self._retry = 0.0  # when to look at the inbox again
        self._delayed = ""
        for left in self._store.staging.glob("*"):
            if left.suffix != ".gone":
                shutil.rmtree(left, ignore_errors=True)
        with suppress(StorageError, LockedError):  # else before the next bundle is unpacked
            self._store.clean_up()

    def next_bundle(self) -> Child | None:
        """Begin with the oldest bundle of the inbox, unless a slot is under test or waits."""
        tar = self._inbox.oldest() if time.monotonic() >= self._retry else None
        if tar is None:
            return None
        if not self._service.config.updates.unsigned:
            config = self._service.config.path
            said = (
                f"nobody signed it; {config}: set updates.unsigned = true to take it all the same"
            )
            self.settle(tar.name, Outcome.REFUSED, said)
            return None
        record = self._store.read()
        waits = any(slot.state is SlotState.INSTALLED for slot in record.slots.values())
        if waits or record.txn.phase is not Phase.NONE:
            return None
        return Child(self._group, tar)

    def settle(self, name: str, outcome: Outcome, said: str) -> None:
        """What became of a bundle of the inbox."""
        tar, service = self._inbox.folder / name, self._service
        if outcome is Outcome.LATER:
            self.delay("bundle.delayed", f"{name}: not installed yet: {said}")
            return
        self._delayed = ""
        if outcome is Outcome.REFUSED:
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

    def look(self, beats: dict[str, Beat]) -> None:
        """Bring the change of model on by what the record and the lanes say."""
        record = self._store.read()
        if record.txn.phase is Phase.NONE:
            self._gates.unlink(missing_ok=True)
            self._failed = ""
            for name, slot in record.slots.items():
                if slot.state is SlotState.INSTALLED:
                    self._store.commit(partial(slots.activate, name=name))
                    what = f"{slot.name} {slot.version} (release {slot.release}, {name[:12]})"
                    self._service.event(
                        "model.testing", Severity.INFO, f"{what} is under test", slot=name
                    )
                    return
        elif record.txn.phase is Phase.PROVING:
            beat = beats.get(lane_name(self._group, record.txn.lane))
            if beat and time.monotonic_ns() - beat.sent_ns < FRESH_S * 1e9 and beat.lane:
                self._prove(record, beat.lane)

    def _prove(self, record: Record, report: LaneReport) -> None:
        slot = record.txn.slot
        if slot == self._failed or not gates.proving(record, report):
            return
        try:
            limits = gates.limits(self._store.path(slot))
        except (OSError, ValueError) as error:
            passed, reason = False, f"its manifest can't be read: {error}"
        else:
            passed, reason = gates.judge(report, self._settings, limits)
        if passed:

            def change(now: Record) -> Record:
                if not gates.proving(now, report):
                    raise TransitionError(f"slot {slot[:12]} is not the candidate any more")
                return slots.request(now)

            self._store.commit(change)
            text = f"slot {slot[:12]} has passed its gates after {report.judged} frames"
            self._service.event("model.requested", Severity.INFO, text, slot=slot)
        elif reason:
            durable.write(self._gates, f"{slot}\n{reason}\n".encode())
            self._failed = slot
            text = f"slot {slot[:12]} has not passed its gates: {reason}"
            self._service.event(
                "model.gate_failed", Severity.WARNING, text, slot=slot, reason=reason
            )

    def told(self) -> None:
        """Announce what the store found wrong."""
        while self._store.problems:
            self._service.event("state.damaged", Severity.ERROR, self._store.problems.pop(0))


def run(service: Service) -> None:
    groups = [group for group in service.config.groups if service.config.cameras_of(group)]
    updaters = {group: Updater(service, group) for group in groups}
    names = [lane_name(group, lane) for group in groups for lane in lanes(service.config, group)]
    endpoints = [service.paths.endpoint(name) for name in names]
    subscriber = Subscriber(service.context, endpoints, [f"beat/{name}" for name in names])
    beats: dict[str, Beat] = {}
    child: Child | None = None
    poller = zmq.Poller()
    poller.register(service.wake_fd, zmq.POLLIN)
    try:
        while not service.stopping:
            for topic, body in subscriber.drain():
                beat = _beat(topic, body)
                if beat:
                    beats[beat.process] = beat
            for group, updater in updaters.items():
                try:
                    if child is None:
                        child = updater.next_bundle()
                        if child:
                            poller.register(child.fd, zmq.POLLIN)
                    elif child.group == group and (outcome := child.outcome()):
                        poller.unregister(child.fd)
                        settled, child = child, None
                        updater.settle(settled.tar.name, *outcome)
                    updater.look(beats)
                except (TransitionError, LockedError):
                    pass  # somebody else was first: look again at the next tick
                except StorageError as error:
                    updater.delay("state.unwritable", str(error))
                updater.told()
            service.progressed()
            wait_s = max(0.0, child.until - time.monotonic()) if child else 2 * TICK_S
            service.beat(
                ProcessState.RUNNING if child else ProcessState.WAITING,
                wait="a bundle to be checked" if child else "a bundle",
                wait_s=wait_s + TICK_S,
            )
            poller.poll(round(TICK_S * 1000))
    finally:
        subscriber.close()
        if child:
            child.close()


def _beat(topic: str, body: bytes) -> Beat | None:
    try:
        beat = bus.decode(topic, body)
    except msgspec.DecodeError:  # of another version
        return None
    return beat if isinstance(beat, Beat) else None


if __name__ == "__main__":
    main("updater", run)
