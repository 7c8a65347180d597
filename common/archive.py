"""Bundles as tar files: packed the same each time, unpacked without trust.

A bundle is a plain POSIX ustar archive (IEEE Std 1003.1-1988, "Extended tar Format") of regular
files and folders. Everything else is refused while the headers are read, before the first byte is
written: links, devices, FIFOs; sparse files, PAX and GNU extensions (which rename and resize what
follows them); compression (so nothing grows by being unpacked); names that leave the folder, or
that some file system would take for one another.
"""

import os
import shutil
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.digest import digest
from common.durable import sync_folder
from common.errors import BundleError, StorageError

_BLOCK = 512
_COPY_BYTES = 1 << 20
RESERVE_BYTES = 16 << 20  # stays free, for the record of slots and the journals

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED |= {b"PK": "zip"}
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device",
    b"6": "a FIFO", b"S": "a sparse file", b"x": "a PAX extension", b"g": "a PAX extension",
    b"L": "a GNU extension", b"K": "a GNU extension",
}  # fmt: skip
_EXPECTED = "expected a tar that scripts/bundle made"


@dataclass(frozen=True)
class Limits:
    """What a bundle may take."""

    total_bytes: int = 1 << 30
    entries: int = 2000
    depth: int = 4  # folders and file name
    name_bytes: int = 200


@dataclass(frozen=True)
class Entry:
    """A regular file, or a folder."""

    name: str  # without ./ before and / after
    size: int
    offset: int  # of its bytes in the tar
    folder: bool


def scan(tar: Path, limits: Limits | None = None) -> list[Entry]:
    """Read every header, and the end, of a tar; its entries in their order.

    Raises:
        BundleError: it is torn, damaged or compressed, too large, or holds what is refused.
        StorageError: it can't be read.
    """
    try:
        with _open(tar) as file:
            return _scan(file.fileno(), str(tar), limits or Limits())
    except OSError as error:
        raise StorageError(f"{tar}: can't be read: {error.strerror}") from error


def unpack(tar: Path, into: Path, limits: Limits | None = None) -> str:
    """Unpack into a new folder `into`, synced to the disk; returns its digest.

    Raises:
        BundleError: as `scan`; `into` is not there afterwards.
        StorageError: the disk has no room, or refuses; `into` is not there afterwards.
    """
    try:
        with _open(tar) as file:
            entries = _scan(file.fileno(), str(tar), limits or Limits())
            _check_room(entries, into.parent)
            into.mkdir(mode=0o750)
            try:
                _write(file.fileno(), entries, into)
                return digest(into)
            except BaseException:
                shutil.rmtree(into, ignore_errors=True)
                raise
    except OSError as error:
        where = error.filename or into
        raise StorageError(f"{tar}: can't be unpacked: {where}: {error.strerror}") from error


