"""Each attack that the specifications of TUF (1.5.2) and Uptane (2.3) list, by somebody in control
of the network, or with stolen keys, on the real updater; after it, the honest release arrives.

Each function makes one, and asserts that it comes to nothing. scripts/bench/update counts them.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.metadata import Metadata

from common import slots
from common.digest import digest
from common.slots import Record
from common.states import Phase
from scripts.metadata import file_name
from scripts.repository import Repository
from services.updater.channel import channel_path
from tests.servers.updates import Fault, Server
from tests.support import until
from tests.updates.device import Device, bundle, publish, sign

MB = 1_000_000


class Stage:
    """A publisher, a web server that is the attacker's to command, and a device that runs
    release 1, factory beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        self.keys = folder / "keys"
        self.repository = Repository.init(folder / "repository", [self.keys])
        self.first = publish(self.repository, self.scratch, 1)
        self.server = Server(folder / "repository")
        self._devices: list[Device] = []

    def device(
        self, updates: str = "stall_s = 2.0\n", url: str | None = None, start: bool = True
    ) -> Device:
        url = self.server.url if url is None else url
        device = Device(
            self.folder / f"device-{len(self._devices)}", self.repository.anchor, url, updates
        )
        self._devices.append(device)
        if start:
            device.start()
        return device

    def old(self) -> Path:
        """A copy of the repository as it is now."""
        copy = self.folder / f"copy-{len(list(self.folder.glob('copy-*')))}"
        shutil.copytree(self.repository.folder, copy)
        return copy

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self.server.close()


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.close()


def honest(stage: Stage, device: Device, release: int = 2) -> None:
    """The attack is over: the next release arrives and begins to prove itself."""
    stage.server.folder = stage.repository.folder
    stage.server.faults.clear()
    slot = publish(stage.repository, stage.scratch, release)

    def begun() -> bool:
        if device.store.read().txn.phase is not Phase.NONE:  # it is judged first
            device.store.commit(_abandoned)
        return device.check().begun == {"main": slot}

    until(begun, 30, "the honest release")
    device.until_step("activate", slot=slot)


def untouched(device: Device, *allowed: str) -> None:
    """No slot is there but those allowed, and none is under test but one of them."""
    record = device.store.read()
    assert set(record.slots) <= set(allowed), record
    assert record.known_good == "factory"


def says(text: str, words: str) -> None:
    assert words in text, text


def refused(device: Device, words: str) -> None:
    reply = device.check()
    says(reply.error, words)
    untouched(device)


def arbitrary_installation(stage: Stage) -> None:
    """An attacker serves a repository of his own, and drops one into the inbox."""
    device = stage.device()
    evil = Repository.init(stage.folder / "evil", [stage.folder / "evil-keys"])
    slot = publish(evil, stage.scratch / "evil", 9)
    stage.server.folder = evil.folder
    refused(device, "not signed by those whom the root names")
    reply = device.check(place=str(evil.folder))
    says(reply.error, "not signed by those whom the root names")
    assert slot not in device.store.read().slots
    honest(stage, device)


def endless_data(stage: Stage) -> None:
    """Metadata, and a bundle, that never end, with the truth, a lie or nothing about it."""
    device = stage.device()
    for length in (None, "1000000000000", "5000"):
        stage.server.faults["metadata/timestamp.json"] = Fault(
            endless=True, headers={"Content-Length": length, "Connection": "close"}
        )
        assert device.check().error
    untouched(device)
    stage.server.faults.clear()
    stage.server.faults["targets/bundles/*"] = Fault(endless=True, headers={"Connection": "close"})
    device.check()
    device.until_step("activate", slot=stage.first)  # what was asked for came, and no more is read
    assert stage.server.body_bytes < 4 * MB
    honest(stage, device)


