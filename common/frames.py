"""The frame ring: pixels in shared memory, the journal of decisions, the account of every frame.

A ring is a file in the run folder's tmpfs, `rings/<camera>.<generation>`, made anew when a camera's
size changes. It has one writer (capture) and any readers. Sequence numbers are per camera, start at
1 and go on across rings. Files are the truth: a message only says that there is something to read.

    header    words of 64 bits, those of different writers on cache lines of their own
    slots     a line each: sequence (0 while it is written), captured_ns, filled_ns, sight, trigger
    journal   W entries: sequence, epoch, run, slot, length, bytes of the result
    pixels    slots x picture, uint8, rows x columns x channels (BGR), page aligned

Who may decide is the fence's epoch; a frame is judged once its entry stands in the journal and
`decided` has reached it. Both change only under the camera's lock (see `common.account`).
Stores are ordered by `Order`: x86 keeps them so by itself, Arm does not.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from common.account import COUNTS, Account, Order, Totals, allocate, map_file
from common.errors import FencedError, RingError, RingFullError, RingGoneError
from common.geometry import View
from common.states import Policy, Sight

MAGIC = int.from_bytes(b"VIGILRNG", "little")
LAYOUT = 2
JOURNAL = 128  # entries
ENTRY_BYTES = 8192
ENTRY_HEAD = 5 * 8
RESULT_BYTES = ENTRY_BYTES - ENTRY_HEAD  # the longest result that fits

_LINE = 8  # words in a cache line
_PAGE = mmap.PAGESIZE
_POLICIES = (Policy.LATEST, Policy.EVERY)

# header words
(_MAGIC, _LAYOUT, _GENERATION, _WIDTH, _HEIGHT, _CHANNELS, _SLOTS, _POLICY) = range(8)
_BASE = 1 * _LINE  # sequence before this ring's first
_WRITTEN, _SUCCESSOR = 2 * _LINE, 2 * _LINE + 1  # capture
_FENCE = 3 * _LINE  # the lane going live, under the lock
_DECIDED = 4 * _LINE  # the lane holding the fence, under the lock
_ATTEMPT, _ATTEMPTS = 5 * _LINE, 5 * _LINE + 1  # the same lane, before it infers
_VIEW = 6 * _LINE  # full width and height, then six doubles
_SLOT_LINES = 8 * _LINE


@dataclass(frozen=True)
class Shape:
    """What a ring is made for; another shape is another ring."""

    width: int
    height: int
    channels: int = 3
    slots: int = 4
    policy: Policy = Policy.LATEST
    view: View | None = None  # how it lies in the camera's full picture; None: it is that

    @property
    def full(self) -> tuple[int, int]:
        """Width and height of the camera's own full picture, which results refer to."""
        view = self.view
        return (view.full_width, view.full_height) if view else (self.width, self.height)

    @property
    def picture_bytes(self) -> int:
        return self.width * self.height * self.channels

    @property
    def slot_bytes(self) -> int:
        return -(-self.picture_bytes // _PAGE) * _PAGE

    @property
    def journal_at(self) -> int:
        return _SLOT_LINES * 8 + self.slots * _LINE * 8

    @property
    def pixels_at(self) -> int:
        return -(-(self.journal_at + JOURNAL * ENTRY_BYTES) // _PAGE) * _PAGE

    @property
    def file_bytes(self) -> int:
        return self.pixels_at + self.slots * self.slot_bytes

    def __str__(self) -> str:
        return f"{self.slots} slots of {self.width}x{self.height}x{self.channels}, {self.policy}"


@dataclass(frozen=True)
class Entry:
    """One decision as the journal has it."""

    sequence: int
    epoch: int
    run: int
    slot: int
    result: bytes


class Ring:
    """One generation of a camera's ring. Use `create`, `attach` (capture) or `open` (readers).

    A Ring belongs to one thread.
    """

    def __init__(self, path: Path, account: Path, *, writable: bool) -> None:
        self.path = path
        self.camera, _, generation = path.name.rpartition(".")
        self._writable = writable
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size < _SLOT_LINES * 8:
                raise RingError(f"{path}: {size} bytes are no ring; remove it and restart capture")
            self._map = map_file(fd, size, writable=writable)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: size // 8 * 8].cast("Q")
        words = self._words
        if words[_MAGIC] != MAGIC or words[_LAYOUT] != LAYOUT:
            raise RingError(f"{path}: not a ring of layout {LAYOUT}; remove it and restart capture")
        self.generation = words[_GENERATION]
        policy = _POLICIES[words[_POLICY] % len(_POLICIES)]
        view = View.unpack(self._bytes[_VIEW * 8 : (_VIEW + _LINE) * 8])
        size_of = words[_WIDTH], words[_HEIGHT], words[_CHANNELS], words[_SLOTS]
        self.shape = Shape(*size_of, policy, view)
        named = f"{self.generation}" == generation and _POLICIES.index(policy) == words[_POLICY]
        if not named or not self.shape.slots or self.shape.file_bytes != size:
            raise RingError(f"{path}: its header contradicts its name or size; remove it")
        self._journal = self.shape.journal_at // 8
        self._order = Order()
        self._totals = Totals(account, writable=writable)

    # -- making and finding ------------------------------------------------------------------

    @classmethod
    def create(cls, rings: Path, accounts: Path, camera: str, shape: Shape) -> Self:
        """Make a camera's next ring; space is reserved at once, readers see it when it is whole.

        Raises:
            RingError: the tmpfs has no room; the message gives both sizes.
        """
        for orphan in rings.glob(f".{camera}.*.new"):
            orphan.unlink()
        older = generations(rings, camera)
        generation, base = 1, 0
        if older:
            with cls.open(rings, accounts, camera, older[-1]) as last:
                generation, base = last.generation + 1, last.written
        path = rings / f"{camera}.{generation}"
        new = rings / f".{camera}.{generation}.new"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
        try:
            allocate(fd, shape.file_bytes, path, str(shape))
            head = [0] * _SLOT_LINES
            head[:8] = [
                MAGIC, LAYOUT, generation, shape.width, shape.height, shape.channels, shape.slots,
                _POLICIES.index(shape.policy),
            ]  # fmt: skip
            head[_BASE] = head[_WRITTEN] = head[_DECIDED] = base
            os.pwrite(fd, b"".join(word.to_bytes(8, "little") for word in head), 0)
            if shape.view is not None:
                os.pwrite(fd, shape.view.pack(), _VIEW * 8)
            Totals(accounts / camera, writable=True).close()  # who finds a ring finds its account
        except BaseException:
            new.unlink()
            raise
        finally:
            os.close(fd)
        new.rename(path)
        cls._link(rings, accounts, camera)
        return cls(path, accounts / camera, writable=True)

    @classmethod
    def attach(cls, rings: Path, accounts: Path, camera: str, shape: Shape) -> Self:
        """The ring for capture: the newest where its shape is the same, else a new one."""
        existing = generations(rings, camera)
        if existing:
            ring = cls.open(rings, accounts, camera, existing[-1], writable=True)
            if ring.shape == shape:
                cls._link(rings, accounts, camera)
                return ring
            ring.close()
        return cls.create(rings, accounts, camera, shape)

    @classmethod
    def _link(cls, rings: Path, accounts: Path, camera: str) -> None:
        """Tell each older ring its successor, also where capture died before it could."""
        for older, newer in pairwise(generations(rings, camera)):
            with cls.open(rings, accounts, camera, older, writable=True) as ring:
                ring._words[_SUCCESSOR] = newer

    @classmethod
    def open(
        cls, rings: Path, accounts: Path, camera: str, generation: int, *, writable: bool = False
    ) -> Self:
        """A ring for a lane (`writable`) or for looking.

        Raises:
            RingGoneError: there is none of that generation (any more).
            RingError: the file is not a ring.
        """
        try:
            return cls(rings / f"{camera}.{generation}", accounts / camera, writable=writable)
        except FileNotFoundError as error:
            raise RingGoneError(f"{camera}: no ring {generation} in {rings}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap, at the latest when the last view that `begin` or `pixels` gave is gone."""
        self._words.release()
        self._bytes.release()
        with suppress(BufferError):
            self._map.close()
        self._totals.close()

    # -- the words ---------------------------------------------------------------------------

    @property
    def base(self) -> int:
        return self._words[_BASE]

    @property
    def written(self) -> int:
        return self._words[_WRITTEN]

    @property
    def decided(self) -> int:
        return self._words[_DECIDED]

    @property
    def fence(self) -> int:
        return self._words[_FENCE]

    @property
    def attempted(self) -> tuple[int, int]:
        """The sequence that was given to an engine last, and how often it was."""
        return self._words[_ATTEMPT], self._words[_ATTEMPTS]

    @property
    def successor(self) -> int:
        """Generation of the ring that follows this one; 0 while this is the newest."""
        return self._words[_SUCCESSOR]

    @property
    def drained(self) -> bool:
        """Whether no frame here will ever be decided any more."""
        every = self.shape.policy is Policy.EVERY
        return self.successor != 0 and (self.decided == self.written or not every)

    @property
    def full(self) -> bool:
        """Whether the next frame would overwrite one that is not decided."""
        return self.written + 1 - self.shape.slots > self.decided

    # -- writing (capture) -------------------------------------------------------------------

    def begin(self) -> memoryview:
        """The pixels of the next slot, to be filled in place, then `publish`ed.

        Raises:
            RingFullError: under `every`, the frame there is not decided yet.
        """
        sequence = self.written + 1
        if self.full and self.shape.policy is Policy.EVERY:
            raise RingFullError(f"{self.camera}: frame {sequence - self.shape.slots} is undecided")
        self._words[self._line(sequence)] = 0
        self._order()
        return self._picture(sequence)

    def publish(
        self, captured_ns: int, filled_ns: int, sight: Sight = Sight.CLEAR, trigger: int = 0
    ) -> int:
        """Hand over the slot that `begin` gave; returns its sequence number."""
        sequence = self.written + 1
        line = self._line(sequence)
        self._words[line + 1], self._words[line + 2] = captured_ns, filled_ns
        self._words[line + 3], self._words[line + 4] = sight, trigger
        self._order()
        self._words[line] = sequence
        self._order()
        self._words[_WRITTEN] = sequence
        return sequence

    def count_overrun(self) -> None:
        """A live camera's frame found no free slot."""
        self._totals.count_overrun()

    # -- reading -----------------------------------------------------------------------------

    def pixels(self, sequence: int) -> memoryview | None:
        """The picture of `sequence` where it is still there; ask `intact` after the last use."""
        return self._picture(sequence) if self.intact(sequence) else None

    def intact(self, sequence: int) -> bool:
        """Whether the slot still holds `sequence`: False says that what was read is torn."""
        self._order()
        return sequence > 0 and self._words[self._line(sequence)] == sequence

    def times(self, sequence: int) -> tuple[int, int]:
        """captured_ns and filled_ns of a slot; valid if `intact` afterwards."""
        line = self._line(sequence)
        return self._words[line + 1], self._words[line + 2]

    def marks(self, sequence: int) -> tuple[Sight, int]:
        """What capture says of the frame, and the trigger it answers (0: none); as `times`."""
        line = self._line(sequence)
        return Sight(self._words[line + 3]), self._words[line + 4]

    def entry(self, sequence: int) -> Entry | None:
        """The decision on `sequence`, or None where it has none (skipped) or has no more."""
        at = self._entry(sequence)
        if self._words[at] != sequence or not 0 < sequence <= self.decided:
            return None
        self._order()
        _, epoch, run, slot, length = self._words[at : at + 5]
        start = at * 8 + ENTRY_HEAD
        result = bytes(self._bytes[start : start + min(length, RESULT_BYTES)])
        self._order()
        if self._words[at] != sequence:
            return None
        return Entry(sequence, epoch, run, slot, result)

    def account(self) -> Account:
        """The camera's account, this being its newest ring."""
        while True:
            covered, overrun = self._covered(), self._totals.overrun
            totals = last, *counts = self._totals.committed(covered)
            written = self.written
            self._order()
            now = self._covered(), self._totals.overrun, self._totals.committed(covered)
            if now == (covered, overrun, totals):
                return Account(
                    captured=written + overrun,
                    **dict(zip(COUNTS, counts, strict=True)),
                    overrun=overrun,
                    in_flight=written - last,
                )

    # -- deciding (lanes) --------------------------------------------------------------------

    def raise_fence(self, epoch: int, *, wait: bool = True) -> bool:
        """Take the right to decide here. It only rises.

        Args:
            wait: for the camera's lock; never while the state lock is held.

        Returns: False where the lock was not free.

        Raises:
            FencedError: another epoch, not older than this one, holds it.
        """
        with self._totals.lock(wait=wait) as mine:
            if not mine:
                return False
            if epoch < self.fence:
                raise FencedError(f"{self.camera}: fence is at epoch {self.fence}, not {epoch}")
            self._words[_FENCE] = epoch
            return True

    def attempt(self, sequence: int) -> int:
        """Note, before inferring, that `sequence` is tried; returns which attempt this is."""
        count = self._words[_ATTEMPTS] + 1 if self._words[_ATTEMPT] == sequence else 1
        self._words[_ATTEMPTS] = 0
        self._words[_ATTEMPT] = sequence
        self._words[_ATTEMPTS] = count
        return count

    def decide(
        self,
        sequence: int,
        epoch: int,
        run: int,
        slot: int,
        kind: str,
        result: bytes,
        torn: int = 0,
    ) -> None:
        """Judge a frame, once: journal entry, totals, then `decided`, which commits both.

        Args:
            kind: `inferred`, `not_inferred` or `failed`, the counter that grows.
            torn: how many of the frames passed over since the last decision were torn in reading;
                the others count as skipped.

        Raises:
            FencedError: another epoch may decide here, or `sequence` is not the next, here or in
                the order of rings. Nothing has changed then.
        """
        if len(result) > RESULT_BYTES:
            raise RingError(f"{self.camera}: a result of {len(result)} bytes; {RESULT_BYTES} fit")
        with self._totals.lock():
            decided = self.decided
            if self.fence != epoch:
                raise FencedError(f"{self.camera}: epoch {self.fence} decides here, not {epoch}")
            gap = sequence > decided + 1 and self.shape.policy is Policy.EVERY
            if gap or not decided < sequence <= self.written:
                raise FencedError(f"{self.camera}: frame {sequence} can't follow {decided}")
            covered = self._covered()
            self._check_order_of_rings(covered)
            last, *counts = self._totals.committed(covered)
            passed = sequence - last - 1
            counts[COUNTS.index(kind)] += 1
            counts[COUNTS.index("torn")] += min(torn, passed)
            counts[COUNTS.index("skipped")] += passed - min(torn, passed)
            self._totals.stage(covered, (sequence, *counts))

            # An entry that a killed lane wrote and did not commit must not count now.
            for passed_over in range(max(decided, sequence - JOURNAL) + 1, sequence):
                if self._words[self._entry(passed_over)] == passed_over:
                    self._words[self._entry(passed_over)] = 0
            at, start = self._entry(sequence), self._entry(sequence) * 8 + ENTRY_HEAD
            self._words[at] = 0
            self._order()
            for i, word in enumerate((epoch, run, slot, len(result)), start=1):
                self._words[at + i] = word
            self._bytes[start : start + len(result)] = result
            self._order()
            self._words[at] = sequence
            self._order()
            self._words[_DECIDED] = sequence

    def _check_order_of_rings(self, covered: int) -> None:
        if self.successor and self._totals.newest > self.written:
            raise FencedError(f"{self.camera}: frames of ring {self.successor} are decided already")
        if covered < self.base:
            for ring in self._older():
                if not ring.drained:
                    first = ring.generation
                    raise FencedError(f"{self.camera}: ring {first} is to be decided first")

    def _covered(self) -> int:
        """Up to where totals count: `decided` of the ring in which was decided last."""
        if self.decided == self.base:
            for ring in self._older():
                return ring._covered()
        return self.decided

    def _older(self) -> Iterator["Ring"]:
        """The rings before this one that are still there, newest first."""
        for generation in reversed(generations(self.path.parent, self.camera)):
            path = self.path.with_name(f"{self.camera}.{generation}")
            if generation < self.generation:
                with (
                    suppress(FileNotFoundError),
                    Ring(path, self._totals.path, writable=False) as r,
                ):
                    yield r

    # -- places ------------------------------------------------------------------------------

    def _line(self, sequence: int) -> int:
        return _SLOT_LINES + sequence % self.shape.slots * _LINE

    def _entry(self, sequence: int) -> int:
        return self._journal + sequence % JOURNAL * (ENTRY_BYTES // 8)

    def _picture(self, sequence: int) -> memoryview:
        start = self.shape.pixels_at + sequence % self.shape.slots * self.shape.slot_bytes
        return self._bytes[start : start + self.shape.picture_bytes]


def generations(rings: Path, camera: str) -> list[int]:
    """The generations of a camera's rings that exist, oldest first."""
    names = (path.name.rpartition(".") for path in rings.glob(f"{camera}.*"))
    return sorted(int(number) for name, _, number in names if name == camera and number.isdigit())


def remove_drained(rings: Path, accounts: Path, camera: str, keep: int = 0) -> bool:
    """Remove those older rings of a camera in which nothing is left to decide, and from which a
    lane has moved on: until then their `decided` tells which totals count. The newest `keep` of
    the older ones stay. Returns whether older rings are left."""
    moved_on = False
    for place, generation in enumerate(reversed(generations(rings, camera))):
        with Ring.open(rings, accounts, camera, generation) as ring:
            done = ring.drained and (moved_on or ring.decided == ring.written)
            moved_on = moved_on or ring.decided > ring.base
        if done and place > keep:
            ring.path.unlink(missing_ok=True)
    return len(generations(rings, camera)) > 1
