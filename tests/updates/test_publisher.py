"""The publisher, as python-tuf's own client sees what it has published."""

import json
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, SecretsHandler
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from common import durable
from common.archive import pack
from common.digest import digest
from common.errors import VigilError
from scripts import publisher
from scripts.metadata import ONLINE, ROLES
from scripts.repository import Repository
from scripts.signers import LIST
from services.updater.channel import Channel, Choice, Offer, parse
from tests import onnx_files


class Files(FetcherInterface):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            return iter([(self.folder / url.removeprefix("files://")).read_bytes()])
        except FileNotFoundError as error:
            raise DownloadHTTPError(url, 404) from error


class Device:
    """A client that keeps what it has seen."""

    def __init__(self, folder: Path, served: Path, anchor: bytes) -> None:
        self.folder, self.served, self.anchor = folder, served, anchor
        folder.mkdir()

    def copy(self, name: str) -> "Device":
        other = Device(self.folder.with_name(name), self.served, self.anchor)
        shutil.copytree(self.folder, other.folder, symlinks=True, dirs_exist_ok=True)
        return other

    def updater(self) -> Updater:
        updater = Updater(
            str(self.folder), "files://metadata", str(self.folder), "files://targets",
            Files(self.served), bootstrap=self.anchor,
        )  # fmt: skip
        updater.refresh()
        return updater

    def get(self, path: str) -> bytes:
        updater = self.updater()
        target = updater.get_targetinfo(path)
        assert target is not None
        return Path(updater.download_target(target, str(self.folder / "target"))).read_bytes()

    def channel(self, name: str = "line") -> Channel:
        return parse(self.get(f"channels/{name}.json"), name)

    def offers(self) -> list[tuple[int, float]]:
        return [(offer.release, offer.rollout) for offer in self.channel().groups["main"].releases]


@cache
def model(folder: Path) -> Path:
    return onnx_files.classifier(folder / "m.onnx")


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = folder / "keys"
        self.repo = Repository.init(folder / "repo", [self.keys])
        self.device = self.new_device("device")

    def new_device(self, name: str) -> Device:
        return Device(self.folder / name, self.repo.folder, self.repo.anchor)

    def tar(self, release: int, name: str = "parts", profile: str = "any", note: str = "") -> Path:
        folder = self.folder / f"{name}-{release}-{profile}{note}"
        folder.mkdir()
        shutil.copy(model(self.folder), folder)
        (folder / "note").write_text(f"{folder.name}")
        more = f'profile = "{profile}"'
        manifest = onnx_files.manifest(name, f"1.{release}", release, more)
        (folder / "manifest.toml").write_text(manifest)
        pack(folder, folder.with_suffix(".tar"))
        return folder.with_suffix(".tar")

    def versions(self) -> tuple[int, ...]:
        state = self.repo.state()
        return tuple(state.role(role).version for role in ROLES)

    def some_keys(self, name: str, *files: str) -> Path:
        """A folder as one holder of keys has it."""
        folder = self.folder / name
        folder.mkdir()
        for file in (LIST, *files):
            shutil.copy(self.keys / file, folder)
        return folder

    def cut(self, monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[], Any]) -> bool:
        """The power goes before the write of that number; whether it came to that."""
        writes = iter(range(at))
        write = durable.write

        def cut_off(path: Path, content: bytes, mode: int = 0o640) -> None:
            if self.keys not in path.parents and next(writes, None) is None:
                raise KeyboardInterrupt
            write(path, content, mode)

        with monkeypatch.context() as patched:
            patched.setattr(durable, "write", cut_off)
            try:
                change()
            except KeyboardInterrupt:
                return True
        return False


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def line(world: World) -> World:
    """A channel `line` that offers release 7, and 8 which is only published."""
    world.repo.add_bundles(world.tar(7), world.tar(8))
    world.repo.set_channel("line", "main", "parts", 7)
    return world


