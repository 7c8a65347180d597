"""What tests share: the data they read, and the real system in a root of its own."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.paths import PROJECT, Paths
from tests.support import System

SHARED = PROJECT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GStreamer comes last, in whichever process: it brings libunwind into all of it, and from then
    on a C++ exception crashes, such as ONNX Runtime throws at a bad model."""
    items.sort(key=lambda item: "test_gstreamer" in item.nodeid)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and media with verified results, beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data in {SHARED}")
    return SHARED


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    """A root of the test's own; processes that it starts inherit it."""
    monkeypatch.setenv("VIGIL_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("VIGIL_RUN", raising=False)
    paths = Paths.from_environment()
    paths.make()
    yield paths
    subprocess.run(["rm", "-rf", paths.run], check=True)


@pytest.fixture
def system(paths: Paths) -> Iterator[Callable[[str], System]]:
    """Start the real system on a vigil.toml; whatever the test does, nothing outlives it."""
    started: list[System] = []

    def start(config: str) -> System:
        started.append(System(paths, config))
        return started[-1]

    yield start
    for one in started:
        one.kill()
