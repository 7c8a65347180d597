"""A repository of signed updates: static files as The Update Framework has them.

    metadata/  N.root.json timestamp.json N.snapshot.json N.targets.json
    targets/   channels/<sha256>.NAME.json   bundles/BUNDLE/RELEASE/<sha256>.PROFILE.tar

Root is signed by 2 of 3 keys. Its keys and that of targets belong offline; those of snapshot and
timestamp stay on the machine that renews them. A reader never meets a gap, whenever the power goes:
everything is written under a new name, what refers to it afterwards, timestamp.json last of all.
"""

import copy
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from common import durable
from common.archive import unpack
from common.config import NAME
from common.engine.bundle import open_bundle
from common.errors import BundleError, ModelError, StorageError
from scripts.signers import Keys, PublishError, named
from services.updater.channel import ANY, Channel, Choice, Custom, Offer, bundle_paths, channel_path

ROLES = ("root", "targets", "snapshot", "timestamp")
ONLINE = ("snapshot", "timestamp")
DAYS = {"root": 365, "targets": 365, "snapshot": 14, "timestamp": 14}
EXPIRY_DAYS, SIGNED_AT = "expiry_days", "signed_at"  # our own fields of `signed`
_HASH = "sha256"
_COPY_BYTES = 1 << 20

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass
class State:
    """The newest metadata of each role."""

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp
    trusted: Root  # as it was read; signs a root that follows it
    unsigned: set[str]  # roles that the keys in root have not signed

    def role(self, name: str) -> Any:
        return {r.type: r for r in (self.root, self.targets, self.snapshot, self.timestamp)}[name]

    def bundles(self) -> list[tuple[TargetFile, Custom]]:
        found = [t for path, t in self.targets.targets.items() if path.startswith("bundles/")]
        return [(target, msgspec.convert(target.custom, Custom)) for target in found]

    def channels(self) -> list[str]:
        found = (re.fullmatch(channel_path("(.*)"), path) for path in self.targets.targets)
        return [match[1] for match in found if match]


