"""Signed files, fetched in pieces that survive disconnects, kills and power cuts.

A file grows in place as FOLDER/SHA256; FOLDER/SHA256.synced says how much of it is on the disk for
certain. After a kill or a power cut it goes on from there: what lies beyond may be anything. It is
used only once its length and SHA-256 are those that were signed.
"""

import hashlib
import math
import os
import random
import re
import time
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from pathlib import Path

from common import durable
from common.archive import RESERVE_BYTES
from common.errors import FetchError, StorageError, UntrustedError
from services.updater.budget import Budget
from services.updater.sources import BLOCK, NoRangesError, Source

PIECE = 4 << 20  # asked for at once
SYNC_S = 20.0  # on slow networks what came is synced in between
TRIES = 6  # in a row without a block's worth of progress
BACKOFF_S = 1.0  # after the first of them; then twice that, and so on
BURST_S = 1.0  # of its rate that a download may catch up on
_HASHES = {64: hashlib.sha256, 128: hashlib.sha512}  # by how many hex digits
_MAY_CHANGE = (0, 500, 502, 503, 504)  # status of what another try may bring


def download(
    source: Source,
    path: str,
    length: int,
    digest: str,
    partial: Path,
    budget: Budget | None,
    *,
    pause: Callable[[float], bool],
    update: str = "",
    rate_b_s: float | None = None,
    room: int = 0,
    progress: Callable[[int], None] | None = None,
    backoff_s: float = BACKOFF_S,
) -> Path | None:
    """Fetch a file of a repository, or what is missing of it; returns where it lies complete.

    Args:
        length, digest: as they were signed; of SHA-256, or SHA-512.
        partial: folder of what is under way.
        budget: what may be moved for `update`; None: any amount, such as from a USB stick.
        pause: waits so many seconds; whether to stop, as `threading.Event.wait`. What came so far
            is kept, and None returned.
        rate_b_s: bytes a second, at most.
        room: bytes that have to stay free beside the file, such as to unpack it.
        progress: told how many bytes there are, after each piece.

    Raises:
        FetchError: the source says no, or fails again and again.
        BudgetError: what may be moved is used up.
        StorageError: the disk has no room, or refuses. As above, what came so far is kept.
        UntrustedError: it is not what was signed; nothing of it is kept.
    """
    if not re.fullmatch("[0-9a-f]*", digest) or len(digest) not in _HASHES:
        raise UntrustedError(f"{path}: its SHA-256 is {digest[:80]!r}; expected 64 hex digits")
    rate, tries, whole = _Rate(rate_b_s), _Tries(backoff_s), False
    try:
        with closing(_Partial(partial, digest)) as file:
            while file.size < length:
                if whole and file.size:
                    file.restart()
                start = file.size
                _check_room(partial, length - start, room)
                asked = length - start if whole else min(PIECE, length - start)
                if budget:
                    asked = budget.reserve(update, asked, asked if whole else 1)
                stop, wait_s = False, 0.0
                try:
                    stop = _fetch(source, path, start + asked, file, rate, pause)
                except NoRangesError as error:
                    whole, wait_s = True, tries.failed(error, math.inf)
                except FetchError as error:
                    wait_s = tries.failed(error, file.size)
                finally:
                    if budget:
                        budget.settle(update, start + asked - file.size)
                file.sync()
                if progress:
                    progress(file.size)
                if stop or pause(wait_s):
                    return None
            told = file.hash.hexdigest()
            if file.size == length and told == digest:
                return file.path
            file.remove()
            raise UntrustedError(
                f"{source.name}: {path}: {file.size} bytes of digest {told} came; "
                f"signed are {length} of {digest}"
            )
    except OSError as error:
        raise StorageError(f"{partial / digest}: can't be written: {error.strerror}") from error


def tidy(folder: Path, keep: Collection[str]) -> None:
    """Remove what is under way in `folder`, but for these, by their SHA-256.

    Raises:
        StorageError: something can't be removed.
    """
    try:
        for path in folder.iterdir() if folder.exists() else ():
            if path.name.removesuffix(".synced") not in keep:
                path.unlink()
    except OSError as error:
        raise StorageError(f"{error.filename}: can't be removed: {error.strerror}") from error


