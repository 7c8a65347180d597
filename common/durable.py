"""Files that survive a power cut: everyone who persists writes through here."""

import os
from contextlib import suppress
from pathlib import Path

from common.errors import StorageError


def write(path: Path, content: bytes, mode: int = 0o640) -> None:
    """Replace `path` whole: write a sibling, sync it, rename it, sync the folder.

    After a power cut at any instant `path` holds the old content or the new.

    Raises:
        StorageError: the file system refuses (full, read-only, worn); the old content stands.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(fd)
        finally:
            os.close(fd)
        new.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise StorageError(f"{path}: can't be written: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def set_aside(path: Path) -> Path:
    """Keep a damaged file for a look, as NAME.broken, out of its readers' way."""
    broken = path.with_name(f"{path.name}.broken")
    path.rename(broken)
    sync_folder(path.parent)
    return broken