def pack(folder: Path, tar: Path) -> None:
    """Write a folder as a tar: the same bytes for the same names and contents.

    Raises:
        BundleError: it holds something other than files and folders, or a name is too long.
        StorageError: a file can't be read, or the tar not written.
    """
    new = tar.with_name(f".{tar.name}.new")
    try:
        with tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise BundleError(f"{path}: expected a regular file or a folder")
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                if path.is_dir():
                    member.type, member.mode = tarfile.DIRTYPE, 0o750
                    archive.addfile(member)
                    continue
                member.mode, member.size = 0o640, path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(member, file)
        new.rename(tar)
    except ValueError as error:
        raise BundleError(f"{folder}: {path.relative_to(folder)}: {error}") from error
    except OSError as error:
        raise StorageError(f"{tar}: can't be packed: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def _open(tar: Path) -> BinaryIO:
    if not tar.is_file():  # opening a FIFO would wait for ever
        raise BundleError(f"{tar}: is no file; {_EXPECTED}")
    return tar.open("rb")


# -- reading headers -------------------------------------------------------------------------------


def _scan(fd: int, where: str, limits: Limits) -> list[Entry]:
    names = _Names(where, limits)
    entries: list[Entry] = []
    total = offset = 0
    length = os.fstat(fd).st_size
    for magic, kind in _COMPRESSED.items():
        if os.pread(fd, len(magic), 0) == magic:
            raise BundleError(f"{where}: is compressed ({kind}); expected a plain tar")
    while True:
        header = os.pread(fd, _BLOCK, offset)
        if len(header) < _BLOCK:
            raise BundleError(f"{where}: is cut off at byte {length}: its end is missing")
        if header == bytes(_BLOCK):
            break
        entry = _entry(header, offset + _BLOCK, where)
        total += entry.size
        if total > limits.total_bytes:
            raise BundleError(f"{where}: holds more than the {limits.total_bytes} bytes allowed")
        if len(entries) == limits.entries:
            raise BundleError(f"{where}: holds more than the {limits.entries} entries allowed")
        offset = entry.offset + -(-entry.size // _BLOCK) * _BLOCK
        if offset > length:
            raise BundleError(f"{where}: is cut off at byte {length}, in {entry.name}")
        if entry.name != ".":
            names.add(entry)
            entries.append(entry)
    _check_end(fd, offset, length, where)
    if not any(not entry.folder for entry in entries):
        raise BundleError(f"{where}: holds no file; {_EXPECTED}")
    return entries


def _entry(header: bytes, offset: int, where: str) -> Entry:
    """Decode a header block; `offset` is where it ends."""
    at = f"{where}: at byte {offset - _BLOCK}"
    sums = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    magic = header[257:263]
    if _octal(header[148:156]) != sums or magic not in (b"ustar\0", b"ustar "):
        raise BundleError(f"{at}: no valid tar header; {_EXPECTED}")
    raw = header[:100].split(b"\0")[0]
    if magic == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        raw = prefix + b"/" + raw
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise BundleError(f"{at}: the name {raw!r} is not UTF-8; {_EXPECTED}") from None
    kind = header[156:157]
    if kind not in (b"0", b"\0", b"5"):
        what = _REFUSED.get(kind, f"of unknown type {kind!r}")
        raise BundleError(f"{at}: {name!r} is {what}; a bundle holds regular files and folders")
    folder, size = kind == b"5", _octal(header[124:136])
    if size is None or (folder and size):
        raise BundleError(f"{at}: {name!r} has no valid size; {_EXPECTED}")
    if folder:
        name = name.removesuffix("/")
    return Entry(name.removeprefix("./") or ".", size, offset, folder)


def _octal(field: bytes) -> int | None:
    """A number as ustar writes it; None where it is none (GNU's base-256 among them)."""
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and all(digit in b"01234567" for digit in digits) else None


class _Names:
    """The names so far, folders that are only implied among them."""

    def __init__(self, where: str, limits: Limits) -> None:
        self._where, self._limits = where, limits
        self._seen: dict[str, tuple[str, bool]] = {}  # alike -> as it is written, whether a folder
        self._listed: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Raises: BundleError: this name may not be, or not beside the others."""
        name, parts = entry.name, entry.name.split("/")
        if name.startswith("/") or ".." in parts:
            raise self._error(name, "leaves the bundle's folder")
        if "" in parts or "." in parts or not name.isprintable():
            raise self._error(name, "is no plain path")
        if len(os.fsencode(name)) > self._limits.name_bytes:
            raise self._error(name, f"has more than {self._limits.name_bytes} bytes")
        if len(parts) > self._limits.depth:
            raise self._error(name, f"lies more than {self._limits.depth} deep")
        if name in self._listed:
            raise self._error(name, "occurs twice")
        self._listed.add(name)
        for depth in range(1, len(parts) + 1):
            path, folder = "/".join(parts[:depth]), depth < len(parts) or entry.folder
            alike = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
            other, was_folder = self._seen.setdefault(alike, (path, folder))
            if other != path:
                raise self._error(name, f"differs from {other!r} only by case or normalisation")
            if was_folder != folder:
                raise self._error(path, "is both a file and a folder")

    def _error(self, name: str, what: str) -> BundleError:
        return BundleError(f"{self._where}: the name {name!r} {what}")


def _check_end(fd: int, offset: int, length: int, where: str) -> None:
    """An archive ends with two blocks of zeros; nothing but zeros may follow."""
    if length - offset < 2 * _BLOCK:
        raise BundleError(f"{where}: is cut off at byte {length}: its end is missing")
    while block := os.pread(fd, _COPY_BYTES, offset):
        if block.strip(b"\0"):
            raise BundleError(f"{where}: something follows its end; {_EXPECTED}")
        offset += len(block)


# -- writing files ---------------------------------------------------------------------------------


def _check_room(entries: list[Entry], folder: Path) -> None:
    volume = os.statvfs(folder)
    block = volume.f_frsize
    needed = sum(-(-entry.size // block) * block + block for entry in entries) + RESERVE_BYTES
    free = volume.f_bavail * block
    if needed > free:
        raise StorageError(
            f"{folder}: has {free >> 20} MB free, the bundle needs {needed >> 20} MB; make room"
        )


def _write(tar: int, entries: list[Entry], into: Path) -> None:
    folders = {into}
    for entry in entries:
        target = into / entry.name
        folder = target if entry.folder else target.parent
        missing = [f for f in (folder, *folder.parents) if f.is_relative_to(into)]
        for parent in reversed(missing):
            parent.mkdir(mode=0o750, exist_ok=True)
            folders.add(parent)
        if entry.folder:
            continue
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(target, flags, 0o640)
        with os.fdopen(fd, "wb") as file:
            for block in _blocks(tar, entry):
                file.write(block)
            file.flush()
            os.fsync(fd)
    for folder in sorted(folders, reverse=True):  # a folder after those in it
        sync_folder(folder)


def _blocks(tar: int, entry: Entry) -> Iterator[bytes]:
    at, end = entry.offset, entry.offset + entry.size
    while at < end:
        block = os.pread(tar, min(_COPY_BYTES, end - at), at)
        if not block:
            raise BundleError(f"{entry.name}: the tar became shorter while it was read")
        at += len(block)
        yield block
