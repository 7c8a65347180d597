"""Every message on the bus: frozen structs, MessagePack arrays on the wire.

They evolve by msgspec's rules: a new field goes last and has a default, a type never changes.
Times ending in `_ns` are CLOCK_MONOTONIC nanoseconds of this boot; `wall_s` is a label only.
"""

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


class Item(Message, frozen=True):
    """One thing a model reports of a frame.

    `box` is x1, y1, x2, y2 in pixels of the camera's own picture (origin top left, x2 and y2
    exclusive); None where the task has no place (classification).
    """

    label: str
    score: float  # 0..1
    index: int  # the class's index as the model counts
    box: tuple[float, float, float, float] | None = None
    zones: tuple[str, ...] = ()  # of the camera, that hold its anchor


class Stages(Message, frozen=True):
    """Where the time of one result went, in nanoseconds (stage names as in Triton)."""

    decode: int  # captured -> slot filled, in capture
    queue: int  # slot filled -> engine, without compute_input
    compute_input: int  # pre-processing
    compute_infer: int  # the runtime
    compute_output: int  # decoding, non-maximum suppression, encoding
    total: int  # slot filled -> decision committed


class Frame(Message, frozen=True):
    """`frame/<cam>`: a slot of the camera's ring is filled. Pixels stay in the ring."""

    ring: int  # generation of the ring file
    sequence: int
    captured_ns: int
    filled_ns: int
    sight: int = 0  # states.Sight
    trigger: int = 0  # id of the trigger that it answers; 0: none


class Result(Message, frozen=True):
    """`result/<cam>`: one decision, byte for byte as in the ring's journal."""

    camera: str
    ring: int
    sequence: int
    epoch: int
    validity: str
    captured_ns: int
    age_ns: int  # at the decision
    model: str
    version: str
    release: int
    slot: str  # first 12 hex digits of the bundle's sha256
    runtime: str
    items: tuple[Item, ...]
    stages: Stages
    items_cut: int = 0  # items of lowest score left out to fit the journal
    reason: str = ""  # why it is not valid
    trigger: int = 0  # id of the trigger that it answers; 0: none


class TruthItem(Message, frozen=True):
    """One thing that is really there, in the form of `Item` without a score."""

    label: str
    box: tuple[float, float, float, float]


class Truth(Message, frozen=True):
    """`truth/<cam>`: what the virtual camera put into a frame."""

    ring: int
    sequence: int
    items: tuple[TruthItem, ...]


class Trigger(Message, frozen=True):
    """`trigger/<cam>`: inspect now. Sent to capture without the last three, which it fills in."""

    id: int  # of the part, 1 to 2**63-1; one that was seen before is not inspected again
    at_ns: int  # when the part was there
    ring: int = 0
    sequence: int = 0  # the frame that answers; 0: none does
    reason: str = ""  # why none does


class CameraReport(Message, frozen=True):
    """What capture says of its camera in its beat."""

    state: str  # states.CameraState
    since_ns: int
    reason: str = ""  # why it does not stream
    format: str = ""  # as negotiated: "1280x720 MJPG 30/s"
    problem: str = ""  # of its configuration: a zone outside the picture
    per_s: float = 0.0  # frames that came from it, taken or not
    reconnects: int = 0
    skipped: int = 0  # frames passed over before decoding, to keep the rate asked
    brightness: float = 0.0  # mean of the newest picture's brightest colour, 0..255
    spread: float = 0.0  # standard deviation of its most varied colour
    triggers: int = 0  # answered by a frame
    triggers_missed: int = 0


class LaneReport(Message, frozen=True):
    """What a lane says of itself in its beat."""

    run: int  # of this process, as the record has it if it is the lane's
    slot: str  # loaded, as in the record
    ready: bool  # warm, and its self-test passed
    live: bool  # holds the fence of every camera of its group
    refused: str = ""  # why its self-test failed
    degraded: str = ""  # why it does not run on what the bundle prefers
    judged: int = 0  # frames, live or in the shadow, since it started
    failed: int = 0  # of those, how many the engine could not judge
    agreement: float = 1.0  # in the shadow: share of frames decided as the live lane did
    infer_ms_p99: float = 0.0  # of the newest few hundred frames
    # In the shadow, over the frames that both lanes judged:
    compared: int = 0
    score_shift: float = 0.0  # mean of candidate's minus live model's, of items that pair up
    latency_ratio: float = 0.0  # median of candidate's inference time over live one's; 0: unknown
    # Deciding, over the frames that showed something:
    offered: int = 0  # that came, decided or skipped
    shown: int = 0  # of those, decided
    inferred: int = 0  # of those, given to the model
    valid: int = 0  # of those, judged in time
    scores: tuple[int, ...] = ()  # items by score, in ten equal bins, of what the model judged
    shown_ns: int = 0  # when the newest of those was decided


class Beat(Message, frozen=True):
    """`beat/<process>`: sent from the working loop, at least once a second while it progresses."""

    process: str
    pid: int
    progress: int  # grows with each piece of work; standing still is a hang
    state: str
    rss_bytes: int
    sent_ns: int
    wait: str = ""  # what a declared wait is for
    wait_until_ns: int = 0  # its bound
    detail: dict[str, str] = {}  # msgspec copies defaults; e.g. camera state
    progressed_ns: int = 0  # when `progress` last grew
    lane: LaneReport | None = None
    camera: CameraReport | None = None


class Event(Message, frozen=True):
    """`event`: something worth telling. `code` is stable: `camera.lost`, `model.loaded`."""

    code: str
    severity: str
    text: str
    process: str
    at_ns: int
    wall_s: float
    data: dict[str, str] = {}


class Health(Message, frozen=True):
    """`health`: how the board is."""

    at_ns: int
    temperatures_c: dict[str, float]  # by sensor; what a lost device reads is left out
    lost: tuple[str, ...]  # devices whose sensor reads what cannot be (a Coral at -89.7)
    clock_mhz: dict[str, float]  # by CPU policy
    throttled: str  # the board's own word, "" where it has none
    memory_free_mb: float
    disk_free_mb: float  # where models and state are
    tmpfs_free_mb: float  # where rings are
    load: float
    clock_synced: bool | None  # None: nobody knows
    pace: float  # share of the frame rate that is allowed; under 1 it is too hot
    processes_mb: dict[str, float]  # resident memory