def test_the_first_metadata(world: World) -> None:
    world.device.updater()
    state = world.repo.state()
    assert world.versions() == (1, 1, 1, 1)
    assert state.root.consistent_snapshot
    assert [(role, len(r.keyids), r.threshold) for role, r in state.root.roles.items()] == [
        (role, 3 if role == "root" else 1, 2 if role == "root" else 1) for role in state.root.roles
    ]
    now = datetime.now(UTC)
    for role, days in (("root", 365), ("targets", 365), ("snapshot", 14), ("timestamp", 14)):
        signed = state.role(role)
        assert abs(signed.expires - now - timedelta(days=days)) < timedelta(minutes=1)
        assert ("signed_at" in signed.unrecognized_fields) == (role not in ONLINE)
    signed_at = datetime.strptime(
        state.root.unrecognized_fields["signed_at"], "%Y-%m-%dT%H:%M:%S%z"
    )
    assert abs(signed_at - now) < timedelta(minutes=1)
    assert set(json.loads((world.keys / LIST).read_bytes())) == set(state.root.keys)
    assert stat.S_IMODE(world.keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in world.keys.iterdir()} == {0o600}
    assert sorted(file.stem for file in world.keys.glob("*.pem")) == [
        "root-1", "root-2", "root-3", "snapshot", "targets", "timestamp",
    ]  # fmt: skip
    for meta in (state.timestamp.snapshot_meta, state.snapshot.meta["targets.json"]):
        assert meta.length is not None
        assert list(meta.hashes or {}) == ["sha256"]


def test_days_and_now(tmp_path: Path) -> None:
    now, days = datetime(2031, 5, 1, 12, tzinfo=UTC), {"timestamp": 3, "root": 1000}
    repo = Repository.init(tmp_path / "repo", [tmp_path / "keys"], now=now, days=days)
    repo.now = now + timedelta(days=1)
    repo.refresh()
    state = repo.state()
    assert state.timestamp.expires == now + timedelta(days=4)
    assert state.root.expires == now + timedelta(days=1000)
    assert state.root.unrecognized_fields["signed_at"] == "2031-05-01T12:00:00Z"
    repo.refresh(["targets"], days=5)
    assert repo.state().targets.expires == now + timedelta(days=6)
    repo.refresh(["targets"])
    assert repo.state().targets.expires == now + timedelta(days=6)


def test_bundles(world: World) -> None:
    tar, other = world.tar(7), world.tar(7, profile="jetson")
    paths = world.repo.add_bundles(tar, other)
    assert paths == ["bundles/parts/7/any.tar", "bundles/parts/7/jetson.tar"]
    assert [world.device.get(path) for path in paths] == [tar.read_bytes(), other.read_bytes()]
    target = world.device.updater().get_targetinfo(paths[1])
    assert target is not None
    published = target.custom.pop("published")
    assert abs(datetime.fromisoformat(published) - datetime.now(UTC)) < timedelta(minutes=1)
    assert target.custom == {
        "name": "parts", "version": "1.7", "release": 7, "profile": "jetson",
        "slot": digest(other.with_suffix("")),
    }  # fmt: skip
    world.repo.add_bundles(tar)  # the same once more changes nothing
    assert world.repo.add_bundles(tar, profile="coral") == ["bundles/parts/7/coral.tar"]
    with pytest.raises(VigilError, match="published already, with other content"):
        world.repo.add_bundles(world.tar(7, note="-b"))
    assert world.device.get(paths[0]) == tar.read_bytes()
    assert not list(world.repo.targets.glob(".new*"))
    assert len(list(world.repo.targets.rglob("*.tar"))) == 3


def test_a_release_goes_out_and_comes_back(line: World) -> None:
    assert line.device.channel() == Channel(
        serial=1, groups={"main": Choice(bundle="parts", releases=(Offer(release=7),))}
    )
    soon = datetime(2027, 1, 1, tzinfo=UTC)
    line.repo.set_channel("line", "main", "parts", 8, 1, soon)
    assert line.device.offers() == [(8, 1), (7, 100)]
    line.repo.promote("line", 8, 10)
    assert line.device.channel().groups["main"].releases[0].not_before == soon
    line.repo.set_channel("line", "main", "parts", 8)
    assert line.device.offers() == [(8, 10), (7, 100)]
    line.repo.add_bundles(line.tar(9), line.tar(10))
    line.repo.set_channel("line", "main", "parts", 9, 50)
    line.repo.promote("line", 8)
    assert line.device.offers() == [(9, 50), (8, 100), (7, 100)]
    line.repo.set_channel("line", "main", "parts", 10, 5)
    line.repo.promote("line", 9)
    assert line.device.offers() == [(10, 5), (9, 100), (8, 100)]
    line.repo.withdraw("line", "parts", 9, "sees ghosts")
    line.repo.withdraw("line", "parts", 10, "slow")
    with pytest.raises(VigilError, match="would have no release left"):
        line.repo.withdraw("line", "parts", 8, "too")
    line.repo.withdraw("line", "parts", 8, "too", fallback=7)
    channel = line.device.channel()
    assert channel.withdrawn == {"parts": {"9": "sees ghosts", "10": "slow", "8": "too"}}
    assert line.device.offers() == [(7, 100)]
    assert channel.serial == 11
    with pytest.raises(VigilError, match="release 9 of parts is withdrawn: sees ghosts"):
        line.repo.set_channel("line", "main", "parts", 9)