class _Partial:
    """The bytes so far. Whatever it does may raise OSError or StorageError."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        self.path, self._note = folder / name, folder / f"{name}.synced"
        self._open()

    def _open(self) -> None:
        self.size, self.hash = 0, _HASHES[len(self.path.name)]()
        for path in (self.path, self._note):
            if path.is_symlink() or not path.is_file():
                durable.remove(path)
        try:
            synced = int(self._note.read_bytes())
        except (FileNotFoundError, ValueError):
            synced = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        while block := os.read(self._fd, max(0, min(BLOCK, synced - self.size))):
            self._count(block)
        os.ftruncate(self._fd, self.size)
        self._synced, self._synced_s = self.size, time.monotonic()

    def _count(self, block: bytes | memoryview) -> None:
        self.hash.update(block)
        self.size += len(block)

    def append(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            written = os.write(self._fd, rest)
            self._count(rest[:written])
            rest = rest[written:]
        if time.monotonic() - self._synced_s >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        if self.size > self._synced:
            os.fsync(self._fd)
            durable.write(self._note, b"%d\n" % self.size)  # which makes the file's name durable
            self._synced, self._synced_s = self.size, time.monotonic()

    def remove(self) -> None:
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        durable.sync_folder(self.path.parent)  # before a new file: the note never says too much
        self._synced = self.size

    def restart(self) -> None:
        self.remove()
        old = self._fd
        self._open()
        os.close(old)

    def close(self) -> None:
        with suppress(OSError, StorageError):  # it was kept as well as can be
            self.sync()
        os.close(self._fd)


class _Rate:
    """A bucket of tokens, in the time at which all that came is paid for."""

    def __init__(self, rate_b_s: float | None) -> None:
        self._rate_b_s, self._paid_s = rate_b_s, time.monotonic()

    def owed_s(self, count: int) -> float:
        """How long to wait after so many bytes."""
        if self._rate_b_s is None:
            return 0.0
        now = time.monotonic()
        self._paid_s = max(self._paid_s, now - BURST_S) + count / self._rate_b_s
        return max(0.0, self._paid_s - now)


class _Tries:
    def __init__(self, backoff_s: float) -> None:
        self._backoff_s = backoff_s
        self._count, self._goal = 0, 0.0

    def failed(self, error: FetchError, size: float) -> float:
        """How long to wait before the next try.

        Args:
            size: bytes so far; with inf, none counts as progress from now on.

        Raises:
            FetchError: there is no use in one.
        """
        if size >= self._goal:
            self._count, self._goal = 0, size + BLOCK
        self._count += 1
        hopeless = error.status not in _MAY_CHANGE and not isinstance(error, NoRangesError)
        if hopeless or error.wait_s or self._count == TRIES:
            raise error
        return self._backoff_s * 2.0 ** (self._count - 1) * random.uniform(0.5, 1.5)


def _fetch(
    source: Source,
    path: str,
    end: int,
    file: _Partial,
    rate: _Rate,
    pause: Callable[[float], bool],
) -> bool:
    """Append a source's bytes up to `end`; whether to stop."""
    with closing(source.read(path, file.size, end)) as blocks:
        for block in blocks:
            file.append(block)
            if pause(rate.owed_s(len(block))):
                return True
    if file.size < end:
        raise FetchError(f"{source.name}: {path}: ends at byte {file.size}; more was signed", 416)
    return False


def _check_room(folder: Path, missing: int, room: int) -> None:
    volume = os.statvfs(folder)
    free, needed = volume.f_bavail * volume.f_frsize, missing + room + RESERVE_BYTES
    if needed > free:
        raise StorageError(
            f"{folder}: has {free / 1e6:.1f} MB free, the update needs {needed / 1e6:.1f} MB; "
            f"make room"
        )
