"""The processes of test_ring_kills.py: `python -m tests.faults.ring_programs NAME ARGUMENT...`.

A picture is its sequence number, repeated: whoever reads another one than it asked for knows it.
"""

import mmap
import os
import sys
import time
from pathlib import Path

from common.errors import FencedError, RingError
from common.frames import JOURNAL, Ring, Shape, generations, remove_drained
from common.states import Policy

CAMERA = "belt"
LEAD = JOURNAL // 2  # decided frames that the journal's reader may be behind, at the most


class Cursor:
    """How far the journal's reader is: a word in shared memory, so that nothing laps it."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")

    def get(self) -> int:
        return self._words[0]

    def set(self, value: int) -> None:
        self._words[0] = value


def picture(sequence: int, size: int) -> bytes:
    return sequence.to_bytes(8, "little") * (size // 8)


def capture(folder: Path, policy: str, width: int) -> None:
    """Write frames as fast as they fit, for ever."""
    rings, accounts = folder / "rings", folder / "accounts"
    shape = Shape(width, 48, slots=2, policy=Policy(policy))
    ring = Ring.attach(rings, accounts, CAMERA, shape)
    reader = Cursor(folder / "cursor")
    older = True
    while True:
        if older and reader.get() >= ring.base:
            older = remove_drained(rings, accounts, CAMERA)
        if (policy == "every" and ring.full) or ring.written >= reader.get() + LEAD:
            time.sleep(0)
            continue
        content = picture(ring.written + 1, shape.picture_bytes)
        slot = ring.begin()
        half = len(content) // 2
        slot[:half] = content[:half]
        time.sleep(0)  # gives others the processor just here
        slot[half:] = content[half:]
        ring.publish(time.monotonic_ns(), time.monotonic_ns())


def lane(folder: Path, name: str) -> None:
    """Wait for an epoch on standard input, go live with it, decide until another one does."""
    print("ready", flush=True)
    epoch = int(sys.stdin.readline())
    log = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rings, accounts = folder / "rings", folder / "accounts"
    done = 0
    while True:
        for generation in generations(rings, CAMERA):
            if generation > done:
                try:
                    ring = Ring.open(rings, accounts, CAMERA, generation, writable=True)
                except RingError:  # removed meanwhile
                    continue
                try:
                    with ring:
                        ring.raise_fence(epoch)
                        _decide_all(ring, epoch, log)
                except FencedError:
                    return
                done = generation


def _decide_all(ring: Ring, epoch: int, log: int) -> None:
    """Judge each frame of a ring until it is drained."""
    every = ring.shape.policy is Policy.EVERY
    torn = 0
    while not ring.drained:
        sequence = ring.decided + 1 if every else ring.written
        if not ring.decided < sequence <= ring.written:
            time.sleep(0)
            continue
        ring.attempt(sequence)
        view = ring.pixels(sequence)
        seen = b""
        if view is not None:
            with view:
                half = len(view) // 2
                seen = bytes(view[:half])
                time.sleep(0)
                seen += bytes(view[half:])
        if not ring.intact(sequence):
            still_mine = ring.fence == epoch and ring.decided < sequence
            assert not (every and still_mine), f"frame {sequence} was overwritten undecided"
            torn += 1
            continue
        right = seen == picture(sequence, len(seen))
        result = b"%d %d" % (sequence, right)
        ring.decide(sequence, epoch, os.getpid(), 1, "inferred", result, torn)
        torn = 0
        os.write(log, b"%d %d\n" % (sequence, epoch))


if __name__ == "__main__":
    if sys.argv[1] == "capture":
        capture(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        lane(Path(sys.argv[2]), sys.argv[3])
