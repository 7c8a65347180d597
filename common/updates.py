"""Files between the updater and whoever looks at it or asks it: what it does and has done
(`Report`, run/updates.json), what it is asked (`Request`) and answers (`Reply`). JSON all."""

from typing import Annotated

import msgspec
from msgspec import Meta

REPORT, REQUEST, REPLY = "updates.json", "update.request", "update.reply"  # in the run folder
HISTORY = "history.json"  # in ROOT/updates: the newest statuses


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one step of an update."""

    group: str
    bundle: str
    version: str
    release: int
    slot: str
    step: str  # download, install, activate, prove, hand_over, soak, good, bad
    outcome: str  # "ok", "failed", "waits"
    reason: str = ""
    bytes: int = 0  # moved for this update so far, failed tries included
    seconds: float = 0.0  # in this step; 0 where a restart lies in it
    wall_s: float = 0.0  # a label


class GroupReport(msgspec.Struct, frozen=True, kw_only=True):
    """A group's update under way, if `step` says one."""

    title: str = ""
    step: str = ""
    waits: str = ""  # for what
    length: int = 0  # bytes of its bundle
    have: int = 0  # of those, here
    reason: str = ""  # of the last check: why not more
    age_s: float | None = None  # since the live model was published
    age_level: str = ""  # "", "warning", "critical"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    checked_ns: int = 0  # CLOCK_MONOTONIC of the last check that went through; 0: none yet
    next_ns: int = 0  # the next one; 0: none is planned
    error: str = ""  # of the last check
    checking: bool = False
    groups: dict[str, GroupReport] = {}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Check now."""

    id: str
    # A folder (a stick) instead of the repository; "" its URL.
    place: Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00]*$")] = ""
    dry_run: bool = False  # tell, and begin nothing


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    error: str = ""
    lines: tuple[str, ...] = ()  # what was found, a line a group
    begun: dict[str, str] = {}  # group -> slot that is on its way
