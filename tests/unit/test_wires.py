"""Every row of the table of topics, and how its messages evolve."""

import re
from typing import Any

import msgspec
import pytest

from common import bus
from common.messages import (
    Beat,
    CameraReport,
    Event,
    Frame,
    Health,
    Item,
    LaneReport,
    Message,
    Result,
    Stages,
    Trigger,
    Truth,
    TruthItem,
)
from common.processes import KINDS
from common.topics import TOPICS, Topic, row

SAMPLES: dict[type[Message], Message] = {
    Frame: Frame(1, 2**40, 10**15, 10**15 + 1, 2, 2**62),
    Result: Result(
        "belt", 1, 7, 3, "valid", 10**15, 5_000_000, "m", "1.0.0", 1, "0123456789ab", "litert",
        (Item("dent", 0.75, 2, (0.0, 1.5, 20.0, 30.25), ("gate", "b")), Item("cat", 0.5, 281)),
        Stages(1, 2, 3, 4, 5, 6), 17, "nothing", 4711,
    ),
    Trigger: Trigger(4711, 10**15, 1, 7, "late"),
    Truth: Truth(1, 7, (TruthItem("stain", (1.0, 2.0, 3.0, 4.0)),)),
    Beat: Beat(
        "inference-main-a", 99, 5, "waiting", 2**33, 10**15, "frame", 10**15, {"a": "b"}, 10**14,
        LaneReport(7, "factory", True, True, "slow", "no accelerator", 9, 1, 0.5, 12.5),
        CameraReport(
            "dark", 10**15, "covered", "640x480 YUYV", "a zone", 29.5, 3, 4, 9.5, 1.5, 7, 8
        ),
    ),
    Health: Health(
        10**15, {"cpu": 55.5}, ("apex_0",), {"policy0": 1500.0}, "0x50000", 900.5, 3000.0, 60.0,
        0.75, True, 0.5, {"capture-belt": 40.5},
    ),
    Event: Event("camera.lost", "warning", "belt: lost – gone", "capture-belt", 1, 1.5, {"a": "b"}),
}  # fmt: skip
each = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)


def wire(topic: Topic) -> str:
    return topic.name if topic.per == "" else f"{topic.name}/x"


def raw(message: Message) -> list[Any]:
    decoded: list[Any] = msgspec.msgpack.decode(bus.encode(message))
    return decoded


@each
def test_a_row_is_whole(topic: Topic) -> None:
    assert topic.owner in {kind.name for kind in KINDS} | {"any"}
    assert topic.per in ("camera", "process", "")
    assert re.fullmatch("[a-z]+", topic.name)
    assert topic.rate is None or topic.rate == "fps" or float(topic.rate) > 0
    assert topic.slow_reader_loses
    assert row(wire(topic)) is topic
    assert row(f"{topic.name}x/y") is None


@each
def test_a_message_arrives_as_it_was_sent(topic: Topic) -> None:
    sample = SAMPLES[topic.message]
    assert bus.decode(wire(topic), bus.encode(sample)) == sample
    for field, value in zip(msgspec.structs.fields(sample), raw(sample), strict=True):
        plain = getattr(sample, field.name)
        assert value is not None
        if isinstance(plain, int | float | str | dict):
            assert (value, type(value)) == (plain, type(plain))
        if not field.required:
            assert plain != field.default  # the sample says something in each field


@each
def test_an_older_reader_takes_a_newer_message(topic: Topic) -> None:
    sample = SAMPLES[topic.message]
    newer = msgspec.msgpack.encode([*raw(sample), "a field of tomorrow", {"and": [1]}])
    assert bus.decode(wire(topic), newer) == sample


@each
def test_a_newer_reader_takes_an_older_message(topic: Topic) -> None:
    sample = SAMPLES[topic.message]
    fields = msgspec.structs.fields(topic.message)
    required = [field for field in fields if field.required]
    assert list(fields[: len(required)]) == required  # a new field goes last
    for kept in range(len(required), len(fields)):
        older = bus.decode(wire(topic), msgspec.msgpack.encode(raw(sample)[:kept]))
        for n, field in enumerate(fields):
            default: Any = field.default
            if default is msgspec.NODEFAULT and not field.required:
                default = field.default_factory()
            expected = getattr(sample, field.name) if n < kept else default
            assert getattr(older, field.name) == expected
    with pytest.raises(msgspec.DecodeError):
        bus.decode(wire(topic), msgspec.msgpack.encode(raw(sample)[: len(required) - 1]))


@each
def test_a_message_that_is_none_of_the_topic_is_refused(topic: Topic) -> None:
    changed = raw(SAMPLES[topic.message])
    changed[0] = [changed[0]]
    for body in (b"", b"\xc1", b"{}", msgspec.msgpack.encode(changed)):
        with pytest.raises(msgspec.DecodeError):
            bus.decode(wire(topic), body)


def test_names_are_unique_and_unknown_ones_are_refused() -> None:
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    assert set(SAMPLES) == {topic.message for topic in TOPICS}
    for topic in ("", "results/belt", "/belt", "Frame/belt"):
        assert row(topic) is None
        with pytest.raises(msgspec.DecodeError, match=f"unknown topic {topic}"):
            bus.decode(topic, bus.encode(SAMPLES[Frame]))


def test_messages_can_not_be_changed() -> None:
    for sample in SAMPLES.values():
        with pytest.raises(AttributeError, match="immutable"):
            setattr(sample, sample.__struct_fields__[0], 1)


def test_a_frame_is_small() -> None:
    assert len(bus.encode(SAMPLES[Frame])) < 60
