"""An update's way when things happen in an odd order: withdrawn, judged, rolled back, looked for
again in between."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec
import pytest

from common import durable, slots
from common.slots import Slot
from common.states import Phase, SlotState
from common.store import Store
from common.updates import REPLY, REQUEST, Reply, Request
from scripts.repository import Repository
from scripts.signers import PublishError
from services.updater.channel import Channel, Choice, Offer, wanted
from services.updater.life import Step
from tests.servers.updates import Fault
from tests.updates.attacks import Stage
from tests.updates.desk import Desk
from tests.updates.device import bundle, publish, sign

_TIMES = (datetime.now() + timedelta(hours=two) for two in (2, 3))
AWAY = "-".join(f"{one:%H:%M}" for one in _TIMES)  # a window


@pytest.fixture
def desk(stage: Stage) -> Iterator[Desk]:
    """Release 1 is known good there."""
    one = Desk(stage.folder / "desk", stage.repository.anchor, stage.server.url)
    one.work()
    one.judge()
    one.turn()
    assert one.told("update.good")
    yield one
    one.close()


def test_going_back_is_not_cut_short_by_the_next_check(stage: Stage, desk: Desk) -> None:
    """A withdrawn release is left for the one before, however often is asked meanwhile."""
    publish(stage.repository, stage.scratch, 2)
    desk.work()
    desk.judge()
    stage.repository.withdraw("stable", "parts", 2, "misses cracks", fallback=1)
    for phase in (Phase.REQUESTED, Phase.SOAK):
        desk.work()
        assert desk.judge(phase).txn.phase is phase
        desk.work()
        assert desk.store.read().txn.phase is phase
    assert desk.judge().known_good == stage.first


@pytest.mark.parametrize("phase", [Phase.PROVING, Phase.SOAK])
def test_a_release_withdrawn_under_test_is_told_to_be_bad(
    stage: Stage, desk: Desk, phase: Phase
) -> None:
    slot = publish(stage.repository, stage.scratch, 2)
    desk.work()
    desk.judge(phase)
    stage.repository.withdraw("stable", "parts", 2, "misses cracks", fallback=1)
    desk.work()
    assert desk.store.read().state(slot) is SlotState.BAD
    last = desk.history[-1]
    assert (last.step, last.outcome, last.slot) == ("bad", "failed", slot)
    assert last.reason == "withdrawn: misses cracks"


def test_a_verdict_between_two_turns_is_told(stage: Stage, desk: Desk) -> None:
    """Good, while a check finds that there is something newer already."""
    second = publish(stage.repository, stage.scratch, 2)
    desk.work()
    publish(stage.repository, stage.scratch, 3)
    desk.judge()
    desk.work()
    assert [one.slot for one in desk.history if one.step == "good"] == [stage.first, second]


SIDE = """
[groups.side]
model = "nowhere"
[cameras.other]
source = "virtual"
fps = 5
group = "side"
"""


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * 10240)])
def test_a_bundle_that_is_damaged_after_its_download(
    stage: Stage, desk: Desk, damage: Callable[[Path], object]
) -> None:
    """The release is not to blame: it is fetched again."""
    second, way = publish(stage.repository, stage.scratch, 2), desk.signed.ways["main"]
    desk.signed._next_s = 0.0
    while not way.noted.update or way.noted.update.step is not Step.INSTALL:
        desk.turn()
    damage(desk.paths.updates / "partial" / way.noted.update.sha256)
    desk.turn()
    way._retry = 0.0
    desk.work()
    assert desk.judge().known_good == second


def test_a_release_that_was_packed_anew(stage: Stage, desk: Desk) -> None:
    """With the same content, and other bytes: where they were before there is nothing."""
    stage.server.faults["targets/bundles/parts/2/*"] = Fault(status=404)
    second = publish(stage.repository, stage.scratch, 2)
    desk.work()
    [old] = (stage.server.folder / "targets/bundles/parts/2").iterdir()
    path = "bundles/parts/2/any.tar"
    custom = stage.repository.state().targets.targets[path].custom
    sign(stage.repository, path, old.read_bytes() + bytes(10240), custom)
    old.unlink()
    stage.server.faults.clear()
    desk.work()
    assert desk.judge().known_good == second


def test_what_a_budget_can_never_allow_is_not_begun(stage: Stage) -> None:
    """And a budget that can't be read is told to be so."""
    [old] = (stage.server.folder / "targets/bundles/parts/1").iterdir()
    path = "bundles/parts/1/any.tar"
    custom = stage.repository.state().targets.targets[path].custom
    sign(stage.repository, path, old.read_bytes() + bytes(1_000_000), custom)
    url = stage.server.url
    desk = Desk(stage.folder / "desk", stage.repository.anchor, url, "update_mb = 1\n")
    desk.work()
    assert "has 1.0 MB, and 1 MB may be moved" in desk.history[-1].reason
    assert not any("bundles" in request.path for request in stage.server.requests)
    (desk.paths.updates / "budget.json").unlink()
    (desk.paths.updates / "budget.json").mkdir()
    desk.signed.ways["main"]._retry = 0.0
    desk.work()
    assert "budget.json" in desk.history[-1].reason
    desk.close()


