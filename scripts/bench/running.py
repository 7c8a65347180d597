"""Vigil running for a benchmark: the real system on a vigil.toml, in a root of its own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.account import Account
from common.config import load
from common.frames import Ring, generations
from common.paths import PROJECT, Paths
from scripts.bench.lanes import Lanes

START_S = 60.0


@contextmanager
def running(config: str) -> Iterator[Paths]:
    """Start it, wait for the first valid result and a standby, stop it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "vigil.toml").write_text(config)
        environment = os.environ | {"VIGIL_ROOT": folder}
        environment.pop("VIGIL_RUN", None)
        runner = subprocess.Popen(
            [sys.executable, "-m", "scripts.runner", "--config", root / "vigil.toml"],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert runner.stdout is not None
        try:
            said = []
            for line in runner.stdout:
                said.append(line)
                if line.startswith("First valid result"):
                    break
            else:
                raise RuntimeError("".join(said))
            paths = Paths.under(root)
            # The standby's start is a load that a running system does not have.
            lanes = Lanes(paths, load(root / "vigil.toml").groups["main"].lanes)
            lanes.until_standby()
            lanes.close()
            yield paths
        finally:
            runner.terminate()
            runner.communicate()


def account(paths: Paths, camera: str) -> Account:
    newest = generations(paths.rings, camera)[-1]
    with Ring.open(paths.rings, paths.accounts, camera, newest) as ring:
        return ring.account()


def result_rate(paths: Paths, camera: str, seconds: float) -> float:
    """Results a second of a camera over the time."""
    before, started = account(paths, camera).inferred, time.monotonic()
    time.sleep(seconds)
    return (account(paths, camera).inferred - before) / (time.monotonic() - started)