def test_the_first_release_for_all_leaves_the_one_before_it(line: World) -> None:
    for release in (9, 10, 11):
        line.repo.add_bundles(line.tar(release))
        line.repo.set_channel("early", "main", "parts", release, 5)
    line.repo.promote("early", 11)
    groups = line.device.channel("early").groups
    assert [offer.release for offer in groups["main"].releases] == [11, 10]


def test_groups(line: World) -> None:
    line.repo.add_bundles(line.tar(1, "screws"))
    line.repo.set_channel("line", "night", "screws", 1, 20)
    line.repo.promote("line", 1)
    line.repo.set_channel("line", "night", "parts", 7, 30)  # another bundle: its list begins anew
    groups = line.device.channel().groups
    assert groups["night"].bundle == "parts"
    assert [offer.rollout for offer in groups["night"].releases] == [30]
    with pytest.raises(VigilError, match="is in groups main, night: say which"):
        line.repo.promote("line", 7)
    line.repo.promote("line", 7, group="night")
    assert line.device.channel().groups["night"].releases[0].rollout == 100


def test_refreshing_needs_the_online_keys_alone(line: World) -> None:
    keys = line.some_keys("online", "snapshot.pem", "timestamp.pem")
    online = Repository(line.repo.folder, [keys])
    before = line.versions()
    size = (line.repo.metadata / "timestamp.json").stat().st_size
    assert size < 700
    online.refresh()
    assert line.versions() == (*before[:2], before[2] + 1, before[3] + 1)
    assert line.device.offers() == [(7, 100)]
    for change in (
        lambda: online.refresh(["targets"]),
        lambda: online.set_channel("line", "main", "parts", 8),
    ):
        with pytest.raises(VigilError) as caught:
            change()
        keyid = line.repo.state().root.roles["targets"].keyids[0]
        for words in (
            "targets is signed by 1 of 1",
            f"targets ({keyid[:8]})",
            f"{keys}/targets.pem",
        ):
            assert words in str(caught.value)
    assert line.device.offers() == [(7, 100)]


@pytest.mark.parametrize(
    ("roles", "names"),
    [*(([role], []) for role in ROLES), (["root"], ["root-2"]), (ROLES, []), (ONLINE, [])],
)
def test_rotation(line: World, roles: list[str], names: list[str]) -> None:
    line.device.updater()
    before = line.repo.state().root
    line.repo.rotate(roles, names)
    after = line.repo.state().root
    assert after.version == 2
    for role in ROLES:
        old, new = ({*root.roles[role].keyids} for root in (before, after))
        assert len(old) == len(new)
        assert len(old & new) == (
            0 if role in roles and not names else len(old) - len(names) * (role in roles)
        )
    assert len(after.keys) == 6
    fresh = Repository(line.repo.folder, [line.keys])  # all from the disk
    fresh.set_channel("line", "main", "parts", 8)
    for device in (line.device, line.new_device("new")):
        assert device.offers() == [(8, 100), (7, 100)]
        assert device.updater()._trusted_set.root.version == 2


