"""What the repository has signed, verified: python-tuf's client, for metadata only, with what it
leaves open: durable files, floors, the time, one at a time.

    updates/metadata/         python-tuf's; whatever of it is lost or damaged is fetched again
    updates/channels/         the newest of each channel, so that an idle check does not fetch it
    updates/floors.json, …    see `floors`
    updates/lock              held for as long as a Trust is open
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root, Signed
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface
from tuf.ngclient import Updater as TufUpdater

from common import durable
from common.errors import (
    ConfigError,
    FetchError,
    LockedError,
    StorageError,
    UntrustedError,
    UpdateError,
)  # fmt: skip
from services.updater import channel as channels
from services.updater import floors
from services.updater.channel import Channel
from services.updater.floors import Floor, Floors
from services.updater.sources import PORTAL, Source

CHANNEL_MOST = 64 * 1024  # bytes
ROLES = ("root", "timestamp", "snapshot", "targets")
# Whose keys vouch for a role's version. The root's only grows; what versions of targets there are
# is for snapshot to say.
_VOUCH = {"root": (), "timestamp": ("timestamp",), "snapshot": ("snapshot",)}
_VOUCH["targets"] = ("snapshot", "targets")
# Who can sign a time: their keys are offline. Who steals the online ones shall not stop the clock.
_OFFLINE = ("root", "targets")


_WRONG: dict[type[Exception], str] = {
    tuf.UnsignedMetadataError: "not signed by those whom the root names",
    tuf.BadVersionNumberError: "another version than is signed, or an older one (rollback)",
    tuf.LengthOrHashMismatchError: "not the file that is signed",
    DeserializationError: "no metadata",
}
_TIME = "%Y-%m-%dT%H:%M:%SZ"


class Target(msgspec.Struct, frozen=True):
    """A file that is signed."""

    path: str
    place: str  # in the repository
    length: int  # bytes
    hashes: dict[str, str]
    custom: dict[str, Any]

    @property
    def sha256(self) -> str:
        """
        Raises:
            UntrustedError: none is signed.
        """
        found = self.hashes.get("sha256", "")
        if not re.fullmatch("[0-9a-f]{64}", found):
            raise UntrustedError(f"{self.path}: is signed with sha256 {found!r}, expected a digest")
        return found


class _Fetcher(FetcherInterface):
    """Reads metadata into memory, which is bounded; the library would take files in /tmp."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path, self.content = "", b""  # the newest

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.source.read(url)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        try:
            self.path, self.content = url, b""
            self.content = _read(self.source, url, max_length)
        except FetchError as error:
            if error.status in (403, 404):  # the library asks for the next root until there is none
                raise tuf.DownloadHTTPError(str(error), error.status) from error
            raise
        return self.content


