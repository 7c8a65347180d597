"""How long nobody judges when the live lane dies or hangs, and what a planned hand-over costs.

The real system, each time: supervisord, watchdog, the factory model, the virtual camera under
`every`. A time runs from the fault to the decision of the next valid result, in the journal.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import archive
from common.messages import Result
from common.paths import PROJECT, Paths
from common.states import SlotState, Validity
from scripts.bench.journal import Journal, decided_ns
from scripts.bench.lanes import Lanes, Processes, until
from scripts.bench.measure import Figures, percentile, report
from scripts.bench.running import running

CONFIG = f"""
[cameras.belt]
source = "virtual"
fps = FPS
policy = "every"
prerender = 60
slots = 64
[groups.main]
model = "{PROJECT}/models/factory"
lanes = LANES
shadow_frames = 5
shadow_every = 2
soak_s = 1.0
[updates]
unsigned = true
"""


class Line:
    """A running system under test, and the journal of its camera."""

    def __init__(self, paths: Paths, lanes: int) -> None:
        self.paths = paths
        self.lanes = Lanes(paths, lanes)
        self.processes = Processes(paths)
        self.journal = Journal(paths, "belt")

    def recovery_ms(self, number: signal.Signals) -> float:
        """Send a signal to the live lane; the time to the next valid result, another term's."""
        record = self.lanes.record
        name = f"inference-main-{record.live}"
        victim = until(lambda: self.processes.get(name), 10, f"{name} runs")
        seen = max(0, len(self.journal.results) - 1)

        def found() -> Result | None:
            for result in self.journal.results[seen:]:
                if result.epoch > record.epoch and result.validity == Validity.VALID:
                    return result
            return None

        sent_ns = time.monotonic_ns()
        victim.send_signal(number)
        return (decided_ns(until(found, 30, "a valid result")) - sent_ns) / 1e6

    def accept(self, bundle: Path) -> None:
        """Offer a bundle, and wait until it is known good.

        Raises:
            RuntimeError: it is not, or something is bad.
        """
        inbox = self.paths.models("main") / "inbox"
        inbox.mkdir(exist_ok=True)
        shutil.copy(bundle, inbox / ".new")
        before = self.lanes.record.known_good
        (inbox / ".new").rename(inbox / bundle.name)
        until(lambda: self.lanes.record.known_good != before, 120, "a new known-good slot")
        slots = self.lanes.record.slots
        if any(slot.state is SlotState.BAD for slot in slots.values()):
            raise RuntimeError(f"a release was refused: {slots}")


@contextmanager
def line(lanes: int, fps: str = "30") -> Iterator[Line]:
    with running(CONFIG.replace("LANES", str(lanes)).replace("FPS", fps)) as paths:
        under_test = Line(paths, lanes)
        try:
            yield under_test
        finally:
            under_test.journal.stop()
            under_test.lanes.close()


def faults(
    under_test: Line, count: int, number: signal.Signals, dice: random.Random
) -> list[float]:
    """Send a signal to the live lane so often; the times to the next valid result, ms."""
    times = []
    for place in range(count):
        under_test.lanes.until_standby()
        time.sleep(dice.uniform(0, 0.2))  # any moment of a frame
        times.append(under_test.recovery_ms(number))
        if (place + 1) % 10 == 0:
            print(f"{number.name} {place + 1}/{count}: {times[-1]:.0f} ms", flush=True)
    return times


def lost(results: list[Result]) -> int:
    """Frames between the first and the last decision that have none."""
    sequences = {result.sequence for result in results}
    return max(sequences) - min(sequences) + 1 - len(sequences)


def hand_overs(under_test: Line, count: int) -> None:
    """Install so many releases of the factory model; each is handed over at full rate."""
    with tempfile.TemporaryDirectory() as folder:
        for place in range(count):
            under_test.lanes.until_standby()
            source = Path(folder) / f"bundle-{place}"
            shutil.copytree(PROJECT / "models" / "factory", source)
            manifest = source / "manifest.toml"
            manifest.write_text(
                manifest.read_text().replace("release = 1", f"release = {place + 2}")
            )
            tar = Path(folder) / f"{place}.tar"
            archive.pack(source, tar)
            under_test.accept(tar)
            print(f"hand-over {place + 1}/{count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/takeover", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--restarts", type=int, default=20, metavar="N")
    parser.add_argument("--hangs", type=int, default=20, metavar="N")
    parser.add_argument("--handovers", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    figures: Figures = {}
    with line(2) as under_test:
        kills = faults(under_test, arguments.kills, signal.SIGKILL, dice)
        hangs = faults(under_test, arguments.hangs, signal.SIGSTOP, dice)
        results = under_test.journal.results
        figures["kills"] = len(kills)
        figures["takeover_ms_p50"] = percentile(kills, 50)
        figures["takeover_ms_p99"] = percentile(kills, 99)
        figures["frames_lost"] = lost(results)
        figures["hang_ms_p99"] = percentile(hangs, 99)
    with line(1) as under_test:
        restarts = faults(under_test, arguments.restarts, signal.SIGKILL, dice)
        figures["restart_ms_p50"] = percentile(restarts, 50)
        figures["restart_ms_p99"] = percentile(restarts, 99)
    with line(2, fps='"max"') as under_test:
        hand_overs(under_test, arguments.handovers)
        results = under_test.journal.results
        sequences = [result.sequence for result in results]
        figures["handovers"] = arguments.handovers
        figures["skipped"] = lost(results)
        figures["judged_twice"] = len(sequences) - len(set(sequences))
    report({key: round(value, 1) for key, value in figures.items()})


if __name__ == "__main__":
    main()