def test_keys_in_different_hands(line: World) -> None:
    one, two = line.some_keys("one", "root-1.pem"), line.some_keys("two", "root-3.pem")
    with pytest.raises(VigilError) as caught:
        Repository(line.repo.folder, [one]).rotate(["root"], ["root-2"])
    assert "root is signed by 2 of 3 keys, 1 at hand" in str(caught.value)
    assert str(one / "root-3.pem") in str(caught.value)
    assert len(list(one.glob("*.pem"))) == 1  # none was made
    Repository(line.repo.folder, [one, two]).rotate(["root"], ["root-2"])
    assert (one / "root-2.pem").exists()
    assert line.device.offers() == [(7, 100)]
    signed: Metadata[Root] = Metadata.from_file(str(line.repo.metadata / "2.root.json"))
    assert len(signed.signatures) == 3  # root-1 and root-3, for both, and the new root-2


def test_the_keys_of_online_roles_can_be_replaced_without_those_of_targets(line: World) -> None:
    keys = line.some_keys("roots", "root-1.pem", "root-2.pem")
    Repository(line.repo.folder, [keys]).rotate(ONLINE)
    assert line.device.offers() == [(7, 100)]


def test_fast_forward_is_cured_by_new_keys(line: World) -> None:
    """A thief of the online keys serves a copy of his own with versions far ahead."""
    thief = Repository(line.folder / "thief", [line.keys])
    shutil.copytree(line.repo.folder, thief.folder)
    state = thief.state()
    state.snapshot.version = 10**9
    content = thief._sign(state.snapshot, [state.root])
    (thief.metadata / f"{10**9}.snapshot.json").write_bytes(content)
    state.timestamp.version = 10**9
    state.timestamp.snapshot_meta = MetaFile.from_data(10**9, content, ["sha256"])
    (thief.metadata / "timestamp.json").write_bytes(thief._sign(state.timestamp, [state.root]))
    line.device.served = thief.folder
    line.device.updater()
    line.device.served = line.repo.folder
    line.repo.set_channel("line", "main", "parts", 8)
    with pytest.raises(RepositoryError, match="version"):
        line.device.updater()
    line.repo.rotate(ONLINE)
    assert line.device.offers() == [(8, 100), (7, 100)]
    assert line.versions()[3] < 10


class Vault(CryptoSigner):
    """A key service, as far as securesystemslib can tell."""

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CryptoSigner:
        path = priv_key_uri.removeprefix("vault-of-ours:")
        return CryptoSigner.from_priv_key_uri(f"file2:{path}", public_key, secrets_handler)


def test_a_key_in_a_key_service(line: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "vault-of-ours", Vault)
    (line.keys / "targets.pem").rename(line.folder / "inside")
    listed = json.loads((line.keys / LIST).read_bytes())
    keyid = next(keyid for keyid, uri in listed.items() if uri == "file2:targets.pem")
    listed[keyid] = f"vault-of-ours:{line.folder}/inside"
    (line.keys / LIST).write_text(json.dumps(listed))
    Repository(line.repo.folder, [line.keys]).set_channel("line", "main", "parts", 8)
    assert line.device.offers()[0] == (8, 100)


def change(line: World, name: str) -> Callable[[], Any]:
    repo = line.repo
    changes: dict[str, Callable[[], Any]] = {
        "channel": lambda: repo.set_channel("line", "main", "parts", 8),
        "refresh": repo.refresh,
        "rotate targets": lambda: repo.rotate(["targets"]),
        "rotate timestamp": lambda: repo.rotate(["timestamp"]),
        "rotate all": lambda: repo.rotate(ROLES),
    }
    return changes[name]


