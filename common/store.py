"""The record of slots on disk, and the slots' folders: one commit a transition, under one lock.

    models/<group>/state.0 state.1   the record's two newest versions; the valid one with the
                                     highest sequence counts
    models/<group>/slots/<sha256>/   unpacked bundles, immutable
    models/<group>/staging/          what is on its way in or out

The lock is a flock on a file of the run folder, which also says, by a byte, that a commit is not
synced yet: who finds that byte syncs the folder before acting on what was read. A file is
`vigil-state 1 SEQUENCE CRC32` and a line of JSON.
"""

import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from common import durable, slots
from common.bell import Ringer
from common.digest import digest
from common.errors import LockedError, RingError, StorageError
from common.frames import Ring, generations
from common.paths import Paths
from common.processes import record_bell
from common.slots import FACTORY, LANES, PASS, SAFE_MARGIN, Record, Slot

LOCK_S = 5.0
_RETRY_S = 0.002
_FILES = ("state.0", "state.1")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Change = Callable[[Record], Record]


class Store:
    """A group's record and slots. `problems` collects what its owner should announce."""

    def __init__(self, paths: Paths, group: str, lanes: int, boot: str = "") -> None:
        self.group = group
        self.folder = paths.models(group)
        self.slots = self.folder / "slots"
        self.staging = self.folder / "staging"
        self.problems: list[str] = []
        self.lock_path = paths.run / f"state-{group}.lock"
        self._overlay = paths.run / f"state-{group}"  # of this boot, while the disk refuses
        self._paths = paths
        self._lanes = lanes
        self._bells = Ringer(paths.bell(record_bell(group, lane)) for lane in LANES[:lanes])
        self._boot = boot or _BOOT_ID.read_text().strip()
        for folder in (self.slots, self.staging):
            try:
                folder.mkdir(mode=0o770, parents=True, exist_ok=True)
            except OSError as error:
                self.problems.append(f"{folder}: can't be made: {error.strerror}")

    # -- reading -----------------------------------------------------------------------------

    def read(self) -> Record:
        """The record as it stands; needs no lock and may be outdated when it returns."""
        return self._find()[1]

    def _find(self) -> tuple[int, Record, list[Path]]:
        """Sequence and record of the newest valid version, and the files that are damaged."""
        versions: list[tuple[int, Record]] = []
        damaged: list[Path] = []
        missing: list[Path] = []
        for path in (*(self.folder / name for name in _FILES), self._overlay):
            if path == self._overlay and versions and versions[0][0] > 1:
                damaged += missing  # there were two: its finder died after setting it aside
            try:
                versions.append(parse(path.read_bytes()))
            except FileNotFoundError:
                missing.append(path)
            except (OSError, ValueError):
                damaged.append(path)
        if not versions:
            return 0, slots.fitted(Record(lanes={}), self._lanes), damaged
        return *max(versions, key=lambda version: version[0]), damaged

    # -- changing ----------------------------------------------------------------------------

    @contextmanager
    def held(self, wait_s: float = LOCK_S) -> Iterator[Record]:
        """Hold the state lock; gives the record, synced, mended, and accounted for this boot.

        Raises:
            LockedError: somebody else holds it for longer than `wait_s`.
            StorageError: what has to be written before anything else can't be.
        """
        self._fd = self._lock(wait_s)
        try:
            if os.pread(self._fd, 1, 0) == b"1":  # its writer died before it had synced
                try:
                    durable.sync_folder(self.folder)
                except OSError as error:
                    text = f"{self.folder}: can't be synced: {error.strerror}"
                    raise StorageError(text) from error
                os.pwrite(self._fd, b"0", 0)
            yield self._settled()
        finally:
            os.close(self._fd)

    def commit(self, change: Change, *, wait_s: float = LOCK_S, volatile: bool = False) -> Record:
        """Make one transition durable; returns the record after it.

        Args:
            volatile: where the disk refuses, let it count in memory until the next boot. Right
                for a start or takeover on a proven slot; never for a verdict or a try.

        Raises:
            TransitionError: `change` does not apply to the record as it is now.
            LockedError, StorageError: nothing has changed.
        """
        with self.held(wait_s) as record:
            changed = change(record)
            if changed != record:
                self._write(changed, volatile)
        self._bells.ring()
        return changed

    def _settled(self) -> Record:
        sequence, found, damaged = self._find()
        record = found
        if damaged or (not sequence and self._highest_fence()):
            # The newest version may be lost, and with it the last numbers that were given out.
            for path in damaged:
                self.problems.append(f"{path}: the record of slots is damaged; set aside")
                with suppress(OSError):
                    durable.set_aside(path)
            if not sequence:
                self.problems.append(
                    f"{self.folder}: no valid record of slots; beginning anew with the factory's"
                )
            counter = max(record.counter, self._highest_fence()) + SAFE_MARGIN
            record = msgspec.structs.replace(record, counter=counter)
        record = slots.account_boot(slots.fitted(record, self._lanes), self._boot)
        if not sequence:  # the names of the folders themselves, before anything in them counts
            with suppress(OSError):
                durable.sync_folder(self._paths.root)
                durable.sync_folder(self.folder.parent)
        if record != found or not sequence:
            self._write(record, volatile=True)
        return record

    def _write(self, record: Record, volatile: bool) -> None:
        sequence = self._find()[0] + 1
        content = render(sequence, record)
        os.pwrite(self._fd, b"1", 0)
        try:
            durable.write(self.folder / _FILES[sequence % 2], content)
        except StorageError as error:
            if not volatile:
                raise
            self.problems.append(f"{error}; what was decided counts until the next boot")
            durable.write(self._overlay, content)
        os.pwrite(self._fd, b"0", 0)

    def _lock(self, wait_s: float) -> int:
        fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    raise LockedError(
                        f"{self.lock_path}: held by another process for {wait_s:g} s"
                    ) from None
            time.sleep(_RETRY_S)

    def _highest_fence(self) -> int:
        """Over all rings of this boot: epochs that were given out reach at least so far."""
        paths, highest = self._paths, 0
        for camera in {path.name.rpartition(".")[0] for path in paths.rings.glob("[!.]*.*")}:
            for generation in generations(paths.rings, camera):
                with (
                    suppress(RingError),
                    Ring.open(paths.rings, paths.accounts, camera, generation) as ring,
                ):
                    highest = max(highest, ring.fence)
        return highest

    # -- folders -----------------------------------------------------------------------------

    def path(self, slot: str) -> Path:
        """The folder of an unpacked slot."""
        return self.slots / slot

    def verifies(self, slot: str) -> bool:
        """Whether a slot's files are what its name says, to the last bit."""
        if slot in (FACTORY, PASS):
            return True
        try:
            return self.path(slot).is_dir() and digest(self.path(slot)) == slot
        except OSError:
            return False

    def adopt(self, unpacked: Path, name: str, slot: Slot) -> Record:
        """Take a folder of `staging`, synced and verified, into the slots, and refer to it.

        Raises:
            TransitionError: the slot is bad.
            LockedError, StorageError: nothing refers to it.
        """
        whole = self.verifies(name)  # it takes long where there is one: not under the lock
        with self.held() as record:
            changed = slots.install(record, name, slot)
            try:
                if not whole:
                    if self.path(name).is_dir():  # damaged: of no use to anyone
                        self.path(name).rename(self.staging / f"{name}.gone")
                    unpacked.rename(self.path(name))
                durable.sync_folder(self.slots)
                durable.sync_folder(self.staging)
            except OSError as error:
                raise StorageError(f"{self.path(name)}: {error.strerror}") from error
            if changed != record:
                self._write(changed, volatile=False)
        return changed

    def clean_up(self) -> list[str]:
        """Remove the folders that nothing refers to; the reference goes first, durably.

        Raises:
            LockedError, StorageError: some are still there.
        """
        removed = []
        self._sweep()  # a power cut may have left a folder under both its names
        with self.held() as record:
            changed = slots.clean_up(record)
            if changed != record:
                self._write(changed, volatile=False)
            try:
                for path in list(self.slots.iterdir()):
                    if path.name not in changed.references:
                        path.rename(self.staging / f"{path.name}.gone")
                        removed.append(path.name)
            except OSError as error:
                text = f"{error.filename}: can't be removed: {error.strerror}"
                raise StorageError(text) from error
        self._sweep()
        return removed

    def _sweep(self) -> None:
        for path in self.staging.glob("*.gone"):
            shutil.rmtree(path, ignore_errors=True)


def render(sequence: int, record: Record) -> bytes:
    body = msgspec.json.encode(record) + b"\n"
    return f"vigil-state 1 {sequence} {_checksum(sequence, body)}\n".encode() + body


def parse(content: bytes) -> tuple[int, Record]:
    """Sequence and record of a version.

    Raises:
        ValueError: it is torn or damaged.
    """
    head, _, body = content.partition(b"\n")
    kind, layout, sequence, checksum = head.decode("ascii").split(" ")
    if (kind, layout) != ("vigil-state", "1") or checksum != _checksum(int(sequence), body):
        raise ValueError("damaged")
    try:
        return int(sequence), msgspec.json.decode(body, type=Record)
    except msgspec.MsgspecError as error:
        raise ValueError(f"of another version: {error}") from error


def _checksum(sequence: int, body: bytes) -> str:
    return f"{zlib.crc32(body, sequence & 0xFFFFFFFF):08x}"
