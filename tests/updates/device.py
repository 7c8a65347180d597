"""A device's updater by itself, the real process, beside a repository made on the spot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import TargetFile

from common import durable
from common.archive import pack
from common.digest import digest
from common.paths import PROJECT, Paths
from common.store import Store
from common.updates import HISTORY, REPLY, REQUEST, Reply, Request, Status
from scripts.repository import Repository
from tests import onnx_files
from tests.support import until

# Preloaded: the command faketime is a process in between, whose end would leave the updater alone.
_FAKETIME = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
needs_faketime = pytest.mark.skipif(not _FAKETIME, reason="needs faketime")
CONFIG = """
[cameras.belt]
source = "virtual"
fps = 5
[groups.main]
model = "nowhere"
[updates]
root = "root.json"
check_s = 3600.0
"""


def bundle(folder: Path, release: int, name: str = "parts", more: str = "") -> Path:
    """The tar of a small model; the same arguments give the same bytes."""
    source = folder / f"{name}-{release}"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    onnx_files.classifier(source / "m.onnx", weight=release)
    manifest = onnx_files.manifest(name, f"1.{release}", release, more)
    (source / "manifest.toml").write_text(manifest)
    pack(source, source.with_suffix(".tar"))
    return source.with_suffix(".tar")


def publish(repository: Repository, scratch: Path, release: int, **offer: Any) -> str:
    """Publish a release in the channel `stable`; returns the slot it becomes."""
    tar = bundle(scratch, release)
    repository.add_bundles(tar)
    repository.set_channel("stable", "main", "parts", release, **offer)
    return digest(tar.with_suffix(""))


def sign(repository: Repository, path: str, content: bytes, custom: dict[str, Any]) -> Path:
    """Sign a target as a careless publisher might, without any check; returns its file."""
    with repository._changing() as state:
        target = TargetFile.from_data(path, content, ["sha256"])
        target.unrecognized_fields["custom"] = custom
        state.targets.targets[path] = target
        place = repository._place(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return place


class Device:
    """
    Args:
        updates: more lines of [updates].
    """

    def __init__(self, root: Path, anchor: bytes, url: str, updates: str = "") -> None:
        root.mkdir(parents=True)
        self.paths = Paths(root, Path(f"/dev/shm/vigil-test-{os.getpid()}-{os.urandom(4).hex()}"))
        self.paths.make()
        (root / "root.json").write_bytes(anchor)
        self.config = root / "vigil.toml"
        where = f'url = "{url}"\n' if url else ""
        self.config.write_text(CONFIG + where + updates)
        self.environment = os.environ | {
            "VIGIL_ROOT": str(root), "VIGIL_RUN": str(self.paths.run),
            "VIGIL_CONFIG": str(self.config),
        }  # fmt: skip
        self.store = Store(self.paths, "main", 2)
        self.log = root / "updater.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, clock: Path | None = None) -> subprocess.Popen[bytes]:
        """
        Args:
            clock: a file with what it takes for the system's clock, as faketime has it.
        """
        environment = self.environment
        if clock:
            environment = environment | {
                "LD_PRELOAD": str(_FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(clock),
                "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
            }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-OO", "-m", "services.updater.main"],
                cwd=PROJECT,
                env=environment,
                stderr=log,
            )
        return self.process

    def check(self, *, dry_run: bool = False, place: str = "") -> Reply:
        """Ask it to look for updates now; its answer."""
        request = Request(id=os.urandom(4).hex(), dry_run=dry_run, place=place)
        durable.write(self.paths.run / REQUEST, msgspec.json.encode(request))

        def reply() -> Reply | None:
            try:
                found = msgspec.json.decode((self.paths.run / REPLY).read_bytes(), type=Reply)
            except FileNotFoundError:
                return None
            return found if found.id == request.id else None

        try:
            answer = until(reply, 60, "the updater's answer")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from error
        assert isinstance(answer, Reply)
        return answer

    @property
    def history(self) -> list[Status]:
        path = self.paths.updates / HISTORY
        return msgspec.json.decode(path.read_bytes(), type=list[Status]) if path.exists() else []

    def until_step(self, step: str, outcome: str = "ok", slot: str = "") -> Status:
        """Wait for a step of an update (to a slot) to end so."""

        def found() -> Status | None:
            for one in reversed(self.history):
                if (one.step, one.outcome) == (step, outcome) and slot in ("", one.slot):
                    return one
            return None

        try:
            status = until(found, 60, f"{step}: {outcome}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from error
        assert isinstance(status, Status)
        return status

    def events(self, code: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line.get("code") == code]

    def stop(self) -> None:
        """In good order, if it still runs."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(20) == 0, self.log.read_text()

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.paths.run, ignore_errors=True)
