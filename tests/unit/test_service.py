"""A service as a real process: one of a name, how it ends, and that it never runs alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import psutil
import pytest
import zmq

from common import bus
from common.bus import Subscriber
from common.errors import AlreadyRunningError
from common.messages import Beat
from common.paths import PROJECT, Paths
from common.service import lock
from tests.support import until

Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture
def start(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start one of tests/programs.py; it is gone when the test is over."""
    monkeypatch.setenv("VIGIL_CONFIG", str(PROJECT / "vigil.toml"))
    monkeypatch.delenv("SUPERVISOR_ENABLED", raising=False)
    started: list[Process] = []

    def start(*arguments: str, **environment: str) -> Process:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.programs", *arguments],
                cwd=PROJECT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def messages(paths: Paths) -> Iterator[Subscriber]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber = Subscriber(context, [paths.endpoint("probe")], ["beat/probe", "event"])
    yield subscriber
    subscriber.close()
    context.term()


def said(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: Process) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and log lines."""
    _, errors = process.communicate(timeout=20)
    return process.returncode, [json.loads(line) for line in errors.splitlines()]


def test_something_outside_is_wrong(start: Start) -> None:
    status, lines = ended(start("serve", "probe", "fails"))
    assert status == 1
    (line,) = lines
    assert line["text"] == "/dev/video7: there is no such camera; plug one in"
    assert (line["level"], line["process"], line["code"]) == ("error", "probe", "SourceError")
    assert "trace" not in line


def test_a_fault_in_the_code(start: Start) -> None:
    status, lines = ended(start("serve", "probe", "has a fault"))
    assert status == 70
    (line,) = lines
    assert "fault in the code" in line["text"]
    assert line["trace"].startswith("Traceback")
    assert line["trace"].endswith("ZeroDivisionError: nobody thought of this")


def test_a_bad_configuration_ends_it_before_anything(start: Start, paths: Paths) -> None:
    bad = paths.root / "bad.toml"
    bad.write_text("[cameras.belt]\nsource = 3\n")
    status, lines = ended(start("serve", "probe", "beats", VIGIL_CONFIG=str(bad)))
    assert status == 1
    assert lines[0]["text"] == f"{bad}, line 2: cameras.belt.source = 3: expected str, got int"
    assert lines[0]["code"] == "ConfigError"
    assert not list(paths.run.glob("probe.*"))


def test_a_path_too_long_for_a_socket(start: Start, paths: Paths) -> None:
    deep = paths.run / ("d" * 90)
    status, lines = ended(start("serve", "probe", "beats", VIGIL_RUN=str(deep)))
    assert status == 1
    assert "bytes are too long for a socket; set VIGIL_RUN" in lines[0]["text"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_at_once_though_it_waits(start: Start, number: signal.Signals) -> None:
    process = start("serve", "probe", "waits for a minute")
    assert said(process).startswith("up")
    process.send_signal(number)
    sent = time.monotonic()
    status, lines = ended(process)
    assert time.monotonic() - sent < 2
    assert (status, lines[-1]["text"]) == (0, "stopped")


def test_a_second_signal_while_it_ends_is_no_fault(start: Start) -> None:
    process = start("serve", "probe", "is told twice")
    said(process)
    process.send_signal(signal.SIGTERM)
    status, lines = ended(process)
    assert (status, lines[-1]["text"]) == (0, "stopped")


def test_a_signal_after_its_end_is_no_fault_either(start: Start) -> None:
    process = start("serve", "probe", "is told after its end")
    status, lines = ended(process)
    assert (status, lines[-1]["text"]) == (-signal.SIGTERM, "stopped")


def test_one_of_a_name(start: Start, paths: Paths) -> None:
    first = start("hold_lock", "probe")
    assert said(first) == "held"
    status, lines = ended(start("serve", "probe", "beats"))
    assert status == 1
    assert lines[0]["code"] == "AlreadyRunningError"
    assert lines[0]["text"].startswith(f"probe: already runs under {paths.root}; stop it, or set ")
    with pytest.raises(AlreadyRunningError):
        lock(paths, "probe")
    os.close(lock(paths, "another"))
    first.kill()
    first.wait()
    os.close(lock(paths, "probe"))


def test_after_a_kill_the_next_one_is_heard(
    start: Start, paths: Paths, messages: Subscriber
) -> None:
    for _ in range(2):
        process = start("serve", "probe", "beats")
        pid = int(said(process).split()[1])

        def heard(pid: int = pid) -> bool:
            return pid in {beat.pid for beat in beats(messages)}

        until(heard, 20, "its beat")
        process.kill()
        process.wait()


def beats(messages: Subscriber) -> list[Beat]:
    decoded = (bus.decode(topic, body) for topic, body in messages.drain())
    return [message for message in decoded if isinstance(message, Beat)]


def test_it_beats_from_its_loop_and_tells_events(start: Start, messages: Subscriber) -> None:
    process = start("serve", "probe", "beats")
    pid = int(said(process).split()[1])
    seen: list[Beat] = []

    def three() -> bool:
        seen.extend(beats(messages))
        return len(seen) >= 3

    until(three, 20, "three beats")
    for earlier, later in pairwise(seen):
        assert later.progress > earlier.progress
        assert later.sent_ns - earlier.sent_ns > 0.45e9
    last = seen[-1]
    assert (last.process, last.pid, last.state, last.wait) == ("probe", pid, "waiting", "nothing")
    assert last.detail == {"how": "beats"}
    assert last.wait_until_ns - last.sent_ns == 2 * 10**9
    assert abs(last.rss_bytes - psutil.Process(pid).memory_info().rss) < 20e6
    process.send_signal(signal.SIGTERM)
    status, lines = ended(process)
    assert status == 0
    (line,) = [line for line in lines if line.get("code") == "probe.up"]
    assert (line["text"], line["level"], line["pid"]) == ("here", "info", str(pid))


def test_supervisord_killed_takes_it_along(start: Start, paths: Paths) -> None:
    """The shipped supervisord.conf, with the probe as a program of the run folder."""
    (paths.programs / "probe.conf").write_text(
        f"[program:probe]\ncommand={sys.executable} -m tests.programs serve probe beats\n"
        f"directory={PROJECT}\n"
    )
    supervisord = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", PROJECT / "supervisord.conf"],
        cwd=PROJECT,
        env=os.environ | {"VIGIL_RUN": str(paths.run), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def child() -> psutil.Process | None:
            children = psutil.Process(supervisord.pid).children()
            return children[0] if children and (paths.run / "probe.ipc").exists() else None

        probe: psutil.Process = until(child, 20, "the probe under supervisord")
        assert probe.is_running()
        supervisord.kill()
        supervisord.wait()
        gone, _ = psutil.wait_procs([probe], timeout=2)
        assert gone
        os.close(lock(paths, "probe"))
    finally:
        supervisord.kill()
        supervisord.wait()


def test_it_will_not_run_without_its_supervisord(start: Start, paths: Paths) -> None:
    status, lines = ended(start("serve", "probe", "beats", SUPERVISOR_ENABLED="1"))
    assert status == 1
    assert lines[0]["code"] == "NotRunningError"
    assert f"{paths.run}/supervisord.pid: no supervisord runs there" in lines[0]["text"]
    (paths.run / "supervisord.pid").write_text("1\n" if os.getpid() != 1 else "2\n")
    status, lines = ended(start("serve", "probe", "beats", SUPERVISOR_ENABLED="1"))
    assert (status, lines[0]["code"]) == (1, "NotRunningError")
    assert "is gone; this process will not run alone" in lines[0]["text"]
