"""Attacks on the signed metadata, against the client over a real web server, and what must not
hurt: damage, wrong clocks, other processes, a full disk. Each attacker has what the attack needs:
the network, old states of the repository, stolen keys.
"""

import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from common.errors import (
    ConfigError,
    FetchError,
    LockedError,
    StorageError,
    UntrustedError,
    VigilError,
)
from scripts.repository import Repository
from services.updater import floors
from services.updater.channel import Channel, channel_path
from services.updater.sources import PORTAL as PORTAL_STATUS
from services.updater.sources import open_source
from services.updater.trust import CHANNEL_MOST, ROLES, Trust
from tests.servers.updates import PORTAL, Fault, Server

START = datetime(2026, 12, 1, tzinfo=UTC)
ONLINE = ("snapshot", "timestamp")


class World:
    """A repository, the server that an attacker may hold, and a device with its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repo = Repository.init(folder / "repo", [folder / "keys"], now=START)
        self.anchor = self.repo.anchor
        self.updates = folder / "device" / "updates"
        self.clock = START
        self.server = Server(self.repo.folder)
        self.source = open_source(self.server.url)
        self.publish()

    def later(self, **by: float) -> None:
        self.clock += timedelta(**by)
        self.repo.now = self.clock

    def publish(self, content: bytes | None = None) -> None:
        """A new version of targets, snapshot and timestamp."""
        self.later(hours=1)
        with self.repo._changing() as state:
            self.repo._put(state, "stable", self.repo._channel(state, "stable", new=True))

    def state(self) -> Path:
        """A copy of the repository as it is."""
        to = self.folder / f"state-{time.monotonic_ns()}"
        shutil.copytree(self.repo.folder, to)
        return to

    def serve(self, folder: Path) -> None:
        self.server.folder = folder

    def trust(self, clock: datetime | None = None, built_s: float = 0.0) -> Trust:
        at = (clock or self.clock).timestamp()
        return Trust(self.updates, self.anchor, self.source, clock=lambda: at, built_s=built_s)

    def check(self, clock: datetime | None = None, built_s: float = 0.0) -> Channel:
        with self.trust(clock, built_s) as trust:
            trust.refresh()
            return trust.channel("stable")

    def refused(self, *words: str, clock: datetime | None = None, built_s: float = 0.0) -> None:
        before = self.floors
        with pytest.raises(UntrustedError) as caught:
            self.check(clock, built_s)
        for word in words:
            assert word in str(caught.value)
        after = self.floors
        assert after.time_s >= before.time_s
        for role, floor in before.versions.items():
            assert after.versions[role].value >= floor.value or after.versions["root"].value > 1
        assert after.serials == before.serials

    @property
    def floors(self) -> floors.Floors:
        return floors.load(self.updates)[0]

    def forget_metadata(self) -> None:
        shutil.rmtree(self.updates / "metadata")

    def steal_online(
        self, timestamp: int | None = None, snapshot: int | None = None, targets: int | None = None
    ) -> None:
        """Sign snapshot and timestamp with the keys of the machine that renews them."""
        state, metadata = self.repo.state(), self.repo.metadata
        state.timestamp.version = timestamp or state.timestamp.version + 1
        if targets:
            content = (metadata / f"{targets}.targets.json").read_bytes()
            meta = MetaFile.from_data(targets, content, ["sha256"])
            state.snapshot.meta["targets.json"] = meta
        if targets or snapshot:
            state.snapshot.version = snapshot or state.snapshot.version + 1
            content = self.repo._sign(state.snapshot, [state.root])
            (metadata / f"{state.snapshot.version}.snapshot.json").write_bytes(content)
            meta = MetaFile.from_data(state.snapshot.version, content, ["sha256"])
            state.timestamp.snapshot_meta = meta
        content = self.repo._sign(state.timestamp, [state.root])
        (metadata / "timestamp.json").write_bytes(content)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "device").mkdir()
    one = World(tmp_path)
    yield one
    one.server.close()


def test_updates_are_followed_and_an_idle_check_moves_and_writes_next_to_nothing(
    world: World,
) -> None:
    assert world.check().serial == 1
    world.publish()
    assert world.check().serial == 2
    world.repo.rotate(["root", "timestamp"])
    assert world.check().serial == 2

    def files() -> dict[Path, tuple[int, int]]:
        found = (path for path in world.updates.rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = files()
    world.server.forget()
    assert world.check().serial == 2
    assert [request.path for request in world.server.requests] == [
        "metadata/3.root.json", "metadata/timestamp.json"
    ]  # fmt: skip
    assert world.server.body_bytes <= 1024
    assert files() == before
    with world.trust() as trust:
        trust.refresh()
        assert trust.target("bundles/none/1/any.tar") is None
        target = trust.target(channel_path("stable"))
        assert target is not None
        assert (world.repo.folder / target.place).stat().st_size == target.length


# -- attacks --------------------------------------------------------------------------------------


def test_arbitrary_metadata(world: World, tmp_path: Path) -> None:
    world.check()
    foreign = Repository.init(tmp_path / "foreign", [tmp_path / "others"], now=world.clock)
    foreign.refresh()
    world.serve(foreign.folder)
    world.refused("metadata/timestamp.json of http://", "not signed", "0/1 keys")
    foreign.rotate(["timestamp"])  # now it has a second root as well
    world.refused("metadata/2.root.json", "not signed")
    world.forget_metadata()
    world.refused("not signed")


@pytest.mark.parametrize(
    ("file", "most"),
    [
        ("2.root.json", 512_000),
        ("timestamp.json", 16_384),
        ("2.snapshot.json", 1000),
        ("2.targets.json", 1000),
    ],
)
def test_endless_data(world: World, file: str, most: int) -> None:
    fault = Fault(endless=True, headers={"Content-Length": "999999999999"})
    if "root" in file:
        fault.body = bytes(10_000)
    world.server.faults[f"metadata/{file}"] = fault
    world.refused(f"metadata/{file}", "more than")
    moved = world.server.sent[f"metadata/{file}"]
    assert moved < most + 1_500_000  # what was on its way in buffers
    world.server.faults.clear()
    world.check()


def test_endless_data_in_a_channel(world: World) -> None:
    fault = Fault(endless=True, headers={"Content-Length": "999999999999"})
    world.server.faults["targets/channels/*"] = fault
    world.refused("channels/", "more than")


def test_fast_forward_and_its_cure(world: World) -> None:
    world.check()
    good = world.state()
    world.publish()  # what the owner will lose
    world.steal_online(timestamp=10**9, snapshot=10**9)
    assert world.check().serial == 2  # as good as signed
    world.serve(good)
    world.refused("rollback")
    world.forget_metadata()
    world.refused("the version of timestamp.json is", "1000000000", "rollback")
    # Its owner finds out, takes up the good state again, and replaces the keys that were stolen.
    shutil.rmtree(world.repo.folder)
    good.rename(world.repo.folder)
    world.serve(world.repo.folder)
    world.repo.rotate(ONLINE)
    world.refused("serial of channel stable is 1")  # of keys that were not replaced
    assert {world.floors.versions[role].value for role in ("targets", "timestamp")} == {2, 3}
    world.publish()
    assert world.check().serial == 2


def test_fast_forward_of_one_key_alone_is_cured_by_that_key(world: World) -> None:
    world.check()
    good = world.state()
    world.steal_online(timestamp=10**9)
    world.check()
    shutil.rmtree(world.repo.folder)
    good.rename(world.repo.folder)
    world.repo.rotate(["timestamp"])
    world.check()


def test_fast_forward_beyond_all_counting(world: World) -> None:
    world.check()
    world.steal_online(timestamp=10**40)
    world.refused("expected at most")


def test_fast_forward_of_time(world: World) -> None:
    """Stolen targets and online keys: what they sign in 300 days is believed until replaced."""
    world.check()
    today = world.clock
    world.repo.now = today + timedelta(days=300)
    world.repo.refresh(["targets"])
    world.check(today)
    assert world.floors.time_s == world.repo.now.timestamp()
    world.repo.now = today
    world.repo.refresh(["targets"])
    words = ("timestamp.json", "good until 2026-12-15", "when trusted metadata was signed")
    world.refused(*words, clock=today)
    world.repo.rotate(["targets", *ONLINE])
    with pytest.raises(UntrustedError, match="good until 2026-12-15"):
        world.check(today)  # but the new root is noted
    world.check(today)
    assert world.floors.time_s == today.timestamp()


def test_fast_forward_of_time_beyond_what_the_root_lasts(world: World) -> None:
    world.check()
    before, today = world.floors.time_s, world.clock
    world.repo.now = today.replace(year=2090)
    world.repo.refresh(["targets"])
    world.refused("root.json", "good until 2027", "already (when trusted metadata", clock=today)
    assert world.floors.time_s == before


def test_freeze(world: World) -> None:
    world.check()
    frozen = world.state()
    world.later(days=15)
    world.repo.refresh()
    world.serve(frozen)
    world.refused("timestamp.json", "good until 2026-12-15", "so says the system clock", "set the")
    world.serve(world.repo.folder)
    world.check()


@pytest.mark.parametrize("role", ROLES)
def test_freeze_of_each_role(world: World, role: str) -> None:
    world.repo.refresh(["root", *ONLINE, "targets"], days=1000)
    world.repo.refresh([role], days=3)
    world.check()
    world.later(days=4)
    world.refused(f"{role}.json", "is good until 2026-12-04T01:00:00Z")
    world.forget_metadata()
    world.refused(f"{role}.json", "is good until 2026-12-04T01:00:00Z")


def test_freeze_betrayed_by_a_newer_root(world: World) -> None:
    """No clock and nothing known yet: that the root is newer shows that the rest has expired."""
    world.publish()
    frozen = world.state()
    world.later(days=60)
    world.repo.refresh(["root"])
    shutil.copy(world.repo.metadata / "2.root.json", frozen / "metadata")
    world.serve(frozen)
    world.refused("timestamp.json", "signed", clock=datetime.fromtimestamp(0, UTC))


def test_rollback_of_everything(world: World) -> None:
    world.check()
    old = world.state()
    world.publish()
    world.check()
    world.serve(old)
    world.refused("metadata/timestamp.json", "rollback")
    world.forget_metadata()  # floors are what is left
    world.refused("the version of timestamp.json", "rollback")


def test_rollback_of_snapshot(world: World) -> None:
    world.publish()
    world.check()
    world.steal_online(snapshot=1)
    world.refused("rollback")
    world.forget_metadata()
    world.refused("the version of snapshot.json", "rollback")


def test_rollback_of_targets(world: World) -> None:
    """Stolen online keys: the newest snapshot lists targets that were signed long ago."""
    world.publish()
    world.check()
    world.steal_online(targets=2)
    world.refused("rollback")
    world.forget_metadata()
    world.refused("the version of targets.json", "rollback")


def test_rollback_of_root(world: World) -> None:
    old = world.state()
    world.repo.rotate(ONLINE)
    world.check()
    world.forget_metadata()
    world.serve(old)
    world.refused("the version of root.json is 1, older than 2")


def test_rollback_of_a_channel(world: World) -> None:
    """By the holder of the targets keys, or a backup that was played back into the repository."""
    world.publish()
    world.check()
    with world.repo._changing() as state:
        content = msgspec.json.encode(Channel(serial=1, groups={}))
        target = TargetFile.from_data(channel_path("stable"), content, ["sha256"])
        (world.repo.targets / target.get_prefixed_paths()[0]).write_bytes(content)
        state.targets.targets[target.path] = target
    world.refused("serial of channel stable is 1", "rollback")


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_mix_and_match(world: World, role: str) -> None:
    world.check()
    old = (world.repo.metadata / f"2.{role}.json").read_bytes()
    world.publish()
    (world.repo.metadata / f"3.{role}.json").write_bytes(old)
    world.refused(f"metadata/3.{role}.json", "not the file that is signed")


@pytest.mark.parametrize("stolen", [1, 2])
def test_key_compromise_of_root_keys(world: World, stolen: int) -> None:
    world.check()
    state = world.repo.state()
    signers = world.repo.keys.signers(state.root, "root")
    thief = Repository.init(world.folder / "thief", [world.folder / "own"], now=world.clock)
    for role in ("targets", *ONLINE):
        own = thief.state().root
        state.root.roles[role].keyids = []
        for keyid in own.roles[role].keyids:
            state.root.add_key(own.keys[keyid], role)
    state.root.version += 1
    root = Metadata(state.root)
    for signer in signers[:stolen]:
        root.sign(signer, append=True)
    (thief.metadata / "2.root.json").write_bytes(root.to_bytes())
    world.serve(thief.folder)
    if stolen < 2:
        world.refused("metadata/2.root.json", "not signed", "1/2 keys")
    else:  # that is what the threshold means
        with world.trust() as trust:
            trust.refresh()


def test_key_compromise_of_online_keys_adds_no_target(world: World) -> None:
    world.check()
    state = world.repo.state()
    state.targets.version += 1
    state.targets.targets["evil"] = TargetFile.from_data("evil", b"evil", ["sha256"])
    targets = Metadata(state.targets)
    for role in ONLINE:
        for signer in world.repo.keys.signers(state.root, role):
            targets.sign(signer, append=True)
    number = state.targets.version
    (world.repo.metadata / f"{number}.targets.json").write_bytes(targets.to_bytes())
    world.steal_online(targets=number)
    world.refused("targets.json", "not signed", "0/1 keys")


def test_key_compromise_of_online_keys_moves_no_time(world: World) -> None:
    world.check()
    before = world.floors.time_s
    state = world.repo.state()
    for signed in (state.snapshot, state.timestamp):
        signed.unrecognized_fields["signed_at"] = "2090-01-01T00:00:00Z"
    state.timestamp.version += 1
    (world.repo.metadata / "timestamp.json").write_bytes(
        world.repo._sign(state.timestamp, [state.root])
    )
    world.check()
    assert world.floors.time_s == before


@pytest.mark.parametrize("signed_at", ["2027-12-02T00:00:00Z", "yesterday", 7, None])
def test_a_time_that_can_not_be(world: World, signed_at: object) -> None:
    state = world.repo.state()
    state.root.version += 1
    state.root.unrecognized_fields["signed_at"] = signed_at
    root = Metadata(state.root)
    for signer in world.repo.keys.signers(state.root, "root"):
        root.sign(signer, append=True)
    (world.repo.metadata / "2.root.json").write_bytes(root.to_bytes())
    if signed_at is None:
        world.check()
    else:
        world.refused("root.json: signed_at")


def test_malicious_mirror_of_a_channel(world: World) -> None:
    world.server.faults["targets/channels/*"] = Fault(body=b'{"format":1,"serial":9,"groups":{}}')
    world.refused("channels/stable.json", "is not the file that is signed")
    world.server.faults["targets/channels/*"] = Fault(body=b"{")
    world.refused("is not the file that is signed")


def test_a_channel_too_large(world: World) -> None:
    with world.repo._changing() as state:
        content = bytes(CHANNEL_MOST + 1)
        target = TargetFile.from_data(channel_path("stable"), content, ["sha256"])
        state.targets.targets[target.path] = target
    world.refused("channels/stable.json", f"expected {CHANNEL_MOST}")


# -- clocks ---------------------------------------------------------------------------------------


def test_a_clock_at_1970(world: World) -> None:
    zero = datetime.fromtimestamp(0, UTC)
    world.check(zero)
    with world.trust(zero) as trust:
        assert trust.now_s == world.clock.timestamp()  # the newest that was signed
    frozen = world.state()
    world.later(days=30)
    world.repo.refresh(["targets"])
    world.check(zero)
    world.serve(frozen)
    world.forget_metadata()
    world.refused("timestamp.json", "when trusted metadata was signed", clock=zero)


def test_a_clock_at_1970_is_not_before_the_code_was_built(world: World) -> None:
    built = world.clock + timedelta(days=20)
    zero = datetime.fromtimestamp(0, UTC)
    world.refused("when Vigil was built", clock=zero, built_s=built.timestamp())


def test_a_clock_at_2100_is_cured_by_setting_it(world: World) -> None:
    world.check()
    world.refused("2100-", "set the clock", clock=datetime(2100, 1, 1, tzinfo=UTC))
    world.check()
    assert floors.trusted_now(world.updates) < datetime(2099, 1, 1, tzinfo=UTC).timestamp()


# -- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [PORTAL.headers, {"Content-Type": "application/json"}])
@pytest.mark.parametrize("files", ["*", "metadata/timestamp.json", "targets/channels/*"])
def test_a_captive_portal(world: World, headers: dict[str, str | None], files: str) -> None:
    body = PORTAL.body if headers == PORTAL.headers else b"\r\n <!DOCTYPE html>"
    world.server.faults[files] = Fault(body=body, headers=headers)
    with pytest.raises(FetchError, match="portal") as caught:
        world.check()
    assert caught.value.status == PORTAL_STATUS
    world.server.faults.clear()
    assert world.check().serial == 1


@pytest.mark.parametrize("status", [403, 404, 500, 503])
@pytest.mark.parametrize("file", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_a_file_that_is_not_to_be_had(world: World, status: int, file: str) -> None:
    world.server.faults[f"metadata/{file}"] = Fault(status=status)
    with pytest.raises(FetchError, match=file) as caught:
        world.check()
    assert caught.value.status == status


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[" * 9999, b"\xff" * 99, b'{"signed":7}'])
def test_garbage(world: World, body: bytes) -> None:
    for file in ("2.root.json", "timestamp.json"):
        world.server.faults = {f"metadata/{file}": Fault(body=body)}
        world.refused(f"metadata/{file}", "no metadata")


# -- the device itself ----------------------------------------------------------------------------


def test_damaged_metadata_is_fetched_again(world: World) -> None:
    world.repo.rotate(["root"])
    world.source = open_source(str(world.repo.folder))
    world.check()
    kept = {p: p.read_bytes() for p in world.updates.rglob("*.json") if "floors" not in p.name}
    assert len(kept) == 6  # two roots, three more, the channel
    for path, content in kept.items():
        size = len(content)
        cut = [content[:at] for at in range(0, size, size // 8)]
        flipped = [
            content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            for at in range(0, size, size // 12)
        ]
        for damaged in (*cut, *flipped, bytes(size)):
            path.write_bytes(damaged)
            assert world.check().serial == 1
        assert path.read_bytes() == content
    for path in (world.updates / "metadata").glob("*.json"):
        path.unlink()
        path.mkdir()  # as a mad file system has it
    with pytest.raises(StorageError):
        world.check()


def test_each_bit_of_the_floors_counts(world: World) -> None:
    world.check()
    for name in floors.COPIES:
        content = (world.updates / name).read_bytes()
        good = floors._parse(content)
        for at in range(len(content) * 8):
            changed = bytearray(content)
            changed[at // 8] ^= 1 << at % 8
            with pytest.raises(ValueError, match="damaged"):
                floors._parse(bytes(changed))
        for at in range(len(content)):
            with pytest.raises(ValueError, match="damaged"):
                floors._parse(content[:at])
        assert good == world.floors


@pytest.mark.parametrize("name", floors.COPIES)
def test_one_copy_of_the_floors_damaged_lowers_nothing(world: World, name: str) -> None:
    old = world.state()
    world.publish()
    world.check()
    (world.updates / name).write_bytes(b"\0" * 100)
    world.forget_metadata()
    world.serve(old)
    with world.trust() as trust:
        assert len(trust.problems) == 1
        assert name in trust.problems[0]
    world.refused("rollback")
    assert (world.updates / f"{name}.broken").exists()
    assert floors.load(world.updates)[1] == []


def test_both_copies_of_the_floors_damaged_the_metadata_here_still_proves(world: World) -> None:
    old = world.state()
    world.publish()
    world.check()
    good = world.floors
    for name in floors.COPIES:
        (world.updates / name).write_bytes(b"\0" * 100)
    world.serve(old)
    with world.trust() as trust:
        assert len(trust.problems) == 3
    world.refused("rollback")
    world.serve(world.repo.folder)
    world.check()
    assert world.floors == good


def _hold(updates: Path, anchor: bytes, pipe: Connection) -> None:
    with Trust(updates, anchor, open_source("/")):
        pipe.send("held")
        pipe.recv()


def test_one_updater_at_a_time(world: World) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(world.updates, world.anchor, theirs)
    )
    other.start()
    assert ours.recv() == "held"
    with pytest.raises(LockedError, match="held by another process"):
        world.trust()
    other.kill()
    other.join()
    other.close()
    world.check()


@pytest.mark.parametrize("limit", [0, 100, 700, 1200])
def test_a_full_disk(world: World, limit: int) -> None:
    """No file may grow beyond the limit, which cuts writes as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    world.publish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match="can't be written"):
            world.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert world.check().serial == 2


