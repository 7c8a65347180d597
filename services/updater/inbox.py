"""A group's inbox: bundles that are offered, and what became of each.

inbox/NAME.tar         offered; `vigil install` puts it there whole, by a rename
inbox/NAME.installed   it became this slot
inbox/NAME.refused     it did not, for this reason
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from common import durable
from common.errors import StorageError
from common.paths import PROJECT

LIMIT_S = 300.0  # for one bundle
RETRY_S = 30.0  # where the disk or the lock was not to be had
NOTES = 16  # kept; whoever waits for one reads it and removes it


class Outcome(IntEnum):
    """Exit status of `services.updater.install`."""

    INSTALLED = 0
    REFUSED = 2  # never again
    LATER = 3  # not the bundle's fault


class Child:
    """The process that verifies and unpacks one bundle."""

    def __init__(self, group: str, tar: Path) -> None:
        self.group, self.tar = group, tar
        self.until = time.monotonic() + LIMIT_S
        command = [sys.executable, "-OO", "-m", "services.updater.install"]
        self._process = subprocess.Popen(
            [*command, group, str(tar), str(os.getpid())], stdout=subprocess.PIPE, cwd=PROJECT
        )
        self.fd = os.pidfd_open(self._process.pid)

    def outcome(self) -> tuple[Outcome, str] | None:
        """What became of it, and what it says; None while it works, within its time."""
        late = time.monotonic() >= self.until
        if self._process.poll() is None and not late:
            return None
        said = self.close()
        if late:
            return Outcome.REFUSED, f"could not be checked within {LIMIT_S:g} s"
        with suppress(ValueError):
            return Outcome(self._process.returncode), said
        return Outcome.REFUSED, f"its check ended with status {self._process.returncode}"

    def close(self) -> str:
        """End it; returns what it said."""
        self._process.kill()
        said = self._process.communicate()[0].decode(errors="replace")
        os.close(self.fd)
        return said.strip()


class Inbox:
    def __init__(self, folder: Path) -> None:
        """Raises: StorageError: it can't be made."""
        self.folder = folder
        try:
            folder.mkdir(mode=0o770, parents=True, exist_ok=True)
            for left in folder.glob(".*.new"):  # of an offer that was not completed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: can't be made: {error.strerror}") from error

    def oldest(self) -> Path | None:
        """The bundle offered first."""
        found = []
        for tar in self.folder.glob("[!.]*.tar"):
            with suppress(OSError):  # taken away meanwhile
                if tar.is_file():
                    found.append((tar.stat().st_mtime_ns, tar))
        return min(found)[1] if found else None

    def settle(self, tar: Path, word: str, said: str) -> None:
        """Note what became of a bundle, and remove it.

        Raises:
            StorageError: it will be looked at again.
        """
        notes = [*self.folder.glob("*.refused"), *self.folder.glob("*.installed")]
        try:
            for old in sorted(notes, key=lambda path: path.lstat().st_mtime_ns)[: -NOTES + 1]:
                old.unlink(missing_ok=True)
            with suppress(StorageError):  # a note is only told, never needed
                durable.write(tar.with_suffix(f".{word}"), f"{said}\n".encode())
            tar.unlink(missing_ok=True)
            durable.sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"{tar}: can't be removed: {error.strerror}") from error
