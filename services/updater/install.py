"""Verify and unpack one bundle of an inbox into the slots, in a process that ends: the check needs
the engine, whose memory the updater shall not keep, and a hostile file kills this process only.

    python -m services.updater.install GROUP FILE.tar PARENT

Prints one line: the slot, or why not. Its exit status says which (`Outcome`).
"""

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

from common import config
from common.archive import unpack
from common.engine.bundle import open_bundle
from common.engine.samples import load_samples
from common.errors import BundleError, LockedError, ModelError, StorageError, TransitionError
from common.paths import Paths
from common.slots import Slot
from common.states import SlotState
from common.store import Store
from services.updater.inbox import Outcome

SHOWN = 64  # characters of a name or version that the record keeps
_PR_SET_PDEATHSIG = 1


def install(store: Store, tar: Path) -> str:
    """Make a bundle an installed slot; returns its name.

    Raises:
        BundleError, ModelError: it can't be used.
        TransitionError: it is known, and known not to be wanted.
        StorageError, LockedError: not now.
    """
    into = store.staging / "incoming"
    shutil.rmtree(into, ignore_errors=True)
    store.clean_up()  # makes room
    try:
        name = unpack(tar, into)
        bundle = open_bundle(into)
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


def _shown(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())[:SHOWN]


def main(group: str, tar: str, parent: str) -> int:
    # An updater that starts anew clears staging: nothing of its predecessor's may write there.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return Outcome.LATER
    os.nice(10)
    store = Store(Paths.from_environment(), group, config.from_environment().groups[group].lanes)
    try:
        said, outcome = install(store, Path(tar)), Outcome.INSTALLED
    except (BundleError, ModelError, TransitionError) as error:
        said, outcome = str(error), Outcome.REFUSED
    except (StorageError, LockedError) as error:
        said, outcome = str(error), Outcome.LATER
    said = said.replace(f"{store.staging}/incoming/", "").replace(f"{Path(tar).parent}/", "")
    print(" ".join(said.split())[:2000])
    return outcome


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