@pytest.mark.parametrize(
    ("name", "writes", "stale"),
    [
        ("channel", 4, 2),
        ("refresh", 2, 1),
        ("rotate targets", 4, 2),
        ("rotate timestamp", 2, 1),
        ("rotate all", 4, 1),
    ],
)
def test_the_power_goes_before_any_write(
    line: World, monkeypatch: pytest.MonkeyPatch, name: str, writes: int, stale: int
) -> None:
    """Readers have the state before or after; only a new root and the old timestamp fit ill."""
    line.device.updater()
    whole, at, ill = line.folder / "whole", 0, 0
    shutil.copytree(line.repo.folder, whole)
    while line.cut(monkeypatch, at, change(line, name)):
        for device in (line.device.copy(f"cut-{at}"), line.new_device(f"new-{at}")):
            try:
                assert device.offers() == [(7, 100)]
            except RepositoryError:
                ill += 1
                assert (line.repo.metadata / "2.root.json").exists()
        repo = Repository(line.repo.folder, [line.keys])
        state = repo.state()
        if state.stale:
            stale -= 1
            with pytest.raises(VigilError, match="`publish refresh` completes it"):
                repo.export(line.folder / "stick")
        repo.refresh(["root"])  # whatever is signed next completes it
        state = repo.state()
        assert state.snapshot.meta["targets.json"].version == state.targets.version
        assert state.timestamp.snapshot_meta.version == state.snapshot.version
        for device in (line.device.copy(f"later-{at}"), line.new_device(f"last-{at}")):
            assert device.offers() in ([(7, 100)], [(8, 100), (7, 100)])
        change(line, name)()
        assert line.new_device(f"done-{at}").offers()[-1] == (7, 100)
        shutil.rmtree(line.repo.folder)
        shutil.copytree(whole, line.repo.folder)
        at += 1
    assert (at, stale) == (writes, 0)
    assert ill == (2 if name.startswith("rotate") else 0)


def test_readers_while_it_is_published(line: World) -> None:
    seen: list[int] = []
    ended = threading.Event()

    def publish() -> None:
        try:
            while len(set(seen)) < 8:
                line.repo.set_channel("line", "main", "parts", 8, len(seen) % 100)
        finally:
            ended.set()

    thread = threading.Thread(target=publish)
    thread.start()
    while not ended.is_set():
        seen.append(line.device.channel().serial)
    thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) >= 8


def test_one_publisher_at_a_time(line: World) -> None:
    with line.repo._locked(), pytest.raises(VigilError, match="somebody else is publishing"):
        Repository(line.repo.folder, [line.keys]).refresh()
    line.repo.refresh()


def test_what_nobody_has_signed_is_not_signed(line: World) -> None:
    """Somebody can write to the web server, and has no key, or one that counts no more."""
    metadata = line.repo.metadata
    old = (metadata / f"{line.repo.state().targets.version}.targets.json").read_bytes()
    line.repo.set_channel("line", "main", "parts", 8)
    line.repo.rotate(["targets"])
    (metadata / "900.targets.json").write_bytes(old)
    line.repo.refresh()
    assert line.device.offers() == [(8, 100), (7, 100)]
    for name, words in (("timestamp", "timestamp.json: isn't signed"), ("3.root", "3.root.json")):
        path = metadata / f"{name}.json"
        before = path.read_bytes() if path.exists() else None
        forged: Metadata[Any] = Metadata.from_bytes(
            before or (metadata / "2.root.json").read_bytes()
        )
        forged.signed.version = 3
        path.write_bytes(forged.to_bytes())
        with pytest.raises(VigilError, match=words):
            line.repo.refresh()
        path.unlink() if before is None else path.write_bytes(before)
    line.repo.refresh()


# -- export ----------------------------------------------------------------------------------------


@pytest.fixture
def stick(line: World) -> World:
    """Two profiles, two channels."""
    line.repo.add_bundles(line.tar(8, profile="jetson"), line.tar(1, "screws"))
    line.repo.set_channel("line", "main", "parts", 8, 10)
    line.repo.set_channel("other", "main", "screws", 1)
    return line


@pytest.mark.parametrize(
    ("channel", "profile", "missing"),
    [
        (None, None, []),
        ("line", None, ["channels/other.json", "bundles/screws/1/any.tar"]),
        ("line", "coral", ["channels/other.json", "bundles/parts/8/jetson.tar"]),
        ("other", "jetson", ["channels/line.json", "bundles/parts/7/any.tar"]),
    ],
)
def test_export(stick: World, channel: str | None, profile: str | None, missing: list[str]) -> None:
    stick.repo.rotate(["root", "timestamp"])
    paths = stick.repo.export(stick.folder / "stick", channel, profile)
    device = Device(stick.folder / "offline", stick.folder / "stick", stick.repo.anchor)
    for path in paths:
        assert device.get(path) == stick.device.get(path)
    everything = stick.repo.state().targets.targets
    for path in everything.keys() - paths:
        with pytest.raises(DownloadError):
            device.get(path)
    assert not {*paths} & {*missing}


