"""`vigil models`, `install` and `rollback`, and what `status` tells of lanes and incidents."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import slots, verdict
from common.config import load
from common.messages import Beat, LaneReport
from common.paths import PROJECT, Paths
from common.slots import PASS, Slot
from common.states import Phase, ProcessState, SlotState
from common.verdict import Counts, Limits, Proof, Soak, Verdict
from services.cli import groups
from tests.process.test_updater import CONFIG, MANIFEST, Line
from tests.support import until

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def line(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    one = Line(paths, tmp_path)
    monkeypatch.setenv("VIGIL_CONFIG", str(one.config))
    yield one
    if one.process and one.process.poll() is None:
        one.process.kill()
        one.process.wait()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "services.cli.main", *map(str, arguments)]


def vigil(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=PROJECT, capture_output=True, text=True, timeout=60
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    for word in words:
        assert word in done.stderr


def install(line: Line, slot: str, name: str = "parts", release: int = 1) -> None:
    """Into the record, without files."""
    row = Slot(SlotState.INSTALLED, name=name, version="1.0", release=release)
    line.store.commit(lambda record: slots.install(record, slot, row))
    line.store.commit(lambda record: slots.activate(record, slot))


def make_good(line: Line, slot: str, release: int = 1) -> None:
    install(line, slot, release=release)
    line.store.commit(slots.request)
    line.store.commit(slots.hand_over)
    line.store.commit(slots.mark_good)


def test_models_before_anything_ran(line: Line, tmp_path: Path) -> None:
    done = vigil("models", "--root", tmp_path / "nowhere")
    assert done.returncode == 0, done.stderr
    assert "group main: lane a is live" in done.stdout
    assert "known good factory" in done.stdout
    assert not (tmp_path / "nowhere").exists(), "looking makes nothing"


def test_models(line: Line) -> None:
    line.config.write_text(CONFIG.replace("nowhere", f"{PROJECT}/models/factory"))
    make_good(line, A)
    install(line, B, release=2)
    line.store.commit(lambda record: slots.abandon(record, "it died 3 times"))
    install(line, C, release=3)
    done = vigil("models")
    assert done.returncode == 0, done.stderr
    assert f"known good {A[:12]}, previous factory" in done.stdout
    assert f"change of model: proving, slot {C[:12]}" in done.stdout
    rows = [row.split() for row in done.stdout.splitlines() if row]
    assert ["a", "candidate", C[:12], "0", "-"] in rows
    assert ["b", "live", A[:12], "0", "-"] in rows
    assert ["factory", "good", "0", "factory", "1.0.0", "1"] in [row[:6] for row in rows]
    (bad,) = [row for row in rows if row[0] == B[:12]]
    assert (bad[1:3], " ".join(bad[-4:])) == (["bad", "0"], "it died 3 times")
    (group,) = json.loads(vigil("models", "--json").stdout)
    assert (group["group"], group["phase"], group["candidate"]) == ("main", "proving", C)
    assert [slot["state"] for slot in group["slots"]] == ["good", "good", "bad", "testing"]


def test_a_verdict_judged_again(line: Line) -> None:
    """From what was recorded; whoever changes that gets another outcome, and exit status 2."""
    held = Limits(latency_p99_ms=20)
    soak = Soak("", True, 100, held, Counts(3, 500, 0, 500, 500, 500, 500, (), 30.0))
    reason = verdict.judge(soak)
    assert reason
    verdict.record(line.store.folder, Verdict("main", A, reason, soak, 1.0))
    verdict.record(line.store.folder, Verdict("main", A, "", Proof(judged=9), 1.0))
    done = vigil("models", "--verdict", A[:8])
    assert done.returncode == 0, done.stderr
    for words in ('"p99_ms": 30.0', f"slot {A[:12]}: good", f"slot {A[:12]}: bad: {reason}"):
        assert words in done.stdout
    assert f"judged again: bad: {reason}" in done.stdout
    file = line.store.folder / "verdicts" / f"{A[:12]}-soak.json"
    file.write_text(file.read_text().replace('"p99_ms": 30.0', '"p99_ms": 3.0'))
    done = vigil("models", "--verdict", A[:8], "--json")
    assert done.returncode == 2, done.stderr
    assert [row["again"] for row in json.loads(done.stdout)] == ["", ""]
    refused(vigil("models", "--verdict", B), "no verdict on a slot", B)


def test_rollback_says_where_to(line: Line) -> None:
    refused(vigil("rollback"), "nothing to go back to")
    refused(vigil("rollback", "--group", "other"), "no group other", "main")
    install(line, A)
    assert vigil("rollback").stdout == (
        f"the test of parts 1.0 (release 1, {A[:12]}) is over; factory stays\n"
    )
    assert line.store.read().slots[A].reason == "rolled back by the operator"
    make_good(line, B, 2)
    make_good(line, C, 3)
    assert vigil("rollback").stdout == (
        f"from parts 1.0 (release 3, {C[:12]}) back to parts 1.0 (release 2, {B[:12]})\n"
    )
    record = line.store.read()
    assert (record.txn.phase, record.txn.slot) == (Phase.REQUESTED, B)
    line.store.commit(slots.hand_over)
    assert "which is known good" in vigil("rollback").stdout
    with subprocess.Popen(
        command("rollback", "--wait"), cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as waiting:
        until(lambda: line.store.read().txn.phase is Phase.REQUESTED, 20, "the roll-back")
        line.store.commit(slots.hand_over)
        assert waiting.stdout is not None
        said = [waiting.stdout.readline() for _ in range(2)]
        assert said[1].startswith(("requested in lane", "soak in lane"))
        line.store.commit(slots.mark_good)
        assert waiting.wait(20) == 0
        assert f"{B[:12]}) is known good now" in waiting.stdout.read()


def test_install_needs_a_bundle_and_leave(line: Line, tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_text("<html>not found</html>" * 50)
    refused(vigil("install", tmp_path / "absent.tar"), "absent.tar: is no file")
    refused(vigil("install", tmp_path / "page.tar"), "page.tar", "no valid tar header")
    _, tar = line.bundle()
    refused(vigil("install", tar, "--group", "other"), "no group other")
    refused(vigil("install", tar), "nothing runs under")
    line.config.write_text(CONFIG.replace("unsigned = true", "unsigned = false"))
    refused(vigil("install", tar), str(line.config), "updates.unsigned = false", "unsigned = true")
    assert list(line.inbox.iterdir()) == []


def test_install_follows_the_updater(line: Line) -> None:
    line.start()
    until(lambda: (line.paths.run / "updater.ipc").exists(), 10, "the updater")
    done = vigil("install", line.bundle(MANIFEST.replace("m.onnx", "other.onnx"))[1])
    refused(done, "refused: ", "other.onnx")
    name, tar = line.bundle()
    done = vigil("install", tar)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"installed as colours 2.1 (release 7, {name[:12]})\n"
    assert list(line.inbox.iterdir()) == [], "it reads its note, and removes it"
    line.until_phase(Phase.PROVING)
    line.store.commit(lambda record: slots.abandon(record, "too slow"))
    _, tar = line.bundle(weight=2)
    with subprocess.Popen(
        command("install", tar, "--wait"), cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline().startswith("installed as colours 2.1")
        line.until_phase(Phase.PROVING)
        line.store.commit(slots.request)
        out = waiting.stdout
        until(lambda: out.readline() == "requested in lane b\n", 20, "requested")
        line.store.commit(slots.hand_over)
        line.store.commit(lambda record: slots.fail_soak(record, "it sees nothing"))
        assert waiting.wait(20) == 2
        assert waiting.stdout.read().endswith("bad: it sees nothing; factory is live\n")


# -- what status tells -----------------------------------------------------------------------------


def beats(line: Line, **reports: dict[str, Any]) -> dict[str, Beat]:
    """Of each lane's process as the record has it."""
    record, found = line.store.read(), {}
    for lane, changes in reports.items():
        fields = {"run": record.lanes[lane].run, "slot": record.lanes[lane].slot, "ready": True}
        report = LaneReport(**fields | {"live": record.live == lane} | changes)  # type: ignore[arg-type]
        name = f"inference-main-{lane}"
        found[name] = Beat(name, 1, 1, ProcessState.RUNNING, 1, time.monotonic_ns(), lane=report)
    return found


