"""The hardware watchdog on stand-ins, and systemd's notifications on real sockets."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import StorageError
from services.watchdog.hardware import Hardware, Notify


def test_a_file_as_a_stand_in_is_fed_and_closed_in_good_order(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    opened = Hardware(str(device), 15)
    assert opened.timeout_s == 15  # a file has none of its own
    opened.feed()
    opened.feed()  # not due yet
    opened.close(stop=True)
    assert device.read_bytes() == b"\0V"


def test_it_is_fed_several_times_in_one_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    opened = Hardware(str(device), 15)
    now = 10**12
    monkeypatch.setattr("services.watchdog.hardware.time.monotonic_ns", lambda: now)
    for _ in range(16):
        opened.feed()
        now += 10**9
    opened.close(stop=False)
    assert device.read_bytes() == b"\0" * 4  # and no V: the board restarts


def test_a_fifo_that_nobody_reads_blocks_nothing(tmp_path: Path) -> None:
    fifo = tmp_path / "watchdog"
    os.mkfifo(fifo)
    opened = Hardware(str(fifo), 2)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    opened.feed()
    assert os.read(end, 10) == b"\0"
    os.close(end)
    opened.close(stop=False)


def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="watchdog: can't be opened: No such file"):
        Hardware(str(tmp_path / "watchdog"), 15)


def test_a_device_without_a_settable_time_out_is_used_as_it_is() -> None:
    opened = Hardware("/dev/null", 15)  # a character device that knows no such ioctl
    assert opened.timeout_s == 15
    opened.feed()
    opened.close(stop=True)


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """systemd's end of the notifications."""
    path = str(tmp_path / "notify") if request.param == "path" else f"@vigil-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path.replace("@", "\0"))
        server.setblocking(False)
        yield server


def test_systemd_is_told(manager: socket.socket) -> None:
    notify = Notify()
    notify.ready()
    notify.feed()
    notify.feed()  # not due before half of WATCHDOG_USEC
    notify.stopping()
    assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
    with pytest.raises(BlockingIOError):
        manager.recv(100)


def test_nobody_asked_for_notifications(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    notify = Notify()
    notify.ready()
    notify.feed()
    notify.stopping()


def test_a_manager_that_is_gone_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Notify().ready()