def test_what_is_too_long_for_a_bundle_is_not_begun(stage: Stage, desk: Desk) -> None:
    publish(stage.repository, stage.scratch, 2)
    with stage.repository._changing() as state:
        state.targets.targets["bundles/parts/2/any.tar"].length = 10**12
    desk.work()
    assert "has 1000000000000 bytes" in desk.signed.ways["main"].report().reason
    assert desk.history[-1].step == "good"


def test_a_server_with_something_else_is_asked_ever_less(stage: Stage) -> None:
    stage.server.faults["targets/bundles/*"] = Fault(body=bytes(10240))
    desk = Desk(stage.folder / "desk", stage.repository.anchor, stage.server.url)
    desk.work()
    way, waits_s = desk.signed.ways["main"], []
    for _ in range(6):
        waits_s.append(way._retry - time.monotonic())
        way._retry = 0.0
        desk.turn()
    hour_s, slack_s = 3600.0, 30.0
    assert 0.5 * hour_s - slack_s < waits_s[0] < 1.5 * hour_s
    assert waits_s[-1] > 12 * hour_s - slack_s
    assert [one.outcome for one in desk.history] == ["ok", "failed"]
    desk.close()


def test_what_is_here_is_not_fetched_again(stage: Stage) -> None:
    """Though the notes on it are lost; and withdrawn while it waits, it is told to be so."""
    desk = Desk(
        stage.folder / "desk", stage.repository.anchor, stage.server.url, f'activate = ["{AWAY}"]\n'
    )
    desk.work()
    assert desk.store.read().state(stage.first) is SlotState.INSTALLED
    stage.server.forget()
    (desk.paths.updates / "txn-main.json").unlink()
    desk.begin()
    desk.work()
    assert not any("bundles" in request.path for request in stage.server.requests)
    assert desk.signed.ways["main"].report().step == "activate"
    publish(stage.repository, stage.scratch, 2)
    stage.repository.withdraw("stable", "parts", 1, "misses cracks")
    desk.work()
    assert stage.first not in desk.store.read().slots
    [last] = [one for one in desk.history if one.outcome == "failed"]
    assert (last.slot, last.reason) == (stage.first, "withdrawn: misses cracks")
    desk.close()


def test_a_record_that_is_lost_is_no_verdict(stage: Stage, desk: Desk) -> None:
    second = publish(stage.repository, stage.scratch, 2)
    desk.work()
    desk.judge(Phase.SOAK)
    desk.turn()
    for name in ("state.0", "state.1"):
        (desk.store.folder / name).write_bytes(b"damaged")
    desk.work()
    assert desk.judge().known_good == second
    desk.turn()
    assert desk.history[-1].step == "good"
    assert not desk.told("update.bad")


def test_an_update_behind_another_model_says_so(stage: Stage, desk: Desk) -> None:
    offered = Slot(SlotState.INSTALLED)
    desk.store.commit(partial(slots.install, name="0" * 64, slot=offered))
    desk.store.commit(partial(slots.activate, name="0" * 64))
    publish(stage.repository, stage.scratch, 2)
    desk.work()
    report = desk.signed.ways["main"].report()
    assert (report.step, report.waits) == ("install", "another model that is under test")


def test_a_release_that_a_thief_has_published_far_ahead(stage: Stage, desk: Desk) -> None:
    """With the key of targets, stolen: its number is a floor on devices until it is withdrawn."""
    evil = Repository(stage.old(), [stage.keys])
    stage.server.folder = evil.folder
    slot = publish(evil, stage.scratch, 10**9)
    desk.work()
    assert desk.judge().known_good == slot
    stage.server.folder = stage.repository.folder
    stage.repository.rotate(("targets", "snapshot", "timestamp"))
    second = publish(stage.repository, stage.scratch, 2)
    desk.work()
    desk.work()  # what the thief has signed last is forgotten with the first, failed try
    assert "older than release 1000000000" in desk.signed.ways["main"].report().reason
    with pytest.raises(PublishError, match="no release 1000000000; published: 1, 2"):
        stage.repository.withdraw("stable", "parts", 10**9, "a thief's")
    stage.repository.withdraw("stable", "parts", 10**9, "a thief's", unpublished=True)
    desk.work()
    assert desk.judge().known_good == second