def test_a_torn_copy_is_never_whole(stick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulled out before any write: the copy that was there before, or none."""
    into = stick.folder / "stick"
    at = 0
    while stick.cut(monkeypatch, at, lambda: stick.repo.export(into)):
        device = Device(stick.folder / f"torn-{at}", into, stick.repo.anchor)
        with pytest.raises((RepositoryError, DownloadError)):
            device.updater()
        shutil.rmtree(into)
        at += 1
    assert at == 4
    stick.repo.add_bundles(stick.tar(9))
    stick.repo.set_channel("line", "main", "parts", 9)
    before = stick.folder / "before"
    shutil.copytree(into, before)
    for at in range(4):
        assert stick.cut(monkeypatch, at, lambda: stick.repo.export(into))
        device = Device(stick.folder / f"old-{at}", into, stick.repo.anchor)
        assert device.offers() == [(8, 10), (7, 100)]
        shutil.rmtree(into)
        shutil.copytree(before, into)


def test_a_stick_that_lost_bytes_is_written_anew(stick: World) -> None:
    into = stick.folder / "stick"
    stick.repo.export(into)
    damaged = next(into.rglob("*.jetson.tar"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    stick.repo.export(into)
    device = Device(stick.folder / "offline", into, stick.repo.anchor)
    assert len(device.get("bundles/parts/8/jetson.tar")) == damaged.stat().st_size
    next(stick.repo.targets.rglob("*.jetson.tar")).write_bytes(b"x")
    damaged.unlink()
    with pytest.raises(VigilError, match=r"jetson.tar: is damaged"):
        stick.repo.export(into)
    assert not damaged.exists()


# -- the command line ------------------------------------------------------------------------------


class Command:
    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.world, self._monkeypatch, self._capsys = world, monkeypatch, capsys
        monkeypatch.chdir(world.folder)

    def __call__(self, line: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["publish", *line.split()])
        status = publisher.main()
        out, error = self._capsys.readouterr()
        return status, out, error


@pytest.fixture
def publish(
    line: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(line, monkeypatch, capsys)


def test_the_commands(publish: Command) -> None:
    publish.world.tar(9)
    for line, words in (
        ("init new --keys new-keys --timestamp-days 2", "Devices trust new/metadata/1.root.json"),
        ("show new", "timestamp  version 1     until"),
        ("add repo parts-9-any.tar --keys keys", "added bundles/parts/9/any.tar"),
        ("channel repo line --bundle parts --release 9 --rollout 10 --not-before "
         "2026-11-30T01:00+01:00 --keys keys", "release 9 to 10 %, not before 2026-11-30T00:00Z"),
        ("promote repo line --release 9 --keys keys", "release 9 to 100 %"),
        ("withdraw repo line --bundle parts --release 9 --why ghosts --keys keys",
         "withdrawn: parts release 9: ghosts"),
        ("refresh repo --keys keys --days 3", "timestamp  version 8 "),
        ("rotate repo root --key-name root-2 --keys keys", "root       version 2 "),
        ("export repo stick --channel line", "copied bundles/parts/7/any.tar"),
        ("show repo", "parts release 8 (version 1.8) for any: "),
    ):  # fmt: skip
        status, out, error = publish(line)
        assert (status, error) == (0, ""), line
        assert words in out
    assert publish.world.device.offers() == [(7, 100)]


def test_what_expires_soon_is_told(publish: Command) -> None:
    assert "<-" not in publish("show repo")[1]
    publish.world.repo.now = datetime.now(UTC) - timedelta(days=11)
    publish.world.repo.refresh()
    assert "expires in 3.0 days: publish refresh snapshot" in publish("show repo")[1]
    publish.world.repo.now = datetime.now(UTC) - timedelta(days=15)
    publish.world.repo.refresh(["timestamp"])
    assert "HAS EXPIRED: publish refresh timestamp" in publish("show repo")[1]


BAD = {
    "init repo --keys new": "repo: is a repository already",
    "show nothing": "nothing: is no repository; `publish init` makes one",
    "refresh nothing --keys keys": "nothing: No such file or directory; expected a repository",
    "refresh repo --keys nothing": "missing snapshot (",
    "refresh repo --keys broken": "broken/keys.json: Expected `str`, got `int`",
    "refresh repo --keys garbage": "file2:",
    "add repo nothing.tar --keys keys": "nothing.tar: can't be copied",
    "add repo torn.tar --keys keys": "torn.tar: is cut off at byte 1000",
    "add repo Bad-1-any.tar --keys keys": "Bad-1-any.tar: name 'Bad': expected a-z",
    "add repo empty.tar --keys keys": "empty.tar/manifest.toml: release = -1",
    "add repo parts-7-any.tar --profile X --keys keys": "profile 'X': expected a-z",
    "add repo parts-8-any-b.tar --keys keys": "bundles/parts/8/any.tar is published already",
    "channel repo line --bundle parts --release 9 --keys keys": "no release 9; published: 7, 8",
    "channel repo line --bundle nuts --release 7 --keys keys": "published: none",
    "channel repo Line --bundle parts --release 7 --keys keys": "channel 'Line': expected a-z",
    "channel repo line --group A --bundle parts --release 7 --keys keys": "$.groups",
    "channel repo line --bundle parts --release 7 --rollout 101 --keys keys": "<= 100",
    "channel repo line --bundle parts --release 7 --rollout nan --keys keys": "rollout",
    "channel repo both --bundle parts --release 7 --keys keys": "release 7 is older than 8",
    "promote repo line --release 8 --keys keys": "release 8 is in none of groups main",
    "promote repo lime --release 8 --keys keys": "has no channel lime; expected ",
    "withdraw repo line --bundle parts --release 7 --why x --keys keys": "--fallback RELEASE",
    "withdraw repo line --bundle parts --release 7 --why x --fallback 7 --keys keys": "withdrawn",
    "withdraw repo line --bundle parts --release 6 --why x --keys keys": "no release 6",
    "rotate repo root --key-name root-4 --keys keys": "no keys root-4; expected some of root-1 (",
    "rotate repo root --keys online": "root is signed by 2 of 3 keys, 0 at hand",
    "export repo stick --channel lime": "has no channel lime; expected ",
    "export jetson-only stick --profile coral": "has no bundle for profile coral",
    "export repo file": "file",
    "show damaged": "timestamp.json: is no metadata",
    "show cut": "snapshot",
}


def test_what_is_refused(publish: Command) -> None:
    world = publish.world
    for keys, content in (("broken", b'{"a": 1}'), ("garbage", (world.keys / LIST).read_bytes())):
        (world.folder / keys).mkdir()
        (world.folder / keys / LIST).write_bytes(content)
    (world.folder / "garbage/snapshot.pem").write_text("no key")
    world.some_keys("online", "snapshot.pem", "timestamp.pem")
    torn = world.tar(20).read_bytes()[:1000]
    (world.folder / "torn.tar").write_bytes(torn)
    world.tar(1, "Bad")
    world.tar(8, note="-b")
    world.tar(-1, "empty").rename(world.folder / "empty.tar")
    (world.folder / "file").write_text("in the way")
    world.repo.set_channel("both", "main", "parts", 8)
    jetson = Repository.init(world.folder / "jetson-only", [world.keys])
    jetson.add_bundles(world.tar(30, profile="jetson"))
    jetson.set_channel("line", "main", "parts", 30)
    for name in ("damaged", "cut"):
        shutil.copytree(world.repo.folder, world.folder / name)
    (world.folder / "damaged/metadata/timestamp.json").write_text("{}")
    for file in (world.folder / "cut/metadata").glob("*.snapshot.json"):
        file.unlink()
    before = world.versions()
    for line, words in BAD.items():
        status, out, error = publish(line)
        assert (status, out) == (1, ""), line
        assert error.startswith("publish: ")
        assert error.count("\n") == 1, error
        assert words in error, line
    assert world.versions() == before
    assert world.device.offers() == [(7, 100)]


def test_progress_of_long_work(
    line: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = publisher.Progress()
    clock = iter([0.0, 0.5, 1.5, 1.6, 1.7, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for done in (0, 10, 20, 21, 35, 100):
        progress("parts.tar", done, 100)
    assert capsys.readouterr().err == "parts.tar: 20 %\nparts.tar: 35 %\nparts.tar: 100 %\n"
