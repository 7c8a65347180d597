"""Updater: takes bundles in, signed ones from a repository or a stick and offered ones where that
is allowed, and asks for the hand-over once a candidate has proven itself.

It only proposes: the watchdog alone calls a model good or bad. Everything it knows is in the
record, its own notes, the inbox and the beats of the lanes, so that it may be restarted at any
instant. Downloads and checks are done by children, one at a time.
"""

import time

import msgspec
import zmq

from common import bus
from common.bus import Subscriber
from common.errors import LockedError, StorageError, TransitionError
from common.messages import Beat
from common.processes import lane_name, lanes
from common.service import Service, main
from common.states import ProcessState
from services.updater.candidate import Candidate
from services.updater.children import STOP_S, Child
from services.updater.signed import Signed

TICK_S = 0.5


def run(service: Service) -> None:
    groups = [group for group in service.config.groups if service.config.cameras_of(group)]
    candidates = {group: Candidate(service, group) for group in groups}
    signed = Signed(service, candidates)
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
            for candidate in candidates.values():
                try:
                    fd = child.fd if child else -1
                    if child and signed.hinders(child):
                        child.stop()
                    if child is not None and (settle := child.ended()) is not None:
                        poller.unregister(fd)
                        child = None
                        settle()
                    if child is None:
                        child = signed.next_child() or candidate.next_bundle()
                        if child:
                            poller.register(child.fd, zmq.POLLIN)
                    record = candidate.store.read()
                    way = signed.ways[candidate.group]
                    # First: no note that can't be written keeps a candidate from its test.
                    candidate.look(record, beats, way.may_activate)
                    way.observe(record)
                except (TransitionError, LockedError):
                    pass  # somebody else was first: look again at the next tick
                except (StorageError, OSError) as error:
                    candidate.delay("state.unwritable", str(error))
                    signed.rest()
                candidate.told()
            signed.report()
            service.progressed()
            wait_s = max(0.0, child.until - time.monotonic()) if child else 2 * TICK_S
            service.beat(
                ProcessState.RUNNING if child else ProcessState.WAITING,
                wait=f"its {child.what}" if child else "a bundle",
                wait_s=wait_s + TICK_S,
            )
            poller.poll(round(TICK_S * 1000))
    finally:
        subscriber.close()
        if child:
            child.stop()
            child.close(STOP_S)


def _beat(topic: str, body: bytes) -> Beat | None:
    try:
        beat = bus.decode(topic, body)
    except msgspec.DecodeError:  # of another version
        return None
    return beat if isinstance(beat, Beat) else None


if __name__ == "__main__":
    main("updater", run)