@pytest.mark.parametrize("anchor", [b"", b"{}", b"<html>", "unsigned", "timestamp"])
def test_a_broken_anchor(world: World, anchor: bytes | str) -> None:
    if anchor == "unsigned":
        root = Metadata.from_bytes(world.anchor)
        root.signatures.popitem()
        root.signatures.popitem()
        world.anchor = root.to_bytes()
    elif anchor == "timestamp":
        world.anchor = (world.repo.metadata / "timestamp.json").read_bytes()
    else:
        assert isinstance(anchor, bytes)
        world.anchor = anchor
    with pytest.raises(ConfigError, match="trust anchor"):
        world.check()
    assert world.server.requests == []


def test_releases_only_grow(world: World) -> None:
    with world.trust() as trust:
        assert trust.raise_release("main/parts", 7) == 7
    with world.trust() as trust:
        assert trust.raise_release("main/parts", 3) == 7
        assert trust.raise_release("main/other", 3) == 3


def test_what_is_not_verified_is_not_to_be_had(world: World) -> None:
    world.check()
    old = world.state()
    world.publish()
    world.check()
    world.forget_metadata()
    world.serve(old)
    uses: list[Callable[[Trust], object]] = [
        lambda trust: trust.target("bundles/x"), lambda trust: trust.channel("stable")
    ]  # fmt: skip
    with world.trust() as trust:
        for _ in range(2):
            for use in uses:
                with pytest.raises(UntrustedError, match="nothing is verified"):
                    use(trust)
            with pytest.raises(UntrustedError, match="rollback"):
                trust.refresh()
        world.serve(world.repo.folder)
        trust.refresh()
        assert trust.channel("stable").serial == 2
    assert issubclass(UntrustedError, VigilError)
