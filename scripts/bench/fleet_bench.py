"""A fleet and its owner: releases rolled out in stages from one repository, one of them bad.

Each device is the updater's own state machine (Signed, Way, Candidate, and what its children do)
with its own record, slots, metadata and floors on a disk in memory; the repository is real, its web
server too. What is played:
- the children's work is done in this process, by the same functions;
- the lanes and the watchdog, by `judge`: it makes their transitions of the real record. What
  calls a model bad is proven elsewhere: here a mark in the manifest does, once the model is live,
  as one that shows itself only in soak;
- when a device checks: all at once, stage by stage, in an order drawn by chance.

Release 1 goes to all; 2 is bad and goes to the first share, until its owner reads of the first
`update.bad` and withdraws it; 3, at first with a time to wait for, goes from share to share.

canaries: devices within the first share of release 2. ran_bad: those that ever had it under test
or live. good: those that run release 3 at the end. misplaced: over all stages, devices that ran a
release, or asked for its bundle, other than its rollout said. idle_bytes: the most body that
a check of one device moved where nothing was new.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any

from common import config, slots
from common.config import Config
from common.paths import Paths
from common.service import Service
from common.slots import Record
from common.states import Phase, Severity
from common.store import Store
from scripts.bench.measure import report
from scripts.repository import Repository
from services.updater.candidate import Candidate
from services.updater.channel import share
from services.updater.children import Child, Settle
from services.updater.signed import Signed
from tests.servers.updates import Server
from tests.updates import device as updates

BAD = "# misses cracks\n"  # in the manifest of a bad release
AT_ONCE = 16  # devices
TICKS = 100  # of a device, at most, until it is at rest
WAIT = timedelta(hours=2)  # until release 3 may be taken


class Teller(Service):
    """What the updater needs of its process: it keeps events, and opens no socket."""

    def __init__(self, paths: Paths, settings: Config) -> None:
        self.paths, self.config = paths, settings
        self.events: list[tuple[str, dict[str, str]]] = []

    def event(self, code: str, severity: Severity, text: str, **data: str) -> None:
        self.events.append((code, data))


class Here(Child):
    """A child's work, done in this process when somebody asks whether it has ended."""

    service: Service

    def __init__(self, module: str, *arguments: str, limit_s: float, settle: Settle) -> None:
        self.until, self.what, self.fd = inf, module, -1
        self._arguments, self._settle = arguments, settle

    def ended(self) -> Callable[[], None]:
        run = import_module(self.what).run
        outcome, said = run(self.service.config, self.service.paths, *self._arguments)
        return partial(self._settle, outcome, said.strip())


class Device(updates.Device):
    def __init__(self, root: Path, anchor: bytes, url: str) -> None:
        super().__init__(root, anchor, f"{url}/{root.name}", f'device = "{root.name}"\n')
        self.name, self.checks, self.ran = root.name, 0, set[int]()
        self.service = Teller(self.paths, config.load(self.config))
        self.candidate = Candidate(self.service, "main")
        work = type("Work", (Here,), {"service": self.service})
        self.signed = Signed(self.service, {"main": self.candidate}, work)
        self.way = self.signed.ways["main"]

    @property
    def release(self) -> int:
        """What it runs; 0 is the factory's."""
        record = self.store.read()
        slot = record.slots.get(record.known_good)
        return slot.release if slot else 0

    def work(self) -> None:
        """Look for updates now, and go on until there is nothing left to do."""
        self.signed._next_s = 0.0
        for _ in range(TICKS):
            if not self._tick():
                return
        raise RuntimeError(f"{self.name}: does not come to rest: {self.way.report()}")

    def told(self, code: str) -> list[dict[str, str]]:
        return [data for one, data in self.service.events if one == code]

    def _tick(self) -> bool:
        """One turn of the updater's loop, and of the others'; whether there was anything to do."""
        child = self.signed.next_child()
        if child and (settle := child.ended()):
            settle()
            self.checks += child.what.endswith("check")
        record = self.store.read()
        self.way.observe(record)
        self.candidate.look(record, {}, self.way.may_activate)
        self.signed.report()
        record = self.store.read()
        used = {record.slots.get(lane.slot) for lane in record.lanes.values()}
        self.ran |= {slot.release for slot in used if slot}
        judge(self.store, record)
        return bool(child or self.way.noted.update or record.txn.phase is not Phase.NONE)


def judge(store: Store, record: Record) -> None:
    """Play the lanes and the watchdog: the next transition of a candidate, that passes its tests;
    in soak it turns out what it is worth."""
    txn = record.txn
    if txn.phase is Phase.PROVING:
        store.commit(lambda now: slots.request(slots.start(now, txn.lane)))
    elif txn.phase is Phase.REQUESTED:
        store.commit(slots.hand_over)
    elif txn.phase is Phase.SOAK:
        bad = BAD in (store.path(txn.slot) / "manifest.toml").read_text()
        fail = partial(slots.fail_soak, reason="it misses cracks")
        store.commit(fail if bad else slots.mark_good)


