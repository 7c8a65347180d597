"""Kill, stop and corrupt at random for minutes, under load, and hold the system to its word: each
frame accounted for, each result honest. The scene always holds a part: a valid result without one
is a false "nothing there".

A recovery runs from a fault to the first valid result, on every camera, of a frame captured after
it. Offered releases, and bit flips in the record and in slots, are among the faults.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from common import archive
from common.paths import PROJECT, Paths
from common.slots import FACTORY, PASS
from common.states import Validity
from scripts.bench.journal import Journal, decided_ns
from scripts.bench.lanes import Lanes, Processes
from scripts.bench.measure import percentile, report
from scripts.bench.running import account, running

CAMERAS = ("latest", "every")
CONFIG = f"""
[cameras.latest]
source = "virtual"
fps = 15
gaps = 0.0
[cameras.every]
source = "virtual"
fps = 15
gaps = 0.0
seed = 7
policy = "every"
slots = 64
[groups.main]
model = "{PROJECT}/models/factory"
shadow_frames = 3
shadow_every = 2
soak_s = 2.0
prove_s = 60.0
load_s = 20.0
[watchdog]
# Whoever kills here is no model: lanes that die often are the purpose.
restarts = 50
[updates]
unsigned = true
"""
PAUSE_S = (0.5, 5.0)  # between faults
STOPPED_S = (0.1, 4.0)  # from SIGSTOP to SIGCONT, where the watchdog has not ended it before
SETTLE_S = 20.0  # after the last fault


@dataclass
class Fault:
    name: str
    at_ns: int


class Chaos:
    def __init__(self, paths: Paths, dice: random.Random, scratch: Path) -> None:
        self._paths, self._dice, self._scratch = paths, dice, scratch
        self._lanes = Lanes(paths)
        self._processes = Processes(paths)
        self._stopped: list[tuple[float, psutil.Process]] = []
        self._release = 1
        self.faults: list[Fault] = []

    def run(self, minutes: float) -> None:
        end = time.monotonic() + 60 * minutes
        due = time.monotonic()
        while (now := time.monotonic()) < end:
            self._continue(now)
            if now >= due:
                self._strike()
                due = time.monotonic() + self._dice.uniform(*PAUSE_S)
            time.sleep(0.02)
        self._continue(end + max(STOPPED_S))
        time.sleep(SETTLE_S)
        self._lanes.close()

    def _strike(self) -> None:
        kinds = (self._kill, self._stop, self._flip_record, self._flip_slot, self._offer)
        kind = self._dice.choices(kinds, weights=(6, 3, 1, 1, 1))[0]
        at_ns = time.monotonic_ns()
        if name := kind():
            self.faults.append(Fault(name, at_ns))
            print(f"{len(self.faults):4} {name}", flush=True)

    def _victim(self) -> tuple[str, psutil.Process] | None:
        running = sorted(self._processes.all().items())
        return self._dice.choice(running) if running else None

    def _kill(self) -> str:
        if (victim := self._victim()) is None:
            return ""
        with suppress(psutil.NoSuchProcess):
            victim[1].kill()
        return f"SIGKILL {victim[0]}"

    def _stop(self) -> str:
        if (victim := self._victim()) is None:
            return ""
        with suppress(psutil.NoSuchProcess):
            victim[1].suspend()
        self._stopped.append((time.monotonic() + self._dice.uniform(*STOPPED_S), victim[1]))
        return f"SIGSTOP {victim[0]}"

    def _continue(self, now: float) -> None:
        for due, process in [one for one in self._stopped if one[0] <= now]:
            self._stopped.remove((due, process))
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def _flip_record(self) -> str:
        name = self._dice.choice(("state.0", "state.1"))
        return self._flip(self._lanes.store.folder / name)

    def _flip_slot(self) -> str:
        """One bit of the known-good slot, where it is not the factory's, which is read-only."""
        slot = self._lanes.record.known_good
        if slot in (FACTORY, PASS):
            return ""
        files = sorted(path for path in self._lanes.store.path(slot).glob("model*"))
        return self._flip(self._dice.choice(files)) if files else ""

    def _flip(self, path: Path) -> str:
        try:
            with path.open("r+b") as file:
                at = self._dice.randrange(path.stat().st_size)
                file.seek(at)
                byte = file.read(1)[0] ^ (1 << self._dice.randrange(8))
                file.seek(at)
                file.write(bytes([byte]))
        except (FileNotFoundError, ValueError, IndexError):
            return ""  # just replaced
        return f"bit flip in {path.name}"

    def _offer(self) -> str:
        self._release += 1
        source = self._scratch / f"bundle-{self._release}"
        shutil.copytree(PROJECT / "models" / "factory", source)
        manifest = source / "manifest.toml"
        text = manifest.read_text()
        manifest.write_text(text.replace("release = 1", f"release = {self._release}"))
        inbox = self._paths.models("main") / "inbox"
        inbox.mkdir(exist_ok=True)
        archive.pack(source, inbox / ".offer")
        (inbox / ".offer").rename(inbox / f"{self._release}.tar")
        return f"offer of release {self._release}"


def recoveries_ms(faults: list[Fault], journals: dict[str, Journal]) -> list[float]:
    """For each fault the time until every camera has a valid result of a later frame."""
    times = []
    for fault in faults:
        first = []
        for journal in journals.values():
            good = (
                decided_ns(result)
                for result in journal.results
                if result.captured_ns > fault.at_ns and result.validity == Validity.VALID
            )
            first.append(next(good, time.monotonic_ns()))
        times.append((max(first) - fault.at_ns) / 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, running(CONFIG) as paths:
        journals = {camera: Journal(paths, camera) for camera in CAMERAS}
        chaos = Chaos(paths, random.Random(arguments.seed), Path(scratch))
        chaos.run(arguments.minutes)
        accounts = {camera: account(paths, camera) for camera in CAMERAS}
        for journal in journals.values():
            journal.stop()
        captured = accounted = twice = 0
        for camera, now in accounts.items():
            decided = [result.sequence for result in journals[camera].results]
            twice += len(decided) - len(set(decided))
            captured += now.captured
            # What the journal has against what the account says: a frame in neither is lost.
            accounted += len(set(decided)) + now.skipped + now.torn + now.overrun + now.in_flight
        results = [result for journal in journals.values() for result in journal.results]
        nothing = [r for r in results if r.validity == Validity.VALID and not r.items]
        times = recoveries_ms(chaos.faults, journals)
        worst = max(zip(times, chaos.faults, strict=True), key=lambda pair: pair[0])
        print(f"slowest recovery: {worst[0]:.0f} ms after {worst[1].name}")
        print("faults:", dict(Counter(fault.name for fault in chaos.faults)))
        report(
            {
                "faults": len(chaos.faults),
                "frames": captured,
                "accounted": round(accounted / captured, 6),
                "judged_twice": twice,
                "false_nothing": len(nothing),
                "validity": dict(Counter(result.validity for result in results)),
                "recovery_ms_p50": round(percentile(times, 50), 1),
                "recovery_ms_p99": round(percentile(times, 99), 1),
            }
        )


if __name__ == "__main__":
    main()
