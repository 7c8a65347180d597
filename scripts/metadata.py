"""The metadata of a repository: who may sign what, and what is signed, as TUF has it.

    metadata/  N.root.json timestamp.json N.snapshot.json N.targets.json

Root is signed by 2 of 3 keys. Its keys and that of targets belong offline; those of snapshot and
timestamp stay on the machine that renews them. A reader never meets a gap, whenever the power goes:
everything is written under a new name, what refers to it afterwards, timestamp.json last of all.
"""

import copy
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from common import durable
from scripts.signers import Keys, PublishError, named

ROLES = ("root", "targets", "snapshot", "timestamp")
ONLINE = ("snapshot", "timestamp")
DAYS = {"root": 365, "targets": 365, "snapshot": 14, "timestamp": 14}
EXPIRY_DAYS, SIGNED_AT = "expiry_days", "signed_at"  # our own fields of `signed`
INTERRUPTED = "what was published last isn't complete: `publish refresh` completes it"
HASH = "sha256"


@dataclass
class State:
    """The newest metadata of each role."""

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp
    trusted: Root  # as it was read; its keys sign a root that follows it
    stale: set[str]  # roles to be signed in any case: somebody's publishing was interrupted

    def role(self, name: str) -> Any:
        return {r.type: r for r in (self.root, self.targets, self.snapshot, self.timestamp)}[name]


class Roles:
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
    ) -> None:
        self.folder, self.metadata = folder, folder / "metadata"
        self.keys, self.now = Keys(keys), now

    @classmethod
    def init(
        cls,
        folder: Path,
        keys: Sequence[Path],
        *,
        now: datetime | None = None,
        days: dict[str, int] | None = None,
    ) -> Self:
        """Make the keys and the first metadata; `days`: how long each role's is valid."""
        new = cls(folder, keys, now=now)
        make_folder(folder)
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

    def refresh(self, roles: Iterable[str] = ONLINE, days: int | None = None) -> None:
        """Sign roles and what depends on them anew; from now on for so many days."""
        roles = tuple(roles)
        with self._locked():
            state = self.state()
            for role in roles if days is not None else ():
                state.role(role).unrecognized_fields[EXPIRY_DAYS] = days
            self._commit(state, roles)

    def rotate(self, roles: Iterable[str], names: Sequence[str] = ()) -> None:
        """Replace all keys of roles, or those of these names, by new ones.

        After a theft of online keys replace both at once: devices then forget the versions, of
        whatever height, that the thief made them believe in.
        """
        roles = tuple(dict.fromkeys(roles))
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
        """Sign roles and all that has to follow; then write it.

        Nobody asks for the new targets and snapshot before the new timestamp; and while there is
        no new root, keys that are new in it have signed nothing that counts.
        """
        roles = {*roles, *state.stale}
        if "targets" in roles:
            roles.add("snapshot")
        if "snapshot" in roles:
            roles.add("timestamp")
        new: dict[str, bytes] = {}  # in the order of writing
        if "targets" in roles:
            state.targets.version = self._next("targets")
            new[file_name(state.targets)] = self._sign(state.targets, [state.root])
        if "snapshot" in roles:
            state.snapshot.version = self._next("snapshot")
            state.snapshot.meta["targets.json"] = self._meta(state.targets, new)
            new[file_name(state.snapshot)] = self._sign(state.snapshot, [state.root])
        if "root" in roles:
            state.root.version = self._next("root")
            new[file_name(state.root)] = self._sign(state.root, [state.trusted, state.root])
        if "timestamp" in roles:
            state.timestamp.version += (self.metadata / "timestamp.json").exists()
            state.timestamp.snapshot_meta = self._meta(state.snapshot, new)
            new["timestamp.json"] = self._sign(state.timestamp, [state.root])
        make_folder(self.metadata)
        for name, content in new.items():
            durable.write(self.metadata / name, content, 0o644)

    def _meta(self, signed: Signed, new: dict[str, bytes]) -> MetaFile:
        name = file_name(signed)
        content = new.get(name) or (self.metadata / name).read_bytes()
        return MetaFile.from_data(signed.version, content, [HASH])

    def _sign(self, signed: Any, roots: Sequence[Root]) -> bytes:
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

    def state(self) -> State:
        """The newest metadata that the keys in root have signed.

        Raises:
            PublishError: some is missing or damaged.
        """
        versions = self._versions("root")
        if not versions:
            raise PublishError(f"{self.folder}: is no repository; `publish init` makes one")
        root = self._read(f"{versions[-1]}.root.json")
        before = self._read(f"{versions[-2]}.root.json") if versions[1:] else root
        timestamp = self._read("timestamp.json")
        for right, one in (
            (_signed_by(root, root) and _signed_by(before, root), root),
            # After a rotation that was interrupted the keys before it have signed this one.
            (_signed_by(root, timestamp) or _signed_by(before, timestamp), timestamp),
        ):
            if not right:
                path = self.metadata / file_name(one.signed)
                raise PublishError(f"{path}: isn't signed by the keys of its role")
        snapshot, targets = self._newest("snapshot", root), self._newest("targets", root)
        stale = set()
        if snapshot.signed.meta["targets.json"].version != targets.signed.version:
            stale.add("snapshot")
        meta = timestamp.signed.snapshot_meta
        if meta.version != snapshot.signed.version or not _signed_by(root, timestamp):
            stale.add("timestamp")
        signed = (root.signed, targets.signed, snapshot.signed, timestamp.signed)
        return State(*signed, copy.deepcopy(root.signed), stale)

    def _newest(self, role: str, root: Metadata[Any]) -> Metadata[Any]:
        for version in reversed(self._versions(role)):
            if _signed_by(root, found := self._read(f"{version}.{role}.json")):
                return found
        raise PublishError(f"{self.metadata}: has no {role} that the newest root's keys signed")

    def _read(self, name: str) -> Metadata[Any]:
        path = self.metadata / name
        try:
            return Metadata.from_bytes(path.read_bytes())
        except OSError as error:
            raise PublishError(f"{path}: can't be read: {error.strerror}") from error
        except RepositoryError as error:
            raise PublishError(f"{path}: is no metadata: {error}") from error

    def _versions(self, role: str) -> list[int]:
        found = (file.name.split(".")[0] for file in self.metadata.glob(f"*.{role}.json"))
        return sorted(int(version) for version in found if version.isdigit())

    def _next(self, role: str) -> int:
        """Above all that were ever written: no name ever stands for two contents."""
        return max(self._versions(role), default=0) + 1

    def _time(self) -> datetime:
        return (self.now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PublishError(f"{self.folder}: {error.strerror}; expected a repository") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = f"{self.folder}: somebody else is publishing; try again"
                raise PublishError(text) from error
            yield
        finally:
            os.close(fd)


def file_name(signed: Signed) -> str:
    name = f"{signed.type}.json"
    return name if isinstance(signed, Timestamp) else f"{signed.version}.{name}"


def _signed_by(root: Metadata[Any], one: Metadata[Any]) -> bool:
    try:
        root.signed.verify_delegate(one.signed.type, one.signed_bytes, one.signatures)
    except RepositoryError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make a folder, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        durable.sync_folder(folder.parent)
