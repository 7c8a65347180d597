"""A repository of signed updates: static files, for any web server, a CDN or a stick.

metadata/  see scripts.metadata
targets/   channels/<sha256>.NAME.json   bundles/BUNDLE/RELEASE/<sha256>.PROFILE.tar
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile

from common import durable
from common.archive import unpack
from common.config import NAME
from common.engine.bundle import open_bundle
from common.errors import BundleError, ModelError, StorageError
from scripts.metadata import HASH, INTERRUPTED, Roles, State, file_name, make_folder
from scripts.signers import PublishError
from services.updater.channel import ANY, Channel, Choice, Custom, Offer, bundle_paths, channel_path
from services.updater.trust import CHANNEL_MOST

_COPY_BYTES = 1 << 20

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


class Repository(Roles):
    """Bundles and channels, with the metadata that vouches for them.

    Args:
        progress: is told of each block of a file that is copied or read.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[Path] = (),
        *,
        now: datetime | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        super().__init__(folder, keys, now=now)
        self.targets, self._progress = folder / "targets", progress

    def add_bundles(self, *tars: Path, profile: str | None = None) -> list[str]:
        """Check bundles as a device does and publish them; returns their target paths.

        Args:
            profile: of the devices they are for; their manifests' where left out.
        """
        with self._changing() as state:
            return [self._take_in(state, tar, profile) for tar in tars]

    def _take_in(self, state: State, tar: Path, profile: str | None) -> str:
        make_folder(self.targets)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=self.targets) as scratch:
            file, folder = Path(scratch) / "tar", Path(scratch) / "bundle"
            length, sha256 = self._copy(tar.name, tar, file)
            try:
                slot = unpack(file, folder)
                manifest = open_bundle(folder).manifest
            except (BundleError, StorageError, ModelError) as error:
                text = str(error).replace(f"{folder}", f"{tar}").replace(f"{file}", f"{tar}")
                raise PublishError(text) from error
            profile = profile or manifest.profile
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
            try:
                msgspec.convert(fields["custom"], Custom)  # as devices read it
            except msgspec.ValidationError as error:
                raise PublishError(f"{tar}: {error}") from error
            target = TargetFile(length, {HASH: sha256}, path, fields)
            if state.targets.targets.setdefault(path, target).hashes != target.hashes:
                raise PublishError(
                    f"{tar}: {path} is published already, with other content; "
                    "expected another release"
                )
            place = self._place(target)
            make_folder(place.parent)
            file.rename(place)
            durable.sync_folder(place.parent)
        return path

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
                not_before=(not_before.replace(microsecond=0) if not_before else offer.not_before),
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
        self,
        name: str,
        bundle: str,
        release: int,
        why: str,
        fallback: int | None = None,
        unpublished: bool = False,
    ) -> Channel:
        """Call a release back: devices that run it leave it for what else they are offered.

        Args:
            fallback: a release for all devices, behind the others; needed where none is left.
            unpublished: by us: a thief of keys has; devices that ran it take no older one before.
        """
        with self._changing() as state:
            channel = self._channel(state, name)
            if not unpublished:
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
            there = ", ".join(channels(state)) or "one that `publish channel` makes"
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
        if len(content) > CHANNEL_MOST:
            raise PublishError(f"channel {name}: {len(content)} bytes, at most {CHANNEL_MOST}")
        target = TargetFile.from_data(path, content, [HASH])
        place = self._place(target)
        make_folder(place.parent)
        durable.write(place, content, 0o644)
        state.targets.targets[path] = target
        return channel

    def _place(self, target: TargetFile) -> Path:
        return self.targets / target.get_prefixed_paths()[0]

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
        if state.stale:
            raise PublishError(f"{self.folder}: {INTERRUPTED}")
        wanted: list[TargetFile] = []
        for name in channels(state) if channel is None else [channel]:
            content = self._channel(state, name)
            wanted.append(state.targets.targets[channel_path(name)])
            for choice in content.groups.values():
                for offer in choice.releases:
                    found = [
                        target
                        for target, custom in bundles(state)
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
        make_folder(into / "metadata")
        roots = [f"{version}.root.json" for version in self._versions("root")]
        for name in (file_name(state.targets), file_name(state.snapshot), *roots):
            durable.write(into / "metadata" / name, (self.metadata / name).read_bytes(), 0o644)
        durable.write(into / "metadata/timestamp.json", timestamp, 0o644)
        return [target.path for target in wanted]

    def _copy_out(self, target: TargetFile, into: Path) -> None:
        source = self._place(target)
        there = into / "targets" / source.relative_to(self.targets)
        right = target.length, target.hashes[HASH]
        if there.exists() and self._copy(target.path, there, None) == right:
            return
        make_folder(there.parent)
        new = there.with_name(f".{there.name}.new")
        if self._copy(target.path, source, new) != right:
            new.unlink()
            raise PublishError(f"{source}: is damaged: its content is not what was signed")
        new.rename(there)
        durable.sync_folder(there.parent)

    def _copy(self, what: str, source: Path, target: Path | None) -> tuple[int, str]:
        """Copy a file, synced, or only read it; returns its length and SHA-256."""
        total, done = hashlib.sha256(), 0
        try:
            with source.open("rb") as file, Path(target or os.devnull).open("wb") as copied:
                length = os.fstat(file.fileno()).st_size
                while block := file.read(_COPY_BYTES):
                    total.update(block)
                    copied.write(block)
                    done += len(block)
                    self._progress(what, done, length)
                if target:
                    copied.flush()
                    os.fsync(copied.fileno())
        except OSError as error:
            raise StorageError(f"{source}: can't be copied: {error}") from error
        return done, total.hexdigest()


def bundles(state: State) -> list[tuple[TargetFile, Custom]]:
    found = [t for path, t in state.targets.targets.items() if path.startswith("bundles/")]
    return [(target, msgspec.convert(target.custom, Custom)) for target in found]


def channels(state: State) -> list[str]:
    found = (re.fullmatch(channel_path("(.*)"), path) for path in state.targets.targets)
    return [match[1] for match in found if match]


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise PublishError(f"{what} {name!r}: expected a-z, 0-9, _ and -, at most 32")


def _check_release(
    state: State, channel: Channel, bundle: str, release: int, withdrawn: bool = False
) -> None:
    """Whether it is published, and not withdrawn unless that may be."""
    there = {custom.release for _, custom in bundles(state) if custom.name == bundle}
    if release not in there:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise PublishError(f"bundle {bundle} has no release {release}; published: {known}")
    why = channel.withdrawn.get(bundle, {}).get(str(release))
    if why is not None and not withdrawn:
        raise PublishError(f"release {release} of {bundle} is withdrawn: {why}")
