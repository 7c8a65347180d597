"""The words for states, as they appear in messages, files and logs. Imports nothing of Vigil."""

from enum import IntEnum, StrEnum


class Validity(StrEnum):
    """What a result is worth. Only `VALID` with no items means "nothing there"."""

    VALID = "valid"
    STALE = "stale"  # judged, but the frame was older than the camera's limit
    DEGRADED = "degraded"  # judged by a fall-back (the CPU variant, say)
    FAILED = "failed"  # the engine could not judge this frame
    NOT_INFERRED = "not_inferred"  # pass-through: nobody looked at this frame


class ProcessState(StrEnum):
    """What a process says of itself in its beat."""

    STARTING = "starting"
    LOADING = "loading"  # a model is loaded and warmed up
    RUNNING = "running"
    WAITING = "waiting"  # a declared wait, with its bound, in the beat
    STOPPING = "stopping"


class CameraState(StrEnum):
    CONNECTING = "connecting"  # for the first time
    STREAMING = "streaming"
    STALLED = "stalled"  # connected, and no frame comes
    FROZEN = "frozen"  # frames come, and are always the same
    DARK = "dark"  # frames come, and show nothing: too dark, or covered
    LOST = "lost"  # not connected; tried again with a growing pause
    ENDED = "ended"  # a file that is not looped was read to its end


class Sight(IntEnum):
    """What capture says of a frame, as a word in the ring. Who is blind is not judged."""

    CLEAR = 0
    FROZEN = 1
    DARK = 2


class Policy(StrEnum):
    """What a camera's ring does with a frame that is not decided yet."""

    LATEST = "latest"  # newest wins; skipped frames are counted
    EVERY = "every"  # nothing is overwritten before it is decided


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class SlotState(StrEnum):
    """What is known of a model slot."""

    INSTALLED = "installed"  # unpacked and verified, never run
    TESTING = "testing"
    GOOD = "good"  # proven; may take over
    BAD = "bad"  # never live again


class Phase(StrEnum):
    """How far a change of model is."""

    NONE = "none"
    PROVING = "proving"  # the candidate loads, tests itself and runs in the shadow
    REQUESTED = "requested"  # it passed; the watchdog hands over when it is ready
    SOAK = "soak"  # it is live and watched
