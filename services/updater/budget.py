"""How many bytes updates may move: reserved, on the disk, before they are asked for.

Whatever kills the process in between, what was reserved counts as moved. The day is one of trusted
time. A clock that jumps ahead gives one day's budget; set back, it gives none.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from common import durable
from common.errors import BudgetError, StorageError

_Bytes = Annotated[int, Meta(ge=0)]


class _Spent(msgspec.Struct):
    day: int = 0  # since 1970
    today: _Bytes = 0
    updates: dict[str, _Bytes] = {}


class Budget:
    """
    Args:
        path: budget.json.
        day: today, in days since 1970.
        daily_mb, update_mb: the most of a day, and of one update; None: no end.

    Raises:
        StorageError: `path` can't be read or written.
    """

    def __init__(
        self, path: Path, day: int, daily_mb: int | None = None, update_mb: int | None = None
    ) -> None:
        self._path, self._daily_mb, self._update_mb = path, daily_mb, update_mb
        try:
            self._spent = msgspec.json.decode(path.read_bytes(), type=_Spent)
        except FileNotFoundError:
            self._spent = _Spent()
        except msgspec.MsgspecError:
            durable.set_aside(path)
            self._spent = _Spent()
        except OSError as error:
            raise StorageError(f"{path}: can't be read: {error.strerror}") from error
        if day != self._spent.day:
            if day > self._spent.day:
                self._spent.today = 0
            self._spent.day = day  # set back: or there would be no next day for long
            self._write()

    def used(self, update: str) -> int:
        """Bytes that an update has moved so far."""
        return self._spent.updates.get(update, 0)

    def reserve(self, update: str, most: int, least: int = 1) -> int:
        """Count up to `most` bytes as moved; returns how many may be asked for now.

        Raises:
            BudgetError: fewer than `least` are left.
            StorageError: it can't be noted.
        """
        used, today = self.used(update), self._spent.today
        for key, cap_mb, gone, more in (
            ("update_mb", self._update_mb, used, "for more, raise it"),
            ("daily_mb", self._daily_mb, today, "there is more from 00:00 UTC"),
        ):
            if cap_mb is None:
                continue
            left = cap_mb * 1_000_000 - gone
            if left < least:
                text = f"updates.{key}: {gone / 1e6:.1f} of {cap_mb} MB are used"
                text += f", {least / 1e6:.1f} more needed" if least > 1 else ""
                raise BudgetError(f"{text}; {more}")
            most = min(most, left)
        self._count(update, most)
        return most

    def settle(self, update: str, unused: int) -> None:
        """Give back what was reserved and not moved.

        Raises:
            StorageError: it can't be noted, and stays counted.
        """
        if unused:
            self._count(update, -unused)

    def tidy(self, keep: Collection[str]) -> None:
        """Forget all updates but these.

        Raises:
            StorageError: it can't be noted.
        """
        kept = {name: count for name, count in self._spent.updates.items() if name in keep}
        if kept != self._spent.updates:
            self._spent.updates = kept
            self._write()

    def _count(self, update: str, count: int) -> None:
        self._spent.updates[update] = self.used(update) + count
        self._spent.today += count
        self._write()

    def _write(self) -> None:
        durable.write(self._path, msgspec.json.encode(self._spent))
