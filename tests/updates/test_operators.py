"""`vigil update`, asked by more than one, while the updater dies, or has much to do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.paths import PROJECT
from common.updates import REPORT, REQUEST
from tests.servers.updates import Fault
from tests.support import until
from tests.updates.attacks import Stage, staged
from tests.updates.device import Device


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as one:
        yield one


def update(device: Device, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", "update", *arguments],
        cwd=PROJECT, env=device.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_two_ask_at_once_and_the_updater_dies(stage: Stage) -> None:
    """Each is answered."""
    device = stage.device()
    until((device.paths.run / REPORT).exists, 20, "it runs")
    stage.server.faults["metadata/timestamp.json"] = Fault(silent=True)
    both = [update(device, "--dry-run") for _ in range(2)]
    try:
        until(lambda: stage.server.requests, 20, "it is looking")
        assert device.process is not None
        device.process.kill()
        device.process.wait()
        stage.server.faults.clear()
        device.start()
        for one in both:
            said, _ = one.communicate(timeout=30)
            assert (one.returncode, "10240 bytes from" in said) == (0, True), said
        assert not (device.paths.run / REQUEST).exists()
    finally:
        for one in both:
            one.kill()
            one.communicate()