def test_two_groups_want_the_same_bundle(stage: Stage) -> None:
    """It is fetched once; and what one of them is offered wrongly is not the other's trouble."""
    stage.repository.set_channel("stable", "side", "parts", 1)
    desk = Desk(stage.folder / "desk", stage.repository.anchor, stage.server.url, SIDE)
    side = Store(desk.paths, "side", 2)
    desk.work()
    assert desk.judge().known_good == desk.judge(store=side).known_good == stage.first
    [path] = [one for one in stage.server.sent if "bundles" in one]
    assert stage.server.sent[path] == 10240
    tar = bundle(stage.scratch, 7, "caps")
    stage.repository.add_bundles(tar)
    stage.repository.set_channel("stable", "side", "caps", 7)
    second = publish(stage.repository, stage.scratch, 2)
    wrong = {
        "name": "parts", "version": "1", "release": 7, "profile": "any", "slot": "0" * 64,
        "published": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    sign(stage.repository, "bundles/caps/7/any.tar", tar.read_bytes(), wrong)
    desk.work()
    assert desk.store.read().txn.slot == second
    assert "not signed rightly" in desk.signed.ways["side"].report().reason
    desk.close()


def test_what_a_channel_says_at_length(stage: Stage) -> None:
    """Through a pipe of 64 KiB to the updater, into the record, and onto a screen."""
    repository = stage.repository
    publish(repository, stage.scratch, 2)
    with pytest.raises(PublishError, match="length <= 200"):
        repository.withdraw("stable", "parts", 1, "x" * 201)
    offers = tuple(Offer(release=one) for one in range(64))
    why = {"parts": {str(one): "x" * 200 for one in range(64)}}
    groups = {"main": Choice(bundle="parts", releases=offers)}
    channel = Channel(serial=1, groups=groups, withdrawn=why)
    release, reason = wanted(channel, "main", "device", 0.0, 0, {})
    assert release is None
    assert len(reason) == 1000
    longest = {str(one): "x" * 200 for one in range(400)}
    with repository._changing() as state, pytest.raises(PublishError, match="at most 65536"):
        repository._put(state, "stable", Channel(serial=1, groups=groups, withdrawn={"a": longest}))


def test_killed_after_any_write(stage: Stage, desk: Desk) -> None:
    """It goes on, and whatever became of the release is told: perhaps twice."""
    killed, release = True, 1
    while killed:
        release += 1
        slot = publish(stage.repository, stage.scratch, release)
        killed = _killed(desk, writes=release - 1)
        desk.begin()
        desk.work()
        desk.judge()
        desk.turn()
        assert desk.store.read().known_good == slot
        told = [one.step for one in desk.history if one.slot == slot]
        assert 1 <= told.count("good") <= 2, (release, told)
        assert "bad" not in told
    assert release > 10


def _killed(desk: Desk, writes: int) -> bool:
    """Whether the whole way of a release has more writes of ours than these, after which it is
    killed."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    write = durable.write

    def last(path: Path, content: bytes, mode: int = 0o640) -> None:
        nonlocal writes
        write(path, content, mode)
        writes -= path.name in ("txn-main.json", "history.json", "state.0", "state.1")
        if writes == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.write = last
    try:
        desk.work()
        desk.judge()
        desk.turn()
        os._exit(0)
    finally:
        os._exit(1)


def test_an_inbox_is_looked_at_again(stage: Stage) -> None:
    """Without a network nobody else says that a release's time has come."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    stage.repository.set_channel("stable", "main", "parts", 1, not_before=tomorrow)
    desk = Desk(stage.folder / "desk", stage.repository.anchor, "")
    stage.repository.export(desk.paths.updates / "inbox")
    for _ in range(2):
        desk.signed._next_s = 0.0
        child = desk.turn()
        assert child
        assert child.what.endswith("check")
        assert "not before" in desk.signed.ways["main"].report().reason
        assert desk.turn() is None
    desk.close()


def test_a_question_that_nothing_can_come_of_is_answered(stage: Stage, desk: Desk) -> None:
    lines = desk.config.read_text().splitlines()
    desk.config.write_text("\n".join(one for one in lines if not one.startswith(("root", "url"))))
    desk.begin()
    (desk.paths.run / REQUEST).write_bytes(msgspec.json.encode(Request(id="one")))
    desk.turn()
    reply = msgspec.json.decode((desk.paths.run / REPLY).read_bytes(), type=Reply)
    assert reply.id == "one"
    assert "updates.root is missing" in reply.error
