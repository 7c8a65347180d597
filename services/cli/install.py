"""Offer a bundle: the updater verifies it, a lane tests it beside the live model, and it goes live
if it is good. The live model decides meanwhile, and stays if this one is bad."""

import argparse
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from common import durable
from common.archive import scan
from common.config import Config
from common.errors import BundleError, ConfigError, NotRunningError, StorageError
from common.paths import Paths
from common.processes import processes
from common.states import Phase, SlotState
from services.cli.listen import accepts, configuration, require_running
from services.cli.models import find_group, read_record, short, titled

TAKEN_S = 30.0
LOOK_S = 0.1
NOT_WELL = 2

_EPILOG = """\
examples:
  vigil install parts-1.3.tar              until it is taken or refused
  vigil install parts-1.3.tar --wait       until it is good or bad; 2 if it is bad
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a tar of scripts/bundle")
    parser.add_argument("--group", metavar="NAME", help="whose model it is to be (main)")
    parser.add_argument("--wait", action="store_true", help="until it is good or bad")


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    group = find_group(config, args.group)
    scan(args.bundle)
    if not config.updates.unsigned:
        raise ConfigError(
            f"{config.path}: updates.unsigned = false, and nobody signed {args.bundle}; expected "
            "a signed bundle, or unsigned = true in [updates]"
        )
    require_running(paths, [process.name for process in processes(config)])
    offered = offer(args.bundle, paths.models(group) / "inbox")
    slot = _taken(config, paths, group, offered, args)
    if slot is None:
        return 0
    record = read_record(config, paths, group)
    print(f"installed as {titled(record, slot)}", flush=True)
    return follow(config, paths, group, slot) if args.wait else 0


def offer(bundle: Path, inbox: Path) -> Path:
    """Put a copy into an inbox, whole and durable; returns where.

    Raises:
        StorageError: it can't be copied; nothing is left.
    """
    stem = re.sub(r"[^\w-]", "-", bundle.stem)[:64]
    target = inbox / f"{stem}-{os.urandom(4).hex()}.tar"
    new = target.with_name(f".{target.name}.new")
    try:
        inbox.mkdir(mode=0o770, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with bundle.open("rb") as source, os.fdopen(os.open(new, flags, 0o660), "wb") as copy:
            while block := source.read(1 << 20):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        new.rename(target)
        durable.sync_folder(inbox)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise StorageError(f"{target}: can't be written: {error.strerror}") from error
    return target


def _taken(
    config: Config, paths: Paths, group: str, offered: Path, args: argparse.Namespace
) -> str | None:
    """The slot that the bundle became; None where it waits in the inbox and nobody waits for it.

    Raises:
        BundleError: it was refused.
        NotRunningError: nobody looked at it.
    """
    said = False
    deadline = time.monotonic() + TAKEN_S
    while True:
        for word in ("installed", "refused"):
            note = offered.with_suffix(f".{word}")
            if not note.exists():
                continue
            text = note.read_text().strip()
            with suppress(OSError):  # another user's; the updater keeps few of them
                note.unlink()
            if word == "refused":
                raise BundleError(f"{args.bundle}: refused: {text}")
            return text
        if time.monotonic() >= deadline:
            record = read_record(config, paths, group)
            if record.txn.phase is Phase.NONE:
                raise NotRunningError(
                    f"{offered}: the updater has not taken it within {TAKEN_S:g} s; it stays there "
                    "until it does (vigil status says whether it runs)"
                )
            if not said:
                slot = titled(record, record.txn.slot)
                print(f"waits in the inbox while {slot} is under test", flush=True)
                said = True
            if not args.wait:
                return None
        time.sleep(LOOK_S)


def follow(config: Config, paths: Paths, group: str, slot: str) -> int:
    """Tell how a change of model goes on until it is over; 0 if the slot is known good then. That
    may take long: it waits for a window, or for frames to be judged by.

    Raises:
        NotRunningError: it is not over though its time is: nobody judges.
    """
    settings = config.groups[group]
    limit_s = settings.load_s + settings.prove_s + settings.soak_s + TAKEN_S
    deadline = time.monotonic() + limit_s
    told = said = ""
    while True:
        record = read_record(config, paths, group)
        if record.txn.slot == slot:
            told = _tell(told, f"{record.txn.phase} in lane {record.txn.lane}")
        elif record.state(slot) is SlotState.INSTALLED:
            told = _tell(told, "waits")
        elif record.known_good == slot:
            print(f"good: {titled(record, slot)} is known good now", flush=True)
            return 0
        else:
            known = record.slots.get(slot)
            reason = f": {known.reason}" if known and known.reason else ""
            live = titled(record, record.lanes[record.live].slot)
            print(f"{record.state(slot) or 'gone'}{reason}; {live} is live", flush=True)
            return NOT_WELL
        time.sleep(LOOK_S)
        if time.monotonic() < deadline:
            continue
        if not accepts(Path(paths.endpoint("watchdog").removeprefix("ipc://"))):
            raise NotRunningError(
                f"slot {short(slot)} is neither good nor bad after {limit_s:g} s, and no watchdog "
                "runs to judge it; see vigil status"
            )
        deadline += TAKEN_S
        said = _tell(said, "it waits for its window, or for frames to be judged by")


def _tell(told: str, now: str) -> str:
    if now != told:
        print(now, flush=True)
    return now
