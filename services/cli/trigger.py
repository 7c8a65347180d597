"""Trigger a camera: one part is inspected now. Says which frame answers and what it shows."""

import argparse
import time

import zmq

from common import bus
from common.errors import ConfigError, NotRunningError
from common.messages import Result, Trigger
from common.paths import Paths
from common.processes import capture_name
from common.states import Validity
from services.cli.listen import configuration, listener

NOT_WELL = 2
BEAT_S = 2.0  # the running capture is heard within that

_EPILOG = """\
examples:
  vigil trigger belt            inspect what is there now
  vigil trigger belt --id 4711  the part of that number; a second time it is refused

exit status: 0 inspected, validly; 2 not inspected, or not validly
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("camera", metavar="CAMERA", help="with a [cameras.NAME.trigger]")
    parser.add_argument("--id", type=int, metavar="N", help="of the part (a new one)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds (5)")


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    camera = config.cameras.get(args.camera)
    if camera is None or camera.trigger is None:
        known = ", ".join(name for name, row in config.cameras.items() if row.trigger)
        raise ConfigError(f"no triggered camera {args.camera}; there are {known or 'none'}")
    beat, answer, result = (
        f"beat/{capture_name(args.camera)}", f"trigger/{args.camera}", f"result/{args.camera}"
    )  # fmt: skip
    now = time.monotonic_ns()
    trigger = Trigger(now if args.id is None else args.id, now)
    sent = False
    with listener(config, paths, [beat, answer, result]) as listening:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        try:
            socket.linger = 0
            socket.connect(paths.trigger(args.camera))
            for _, topic, body in listening.hear(BEAT_S + args.timeout):
                if topic == beat and not sent:  # it is heard, so its answer will be
                    socket.send_multipart(
                        [answer.encode(), bus.encode(Trigger(trigger.id, time.monotonic_ns()))]
                    )
                    sent = True
                message = bus.decode(topic, body)
                if isinstance(message, Trigger) and message.id == trigger.id and message.reason:
                    print(f"part {trigger.id}: not inspected: {message.reason}")
                    return NOT_WELL
                if isinstance(message, Result) and message.trigger == trigger.id:
                    return _tell(message)
        finally:
            socket.close()
            zmq.Context.instance().term()
    what = "no frame answered it" if sent else "its capture is not heard; see vigil status"
    raise NotRunningError(f"{args.camera}: part {trigger.id}: {what} within {args.timeout:g} s")


def _tell(result: Result) -> int:
    items = ", ".join(
        f"{item.label} {item.score:.2f}{' in ' + ' '.join(item.zones) if item.zones else ''}"
        for item in result.items
    )
    valid = result.validity == Validity.VALID
    worth = "" if valid else f" ({result.validity}: {result.reason})"
    print(f"part {result.trigger}: frame {result.sequence}: {items or 'nothing'}{worth}")
    return 0 if valid else NOT_WELL