class Repository:
    """
    Args:
        folder: what a web server shows.
        keys: folders with private keys; new ones go to the first.
        now: instead of the clock, with a time zone; may be set anew at any time.

    What changes it raises PublishError, or another VigilError, with nothing changed for readers.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[Path] = (),
        *,
        now: datetime | None = None,
        progress: Progress = _silent,
    ) -> None:
        self.folder, self.keys, self.now, self._progress = folder, Keys(keys), now, progress
        self.metadata, self.targets = folder / "metadata", folder / "targets"

    @classmethod
    def init(
        cls,
        folder: Path,
        keys: Sequence[Path],
        *,
        now: datetime | None = None,
        days: dict[str, int] | None = None,
        progress: Progress = _silent,
    ) -> "Repository":
        """Make the keys and the first metadata; `days`: how long each role's is valid."""
        new = cls(folder, keys, now=now, progress=progress)
        _make(folder)
        with new._locked():
            if new.metadata.exists():
                raise PublishError(f"{folder}: is a repository already; expected a new folder")
            root = Root()
            state = State(root, Targets(), Snapshot(), Timestamp(), root, set())
            for role in ROLES:
                for name in ("root-1", "root-2", "root-3") if role == "root" else (role,):
                    root.add_key(new.keys.make(name), role)
                state.role(role).unrecognized_fields[EXPIRY_DAYS] = (DAYS | (days or {}))[role]
            root.roles["root"].threshold = 2
            new._commit(state, ROLES)
        return new

    @property
    def anchor(self) -> bytes:
        """The first root: what devices are made with."""
        return (self.metadata / "1.root.json").read_bytes()

    # -- bundles and channels ----------------------------------------------------------------------

    def add_bundles(self, *tars: Path, profile: str | None = None) -> list[str]:
        """Check bundles as a device does and publish them; returns their target paths.

        Args:
            profile: of the devices they are for; their manifests' where left out.
        """
        self.state()  # says at once where there is none
        added = [self._take_in(tar, profile) for tar in tars]
        with self._changing() as state:
            for target in added:
                there = state.targets.targets.setdefault(target.path, target)
                if there.hashes != target.hashes:
                    raise PublishError(
                        f"{target.path}: is published already, with other content; "
                        "expected a new release"
                    )
        return [target.path for target in added]

    def _take_in(self, tar: Path, profile: str | None) -> TargetFile:
        """Copy a bundle to its place, where nothing refers to it yet."""
        _make(self.targets)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=self.targets) as scratch:
            file, folder = Path(scratch) / "tar", Path(scratch) / "bundle"
            length, sha256 = _copy(tar, file, self._progress)
            try:
                slot = unpack(file, folder)
                manifest = open_bundle(folder).manifest
            except (BundleError, StorageError, ModelError) as error:
                text = str(error).replace(f"{folder}", f"{tar}").replace(f"{file}", f"{tar}")
                raise PublishError(text) from error
            profile = profile or str(getattr(manifest, "profile", ANY))
            _check_name(f"{tar}: name", manifest.name)
            _check_name(f"{tar}: profile", profile)
            custom = Custom(
                name=manifest.name,
                version=manifest.version,
                release=manifest.release,
                profile=profile,
                slot=slot,
                published=self._time(),
            )
            path = bundle_paths(manifest.name, manifest.release, profile)[0]
            fields = {"custom": msgspec.to_builtins(custom)}
            target = TargetFile(length, {_HASH: sha256}, path, fields)
            place = self._place(target)
            _make(place.parent)
            file.rename(place)
            durable.sync_folder(place.parent)
        return target

    def set_channel(
        self,
        name: str,
        group: str,
        bundle: str,
        release: int,
        rollout: float | None = None,
        not_before: datetime | None = None,
    ) -> Channel:
        """Offer a release to a group before all others, or change how it is offered.

        Args:
            rollout: per cent of the devices; where left out, as it was, or all.
            not_before: where left out, as it was, or at once.

        Once it is for all devices, those behind it go, but for the next that is so too.
        """
        with self._changing() as state:
            channel = self._channel(state, name, new=True)
            _check_release(state, channel, bundle, release)
            choice = channel.groups.get(group)
            offers = list(choice.releases) if choice and choice.bundle == bundle else []
            at = next((n for n, offer in enumerate(offers) if offer.release == release), None)
            if at is None:
                if newer := [offer.release for offer in offers if offer.release > release]:
                    raise PublishError(
                        f"channel {name}: release {release} is older than {newer[0]}, which no "
                        f"device leaves for it; withdraw release {newer[0]} first"
                    )
                at = 0
                offers.insert(0, Offer(release=release))
            offer = offers[at]
            offers[at] = msgspec.structs.replace(
                offer,
                rollout=offer.rollout if rollout is None else rollout,
                not_before=not_before or offer.not_before,
            )
            if offers[at].rollout == 100:
                behind = range(at + 1, len(offers))
                next_one = next((n for n in behind if offers[n].rollout == 100), at + 1)
                del offers[next_one + 1 :]
            groups = channel.groups | {group: Choice(bundle=bundle, releases=tuple(offers))}
            return self._put(state, name, msgspec.structs.replace(channel, groups=groups))

    def promote(
        self, name: str, release: int, rollout: float = 100, group: str | None = None
    ) -> Channel:
        """Change the rollout of a release, in the one group that is offered it."""
        channel = self.channel(name)
        bundles = {
            key: choice.bundle
            for key, choice in channel.groups.items()
            if group in (None, key) and release in {offer.release for offer in choice.releases}
        }
        if len(bundles) != 1:
            groups = ", ".join(bundles or channel.groups)
            what = "is in groups {}: say which" if bundles else "is in none of groups {}"
            raise PublishError(f"channel {name}: release {release} {what.format(groups)}")
        [(group, bundle)] = bundles.items()
        return self.set_channel(name, group, bundle, release, rollout)

    def withdraw(
        self, name: str, bundle: str, release: int, why: str, fallback: int | None = None
    ) -> Channel:
        """Call a release back: devices that run it leave it for what else they are offered.

        Args:
            fallback: a release for all devices, behind the others; needed where none is left.
        """
        with self._changing() as state:
            channel = self._channel(state, name)
            _check_release(state, channel, bundle, release, withdrawn=True)
            of_bundle = channel.withdrawn.get(bundle, {}) | {str(release): why}
            withdrawn = channel.withdrawn | {bundle: of_bundle}
            channel = msgspec.structs.replace(channel, withdrawn=withdrawn)
            if fallback is not None:
                _check_release(state, channel, bundle, fallback)
            groups = dict(channel.groups)
            for group, choice in groups.items():
                offers = {offer.release: offer for offer in choice.releases}
                if choice.bundle != bundle or offers.pop(release, None) is None:
                    continue
                if fallback is not None:
                    offers[fallback] = Offer(release=fallback)
                if not offers:
                    raise PublishError(
                        f"channel {name}: group {group} would have no release left; "
                        "give one for it to go back to: --fallback RELEASE"
                    )
                groups[group] = Choice(bundle=bundle, releases=tuple(offers.values()))
            return self._put(state, name, msgspec.structs.replace(channel, groups=groups))

    def channel(self, name: str) -> Channel:
        return self._channel(self.state(), name)

    def _channel(self, state: State, name: str, new: bool = False) -> Channel:
        target = state.targets.targets.get(channel_path(name))
        if target is None:
            if new:
                return Channel(serial=1, groups={})
            there = ", ".join(state.channels()) or "one that `publish channel` makes"
            raise PublishError(f"{self.folder}: has no channel {name}; expected {there}")
        place = self._place(target)
        try:
            content = place.read_bytes()
            target.verify_length_and_hashes(content)
            return msgspec.json.decode(content, type=Channel)
        except OSError as error:
            raise PublishError(f"{place}: can't be read: {error.strerror}") from error
        except (RepositoryError, msgspec.MsgspecError) as error:
            raise PublishError(f"{place}: is damaged: {error}") from error

    def _put(self, state: State, name: str, channel: Channel) -> Channel:
        _check_name("channel", name)
        path = channel_path(name)
        serial = channel.serial + (path in state.targets.targets)
        content = msgspec.json.encode(msgspec.structs.replace(channel, serial=serial))
        try:
            channel = msgspec.json.decode(content, type=Channel)  # as devices read it
        except msgspec.MsgspecError as error:
            raise PublishError(f"channel {name}: {error}") from error
        target = TargetFile.from_data(path, content, [_HASH])
        place = self._place(target)
        _make(place.parent)
        durable.write(place, content, 0o644)
        state.targets.targets[path] = target
        return channel

    # -- signatures --------------------------------------------------------------------------------

    def refresh(self, roles: Iterable[str] = ONLINE, days: int | None = None) -> None:
        """Sign roles and what depends on them anew; from now on for so many days."""
        roles = tuple(roles)
        with self._locked():
            state = self.state()
            for role in roles if days is not None else ():
                state.role(role).unrecognized_fields[EXPIRY_DAYS] = days
            self._commit(state, roles)

    def rotate(self, *roles: str, names: Sequence[str] = ()) -> None:
        """Replace all keys of roles, or those of these names, by new ones.

        After a theft of online keys replace both at once: devices then forget the versions, of
        whatever height, that the thief made them believe in.
        """
        with self._locked():
            state = self.state()
            root = state.root
            keys = [(role, root.keys[keyid]) for role in roles for keyid in root.roles[role].keyids]
            gone = [(r, k) for r, k in keys if not names or k.unrecognized_fields["name"] in names]
            if len(gone) < max(1, len(names)):
                there = ", ".join(named(key) for _, key in keys)
                raise PublishError(f"no keys {', '.join(names)}; expected some of {there}")
            self.keys.signers(state.trusted, "root")  # or none is made
            for role, key in gone:
                root.revoke_key(key.keyid, role)
                root.add_key(self.keys.make(key.unrecognized_fields["name"]), role)
            self._commit(state, ("root", *roles))

    @contextmanager
    def _changing(self) -> Iterator[State]:
        """The state, whose targets may be changed; then they are published."""
        with self._locked():
            state = self.state()
            yield state
            self._commit(state, ["targets"])

    def _commit(self, state: State, roles: Iterable[str]) -> None:
        """Sign roles and all that has to follow; then write it, in the order of this dict."""
        roles = {*roles, *state.unsigned}
        new: dict[str, bytes] = {}
        if "root" in roles:
            state.root.version = self._next("root")
            content = self._sign(state.root, state.trusted, state.root)
            new[f"{state.root.version}.root.json"] = content
        if "targets" in roles:
            version = state.targets.version = self._next("targets")
            content = new[f"{version}.targets.json"] = self._sign(state.targets, state.root)
            state.snapshot.meta["targets.json"] = MetaFile.from_data(version, content, [_HASH])
        if roles & {"targets", "snapshot"}:
            version = state.snapshot.version = self._next("snapshot")
            content = new[f"{version}.snapshot.json"] = self._sign(state.snapshot, state.root)
            state.timestamp.snapshot_meta = MetaFile.from_data(version, content, [_HASH])
        if roles & {"targets", "snapshot", "timestamp"}:
            state.timestamp.version += (self.metadata / "timestamp.json").exists()
            new["timestamp.json"] = self._sign(state.timestamp, state.root)
        _make(self.metadata)
        for name, content in new.items():
            durable.write(self.metadata / name, content, 0o644)

    def _sign(self, signed: Any, *roots: Root) -> bytes:
        """Metadata with the signatures that each of the roots asks for."""
        now = self._time()
        signed.expires = now + timedelta(days=signed.unrecognized_fields[EXPIRY_DAYS])
        if signed.type not in ONLINE:  # a stolen online key must not move the devices' time
            signed.unrecognized_fields[SIGNED_AT] = f"{now:%Y-%m-%dT%H:%M:%SZ}"
        whole: Metadata[Any] = Metadata(signed)
        try:
            for root in roots:
                for signer in self.keys.signers(root, signed.type):
                    if signer.public_key.keyid not in whole.signatures:
                        whole.sign(signer, append=True)
                root.verify_delegate(signed.type, whole.signed_bytes, whole.signatures)
        except RepositoryError as error:
            raise PublishError(f"{signed.type}: can't be signed: {error}") from error
        return whole.to_bytes()

    # -- reading -----------------------------------------------------------------------------------

    def state(self) -> State:
        """
        Raises:
            PublishError: metadata is missing or damaged, or nobody signed what targets say.
        """
        roots = self._versions("root")
        if not roots:
            raise PublishError(f"{self.folder}: is no repository; `publish init` makes one")
        root = self._read(f"{roots[-1]}.root.json")
        timestamp = self._read("timestamp.json")
        snapshot = self._read(f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        name = f"{snapshot.signed.meta['targets.json'].version}.targets.json"
        targets = self._read(name)
        unsigned = {
            one.signed.type for one in (timestamp, snapshot, targets) if not _signed_by(root, one)
        }
        if "targets" in unsigned:  # a rotation that was cut off leaves them signed by the last keys
            before = self._read(f"{roots[-2]}.root.json") if roots[1:] else root
            if not _signed_by(before, targets):
                raise PublishError(f"{self.metadata / name}: isn't signed by the keys of targets")
        return State(
            root.signed,
            targets.signed,
            snapshot.signed,
            timestamp.signed,
            copy.deepcopy(root.signed),
            unsigned,
        )

    def _read(self, name: str) -> Metadata[Any]:
        path = self.metadata / name
        try:
            return Metadata.from_bytes(path.read_bytes())
        except OSError as error:
            raise PublishError(f"{path}: can't be read: {error.strerror}") from error
        except RepositoryError as error:
            raise PublishError(f"{path}: is no metadata: {error}") from error

    def _versions(self, role: str) -> list[int]:
        found = (re.fullmatch(rf"(\d+)\.{role}\.json", file.name) for file in _files(self.metadata))
        return sorted(int(match[1]) for match in found if match)

    def _next(self, role: str) -> int:
        """Above all that were ever written: no name ever stands for two contents."""
        return max(self._versions(role), default=0) + 1

    def _time(self) -> datetime:
        return (self.now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)

    def _place(self, target: TargetFile) -> Path:
        return self.targets / target.get_prefixed_paths()[0]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"{self.folder}: somebody else is publishing; try again"
                raise PublishError(text) from error
            yield
        finally:
            os.close(fd)

    def export(
        self, into: Path, channel: str | None = None, profile: str | None = None
    ) -> list[str]:
        """Copy what devices need who have no network: metadata, channels, and their bundles.

        Args:
            channel: only this one.
            profile: only for these devices.

        Returns the targets. Until timestamp.json is replaced, last of all, a reader has the copy
        that was there before, or none.
        """
        with self._locked():
            state = self.state()
            timestamp = (self.metadata / "timestamp.json").read_bytes()
        wanted: list[TargetFile] = []
        for name in state.channels() if channel is None else [channel]:
            content = self._channel(state, name)
            wanted.append(state.targets.targets[channel_path(name)])
            for choice in content.groups.values():
                for offer in choice.releases:
                    found = [
                        target
                        for target, custom in state.bundles()
                        if (custom.name, custom.release) == (choice.bundle, offer.release)
                        and (profile is None or custom.profile in (profile, ANY))
                    ]
                    if not found:
                        raise PublishError(
                            f"channel {name}: release {offer.release} of {choice.bundle} "
                            f"has no bundle for profile {profile}"
                        )
                    wanted += found
        for target in wanted:
            self._copy_out(target, into)
        _make(into / "metadata")
        roots = [f"{version}.root.json" for version in self._versions("root")]
        targets, snapshot = state.targets.version, state.snapshot.version
        for name in (f"{targets}.targets.json", f"{snapshot}.snapshot.json", *roots):
            durable.write(into / "metadata" / name, (self.metadata / name).read_bytes(), 0o644)
        durable.write(into / "metadata/timestamp.json", timestamp, 0o644)
        return [target.path for target in wanted]

    def _copy_out(self, target: TargetFile, into: Path) -> None:
        source = self._place(target)
        there = into / "targets" / source.relative_to(self.targets)
        if there.exists() and _copy(there, None, self._progress)[1] == target.hashes[_HASH]:
            return
        _make(there.parent)
        new = there.with_name(f".{there.name}.new")
        if _copy(source, new, self._progress) != (target.length, target.hashes[_HASH]):
            new.unlink()
            raise PublishError(f"{source}: is damaged: its content is not what was signed")
        new.rename(there)
        durable.sync_folder(there.parent)


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise PublishError(f"{what} {name!r}: expected a-z, 0-9, _ and -, at most 32")


def _check_release(
    state: State, channel: Channel, bundle: str, release: int, withdrawn: bool = False
) -> None:
    """Whether it is published, and not withdrawn unless that may be."""
    there = {custom.release for _, custom in state.bundles() if custom.name == bundle}
    if release not in there:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise PublishError(f"bundle {bundle} has no release {release}; published: {known}")
    why = channel.withdrawn.get(bundle, {}).get(str(release))
    if why is not None and not withdrawn:
        raise PublishError(f"release {release} of {bundle} is withdrawn: {why}")


def _signed_by(root: Metadata[Any], one: Metadata[Any]) -> bool:
    try:
        root.signed.verify_delegate(one.signed.type, one.signed_bytes, one.signatures)
    except RepositoryError:
        return False
    return True


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _make(folder: Path) -> None:
    """Make a folder, durably."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        durable.sync_folder(folder.parent)


def _copy(source: Path, target: Path | None, progress: Progress) -> tuple[int, str]:
    """Copy a file, synced, and only read it where there is no target; its length and SHA-256."""
    total, done = hashlib.sha256(), 0
    try:
        with source.open("rb") as file, Path(target or os.devnull).open("wb") as copied:
            length = os.fstat(file.fileno()).st_size
            while block := file.read(_COPY_BYTES):
                total.update(block)
                copied.write(block)
                done += len(block)
                progress(source.name, done, length)
            if target:
                copied.flush()
                os.fsync(copied.fileno())
    except OSError as error:
        raise StorageError(f"{source}: can't be copied: {error}") from error
    return done, total.hexdigest()
