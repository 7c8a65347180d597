"""The watchdog under the real supervisord: what is killed, stopped or given up comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from common import bus, supervisor
from common.messages import Health
from common.paths import PROJECT, Paths
from tests.support import System, until

CONFIG = """
[cameras.belt]
source = "virtual"
size = [320, 240]
fps = 15
prerender = 15
[groups.main]
model = "models/factory"
[watchdog]
device = "device"
timeout_s = 2
"""


def config(paths: Paths) -> str:
    """With the factory model, and a plain file as the hardware watchdog."""
    device = paths.root / "device"
    device.touch()
    text = CONFIG.replace("models/factory", str(PROJECT / "models/factory"))
    return text.replace('"device"', f'"{device}"')


def events(paths: Paths, code: str) -> list[dict[str, Any]]:
    lines = (paths.logs / "watchdog.log").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("code") == code]


def incidents(paths: Paths, process: str) -> list[dict[str, Any]]:
    """Those of a process that are over."""
    file = paths.run / "incidents.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return [r for r in rows if r["process"] == process and r["recovery_ms"] is not None]


def successor(system: System, before: psutil.Process, name: str, timeout_s: float) -> float:
    """Wait for the next process of a name; returns how long it took, seconds."""
    started = time.monotonic()

    def another() -> bool:
        now = system.process(name)
        return now is not None and now.pid != before.pid

    until(another, timeout_s, f"another {name}")
    return time.monotonic() - started


def living(system: System, name: str) -> psutil.Process:
    found: psutil.Process = until(lambda: system.process(name), 20, name)
    return found


def works(system: System, name: str) -> bool:
    """Whether its beats tell of progress."""
    status = json.loads(system.vigil("status", "--json").stdout)
    return any(row["work_per_s"] for row in status["processes"] if row["name"] == name)


def until_ready(system: System) -> None:
    """A valid result, the watchdog at work, and both lanes ready."""
    system.until_valid()

    def both() -> bool:
        status = json.loads(system.vigil("status", "--json").stdout)
        ready = {row["name"]: row["state"] for row in status["processes"]}
        return all(ready[f"inference-main-{lane}"] in ("running", "waiting") for lane in "ab")

    until(both, 30, "both lanes ready")


def test_killed_and_stopped_processes_come_back(
    paths: Paths, system: Callable[[str], System]
) -> None:
    running = system(config(paths))
    until_ready(running)
    capture = living(running, "capture-belt")
    capture.kill()
    assert successor(running, capture, "capture-belt", 5) < 1
    until(lambda: incidents(paths, "capture-belt"), 10, "its incident over")
    assert events(paths, "process.died")[0]["text"].endswith("died: terminated by SIGKILL")

    live = living(running, "inference-main-a")
    live.kill()
    assert successor(running, live, "inference-main-a", 5) < 1
    (incident,) = until(lambda: incidents(paths, "inference-main-a"), 10, "its incident over")
    assert incident["outcome"] == "lane b took over"
    assert incident["recovery_ms"] < 1000
    assert events(paths, "lane.took_over")

    until(lambda: works(running, "capture-belt"), 20, "capture past its start")
    stopped = living(running, "capture-belt")
    stopped.send_signal(signal.SIGSTOP)
    assert successor(running, stopped, "capture-belt", 10) < 3.5  # 2 s of no progress, and a start
    assert "capture-belt" in events(paths, "process.hung")[0]["text"]
    report = running.stop()
    assert report["cameras"]["belt"]["failed"] == 0


def test_a_killed_watchdog_goes_on(paths: Paths, system: Callable[[str], System]) -> None:
    running = system(config(paths))
    until_ready(running)
    capture, watchdog = living(running, "capture-belt"), living(running, "watchdog")
    lane = living(running, "inference-main-b")
    lane.kill()
    successor(running, lane, "inference-main-b", 5)

    def live_since() -> Any:
        kept = json.loads((paths.run / "watchdog.json").read_text())
        return kept["live"].get("main")

    noted = until(live_since, 5, "who is live since when, in its memory")
    watchdog.kill()
    successor(running, watchdog, "watchdog", 10)
    until(lambda: len(events(paths, "incident.recovered")) > 0, 20, "an incident over")
    assert live_since() == noted
    assert living(running, "capture-belt").pid == capture.pid  # nobody suffered
    assert not events(paths, "process.hung")

    # What dies while it is dead is noticed: the standby takes over, or supervisord was faster.
    until_ready(running)
    live_name = "inference-main-a"
    live, watchdog = living(running, live_name), living(running, "watchdog")
    watchdog.suspend()
    live.kill()
    watchdog.kill()
    successor(running, watchdog, "watchdog", 10)
    until(lambda: events(paths, "lane.took_over") or works(running, live_name), 10, "a live lane")


def test_the_hardware_watchdog_is_fed_and_health_told(
    paths: Paths, system: Callable[[str], System]
) -> None:
    running = system(config(paths))
    until_ready(running)
    device = paths.root / "device"
    fed = device.stat().st_size
    until(lambda: device.stat().st_size > fed + 2, 5, "the stand-in to be fed")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        health = bus.Subscriber(context, [paths.endpoint("watchdog")], ["health"])
        assert health.wait(12)
        topic, body = next(health.drain())
        message = bus.decode(topic, body)
        assert isinstance(message, Health)
        assert message.pace == 1.0
        assert {"capture-belt", "inference-main-a"} <= set(message.processes_mb)
    finally:
        context.destroy(linger=0)
    assert b"V" not in device.read_bytes()
    running.stop()
    assert device.read_bytes().endswith(b"V")


# -- supervisord's own states ----------------------------------------------------------------------

PROGRAM = """
[program:{name}]
command={command}
directory={project}
priority={priority}
autorestart=unexpected
startsecs=1
startretries=0
redirect_stderr=true
stdout_logfile={log}
"""


@pytest.fixture
def stand_ins(paths: Paths) -> Iterator[Path]:
    """supervisord with the real watchdog, and sleeping stand-ins for the rest; capture gives up at
    once until the file exists that the fixture names."""
    flag = paths.root / "may-run"
    commands = dict.fromkeys(["inference-main-a", "inference-main-b", "updater"], "sleep 1000")
    commands["capture-belt"] = f"sh -c 'test -e {flag} && exec sleep 1000'"
    commands["watchdog"] = f"{sys.executable} -m services.watchdog.main"
    (paths.programs / "vigil.conf").write_text(
        "".join(
            PROGRAM.format(
                name=name, command=command, project=PROJECT, log=paths.logs / f"{name}.log",
                priority=900 if name == "watchdog" else 100,
            )
            for name, command in commands.items()
        )
    )  # fmt: skip
    toml = paths.root / "vigil.toml"
    toml.write_text(config(paths))
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", PROJECT / "supervisord.conf"],
        cwd=PROJECT,
        env=os.environ
        | {
            "VIGIL_RUN": str(paths.run),
            "VIGIL_CONFIG": str(toml),
            "PYTHONWARNINGS": "ignore",
        },
        stdout=subprocess.DEVNULL,
    )
    yield flag
    process.terminate()
    process.wait(20)


def test_states_that_supervisord_gave_up_in_are_cleared(paths: Paths, stand_ins: Path) -> None:
    def state(name: str) -> str:
        known = supervisor.programs(paths) or {}
        return known[name].state if name in known else ""

    until(lambda: state("capture-belt") == "FATAL", 15, "capture given up")
    log = paths.logs / "supervisord.log"
    tried = log.read_text().count("spawned: 'capture-belt'")
    until(lambda: log.read_text().count("spawned: 'capture-belt'") > tried, 15, "another try")
    stand_ins.touch()
    until(lambda: state("capture-belt") == "RUNNING", 20, "capture running")
    supervisor.stop(paths, "updater")
    until(lambda: state("updater") == "STOPPED", 5, "updater stopped")
    until(lambda: state("updater") == "RUNNING", 10, "updater started again")
