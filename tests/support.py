"""What tests do with the real system: start it in a root of its own, wait, ask, stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from common.paths import PROJECT, Paths
from scripts.bench.journal import Journal as JournalReader


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait for a condition, with a deadline; returns what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


class System:
    """Vigil as `scripts/run` starts it."""

    def __init__(self, paths: Paths, config: str) -> None:
        self.paths = paths
        self.config = paths.root / "vigil.toml"
        self.config.write_text(config)
        self.output = paths.root / "output.txt"
        with self.output.open("wb") as output:
            self.runner = subprocess.Popen(
                [sys.executable, "-m", "scripts.runner", "--config", self.config],
                cwd=PROJECT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.environment = os.environ | {"VIGIL_CONFIG": str(self.config)}

    def until_valid(self, timeout_s: float = 60) -> None:
        try:
            until(lambda: self.says("First valid result"), timeout_s, "a first valid result")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output.read_text()}") from error

    def says(self, text: str) -> bool:
        assert self.runner.poll() is None, self.output.read_text()
        return text in self.output.read_text()

    def process(self, name: str) -> psutil.Process | None:
        """The running process of a name such as `inference-main-a`."""
        kind, *arguments = name.split("-")
        command = ["-m", f"services.{kind}.main", *arguments]
        pidfile = self.paths.run / "supervisord.pid"
        if not pidfile.exists():
            return None
        for child in psutil.Process(int(pidfile.read_text())).children():
            try:
                if child.cmdline()[2:] == command:
                    return child
            except psutil.Error:
                continue
        return None

    def vigil(self, *arguments: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        """The command line, as a user would run it beside the system."""
        return subprocess.run(
            [sys.executable, "-m", "services.cli.main", *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def stop(self, number: int = signal.SIGINT) -> dict[str, Any]:
        """End it in good order; returns the report of its last line."""
        self.runner.send_signal(number)
        self.runner.wait(30)
        return dict(json.loads(self.output.read_text().splitlines()[-1]))

    def kill(self) -> None:
        if self.runner.poll() is None:
            pidfile = self.paths.run / "supervisord.pid"
            processes = []
            if pidfile.exists():
                supervisord = psutil.Process(int(pidfile.read_text()))
                processes = [*supervisord.children(), supervisord]
            self.runner.kill()
            self.runner.wait()
            for process in processes:
                with suppress(psutil.NoSuchProcess):  # without its parent it also ends by itself
                    process.kill()
            psutil.wait_procs(processes, 10)


def balanced(account: dict[str, int]) -> bool:
    """DESIGN's equation, on an account as the report prints it."""
    gone = sum(count for name, count in account.items() if name != "captured")
    return account["captured"] == gone and min(account.values()) >= 0


class Journal(JournalReader):
    """With a deadline for what a test waits for."""

    def until_more(self, count: int, timeout_s: float = 30) -> None:
        enough = len(self.results) + count
        until(lambda: len(self.results) >= enough, timeout_s, f"{count} more results")
