"""Small programs that tests start as processes: `python -m tests.programs NAME ARGUMENT...`."""

import os
import signal
import sys
import time

import zmq

from common import bus, service
from common.errors import SourceError
from common.paths import Paths
from common.states import ProcessState, Severity


def listen(endpoint: str, prefix: str, pause_s: str) -> None:
    """Print each message's topic and number, taking `pause_s` over it."""
    subscriber = bus.Subscriber(zmq.Context(), [endpoint], [prefix])
    while subscriber.wait(60):
        for topic, body in subscriber.drain():
            time.sleep(float(pause_s))
            print(topic, int.from_bytes(body[:8], "little"), flush=True)


def hold_lock(name: str) -> None:
    """Take a process's lock and keep it."""
    service.lock(Paths.from_environment(), name)
    print("held", flush=True)
    signal.pause()


def serve(name: str, how: str) -> None:
    """A service that ends in one way or another."""

    def body(running: service.Service) -> None:
        print("up", os.getpid(), flush=True)
        if how == "fails":
            raise SourceError("/dev/video7: there is no such camera; plug one in")
        if how == "has a fault":
            raise ZeroDivisionError("nobody thought of this")
        if how == "is told after its end":
            return
        poller = zmq.Poller()
        poller.register(running.wake_fd, zmq.POLLIN)
        running.event("probe.up", Severity.INFO, "here", pid=str(os.getpid()))
        while not running.stopping:
            running.progressed()
            running.beat(ProcessState.WAITING, wait="nothing", wait_s=2.0, how=how)
            poller.poll(50 if how == "beats" else 60_000)
        if how == "is told twice":
            os.kill(os.getpid(), signal.SIGTERM)

    service.main(name, body)
    if how == "is told after its end":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