def seen(line: Line, uptime_s: float = 1.0, **reports: dict[str, Any]) -> groups.GroupStatus:
    uptimes = {f"inference-main-{lane}": uptime_s for lane in "ab"}
    return groups.group(load(line.config), line.paths, "main", beats(line, **reports), uptimes)


def test_a_standby_is_ready_or_missed(line: Line) -> None:
    both = seen(line, a={}, b={})
    assert ([lane.role for lane in both.lanes], both.standby) == (["live", "standby"], True)
    assert both.problems == []
    missed: list[Any] = [
        {"a": {}},
        {"a": {}, "b": {"ready": False}},
        {"a": {}, "b": {"run": 99}},
    ]
    for reports in missed:
        status = seen(line, **reports)
        assert not status.standby
        assert status.problems == ["group main: no warm standby"]


def test_a_candidate_is_no_standby(line: Line) -> None:
    install(line, A)
    status = seen(line, a={}, b={"judged": 7, "agreement": 0.9, "infer_ms_p99": 3.0})
    assert (status.standby, status.phase, status.problems) == (False, "proving", [])
    assert status.lanes[1].role == "candidate"
    assert (status.lanes[1].agreement, status.lanes[1].infer_ms_p99) == (0.9, 3.0)
    (line.paths.run / "gates-main").write_text(f"{A}\nagreement 0.1\n")
    assert "has not passed its gates: agreement 0.1" in seen(line, a={}, b={}).problems[0]
    (line.paths.run / "gates-main").write_text(f"{B}\nof another one\n")
    assert seen(line, a={}, b={}).problems == []
    assert "nobody judges it" in seen(line, uptime_s=700, a={}, b={}).problems[0]


