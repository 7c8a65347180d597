"""Files that survive a power cut: everyone who persists writes through here."""

import errno
import os
import shutil
import stat
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


def read(path: Path, most: int = 1 << 20) -> bytes:
    """The content of a regular file: what else lies there may have to be waited for, or never end.

    Raises:
        OSError: it is none, has more than `most` bytes, or can't be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            text = f"expected a regular file of at most {most} bytes"
            raise OSError(errno.EINVAL, text, str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove whatever it is, if it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


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
