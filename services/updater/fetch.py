"""Download the bundle of a group's update, in a process that ends.

    python -m services.updater.fetch PARENT GROUP

Prints the bytes moved for it so far, a blank, and why it is not there, if it is not.
"""

import os
import sys
from pathlib import Path

from common import config
from common.archive import RESERVE_BYTES
from common.config import Config
from common.errors import BudgetError, ConfigError, FetchError, StorageError, UntrustedError
from common.paths import Paths
from services.updater import floors
from services.updater.budget import Budget
from services.updater.children import Outcome, begin
from services.updater.download import download
from services.updater.life import Update, load
from services.updater.sources import open_source

MB = 1_000_000
DAY_S = 86_400


def fetch(settings: Config, paths: Paths, group: str, update: Update, budget: Budget) -> None:
    """
    Raises:
        FetchError, BudgetError, StorageError: not now.
        UntrustedError: what came is not what was signed.
        ConfigError: vigil.toml does not let anything come from there.
    """
    updates = settings.updates
    ca = settings.resolve(updates.ca) if updates.ca else None
    # The transaction shows no password; vigil.toml has it.
    place = update.source if update.offline else updates.url
    if place is None:
        raise ConfigError(f"{settings.path}: updates.url is missing: {update.source} is no folder")
    folder = paths.updates / "partial"
    _check_room(folder, paths.models(group), update)
    download(
        open_source(place, ca=ca, stall_s=updates.stall_s),
        update.place, update.length, update.sha256, folder, budget,
        rate_b_s=None if update.offline or updates.rate_kb_s is None else updates.rate_kb_s * 1000,
        update=update.sha256,
    )  # fmt: skip


def _check_room(folder: Path, models: Path, update: Update) -> None:
    """For the file and for what it unpacks to, before the first byte of it is asked for.

    Raises: StorageError: there is not enough.
    """
    partial = folder / update.sha256
    have = partial.stat().st_size if partial.exists() else 0
    volume = os.statvfs(models if models.exists() else folder)
    free = volume.f_bavail * volume.f_frsize
    needed = 2 * update.length - have + RESERVE_BYTES
    if needed > free:
        raise StorageError(
            f"{folder}: has {free >> 20} MB free; the bundle of {update.length >> 20} MB and its "
            f"content need {needed >> 20} MB; make room"
        )


def main(parent: str, group: str) -> int:
    begin(parent)
    settings, paths = config.from_environment(), Paths.from_environment()
    updates = settings.updates
    noted, problem = load(paths.updates / f"txn-{group}.json")
    if noted.update is None:
        print(f"0 {problem or 'no update is under way'}")
        return Outcome.LATER
    update = noted.update
    budget = Budget(
        paths.updates / "budget.json",
        day=int(floors.trusted_now(paths.updates) // DAY_S),
        daily=None if updates.daily_mb is None else updates.daily_mb * MB,
        per_update=None if updates.update_mb is None else updates.update_mb * MB,
    )
    said, outcome = "", Outcome.DONE
    try:
        fetch(settings, paths, group, update, budget)
    except (FetchError, BudgetError, StorageError, ConfigError) as error:
        said, outcome = str(error), Outcome.LATER
    except UntrustedError as error:
        said, outcome = str(error), Outcome.REFUSED
    print(budget.used(update.sha256), " ".join(said.split())[:2000])
    return outcome


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
