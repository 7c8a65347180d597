"""What tests of updates share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.updates.attacks import Stage, staged


@pytest.fixture
def stage() -> Iterator[Stage]:
    """In memory: what is synced there is no matter of these tests."""
    memory = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vigil-test-")
    with memory as folder, staged(Path(folder)) as one:
        yield one
