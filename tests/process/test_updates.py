"""Signed updates on the real system: supervisord, cameras that run, a web server, real keys."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.archive import pack
from common.paths import PROJECT, Paths
from common.states import Validity
from common.store import Store
from common.updates import Status
from scripts.repository import Repository
from tests.servers.updates import Server
from tests.support import Journal, System, balanced, until

CONFIG = f"""
[cameras.belt]
source = "virtual"
prerender = 60
fps = 30
policy = "every"
slots = 64
stale_after_s = 10.0
[groups.main]
model = "{PROJECT}/models/factory"
shadow_frames = 10
shadow_every = 2
soak_s = 2.0
[updates]
root = "root.json"
stall_s = 5.0
"""
STEPS = ["found", "download", "install", "activate", "prove", "hand_over", "soak", "good"]


class Fleet:
    """A repository with releases of the factory model, and its web server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository.init(folder / "repository", [folder / "keys"])
        self.server = Server(folder / "repository")

    def publish(self, release: int, change: Callable[[Path], None] | None = None) -> None:
        source = self.folder / f"parts-{release}"
        shutil.copytree(PROJECT / "models" / "factory", source)
        manifest = source / "manifest.toml"
        text = manifest.read_text().replace('"factory"', '"parts"')
        manifest.write_text(text.replace("release = 1", f"release = {release}"))
        if change:
            change(source)
        pack(source, source.with_suffix(".tar"))
        self.repository.add_bundles(source.with_suffix(".tar"))
        self.repository.set_channel("stable", "main", "parts", release)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    one = Fleet(tmp_path)
    yield one
    one.server.close()


def history(line: System, release: int) -> list[Status]:
    done = line.vigil("update", "--status", "--json")
    found = json.loads(done.stdout)["history"]
    return [Status(**one) for one in found if one["release"] == release]


def wrong(bundle: Path) -> None:
    """It calls everything by another name."""
    labels = bundle / "labels.txt"
    labels.write_text("\n".join(reversed(labels.read_text().split())) + "\n")
    manifest = bundle / "manifest.toml"
    manifest.write_text(f"{manifest.read_text()}\n[limits]\nagreement = 0.8\n")


def test_a_release_from_the_publisher_to_good(
    system: Callable[[str], System], paths: Paths, fleet: Fleet
) -> None:
    """No frame is lost; a wrong one is bad and stays away; a withdrawn one is left."""
    (paths.root / "root.json").write_bytes(fleet.repository.anchor)
    fleet.publish(2)
    line = system(f'{CONFIG}url = "{fleet.server.url}"\n')
    line.until_valid()
    store = Store(paths, "main", 2)
    journal = Journal(paths, "belt")
    journal.until_more(1)

    dry = line.vigil("update", "--dry-run")
    if not store.read().slots:  # the updater's own first check may have been faster
        assert "parts 1.0.0 (release 2, " in dry.stdout, dry.stderr
    done = line.vigil("update", "--wait", timeout_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: len(history(line, 2)) == len(STEPS), 20, "every step told")
    told = history(line, 2)
    assert [(one.step, one.outcome) for one in told] == [(step, "ok") for step in STEPS]
    second = told[0].slot
    assert store.read().known_good == second
    size = (fleet.folder / "parts-2.tar").stat().st_size
    assert told[-1].bytes == size
    assert told[-1].seconds >= 2.0

    fleet.server.forget()
    assert "release 2 is the newest" in line.vigil("update").stdout
    assert fleet.server.body_bytes <= 1000, fleet.server.sent  # an idle check

    fleet.publish(3, wrong)
    done = line.vigil("update", "--wait", timeout_s=90)
    assert done.returncode == 2, done.stdout + done.stderr
    last = until(lambda: [one for one in history(line, 3) if one.step == "bad"], 20, "told")[-1]
    assert last.outcome == "failed"
    assert "agreement" in last.reason
    record = store.read()
    assert (record.known_good, record.slots[last.slot].reason) == (second, last.reason)
    fleet.server.forget()
    again = line.vigil("update")
    assert "release 3 was bad here" in again.stdout, again.stdout + again.stderr
    assert not any("bundles" in request.path for request in fleet.server.requests)

    fleet.publish(4)
    done = line.vigil("update", "--wait", timeout_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    fourth = store.read().known_good
    fleet.repository.withdraw("stable", "parts", 4, "misses cracks", fallback=2)
    line.vigil("update")
    until(lambda: store.read().known_good == second, 30, "back on release 2")
    assert store.read().slots[fourth].reason == "rolled back"

    account = line.stop()["cameras"]["belt"]
    results = journal.stop()
    sequences = {result.sequence for result in results} | set(journal.missed)
    assert balanced(account)
    assert sequences == set(range(min(sequences), max(sequences) + 1)), "no frame was lost"
    assert {result.validity for result in results} == {Validity.VALID}
    releases = [result.release for result in results]
    assert set(releases) == {1, 2, 4}
