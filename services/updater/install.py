"""Verify and unpack one bundle of an inbox into the slots, in a process that ends: the check needs
the engine, whose memory the updater shall not keep, and a hostile file kills this process only.

    python -m services.updater.install PARENT GROUP FILE.tar [NOTED]

NOTED is the group's transaction, where the bundle is a signed one: it has to be what was signed.
Prints one line: the slot, or why not. Its exit status says which (`Outcome`).
"""

import hashlib
import shutil
from pathlib import Path

from common import durable
from common.archive import unpack
from common.config import Config
from common.engine.bundle import Manifest, open_bundle
from common.engine.samples import load_samples
from common.errors import (
    BundleError,
    LockedError,
    ModelError,
    StorageError,
    TransitionError,
    UntrustedError,
)
from common.paths import Paths
from common.slots import Slot
from common.states import SlotState
from common.store import Store
from services.updater.channel import ANY
from services.updater.children import Outcome, main
from services.updater.life import Update, load

SHOWN = 64  # characters of a name or version that the record keeps


def install(store: Store, tar: Path, profile: str, signed: Update | None = None) -> str:
    """Make a bundle an installed slot; returns its name.

    Args:
        profile: of this device.
        signed: what the bundle has to be.

    Raises:
        BundleError, ModelError, UntrustedError: it can't be used.
        TransitionError: it is known, and known not to be wanted.
        StorageError, LockedError: not now.
    """
    into = store.staging / "incoming"
    shutil.rmtree(into, ignore_errors=True)
    store.clean_up()  # makes room
    try:
        name = unpack(tar, into)
        if signed and name != signed.slot:
            raise UntrustedError(f"its content is {name[:12]}, signed is {signed.slot[:12]}")
        bundle = open_bundle(into)
        _check(bundle.manifest, profile, signed)
        load_samples(bundle)
        state = store.read().state(name)
        if state is SlotState.GOOD:
            raise TransitionError(f"slot {name[:12]} is good already")
        manifest = bundle.manifest
        slot = Slot(
            SlotState.INSTALLED,
            name=_shown(manifest.name),
            version=_shown(manifest.version),
            release=manifest.release,
        )
        store.adopt(into, name, slot)
        return name
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _check(manifest: Manifest, profile: str, signed: Update | None) -> None:
    """Raises: BundleError, UntrustedError: it is for other devices, or not what was signed."""
    if manifest.profile not in (ANY, profile):
        raise BundleError(f"is for devices of profile {manifest.profile}; this one is {profile}")
    if signed is None:
        return
    found = (manifest.name, manifest.version, manifest.release)
    should = (signed.bundle, signed.version, signed.release)
    if found != should:
        raise UntrustedError(f"says it is {found}, signed is {should}")


def _sha256(path: Path) -> str:
    """ "" where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _shown(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())[:SHOWN]


def run(
    settings: Config, paths: Paths, group: str, tar: str, noted: str = ""
) -> tuple[Outcome, str]:
    store = Store(paths, group, settings.groups[group].lanes)
    signed = load(Path(noted))[0].update if noted else None
    try:
        said = install(store, Path(tar), settings.updates.profile, signed)
        outcome = Outcome.DONE
    except (BundleError, ModelError, TransitionError, UntrustedError) as error:
        said, outcome = str(error), Outcome.REFUSED
        if signed and _sha256(Path(tar)) != signed.sha256:  # it was when it came
            said, outcome = f"its file was damaged here, and is fetched anew: {said}", Outcome.LATER
            durable.remove(Path(f"{tar}.synced"))
            durable.remove(Path(tar))
    except (StorageError, LockedError) as error:
        said, outcome = str(error), Outcome.LATER
    said = said.replace(f"{store.staging}/incoming/", "").replace(f"{Path(tar).parent}/", "")
    return outcome, " ".join(said.split())[:2000]


if __name__ == "__main__":
    main(run)
