"""One table: every message stream, who owns it, and what a slow reader loses."""

from dataclasses import dataclass

from common.messages import Beat, Event, Frame, Health, Message, Result, Trigger, Truth


@dataclass(frozen=True)
class Topic:
    """A row. On the wire the topic is `name`, or `name/<what>` where there is one per something."""

    name: str
    per: str  # "camera", "process" or "" (one for all)
    owner: str  # kind of process that publishes it
    message: type[Message]
    rate: float | str | None  # expected, 1/s; "fps": the camera's; None: when something happens
    slow_reader_loses: str


TOPICS = (
    Topic("frame", "camera", "capture", Frame, "fps", "nothing: the ring has the frames"),
    Topic("result", "camera", "inference", Result, "fps", "nothing: the journal has the results"),
    Topic("shadow", "camera", "inference", Result, None, "what a candidate would have decided"),
    Topic("truth", "camera", "capture", Truth, "fps", "ground truth of those frames"),
    Topic("trigger", "camera", "capture", Trigger, None, "which frame answered a trigger"),
    Topic("beat", "process", "any", Beat, 1.0, "older beats: only the newest counts"),
    Topic("health", "", "watchdog", Health, 0.2, "older ones: only the newest counts"),
    Topic("event", "", "any", Event, None, "the announcement: the log has the event"),
)

_BY_NAME = {topic.name: topic for topic in TOPICS}


def row(topic: str) -> Topic | None:
    """The row of a topic as it is on the wire (`result/belt`); None where there is none."""
    return _BY_NAME.get(topic.partition("/")[0])
