"""The life of an update of one group: what is noted of it on disk, and what follows from the
record. The updater's own transaction; what a model is worth stands in the record alone."""

from enum import StrEnum
from pathlib import Path

import msgspec

from common import durable
from common.slots import Record
from common.states import Phase, SlotState
from common.updates import Status

KEPT = 64  # refusals, publishing times, status entries


class Step(StrEnum):
    DOWNLOAD = "download"
    INSTALL = "install"
    ACTIVATE = "activate"  # installed; waits for its turn and window
    PROVE = "prove"  # self-test, shadow
    HAND_OVER = "hand_over"
    SOAK = "soak"
    GOOD = "good"
    BAD = "bad"


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """One release on its way to one group."""

    bundle: str
    version: str
    release: int
    profile: str
    path: str  # target, as signed
    place: str  # of its file below the repository
    source: str  # where it was found: a URL without a password, or a folder
    length: int
    sha256: str
    slot: str  # what its content has to be
    published_s: float  # signed; seconds since 1970
    step: Step = Step.DOWNLOAD
    moved: int = 0  # bytes so far, failed tries included

    @property
    def offline(self) -> bool:
        return self.source.startswith("/")

    @property
    def title(self) -> str:
        return f"{self.bundle} {self.version} (release {self.release}, {self.slot[:12]})"


class Noted(msgspec.Struct, frozen=True):
    """txn-<group>.json."""

    update: Update | None = None
    refused: dict[str, str] = {}  # slot -> why its bundle could not be installed
    published_s: dict[str, float] = {}  # slot -> when its release was published


class Answer(msgspec.Struct, frozen=True):
    """For one group."""

    update: Update | None = None  # to be had
    back: str = ""  # a slot that is here already, proven, to go back to
    withdrawn: dict[str, str] = {}  # slots here that nobody shall run any more -> why
    reason: str = ""  # why nothing, or nothing newer


class Checked(msgspec.Struct, frozen=True):
    groups: dict[str, Answer] = {}
    now_s: float = 0.0  # trusted time
    error: str = ""
    status: int = 0  # of an HTTP answer that was an error
    wait_s: float = 0.0  # how long the server asks to be left alone
    problems: tuple[str, ...] = ()  # what was damaged here


class Fetched(msgspec.Struct, frozen=True):
    moved: int = 0  # bytes, for this update so far
    wait_s: float = 0.0  # before another try
    error: str = ""


def load(path: Path) -> tuple[Noted, str]:
    """What is noted, and what is wrong with the file: then nothing is, and the next check finds
    the update again."""
    try:
        return msgspec.json.decode(durable.read(path), type=Noted), ""
    except FileNotFoundError:
        return Noted(), ""
    except (OSError, msgspec.MsgspecError) as error:
        return Noted(), f"{path}: can't be read: {error}; begun anew"


def save(path: Path, noted: Noted) -> None:
    """Raises: StorageError: what was noted before stands."""
    few = {
        key: dict(list(getattr(noted, key).items())[-KEPT:]) for key in ("refused", "published_s")
    }
    durable.write(path, msgspec.json.encode(msgspec.structs.replace(noted, **few)))


def add_status(path: Path, status: Status) -> None:
    """Append to the newest ones, which a restart and a power cut leave readable.

    Raises:
        StorageError: it can't be written.
    """
    durable.write(path, msgspec.json.encode([*history(path), status][-KEPT:]))


def history(path: Path) -> list[Status]:
    """The newest, newest last; what can't be read is not there."""
    try:
        return msgspec.json.decode(durable.read(path), type=list[Status])
    except (OSError, msgspec.MsgspecError):
        return []


def followed(update: Update, record: Record) -> tuple[Step, str]:
    """The step that the record says, and the reason where it went wrong."""
    txn = record.txn
    state = record.state(update.slot)
    if state is None:
        if update.step in (Step.DOWNLOAD, Step.INSTALL):
            return update.step, ""
        return Step.DOWNLOAD, "the record does not know it any more"
    if txn.slot == update.slot and txn.phase is not Phase.NONE:
        steps = {Phase.PROVING: Step.PROVE, Phase.REQUESTED: Step.HAND_OVER, Phase.SOAK: Step.SOAK}
        return steps[txn.phase], ""
    if state is SlotState.BAD:
        return Step.BAD, record.slots[update.slot].reason
    if state is SlotState.INSTALLED:
        return Step.ACTIVATE, ""
    if state is SlotState.TESTING:  # between two transitions of the same commit: never seen
        return update.step, ""
    return Step.GOOD, ""