class _Updater(TufUpdater):
    """Writes durably, and only what differs: a check where nothing is new wears no flash."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        with suppress(OSError):
            if path.read_bytes() == data:
                return
        durable.write(path, data)

    def _update_root_symlink(self) -> None:
        """Nobody reads it: each time the anchor is what trust begins with."""


class Trust:
    """The signed metadata of one repository; `problems` is what its owner should tell.

    Every method may raise
        FetchError: it can't be had now.
        UntrustedError: what is there is not to be acted on.
        StorageError: the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        anchor: bytes,
        source: Source,
        *,
        clock: Callable[[], float] = time.time,
        built_s: float | None = None,
    ) -> None:
        """
        Args:
            anchor: a root.json, which everything rests on.
            clock: the system's, seconds since 1970.
            built_s: the time is at least this; None: when this code was built.

        Raises:
            LockedError: another process updates.
        """
        self.folder, self.problems = folder, list[str]()
        self._anchor, self._fetcher, self._clock = anchor, _Fetcher(source), clock
        self._built_s = floors.build_time_s() if built_s is None else built_s
        self._updater: _Updater | None = None
        self._verified = False
        try:
            for name in ("metadata", "channels"):
                (folder / name).mkdir(mode=0o770, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
            # Floors hold only where their folder does, and one that was renamed by a process that
            # died then is to be seen, but not durable yet.
            durable.sync_folder(folder.parent)
            durable.sync_folder(folder)
        except OSError as error:
            raise StorageError(f"{folder}: can't be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.floors = self._load()
        except (BlockingIOError, StorageError) as error:
            self.close()
            if isinstance(error, StorageError):
                raise
            raise LockedError(f"{folder}/lock: held by another process that updates") from error

    def __enter__(self) -> "Trust":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._lock)

    @property
    def now_s(self) -> float:
        """Seconds since 1970, as far as can be known."""
        return self._believed(self.floors)[0]

    def refresh(self) -> None:
        """Fetch and verify what is new of the metadata.

        Raises:
            ConfigError: the anchor is no root.
        """
        self._verified = False
        with self._explained():
            try:
                self._updater = updater = _Updater(
                    str(self.folder / "metadata"), "metadata/", fetcher=self._fetcher,
                    bootstrap=self._anchor,
                )  # fmt: skip
            except tuf.RepositoryError as error:
                raise ConfigError(
                    f"the trust anchor is no signed root.json: {error}; expected the one that "
                    "the repository was created with, [updates] root of vigil.toml"
                ) from error
            trusted = updater._trusted_set
            trusted.reference_time = datetime.fromtimestamp(self.now_s, UTC)
            try:
                updater.refresh()
                raised = self._raised(trusted.root, {role: trusted[role] for role in ROLES})
                now, why = self._believed(raised)  # it may have turned out just now to be later
                for role in ROLES:
                    if trusted[role].is_expired(datetime.fromtimestamp(now, UTC)):
                        raise self._expired(role, trusted[role].expires, now, why)
            except (tuf.RepositoryError, tuf.DownloadError, UpdateError):
                # A new root counts all the same: it may take away keys that were stolen, and with
                # them the floors that keep the rest from being verified.
                self._save(self._raised(trusted.root, {"root": trusted.root}))
                raise
            self._save(raised)
        self._verified = True

    def target(self, path: str) -> Target | None:
        """What is signed of a file, after a refresh; None where nothing is."""
        if self._updater is None or not self._verified:
            raise UntrustedError(f"{path}: nothing is verified yet, or no longer")
        with self._explained():
            found = self._updater.get_targetinfo(path)
        if found is None:
            return None
        digest = next(iter(found.hashes.values()))
        folder, slash, name = found.path.rpartition("/")
        prefix = f"{digest}." if self._updater._trusted_set.root.consistent_snapshot else ""
        place = f"targets/{folder}{slash}{prefix}{name}"
        return Target(found.path, place, found.length, found.hashes, found.custom or {})

    def channel(self, name: str) -> Channel:
        """What a channel says."""
        path = channels.channel_path(name)
        where = f"{path} of {self._fetcher.source.name}"
        target = self.target(path)
        if target is None:
            raise UntrustedError(f"{where}: there is no such channel; see [updates] channel")
        if target.length > CHANNEL_MOST:
            raise UntrustedError(f"{where}: {target.length} bytes, expected {CHANNEL_MOST} at most")
        kept = self.folder / "channels" / f"{name}.json"
        content = b""
        with suppress(OSError):
            content = kept.read_bytes()
        if not _is(content, target):
            content = _read(self._fetcher.source, target.place, target.length)
            if not _is(content, target):
                raise UntrustedError(f"{where}: is not the file that is signed")
            durable.write(kept, content)
        said = channels.parse(content, where)
        assert self._updater is not None
        keys = _keys(self._updater._trusted_set.root, "targets")
        serials = floors.raised(
            self.floors.serials, {name: Floor(said.serial, keys)}, "the serial of channel {}"
        )
        self._save(msgspec.structs.replace(self.floors, serials=serials))
        return said

    def raise_release(self, key: str, release: int) -> int:
        """Note that a release ran; returns the highest that did."""
        highest = max(release, self.floors.releases.get(key, 0))
        releases = self.floors.releases | {key: highest}
        self._save(msgspec.structs.replace(self.floors, releases=releases))
        return highest

    def _load(self) -> Floors:
        found, damaged = floors.load(self.folder)
        for path in damaged:
            self.problems.append(f"{path}: the floors of updates are damaged; set aside")
            with suppress(OSError):
                durable.set_aside(path)
        if damaged:
            if found == Floors():
                self.problems.append(f"{self.folder}: floors begin anew from the metadata here")
            floors.save(self.folder, found)
        return found

    def _save(self, changed: Floors) -> None:
        if changed != self.floors:
            floors.save(self.folder, changed)
            self.floors = changed

    def _raised(self, root: Root, signed: dict[str, Signed]) -> Floors:
        """The floors once this is verified, unless it is below them."""
        seen = {r: Floor(s.version, _keys(root, *_VOUCH[r])) for r, s in signed.items()}
        versions = floors.raised(self.floors.versions, seen, "the version of {}.json")
        times = {}
        for role in _OFFLINE:
            keys, was = _keys(root, role), self.floors.times.get(role)
            at = [was.value] if was and was.keys == keys else []  # else they are taken away
            at += [_signed_at(signed[role])] if role in signed else []
            times[role] = Floor(max(at, default=0), keys)
        return msgspec.structs.replace(self.floors, versions=versions, times=times)

    def _believed(self, of: Floors) -> tuple[float, str]:
        return floors.believed(of, self._clock(), self._built_s)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The library's errors as ours."""
        try:
            yield
        except tuf.DownloadHTTPError as error:
            raise FetchError(str(error), error.status_code) from error
        except tuf.ExpiredMetadataError as error:
            role = re.sub(r"^(Final|New) |(\.json)? is expired$", "", str(error))
            assert self._updater is not None
            signed = self._updater._trusted_set.get(role)
            if signed is None:  # of this one only what came last tells
                signed = Metadata.from_bytes(self._fetcher.content).signed
            now, why = self._believed(self.floors)
            raise self._expired(role, signed.expires, now, why) from error
        except tuf.RepositoryError as error:
            what = next((text for kind, text in _WRONG.items() if isinstance(error, kind)), "wrong")
            where = f"{self._fetcher.path} of {self._fetcher.source.name}"
            raise UntrustedError(f"{where}: {what}: {error}") from error
        except OSError as error:
            text = f"{self.folder}/metadata: can't be written: {error.strerror}"
            raise StorageError(text) from error

    def _expired(self, role: str, at: datetime, now: float, why: str) -> UntrustedError:
        return UntrustedError(
            f"{role}.json of {self._fetcher.source.name} is good until {at:{_TIME}}, and it is "
            f"{datetime.fromtimestamp(now, UTC):{_TIME}} already ({why}): set the clock if that "
            "is ahead, else wait for its owner to sign anew, unless somebody holds that back"
        )


def _read(source: Source, path: str, most: int) -> bytes:
    """A file of JSON, of `most` bytes at most."""
    content = bytearray()
    with closing(source.read(path)) as blocks:
        for block in blocks:
            content += block
            if content.lstrip()[:1] == b"<":
                raise FetchError(
                    f"{path} of {source.name}: a web page came instead; expected JSON: is a proxy "
                    "or a captive portal in between?",
                    PORTAL,
                )
            if len(content) > most:
                raise UntrustedError(f"{path} of {source.name}: more than {most} bytes, the most")
    return bytes(content)


def _is(content: bytes, target: Target) -> bool:
    digest = hashlib.sha256(content).hexdigest()
    return (len(content), digest) == (target.length, target.sha256)


def _keys(root: Root, *roles: str) -> str:
    """Fingerprint of the keys of roles."""
    found = [(root.roles[role].threshold, *sorted(root.roles[role].keyids)) for role in roles]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:32] if found else ""


def _signed_at(signed: Signed) -> int:
    """Seconds since 1970; 0 where it does not say.

    Raises:
        UntrustedError: that can't be.
    """
    text = signed.unrecognized_fields.get("signed_at")
    if text is None:
        return 0
    try:
        at = datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except (TypeError, ValueError) as error:
        raise UntrustedError(f"{signed.type}.json: signed_at: {error}") from error
    if at >= signed.expires:
        raise UntrustedError(
            f"{signed.type}.json: signed_at {text}, expected a time before it expires, "
            f"{signed.expires:{_TIME}}"
        )
    return int(at.timestamp())
