"""What `scripts/run` does once the environment stands: Vigil under supervisord, in the foreground,
until Ctrl-C or --seconds; then the account of every frame, and nothing left in shared memory."""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import zmq

from common import bus, config, frames, messages, processes
from common.account import Account
from common.errors import VigilError
from common.paths import PROJECT, Paths
from common.service import lock
from common.states import Validity

STOP_S = 15.0
TICK_S = 0.2
HINT_S = 10.0  # without a valid result by then, say where to look


class Runner:
    def __init__(self, settings: config.Config, paths: Paths) -> None:
        self._config = settings
        self._paths = paths
        self._started_ns = time.monotonic_ns()
        self._first_valid_ns = 0
        self._inferred_by_then = 0
        self._stopping = False
        self._log_at: dict[Path, int] = {}
        self._hint_due = True

    def run(self, seconds: float | None) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        for folder in (self._paths.rings, self._paths.accounts, self._paths.logs):
            shutil.rmtree(folder)
        self._paths.make()
        (self._paths.programs / "vigil.conf").write_text(
            processes.render(self._config, self._paths)
        )
        self._greet()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        names = [process.name for process in processes.processes(self._config)]
        results = bus.Subscriber(context, map(self._paths.endpoint, names), ["result/"])
        self._started_ns = time.monotonic_ns()
        supervisord = self._start()
        try:
            while not self._stopping and supervisord.poll() is None:
                results.wait(TICK_S)
                self._look(results)
                self._show_errors()
                if seconds and self._running_s() >= seconds:
                    break
            ended_by_itself = supervisord.poll() is not None
            return self._end(supervisord, ended_by_itself)
        finally:
            if supervisord.poll() is None:
                supervisord.kill()
            context.destroy(linger=0)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "VIGIL_ROOT": str(self._paths.root),
            "VIGIL_RUN": str(self._paths.run),
            "VIGIL_CONFIG": str(self._config.path),
            # supervisord itself still imports pkg_resources, which warns of its own end.
            "PYTHONWARNINGS": "ignore",
        }
        # Compiling at each start would cost every restart time and memory.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return subprocess.Popen(
            [
                sys.executable,
                "-OO",
                "-m",
                "supervisor.supervisord",
                "-c",
                PROJECT / "supervisord.conf",
            ],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
            preexec_fn=_end_with_parent,
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _running_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / 1e9

    def _greet(self) -> None:
        root = "" if "VIGIL_ROOT" not in os.environ else f"VIGIL_ROOT={self._paths.root} "
        vigil = f"{root}.venv/bin/vigil"
        cameras = ", ".join(f"{n} ({c.source})" for n, c in self._config.cameras.items())
        models = ", ".join(group.model for group in self._config.groups.values())
        print(
            f"Vigil: cameras {cameras}; model {models}; from {self._config.path}\n"
            f"Running in {self._paths.run}, logs in {self._paths.logs}. Ctrl-C ends it.\n"
            "Try in another terminal:\n"
            f"  {vigil} status\n"
            f"  {vigil} tap dump result\n"
            f"  {vigil} tap picture {next(iter(self._config.cameras))} out.png",
            flush=True,
        )

    def _look(self, results: bus.Subscriber) -> None:
        """Note the first valid result; say so, or where to look when there is none."""
        for topic, body in results.drain():
            result = bus.decode(topic, body)
            assert isinstance(result, messages.Result)
            if not self._first_valid_ns and result.validity == Validity.VALID:
                self._first_valid_ns = time.monotonic_ns()
                self._inferred_by_then = self._inferred()
                print(f"First valid result after {self._running_s():.1f} s.", flush=True)
        if self._hint_due and not self._first_valid_ns and self._running_s() > HINT_S:
            self._hint_due = False
            print("No valid result yet; `vigil status` says what each process does.", flush=True)

    def _show_errors(self) -> None:
        """Errors and warnings of all processes, as they are logged."""
        for path in self._paths.logs.glob("*-*.log"):
            at = self._log_at.get(path, 0)
            if path.stat().st_size < at:  # rotated
                at = 0
            with path.open("rb") as file:
                file.seek(at)
                lines = file.read().rpartition(b"\n")[0]
            self._log_at[path] = at + len(lines) + bool(lines)
            for line in lines.splitlines():
                if line.startswith(b"{"):
                    record = json.loads(line)
                    if record["level"] != "info":
                        print(f"{record['process']}: {record['text']}", flush=True)

    def _end(self, supervisord: subprocess.Popen[bytes], ended_by_itself: bool) -> int:
        ended_ns = time.monotonic_ns()
        since = self._inferred() - self._inferred_by_then
        supervisord.terminate()
        try:
            supervisord.wait(STOP_S)
        except subprocess.TimeoutExpired:
            print(f"supervisord did not stop within {STOP_S:.0f} s; killed", file=sys.stderr)
        self._show_errors()
        accounts = {name: self._account(name) for name in self._config.cameras}
        first = (self._first_valid_ns - self._started_ns) / 1e9 if self._first_valid_ns else None
        rate = since / ((ended_ns - self._first_valid_ns) / 1e9) if self._first_valid_ns else 0.0
        logs = self._paths.root / "log"
        shutil.rmtree(logs, ignore_errors=True)
        shutil.copytree(self._paths.logs, logs)
        problem = ""
        if ended_by_itself:
            problem = f"supervisord ended by itself; see {logs}/supervisord.log"
        elif not self._first_valid_ns:
            problem = f"no valid result in {(ended_ns - self._started_ns) / 1e9:.1f} s; see {logs}"
        if problem:
            print(f"vigil: {problem}", file=sys.stderr)
        report = {
            "cameras": {name: asdict(a) if a else None for name, a in accounts.items()},
            "first_valid_s": None if first is None else round(first, 3),
            "results_per_s": round(rate, 2),
        }
        print(json.dumps(report), flush=True)
        return 1 if problem else 0

    def _inferred(self) -> int:
        accounts = map(self._account, self._config.cameras)
        return sum(account.inferred for account in accounts if account)

    def _account(self, camera: str) -> Account | None:
        rings, accounts = self._paths.rings, self._paths.accounts
        existing = frames.generations(rings, camera)
        if not existing:
            return None
        with frames.Ring.open(rings, accounts, camera, existing[-1]) as ring:
            return ring.account()


def _remove(run: Path) -> None:
    """Leave nothing in shared memory; a run folder that is a mount of its own stays, empty."""
    for entry in run.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not run.is_mount():
        run.rmdir()


def _end_with_parent() -> None:
    """In the child: were this process killed, supervisord would stop everything in good order."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/run",
        description="Run Vigil here, under supervisord, until Ctrl-C. The last line is the account"
        " of every frame, as JSON.",
    )
    parser.add_argument("--config", type=Path, default=PROJECT / "vigil.toml", metavar="FILE")
    parser.add_argument("--seconds", type=float, metavar="N", help="stop after so long")
    arguments = parser.parse_args()
    held = None
    paths = Paths.from_environment()
    try:
        settings = config.load(arguments.config)
        paths.make()
        held = lock(paths, "run")
        return Runner(settings, paths).run(arguments.seconds)
    except VigilError as error:
        print(f"vigil: {error}", file=sys.stderr)
        return 1
    finally:
        if held is not None:
            _remove(paths.run)
            os.close(held)


if __name__ == "__main__":
    sys.exit(main())
