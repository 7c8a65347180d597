"""Look for updates: refresh the signed metadata, read the channel, choose a release for each group.
A process that ends: the metadata's library takes more memory than the updater has.

    python -m services.updater.check PARENT [PLACE]

Prints a `Checked` as JSON, or why not. PLACE, a URL or folder, stands in for vigil.toml's url.
"""

import msgspec

from common import archive
from common.config import Config
from common.errors import (
    ConfigError,
    FetchError,
    LockedError,
    StorageError,
    UntrustedError,
    UpdateError,
)
from common.paths import Paths
from common.slots import Record
from common.states import SlotState
from common.store import Store
from services.updater.channel import Channel, Custom, bundle_paths, wanted
from services.updater.children import Outcome, main
from services.updater.device import device_id
from services.updater.life import Answer, Checked, Noted, Update, load
from services.updater.sources import open_source
from services.updater.trust import Target, Trust

ERROR = 2000  # characters
LENGTH = archive.Limits().total_bytes + (8 << 20)  # of a tar: its headers take some more


def check(settings: Config, paths: Paths, place: str, problems: list[str]) -> Checked:
    """
    Args:
        problems: what was found damaged here, and mended, is added.

    Raises:
        UpdateError, ConfigError, StorageError, LockedError: nothing is known.
    """
    updates = settings.updates
    assert updates.root is not None
    anchor = settings.resolve(updates.root)
    try:
        root = anchor.read_bytes()
    except OSError as error:
        text = f"{settings.path}: updates.root: {anchor}: {error.strerror}; expected the root.json"
        raise ConfigError(f"{text} of the repository to be trusted") from error
    ca = settings.resolve(updates.ca) if updates.ca else None
    source = open_source(place, ca=ca, stall_s=updates.stall_s)
    with Trust(paths.updates, root, source) as trust:
        problems += trust.problems
        trust.refresh()
        channel = trust.channel(updates.channel)
        answers = {}
        for group in settings.groups:
            if not settings.cameras_of(group):
                continue
            record = Store(paths, group, settings.groups[group].lanes).read()
            noted, _ = load(paths.updates / f"txn-{group}.json")
            answers[group] = _answer(trust, channel, settings, group, record, noted, source.name)
        return Checked(answers, trust.now_s)


def _answer(
    trust: Trust,
    channel: Channel,
    settings: Config,
    group: str,
    record: Record,
    noted: Noted,
    source: str,
) -> Answer:
    choice = channel.groups.get(group)
    if choice is None:
        return Answer(reason=f"channel {settings.updates.channel} has nothing for group {group}")
    live = record.slots.get(record.known_good)
    key = f"{group}/{choice.bundle}"
    ran = live.release if live and live.name == choice.bundle else 0
    floor = trust.raise_release(key, ran)
    targets: dict[int, tuple[Target, Custom]] = {}
    bad = {}
    for offer in choice.releases:
        try:
            found = _target(trust, choice.bundle, offer.release, settings.updates.profile)
        except UntrustedError as error:  # the other releases, and groups, don't suffer for it
            bad[offer.release] = f"is not signed rightly: {error}"
            continue
        if found is None:
            bad[offer.release] = f"has no build for profile {settings.updates.profile}"
            continue
        target, slot = found[0], found[1].slot
        if target.length > LENGTH:
            bad[offer.release] = f"has {target.length} bytes, a bundle at most {LENGTH}"
        elif record.state(slot) is SlotState.BAD:
            bad[offer.release] = f"was bad here: {record.slots[slot].reason}"
        elif slot in noted.refused:
            bad[offer.release] = f"was refused here: {noted.refused[slot]}"
        else:
            targets[offer.release] = found
    withdrawn = {
        name: why
        for name, slot in record.slots.items()
        if (why := channel.withdrawn.get(slot.name, {}).get(str(slot.release))) is not None
    }
    device = device_id(settings.updates)
    release, reason = wanted(channel, group, device, trust.now_s, floor, bad)
    if release is None:
        return Answer(withdrawn=withdrawn, reason=reason)
    target, custom = targets[release]
    if custom.slot == record.known_good:
        return Answer(withdrawn=withdrawn, reason=reason or f"release {release} is the newest")
    if record.proven(custom.slot) and custom.slot in record.slots:
        if custom.slot == record.previous and record.known_good in withdrawn:
            return Answer(back=custom.slot, withdrawn=withdrawn, reason=reason)
        return Answer(withdrawn=withdrawn, reason=f"release {release} was left for another one")
    update = Update(
        bundle=custom.name, version=custom.version, release=release, profile=custom.profile,
        path=target.path, place=target.place, source=source, length=target.length,
        sha256=target.sha256, slot=custom.slot, published_s=custom.published.timestamp(),
    )  # fmt: skip
    return Answer(update, withdrawn=withdrawn, reason=reason)


def _target(trust: Trust, bundle: str, release: int, profile: str) -> tuple[Target, Custom] | None:
    """
    Raises:
        UntrustedError: what is signed there contradicts itself.
    """
    for path in bundle_paths(bundle, release, profile):
        target = trust.target(path)
        if target is None:
            continue
        try:
            custom = msgspec.convert(target.custom, Custom)
        except msgspec.ValidationError as error:
            raise UntrustedError(f"{path}: can't be read: {error}") from error
        if (custom.name, custom.release) != (bundle, release) or not path.endswith(
            f"/{custom.profile}.tar"
        ):
            raise UntrustedError(f"{path}: is signed as {custom.name} {custom.release}")
        return target, custom
    return None


def run(settings: Config, paths: Paths, place: str = "") -> tuple[Outcome, str]:
    outcome, problems = Outcome.DONE, list[str]()
    try:
        checked = check(settings, paths, place or settings.updates.url or "", problems)
    except FetchError as error:
        outcome = Outcome.LATER
        checked = Checked(error=str(error), status=error.status, wait_s=error.wait_s)
    except (StorageError, LockedError) as error:
        checked, outcome = Checked(error=str(error)), Outcome.LATER
    except (UpdateError, ConfigError) as error:
        checked, outcome = Checked(error=str(error)), Outcome.REFUSED
    checked = msgspec.structs.replace(
        checked, problems=tuple(problems), error=checked.error[:ERROR]
    )
    return outcome, msgspec.json.encode(checked).decode()


if __name__ == "__main__":
    main(run)
