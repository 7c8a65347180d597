"""What the policy is told, what it remembers, and what it orders: values only.

Times ending in `_ns` are CLOCK_MONOTONIC; 0 stands for never.
"""

import msgspec

from common import config
from common.messages import LaneReport
from common.slots import Record
from common.states import Severity
from common.verdict import Counts, Inputs
from common.verdict import Limits as Held


class Struct(msgspec.Struct, frozen=True):
    pass


# -- settings ------------------------------------------------------------------------------------


class Limits(Struct, frozen=True):
    """What one process may do."""

    hang_s: float
    start_s: float  # from spawn to its first progress
    memory_bytes: int
    group: str = ""  # of a lane
    lane: str = ""


class Settings(Struct, frozen=True):
    watchdog: config.Watchdog
    groups: dict[str, config.Group]
    processes: dict[str, Limits]  # all that should run, but the watchdog itself


# -- observations --------------------------------------------------------------------------------


class Seen(Struct, frozen=True):
    """A process as it is; what it says of itself is from its newest beat."""

    pid: int | None = None
    spawned_ns: int = 0
    gone_ns: int = 0  # since when there is no pid
    progressed_ns: int = 0  # or since when it has not waited any more, if that is later
    wait_until_ns: int = 0
    sent_ns: int = 0
    begun: bool = False  # it has progressed at least once, or is ready
    rss_bytes: int = 0
    report: LaneReport | None = None
    ready_ns: int = 0  # since when its report says ready, and it loads nothing


class Death(Struct, frozen=True):
    name: str
    pid: int
    at_ns: int
    clean: bool | None = None  # exit status 0; None: nobody could tell
    how: str = "died"  # "died: terminated by SIGSEGV", "died: exit status 1"
    report: LaneReport | None = None


class Camera(Struct, frozen=True):
    """A camera's rings, as far as they are not drained."""

    written: int
    fence: int  # the lowest
    undecided_ns: int = 0  # since when nothing was decided though there is something to decide


class Group(Struct, frozen=True):
    record: Record
    cameras: dict[str, Camera] = {}
    gate_failed: str = ""  # why the updater finds that the candidate does not pass
    limits: Held = Held()  # what the candidate is held to
    expected: tuple[float, ...] = ()  # shares of its scores


class Observation(Struct, frozen=True):
    now_ns: int
    listening_ns: int  # since when no beat can have been missed
    answered_ns: int  # when supervisord answered last
    supervisord: int  # its pid
    processes: dict[str, Seen]
    groups: dict[str, Group]
    deaths: tuple[Death, ...] = ()
    temperatures_c: dict[str, float] = {}
    lost: tuple[str, ...] = ()  # devices whose sensor reads what cannot be


# -- memory --------------------------------------------------------------------------------------


class Mark(Struct, frozen=True):
    """A process, by pid, and when something happened to it."""

    pid: int
    at_ns: int


class Deaths(Struct, frozen=True):
    slot: str
    at_ns: tuple[int, ...]


class Down(Struct, frozen=True):
    """A lane has died and was not ready since."""

    at_ns: int
    clean: bool
    how: str


class Asked(Struct, frozen=True):
    """A start was asked for."""

    first_ns: int
    next_ns: int
    wait_s: float


class Watched(Struct, frozen=True):
    """The change of model under way."""

    slot: str
    phase: str
    since_ns: int  # without the time in which a candidate had nothing to judge
    idle_ns: int = 0  # since when it has nothing
    start: Counts = Counts()  # of its lane when its soak began
    before: Counts | None = None  # the live lane's at its beginning; in soak: until the hand-over


class Restore(Struct, frozen=True):
    """When known good is tried again, and how long to wait the next time."""

    at_ns: int
    wait_s: float


class Live(Struct, frozen=True):
    epoch: int
    since_ns: int


class Memory(Struct, frozen=True):
    """By name of process, or by group."""

    supervisord: int = 0  # its pid, whose children these are
    pids: dict[str, int] = {}
    killed: dict[str, Mark] = {}
    planned: dict[str, Mark] = {}  # told to stop, to be started again
    down: dict[str, Down] = {}
    deaths: dict[str, Deaths] = {}
    asked: dict[str, Asked] = {}
    watched: dict[str, Watched] = {}
    restores: dict[str, Restore] = {}
    live: dict[str, Live] = {}
    lost: tuple[str, ...] = ()
    starved: str = ""  # why the hardware watchdog is not fed
    pace: float = 1.0
    paced_ns: int = 0
    cool_ns: int = 0  # since when it is cool


# -- actions -------------------------------------------------------------------------------------


class Action(Struct, frozen=True, tag=True):
    pass


class Kill(Action, frozen=True):
    name: str
    pid: int
    why: str


class Start(Action, frozen=True):
    """Whatever supervisord claims: stop it, then start it."""

    name: str


class Restart(Action, frozen=True):
    """Planned: SIGTERM."""

    name: str
    pid: int


class Transition(Action, frozen=True):
    """One commit; `kind` is the name of a function of `common.slots`."""

    group: str
    kind: str
    lane: str = ""
    reason: str = ""
    inputs: Inputs | None = None  # of a verdict on a candidate


class SetPace(Action, frozen=True):
    value: float


class Event(Action, frozen=True):
    code: str
    severity: Severity
    text: str
    data: dict[str, str] = {}


class Incident(Action, frozen=True):
    """Something failed at `at_ns`; `run`: of the lane that did, 0 for others."""

    process: str
    what: str
    at_ns: int
    run: int = 0


class Feed(Action, frozen=True):
    """Nothing is stuck beyond our means: the hardware watchdog may be fed."""


class Wake(Action, frozen=True):
    """Something may be due then."""

    at_ns: int
