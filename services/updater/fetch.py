"""Download the bundle of a group's update, in a process that ends.

    python -m services.updater.fetch PARENT GROUP

Prints a `Fetched` as JSON.
"""

import threading
import time

import msgspec

from common.config import Config
from common.errors import BudgetError, ConfigError, FetchError, StorageError, UntrustedError
from common.paths import Paths
from services.updater import floors
from services.updater.budget import Budget
from services.updater.children import Outcome, main
from services.updater.download import download
from services.updater.life import Fetched, Update, load
from services.updater.sources import open_source

DAY_S = 86_400


def fetch(settings: Config, paths: Paths, update: Update, budget: Budget) -> bool:
    """Whether it is there; a new day, which has a budget of its own, ends the download before.

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
    most = updates.update_mb
    if most and not update.offline and update.length > most * 1_000_000:
        raise BudgetError(
            f"updates.update_mb: {update.title} has {update.length / 1e6:.1f} MB, and {most} MB "
            "may be moved; raise it"
        )
    today = time.time() // DAY_S

    def pause(seconds: float) -> bool:
        threading.Event().wait(seconds)
        return time.time() // DAY_S != today

    there = download(
        open_source(place, ca=ca, stall_s=updates.stall_s),
        update.place, update.length, update.sha256, paths.updates / "partial",
        None if update.offline else budget,
        pause=pause,
        update=update.sha256,
        rate_b_s=None if update.offline or not updates.rate_kb_s else updates.rate_kb_s * 1000,
        room=update.length,  # for what it unpacks to
    )  # fmt: skip
    return there is not None


def run(settings: Config, paths: Paths, group: str) -> tuple[Outcome, str]:
    updates = settings.updates
    noted, problem = load(paths.updates / f"txn-{group}.json")
    if noted.update is None:
        nothing = Fetched(error=problem or "no update is under way")
        return Outcome.LATER, msgspec.json.encode(nothing).decode()
    update, budget = noted.update, None
    said, wait_s, outcome = "", 0.0, Outcome.DONE
    notes = (load(paths.updates / f"txn-{name}.json")[0].update for name in settings.groups)
    try:
        budget = Budget(
            paths.updates / "budget.json",
            day=int(floors.trusted_now(paths.updates) // DAY_S),
            daily_mb=updates.daily_mb,
            update_mb=updates.update_mb,
        )
        budget.tidy({one.sha256 for one in notes if one})
        if not fetch(settings, paths, update, budget):
            outcome = Outcome.LATER
    except FetchError as error:
        said, wait_s, outcome = str(error), error.wait_s, Outcome.LATER
        if error.status in range(400, 500):  # asking again soon would not help
            wait_s = max(wait_s, updates.check_s)
    except (BudgetError, StorageError, ConfigError) as error:
        said, outcome = str(error), Outcome.LATER
    except UntrustedError as error:  # of which the same server has more: as seldom as possible
        said, wait_s, outcome = str(error), updates.check_s, Outcome.REFUSED
    moved = budget.used(update.sha256) if budget else update.moved
    return outcome, msgspec.json.encode(Fetched(moved, wait_s, said)).decode()


if __name__ == "__main__":
    main(run)
