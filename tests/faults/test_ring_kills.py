"""One capture and two lanes on a real ring at full speed, each SIGKILLed again and again, while a
reader of the journal sees every decision. The ring changes its size now and then."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from common.frames import Ring, generations
from common.paths import PROJECT, Paths
from common.states import Policy
from tests.faults.ring_programs import CAMERA, Cursor
from tests.support import until

KILLS = 50  # of each: capture, lanes
LIMIT_S = 60


class Line:
    def __init__(self, paths: Paths, policy: Policy) -> None:
        self.paths, self.policy = paths, policy
        self.random = random.Random(20260101)
        (paths.run / "cursor").write_bytes(bytes(8))
        self.cursor = Cursor(paths.run / "cursor")
        self.epoch = 0
        self.lanes_started = 0
        self.processes: list[subprocess.Popen[str]] = []
        self.decisions: dict[int, tuple[int, bytes]] = {}
        self.rings: list[int] = []
        self.ring: Ring | None = None
        self.capture = self.start_capture()
        self.live = self.start_lane()
        self.standby = self.start_lane()
        self.go_live()

    # -- processes

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.ring_programs", *arguments],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def start_capture(self) -> subprocess.Popen[str]:
        width = 64 if self.random.random() < 0.8 else 96
        return self.start("capture", str(self.paths.run), self.policy, str(width))

    def start_lane(self) -> subprocess.Popen[str]:
        self.lanes_started += 1
        return self.start("lane", str(self.paths.run), f"log.{self.lanes_started}")

    def go_live(self) -> None:
        """The standby becomes the live lane, with the next epoch; another one stands by."""
        self.epoch += 1
        self.live, self.standby = self.standby, self.start_lane()
        assert self.live.stdin is not None
        self.live.stdin.write(f"{self.epoch}\n")
        self.live.stdin.flush()

    def kill(self, process: subprocess.Popen[str]) -> None:
        assert process.poll() is None, f"ended by itself: {process.args!r}"
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        if self.ring is not None:
            self.ring.close()

    # -- the journal's reader

    def read(self) -> int:
        """Take what was decided; returns how much that was."""
        taken = 0
        paths = self.paths
        if self.ring is None or (self.ring.drained and self.cursor.get() >= self.ring.decided):
            done = self.ring.generation if self.ring else 0
            for generation in generations(paths.rings, CAMERA):
                if generation > done:
                    if self.ring is not None:
                        self.ring.close()
                    self.ring = Ring.open(paths.rings, paths.accounts, CAMERA, generation)
                    self.rings.append(generation)
                    break
        if self.ring is None:
            return 0
        decided = self.ring.decided
        for sequence in range(self.cursor.get() + 1, decided + 1):
            entry = self.ring.entry(sequence)
            if entry is not None:
                assert sequence not in self.decisions
                self.decisions[sequence] = entry.epoch, entry.result
                taken += 1
        self.cursor.set(max(self.cursor.get(), decided))
        return taken

    def run_for(self, seconds: float) -> None:
        """Read for a while, and on until something new was decided."""
        end, limit, taken = time.monotonic() + seconds, time.monotonic() + 20, 0
        while time.monotonic() < end or not taken:
            taken += self.read()
            assert time.monotonic() < limit, "nothing is decided any more"


@pytest.fixture(params=list(Policy))
def line(paths: Paths, request: pytest.FixtureRequest) -> Iterator[Line]:
    line = Line(paths, request.param)
    yield line
    line.close()


def test_nothing_is_lost_or_judged_twice_whoever_is_killed(line: Line) -> None:
    started = time.monotonic()
    for round in range(KILLS):
        line.run_for(line.random.uniform(0, 0.05))
        line.kill(line.capture)
        line.capture = line.start_capture()
        line.run_for(line.random.uniform(0, 0.05))
        if round % 3 == 2:  # a planned hand-over: the old lane is still running and finds out
            old = line.live
            line.go_live()

            def it_ended(old: subprocess.Popen[str] = old) -> bool:
                line.read()
                return old.poll() is not None

            until(it_ended, 20, "the old lane finds out")
            assert old.returncode == 0
            line.run_for(line.random.uniform(0, 0.02))
        line.kill(line.live)
        line.go_live()
        assert time.monotonic() - started < LIMIT_S
    line.run_for(0.1)
    for process in (line.capture, line.live, line.standby):
        line.kill(process)
    while line.read():
        pass
    check(line)


def check(line: Line) -> None:
    paths = line.paths
    newest = generations(paths.rings, CAMERA)[-1]
    with Ring.open(paths.rings, paths.accounts, CAMERA, newest) as ring:
        account = ring.account()
    assert account.balanced
    assert account.inferred == len(line.decisions)
    last = max(line.decisions)
    assert account.captured - account.in_flight == last
    assert len(line.rings) > 5
    if line.policy is Policy.EVERY:
        assert list(line.decisions) == list(range(1, last + 1))
        assert (account.skipped, account.torn, account.overrun) == (0, 0, 0)
        assert line.rings == list(range(1, newest + 1))
    else:
        assert list(line.decisions) == sorted(line.decisions)
        assert account.skipped + account.torn == last - len(line.decisions)
    wrong = [n for n, (_, result) in line.decisions.items() if result != b"%d 1" % n]
    assert not wrong
    epochs = [epoch for epoch, _ in line.decisions.values()]
    assert epochs == sorted(epochs)  # who was replaced decides no more
    announced = [
        (int(sequence), int(epoch))
        for log in paths.run.glob("log.*")
        for sequence, epoch in (text.split() for text in log.read_text().splitlines())
    ]
    assert len(announced) == len({sequence for sequence, _ in announced})  # none of them twice
    assert {n: line.decisions[n][0] for n, _ in announced} == dict(announced)
    silent = len(line.decisions) - len(announced)
    assert 0 <= silent <= line.lanes_started  # each may die once between commit and announcement
    print(f"{line.policy}: {account}, {len(line.rings)} rings seen, {silent} announced by nobody")