class Fleet:
    def __init__(self, folder: Path, devices: int, stack: ExitStack) -> None:
        self._scratch = folder / "scratch"
        self.repository = Repository.init(folder / "repository", [folder / "keys"])
        self.server = stack.enter_context(Server(folder / "served"))
        self.server.folder.mkdir()
        self.devices = []
        for number in range(devices):
            name = f"device-{number:0{len(str(devices - 1))}}"
            # By its own way to the one repository the server knows a device.
            (self.server.folder / name).symlink_to(self.repository.folder)
            device = Device(folder / name, self.repository.anchor, self.server.url)
            self.devices.append(stack.enter_context(closing(device)))
        self._began_s = time.monotonic()
        self.misplaced = 0

    def publish(self, release: int, mark: str = "", **offer: Any) -> None:
        self.repository.add_bundles(updates.bundle(self._scratch, release, more=mark))
        self.repository.set_channel("stable", "main", "parts", release, **offer)

    def within(self, release: int, rollout: float) -> set[str]:
        return {d.name for d in self.devices if share(d.name, "parts", release) < rollout}

    def asked(self, release: int) -> set[str]:
        """Devices that have asked for its bundle."""
        paths = (request.path for request in self.server.requests)
        return {p.partition("/")[0] for p in paths if f"/bundles/parts/{release}/" in p}

    def stage(self, what: str, bad: Callable[[str], None] | None = None) -> None:
        """All devices check.

        Args:
            bad: told once, by the first report of a bad update, while the others are at it.
        """
        said = f"{time.monotonic() - self._began_s:.0f} s: {what}"
        print(said, file=sys.stderr, flush=True)
        order = random.sample(self.devices, len(self.devices))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            working = {pool.submit(device.work): device for device in order}
            for done in as_completed(working):
                done.result()
                device = working[done]
                if bad and (reports := device.told("update.bad")):
                    bad(f"{device.name}: {reports[0]['reason']}")
                    bad = None

    def expect(self, release: int, rollout: float) -> None:
        """Count the devices that run, report or asked for other than the rollout says."""
        within, told = self.within(release, rollout), {"release": str(release)}.items()
        running = {device.name for device in self.devices if device.release == release}
        good = {
            d.name for d in self.devices if any(told <= x.items() for x in d.told("update.good"))
        }
        self.misplaced += len((running ^ within) | (good ^ within) | (self.asked(release) ^ within))

    def bodies(self) -> Counter[str]:
        """Body bytes that each device was sent."""
        sent: Counter[str] = Counter()
        for path, count in self.server.sent.items():
            sent[path.partition("/")[0]] += count
        return sent


def measure(folder: Path, devices: int, rollout: list[float]) -> dict[str, float]:
    """
    Args:
        rollout: per cent of the devices in each stage, the last one 100.
    """
    with ExitStack() as stack:
        fleet = Fleet(folder, devices, stack)
        repository, began_s = fleet.repository, time.monotonic()
        fleet.publish(1)
        fleet.stage("release 1 to all")
        fleet.expect(1, 100)

        fleet.publish(2, BAD, rollout=rollout[0])
        canaries = fleet.within(2, rollout[0])
        if not canaries:
            raise SystemExit(f"none of {devices} devices lies within {rollout[0]} %: take more")
        fleet.stage(f"release 2, bad, to {rollout[0]:g} %: {len(canaries)} devices",
                    lambda why: _withdraw(repository, why))  # fmt: skip
        fleet.expect(1, 100)

        later = datetime.now(UTC).replace(microsecond=0) + WAIT  # as it is signed
        fleet.publish(3, rollout=rollout[0], not_before=later)
        fleet.stage(f"release 2 is withdrawn; 3 not before {later:%H:%M} UTC")
        fleet.expect(3, 0)
        repository.now = later  # what is signed from now on tells the devices
        for part in rollout:
            repository.promote("stable", 3, part)
            fleet.stage(f"release 3 to {part:g} %")
            fleet.expect(3, part)

        before = fleet.bodies()
        fleet.stage("nothing new")
        idle = fleet.bodies() - before
        seconds = time.monotonic() - began_s
        peak = Counter(int(request.at_s) for request in fleet.server.requests).most_common(1)
        ran_bad = {device.name for device in fleet.devices if 2 in device.ran}
        fleet.misplaced += len((ran_bad | fleet.asked(2)) - canaries)
        return {
            "devices": devices,
            "canaries": len(canaries),
            "ran_bad": len(ran_bad),
            "good": sum(device.release == 3 for device in fleet.devices),
            "misplaced": fleet.misplaced,
            "checks": sum(device.checks for device in fleet.devices),
            "failed_checks": sum(len(device.told("update.check")) for device in fleet.devices),
            "bytes_per_device": round(fleet.bodies().total() / devices),
            "idle_bytes": max(idle.values()),
            "peak_requests_per_s": peak[0][1],
            "seconds": round(seconds, 1),
        }


def _withdraw(repository: Repository, why: str) -> None:
    print(f"withdrawn: {why}", file=sys.stderr, flush=True)
    repository.withdraw("stable", "parts", 2, why)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/fleet", description=__doc__)
    parser.add_argument("--devices", type=int, default=500, metavar="N")
    parser.add_argument("--rollout", type=float, nargs="+", default=[1, 10, 100], metavar="PERCENT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vigil-fleet-", dir="/dev/shm") as folder:
        report(measure(Path(folder), arguments.devices, arguments.rollout))


if __name__ == "__main__":
    main()