def test_degraded_refused_and_blind_are_problems(line: Line) -> None:
    status = seen(line, a={"degraded": "no Coral"}, b={"refused": "accuracy 0.1"})
    assert status.problems == [
        "inference-main-a: degraded: no Coral",
        "inference-main-b: refused: accuracy 0.1",
    ]
    line.store.commit(lambda record: slots.give_way(record, "a"))
    assert line.store.read().lanes["a"].slot == PASS
    assert seen(line, a={}, b={}).problems == ["group main: no model is live: frames pass unjudged"]


def test_incidents(paths: Paths) -> None:
    assert groups.incidents(paths) == ([], "")
    rows = [
        {"at_ns": time.monotonic_ns() - i * 10**9, "wall_s": 1.0, "process": "inference-main-a",
         "what": "killed by SIGKILL", "outcome": "lane b took over", "recovery_ms": 41.5}
        for i in range(9, 0, -1)
    ]  # fmt: skip
    rows[-1]["recovery_ms"] = None
    file = paths.run / "incidents.json"
    file.write_text(json.dumps(rows))
    found, wrong = groups.incidents(paths)
    assert (len(found), wrong) == (5, "")
    assert found[-1].recovery_ms is None
    assert found[0].recovery_ms == 41.5
    assert 0.9 < (found[-1].age_s or 0) < 10
    file.write_text("[{}]")
    found, wrong = groups.incidents(paths)
    assert found == []
    assert str(file) in wrong


def test_status_shows_them(line: Line) -> None:
    """An updater alone: its own row is well, the lanes are not there, the incident is shown."""
    line.start()
    until(lambda: (line.paths.run / "updater.ipc").exists(), 10, "the updater")
    row = {"at_ns": time.monotonic_ns(), "wall_s": 1.0, "process": "inference-main-a",
           "what": "killed by SIGKILL", "outcome": "restarted", "recovery_ms": 812.0}  # fmt: skip
    (line.paths.run / "incidents.json").write_text(json.dumps([row]))
    install(line, A)
    done = vigil("status")
    assert done.returncode == 2, done.stderr
    assert f"group main: slot {A[:12]} is proving, no warm standby" in done.stdout
    lines = [" ".join(shown.split()) for shown in done.stdout.splitlines()]
    assert f"inference-main-b candidate, not ready {A[:12]} 0 0 0 - - -" in lines
    assert any("killed by SIGKILL restarted 812 ms" in shown for shown in lines)
    problems = done.stdout.partition("NOT WELL")[2]
    assert "updater" not in problems
    assert "watchdog: not running" in problems
    status = json.loads(vigil("status", "--json").stdout)
    assert status["groups"][0]["candidate"] == A
    assert status["incidents"][0]["recovery_ms"] == 812.0