def extraneous_dependencies(stage: Stage) -> None:
    """A channel, and a bundle, that want something else installed as well."""
    device = stage.device()
    content = msgspec.json.decode(
        msgspec.json.encode(stage.repository.channel("stable")), type=dict
    ) | {"requires": ["bundles/miner/1/any.tar"], "serial": 7}
    sign(stage.repository, channel_path("stable"), msgspec.json.encode(content), {})
    refused(device, "requires")
    sign(stage.repository, channel_path("stable"),
         msgspec.json.encode(content | {"requires": []} | {"serial": 8}), {})  # fmt: skip
    refused(device, "requires")
    content.pop("requires")
    _offer(
        stage, bundle(stage.scratch, 3, more='requires = ["miner"]\n'), 3, content | {"serial": 9}
    )
    device.check()
    says(device.until_step("bad", "failed").reason, "requires")
    untouched(device)
    honest(stage, device, 4)


def _offer(stage: Stage, tar: Path, release: int, channel: dict[str, object], **custom: str) -> str:
    """Sign a bundle and a channel that offers it, whatever they are; returns the slot."""
    slot = digest(tar.with_suffix("")) if tar.with_suffix("").is_dir() else "0" * 64
    signed = {
        "name": "parts", "version": f"1.{release}", "release": release, "profile": "any",
        "slot": slot, "published": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    path = f"bundles/parts/{release}/{custom.get('profile', 'any')}.tar"
    sign(stage.repository, path, tar.read_bytes(), signed | custom)
    groups = {"main": {"bundle": "parts", "releases": [{"release": release}]}}
    sign(stage.repository, channel_path("stable"),
         msgspec.json.encode(channel | {"groups": groups}), {})  # fmt: skip
    return slot


def _channel(serial: int) -> dict[str, object]:
    return {"format": 1, "serial": serial}


def fast_forward(stage: Stage) -> None:
    """Stolen online keys sign versions so high that the honest ones look old; new keys end it."""
    device = stage.device()
    assert device.check().begun == {"main": stage.first}
    evil = Repository(stage.old(), [stage.keys])
    with evil._locked():
        state = evil.state()
        state.timestamp.version = 2**31
        (evil.metadata / f"{2**31}.snapshot.json").write_bytes(b"{}")  # what it counts from
        evil._commit(state, ["snapshot"])
    stage.server.folder = evil.folder
    assert device.check().error == ""
    stage.server.folder = stage.repository.folder
    publish(stage.repository, stage.scratch, 2)
    says(device.check().error, "older")
    stage.repository.rotate(("snapshot", "timestamp"))
    honest(stage, device, 3)


def freeze(stage: Stage) -> None:
    """The same old state is shown for ever: once it expires, the device says so."""
    late = Repository(stage.folder / "repository", [stage.keys])
    late.now = datetime.now(UTC) - timedelta(days=30)
    late.refresh(days=14)
    device = stage.device()
    refused(device, "is good until")
    stage.repository.refresh()
    honest(stage, device)


def malicious_mirror(stage: Stage) -> None:
    """A mirror that has other bytes under the right name, as many as were signed."""
    device = stage.device()
    [name] = (stage.server.folder / "targets/bundles/parts/1").iterdir()
    changed = bytearray(name.read_bytes())
    changed[len(changed) // 2] ^= 1
    copy = stage.old()
    (copy / name.relative_to(stage.server.folder)).write_bytes(changed)
    stage.server.folder = copy
    device.check()
    says(device.until_step("download", "failed").reason, "signed are 10240 of")
    untouched(device)
    # It was asked once; the release itself is not to blame.
    assert sum("bundles" in request.path for request in stage.server.requests) == 1
    stage.server.folder = stage.repository.folder
    assert device.check().begun == {"main": stage.first}
    device.until_step("activate", slot=stage.first)
    honest(stage, device)


def mix_and_match(stage: Stage) -> None:
    """Metadata of different times put together: a new timestamp with an old snapshot or targets."""
    device = stage.device()
    old = stage.old()
    publish(stage.repository, stage.scratch, 2)
    for role in ("snapshot", "targets"):
        mixed = stage.old()
        newest, oldest = (
            max((one / "metadata").glob(f"*.{role}.json"), key=lambda path: int(path.stem[:1]))
            for one in (mixed, old)
        )
        assert newest.name != oldest.name
        newest.write_bytes(oldest.read_bytes())
        stage.server.folder = mixed
        refused(device, "not the file that is signed")
    honest(stage, device, 3)


def rollback(stage: Stage) -> None:
    """An older state of the repository, when the device has seen a newer one."""
    device = stage.device()
    old = stage.old()
    second = publish(stage.repository, stage.scratch, 2)
    assert device.check().begun == {"main": second}
    device.until_step("activate", slot=second)
    stage.server.folder = old
    says(device.check().error, "older")
    shutil.rmtree(device.paths.updates / "metadata")  # nor where the metadata is lost
    says(device.check().error, "older")
    assert stage.first not in device.store.read().slots
    record = device.store.read()
    assert record.txn.slot == second
    honest(stage, device, 3)


def _abandoned(record: Record) -> Record:
    return slots.abandon(record, "the test says so")


def key_compromise(stage: Stage) -> None:
    """Stolen online keys add no bundle; one stolen root key of the three makes no root."""
    device = stage.device()
    evil = Repository.init(stage.folder / "evil", [stage.folder / "evil-keys"])
    publish(evil, stage.scratch / "evil", 9)
    copy = stage.old()
    mine = Repository(copy, [stage.keys])
    with mine._locked():
        state, keep = mine.state(), mine._sign
        targets = Metadata.from_bytes(
            (evil.metadata / file_name(evil.state().targets)).read_bytes()
        )

        def stolen(signed: Any, roots: Any) -> bytes:
            if signed.type != "targets":
                return keep(signed, roots)
            targets.signed.version = signed.version
            targets.sign(mine.keys.signers(state.root, "snapshot")[0])
            return targets.to_bytes()

        mine._sign = stolen  # type: ignore[method-assign]
        mine._commit(state, ["targets"])
    shutil.copytree(evil.targets, mine.targets, dirs_exist_ok=True)
    stage.server.folder = copy
    refused(device, "not signed by those whom the root names")
    copy = stage.old()
    root = Metadata.from_bytes(stage.repository.anchor)
    root.signed.version = 2
    root.signed.roles["targets"].keyids = list(evil.state().root.roles["targets"].keyids)
    root.signed.keys |= evil.state().root.keys
    signer = stage.repository.keys.signers(stage.repository.state().root, "root")[0]
    root.sign(signer)
    (copy / "metadata/2.root.json").write_bytes(root.to_bytes())
    stage.server.folder = copy
    refused(device, "not signed by those whom the root names")
    # The owner takes the stolen keys away; the versions that the thief has used do not matter.
    stage.repository.rotate(("snapshot", "timestamp"))
    honest(stage, device, 2)


def wrong_software(stage: Stage) -> None:
    """A bundle signed as one that it is not."""
    device = stage.device()
    _offer(stage, bundle(stage.scratch, 3, name="caps"), 3, _channel(9))
    device.check()
    reason = device.until_step("bad", "failed").reason
    says(reason, "caps")
    untouched(device)
    stage.server.forget()
    says(device.check().lines[0], "was refused here")  # and that hash is not tried again
    assert stage.server.sent.keys() <= {"metadata/timestamp.json"}
    honest(stage, device, 4)


def slow_retrieval(stage: Stage) -> None:
    """A server that gives a byte now and then, to keep the device waiting and without news."""
    device = stage.device()
    stage.server.faults["metadata/timestamp.json"] = Fault(pause_s=0.1)
    refused(device, "less than 1024 bytes/s")
    stage.server.faults.clear()
    stage.server.faults["targets/bundles/*"] = Fault(pause_s=0.1)
    device.check()
    stage.server.faults["targets/bundles/*"].pause_s = 0.1
    device.until_step("found")
    untouched(device)
    stage.server.faults.clear()
    device.until_step("activate", slot=stage.first)
    honest(stage, device)


def drop_request(stage: Stage) -> None:
    """Requests vanish: no answer, a reset connection, nobody there."""
    device = stage.device()
    stage.server.faults["metadata/*"] = Fault(silent=True)
    assert device.check().error
    stage.server.faults["metadata/*"] = Fault(cut=0)
    assert device.check().error
    untouched(device)
    reached = stage.device(url="http://127.0.0.1:1")
    says(reached.check().error, "127.0.0.1:1")
    assert device.process is not None
    assert device.process.poll() is None
    honest(stage, device)


def partial_bundle(stage: Stage) -> None:
    """A bundle that ends early: broken off, ended by a lie, or signed like that."""
    device = stage.device()
    [file] = (stage.server.folder / "targets/bundles/parts/1").iterdir()
    path = str(file.relative_to(stage.server.folder))
    half = file.read_bytes()[: file.stat().st_size // 2]
    stage.server.faults[path] = Fault(body=half)
    device.check()
    assert device.until_step("download", "waits").reason
    untouched(device)
    stage.server.faults.clear()
    torn = bundle(stage.scratch, 3)
    slot = digest(torn.with_suffix(""))
    torn.write_bytes(torn.read_bytes()[:1000])
    assert slot == _offer(stage, torn, 3, _channel(9))
    device.check()
    says(device.until_step("bad", "failed").reason, "cut off")
    untouched(device)
    honest(stage, device, 4)


def wrong_device_profile(stage: Stage) -> None:
    """A build for another kind of device."""
    device = stage.device('stall_s = 2.0\nprofile = "gateway"\n')
    repository = stage.repository
    repository.add_bundles(bundle(stage.scratch, 2), profile="pi4")
    repository.set_channel("stable", "main", "parts", 2)
    reply = device.check()
    assert reply.begun == {"main": stage.first}, reply
    device.until_step("activate", slot=stage.first)
    device.store.commit(_abandoned)
    reply = device.check()
    says(reply.lines[0], "release 2 has no build for profile gateway")
    slot = _offer(stage, bundle(stage.scratch, 3, more='profile = "pi4"\n'), 3, _channel(9))
    device.check()
    says(device.until_step("bad", "failed", slot).reason, "profile pi4")
    untouched(device, stage.first)
    honest(stage, device, 4)


def eavesdropped_credentials(stage: Stage) -> None:
    """The repository's password is not sent in the clear, nor to anybody else, nor shown; and who
    has it can't make a device take anything."""
    tls = Server(stage.repository.folder, tls=_folder(stage.folder / "tls"))
    other = Server(stage.repository.folder)
    try:
        url = tls.url.replace("://", "://fleet:s3cret@")
        assert tls.ca is not None
        shown = stage.device(url=url.replace("https", "http"))
        says(shown.check().error, "https")
        assert tls.requests == []
        device = stage.device(f'stall_s = 2.0\nca = "{tls.ca}"\n', url=url)
        tls.faults["metadata/timestamp.json"] = Fault(
            times=1,
            status=302,
            body=b"",
            headers={"Location": f"{other.url}/metadata/timestamp.json"},
        )
        assert device.check().error
        assert all(request.authorization == "" for request in other.requests)
        assert any(request.authorization for request in tls.requests)
        untouched(device)
        evil = Repository.init(stage.folder / "evil", [stage.folder / "evil-keys"])
        publish(evil, stage.scratch / "evil", 9)
        tls.folder = evil.folder
        refused(device, "not signed by those whom the root names")
        tls.folder = stage.repository.folder
        assert device.check().begun == {"main": stage.first}
        device.until_step("activate")
        shown_texts = [device.log.read_text(), shown.log.read_text()]
        shown_texts += [p.read_text() for p in device.paths.updates.glob("*.json")]
        assert not any("s3cret" in text for text in shown_texts)
    finally:
        tls.close()
        other.close()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


ATTACKS: dict[str, Callable[[Stage], None]] = {
    one.__name__: one
    for one in (
        arbitrary_installation, endless_data, extraneous_dependencies, fast_forward, freeze,
        malicious_mirror, mix_and_match, rollback, key_compromise, wrong_software, slow_retrieval,
        drop_request, partial_bundle, wrong_device_profile, eavesdropped_credentials,
    )
}  # fmt: skip
