"""A group's inbox: bundles that are offered, and what became of each.

inbox/NAME.tar         offered; `vigil install` puts it there whole, by a rename
inbox/NAME.installed   it became this slot
inbox/NAME.refused     it did not, for this reason
"""

from contextlib import suppress
from pathlib import Path

from common import durable
from common.errors import StorageError

NOTES = 16  # kept; whoever waits for one reads it and removes it


class Inbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with suppress(OSError):  # the disk refuses; then nobody can offer anything
            folder.mkdir(mode=0o770, parents=True, exist_ok=True)
            for left in folder.glob(".*.new"):  # of an offer that was not completed
                left.unlink(missing_ok=True)

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
