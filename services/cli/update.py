"""Signed updates: check now, and see how one comes along. The updater does the work, verifies what
it finds against the trusted root, and lets it prove itself; this command asks and looks."""

import argparse
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from common import durable
from common.config import Config
from common.errors import ConfigError, NotRunningError, UpdateError
from common.paths import Paths
from common.processes import processes
from common.updates import HISTORY, REPLY, REPORT, REQUEST, GroupReport, Reply, Report, Request
from common.updates import Status as Entry
from services.cli.install import follow
from services.cli.listen import accepts, configuration, require_running
from services.cli.text import seconds, size, table

REPLY_S = 960.0  # a check of a slow server
AWAY_S = 30.0  # the updater, while it is started again
LOOK_S = 0.1
NOT_WELL = 2
T = TypeVar("T")

_EPILOG = """\
examples:
  vigil update                        check now; fetch and install what is found, with progress
  vigil update --dry-run              only tell what would be done
  vigil update --wait                 until it is good or bad; 2 if it is bad
  vigil update --from /media/usb      from a stick that scripts/publish export has written
  vigil update --status               what is under way, and what became of the newest ones
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--dry-run", action="store_true", help="tell, and begin nothing")
    parser.add_argument("--from", dest="place", type=Path, metavar="DIR", help="an offline copy")
    parser.add_argument("--wait", action="store_true", help="until it is good or bad")
    parser.add_argument("--status", action="store_true", help="ask nobody, only look")
    parser.add_argument("--json", action="store_true", help="with --status: one JSON object")


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    if args.status:
        return _show(paths, args.json)
    if config.updates.root is None:
        raise ConfigError(
            f"{config.path}: updates.root is missing; expected the root.json of the repository "
            "that is to be trusted"
        )
    require_running(paths, [process.name for process in processes(config)])
    place = "" if args.place is None else str(args.place.resolve())
    reply = _ask(paths, Request(id=os.urandom(8).hex(), place=place, dry_run=args.dry_run))
    if reply.error:
        raise UpdateError(reply.error)
    print("\n".join(reply.lines), flush=True)
    if args.dry_run or not reply.begun:
        return 0
    return max(_progress(config, paths, *one, args.wait) for one in reply.begun.items())


def _ask(paths: Paths, request: Request) -> Reply:
    """
    Raises:
        NotRunningError: nobody answers.
    """
    folder = os.open(paths.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # there is one question at a time
        durable.write(paths.run / REQUEST, msgspec.json.encode(request), mode=0o660)
        updater, deadline = _Updater(paths), time.monotonic() + REPLY_S
        while time.monotonic() < deadline:
            reply = _read(paths.run / REPLY, Reply)
            if reply and reply.id == request.id:
                return reply
            updater.wait()
    finally:
        os.close(folder)
    raise NotRunningError(
        f"the updater has not answered within {REPLY_S:g} s; vigil status says whether it runs"
    )


class _Updater:
    def __init__(self, paths: Paths) -> None:
        self._socket = Path(paths.endpoint("updater").removeprefix("ipc://"))
        self._seen_s = time.monotonic()

    def wait(self) -> None:
        """For a moment.

        Raises:
            NotRunningError: it has not been there for long.
        """
        time.sleep(LOOK_S)
        now_s = time.monotonic()
        if accepts(self._socket):
            self._seen_s = now_s
        elif now_s - self._seen_s > AWAY_S:
            raise NotRunningError(
                f"the updater has been away for {AWAY_S:g} s; vigil status says more"
            )


def _progress(config: Config, paths: Paths, group: str, slot: str, wait: bool) -> int:
    """Tell how an update comes along until it is under test, or, if wanted, judged."""
    told, step, updater = "", "", _Updater(paths)
    while True:
        report = read_report(paths)
        now = report.groups.get(group) if report else None
        if now is None or now.step not in ("download", "install"):
            break
        line = f"{now.step}{_share(now)}{': waits: ' if now.waits else ''}{now.waits}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif now.step != step or (now.waits and line != told):
            print(line, flush=True)
        told, step = line, now.step
        if now.waits and not wait:
            break  # for long, maybe
        updater.wait()
    if sys.stdout.isatty():
        print()
    last = [one for one in _history(paths) if (one.group, one.slot) == (group, slot)]
    if last and (last[-1].outcome == "failed" or not wait):
        print(f"{last[-1].step}: {last[-1].outcome} {last[-1].reason}".rstrip(), flush=True)
    if last and last[-1].outcome == "failed":
        return NOT_WELL
    return follow(config, paths, group, slot) if wait else 0


def _share(now: GroupReport) -> str:
    if now.step != "download" or not now.length:
        return ""
    return f" {100 * now.have // now.length} % of {size(now.length)}"


def _show(paths: Paths, as_json: bool) -> int:
    report, past = read_report(paths), _history(paths)
    if as_json:
        print(msgspec.json.encode({"report": report, "history": past}).decode())
        return 0
    if report is None:
        print("the updater has said nothing since this board has started")
    else:
        now = time.monotonic_ns()
        ago = seconds((now - report.checked_ns) / 1e9) + " ago" if report.checked_ns else "none yet"
        next_ = "in " + seconds((report.next_ns - now) / 1e9) if report.next_ns else "none planned"
        print(
            f"last check {ago} ago; next in {next_}"
            if report.checked_ns
            else f"not checked yet; next in {next_}"
        )
        if report.error:
            print(f"last check failed: {report.error}")
        for name, group in report.groups.items():
            print(f"{name}: {state(group)}")
    if past:
        print()
        print("\n".join(_table(past)))
    return 0


def state(group: GroupReport) -> str:
    """A group's update in a line."""
    age = f"; live model {seconds(group.age_s)} old" if group.age_s is not None else ""
    if not group.step:
        return f"nothing under way{': ' if group.reason else ''}{group.reason}{age}"
    waits = f", waits: {group.waits}" if group.waits else ""
    return f"{group.title}: {group.step}{_share(group)}{waits}{age}"


def _table(past: list[Entry]) -> list[str]:
    return table(
        ("WHEN", "GROUP", "BUNDLE", " RELEASE", "SLOT", "STEP", "OUTCOME", " BYTES", " TIME",
         "WHY"),
        [
            (
                time.strftime("%m-%d %H:%M:%SZ", time.gmtime(one.wall_s)), one.group,
                f"{one.bundle} {one.version}", str(one.release), one.slot[:12], one.step,
                one.outcome, str(one.bytes), seconds(one.seconds), one.reason or "-",
            )
            for one in past
        ],
    )  # fmt: skip


def read_report(paths: Paths) -> Report | None:
    """What the updater says of itself; None where it has not run."""
    return _read(paths.run / REPORT, Report)


def _history(paths: Paths) -> list[Entry]:
    return _read(paths.updates / HISTORY, list[Entry]) or []


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(durable.read(path), type=kind)
    except (OSError, msgspec.MsgspecError):  # not there (yet), or of another version
        return None
