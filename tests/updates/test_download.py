"""Downloads from a real web server that misbehaves, from sticks that are pulled, through kills."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from itertools import count
from pathlib import Path
from threading import Event
from urllib.parse import quote

import pytest

from common.archive import RESERVE_BYTES
from common.errors import BudgetError, ConfigError, FetchError, StorageError, UntrustedError
from common.paths import PROJECT
from services.updater import download as updater
from services.updater.budget import Budget
from services.updater.download import PIECE, TRIES
from services.updater.sources import BLOCK, FolderSource, HttpSource, Source
from tests.servers.updates import PORTAL, Fault, Server
from tests.support import until

MB = 1_000_000
NAME = "targets/bundles/a 1.tar"  # with what a URL must escape


class Repository:
    """A folder with one file, and what a device has of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.partial = folder / "repository", folder / "updates" / "partial"
        (self.folder / NAME).parent.mkdir(parents=True)
        self.make(300_000)

    def make(self, size: int) -> None:
        self.content = random.Random(size).randbytes(size)
        (self.folder / NAME).write_bytes(self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()

    @property
    def note(self) -> Path:
        return self.partial / f"{self.sha256}.synced"

    def fetch(
        self,
        source: Source,
        budget: Budget | None = None,
        pause: Callable[[float], bool] | None = None,
        rate_b_s: float | None = None,
        room: int = 0,
    ) -> bool:
        """Whether it is there, and right."""
        path = updater.download(
            source, NAME, len(self.content), self.sha256, self.partial, budget,
            pause=pause or Event().wait, update="one", rate_b_s=rate_b_s, room=room, backoff_s=1e-3,
        )  # fmt: skip
        assert path is None or path.read_bytes() == self.content
        return path is not None


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.fixture
def server(repository: Repository) -> Iterator[Server]:
    with Server(repository.folder) as server:
        yield server


def test_a_file_comes_in_pieces_over_one_connection_and_never_twice(
    repository: Repository, server: Server
) -> None:
    repository.make(2 * PIECE + 12345)
    told: list[int] = []
    path = updater.download(
        HttpSource(server.url), NAME, len(repository.content), repository.sha256,
        repository.partial, None, pause=Event().wait, progress=told.append,
    )  # fmt: skip
    assert path is not None
    assert path.read_bytes() == repository.content
    assert told == [PIECE, 2 * PIECE, 2 * PIECE + 12345]
    assert (len(server.requests), server.connections) == (3, 1)
    assert repository.fetch(HttpSource(server.url))
    assert len(server.requests) == 3


# What the server does, the error, its status, and how often it is asked.
LIES = {
    "cut off each time": (Fault(cut=10), FetchError, 0, TRIES),
    "length too long": (Fault(headers={"Content-Length": "300001"}), FetchError, 206, 1),
    "length too short": (Fault(headers={"Content-Length": "5"}), FetchError, 206, 1),
    "no length": (Fault(headers={"Content-Length": None}), FetchError, 206, 1),
    "two lengths": (Fault(headers={"Content-Length": "300000, 5"}), FetchError, 0, TRIES),
    "no end": (Fault(endless=True, headers={"Content-Length": None}), FetchError, 206, 1),
    "no end to the chunks": (
        Fault(endless=True, headers={"Content-Length": None, "Transfer-Encoding": "chunked"}),
        FetchError, 206, 1,
    ),
    "no end to the headers": (Fault(headers={"X": "a" * 60000, "Y": "b" * 9000}),
                              FetchError, 0, TRIES),
    "another range": (Fault(headers={"Content-Range": "bytes 5-300004/400000"}),
                      FetchError, 206, 1),
    "no range": (Fault(headers={"Content-Range": None}), FetchError, 206, 1),
    "a shorter file": (Fault(status=206, body=b"a" * 9, headers={"Content-Range": "bytes 0-8/9"}),
                       FetchError, 416, 1),
    "a shorter file, whole": (Fault(body=b"a" * 9), FetchError, 416, 1),
    "another file": (Fault(body=b"a" * 300_000), UntrustedError, 0, 1),
    "a longer file, without end": (Fault(body=b"a" * 300_001, endless=True), UntrustedError, 0, 1),
    "a bomb": (Fault(headers={"Content-Encoding": "gzip"}), FetchError, 206, 1),
    "a captive portal": (PORTAL, FetchError, 511, 1),
    "a captive portal elsewhere": (Fault(status=302, headers={"Location": "/login"}),
                                   FetchError, 511, 2),
    "a loop": (Fault(status=307, headers={"Location": "/targets/bundles/a%201.tar"}),
               FetchError, 307, 4),
    "a redirect to a file": (Fault(status=301, headers={"Location": "file:///etc/passwd"}),
                             FetchError, 301, 1),
    "a redirect to nowhere": (Fault(status=301, headers={"Location": "http://[::1"}),
                              FetchError, 0, TRIES),
    "silence": (Fault(silent=True), FetchError, 0, TRIES),
    "a drip": (Fault(pause_s=0.01), FetchError, 0, TRIES),
    "forbidden": (Fault(status=403), FetchError, 403, 1),
    "not found": (Fault(status=404), FetchError, 404, 1),
    "gone": (Fault(status=410), FetchError, 410, 1),
    "broken": (Fault(status=500), FetchError, 500, TRIES),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_server_that_lies_is_left_and_an_honest_one_goes_on(
    repository: Repository, server: Server, case: str
) -> None:
    fault, error, status, asked = LIES[case]
    server.faults = {"targets/*": Fault(**vars(fault)), "login": Fault(**vars(PORTAL))}
    slow = case in ("silence", "a drip")
    with pytest.raises(error) as caught:
        repository.fetch(HttpSource(server.url, stall_s=0.1 if slow else 30))
    assert not isinstance(caught.value, FetchError) or caught.value.status == status
    until(lambda: len(server.requests) >= asked, 10, f"{asked} requests seen")
    assert len(server.requests) == asked
    assert server.url in str(caught.value)
    if error is UntrustedError:
        assert list(repository.partial.glob(f"{repository.sha256}*")) == []
    server.faults.clear()
    source = HttpSource(server.url)
    if case.startswith("a shorter file"):  # and wrong: which only the whole shows
        with pytest.raises(UntrustedError):
            repository.fetch(source)
    assert repository.fetch(source)


@pytest.mark.parametrize(
    ("status", "after", "wait_s"),
    [
        (503, "120", 120),
        (429, "Sun, 06 Nov 1994 08:51:37 GMT", 120),  # by the server's clock, whatever ours says
        (429, "Sun, 06 Nov 2094 08:49:37 GMT", 86400),
        (429, "whenever", 0),
    ],
)
def test_a_server_that_asks_to_be_left_alone_is_asked_once(
    repository: Repository, server: Server, status: int, after: str, wait_s: float
) -> None:
    headers = {"Retry-After": after, "Date": "Sun, 06 Nov 1994 08:49:37 GMT"}
    server.faults["*"] = Fault(status=status, headers=headers)
    with pytest.raises(FetchError, match=f"status {status}") as caught:
        repository.fetch(HttpSource(server.url))
    assert (caught.value.wait_s, len(server.requests)) == (wait_s, 1)


def test_fifty_disconnects_cost_next_to_nothing(
    repository: Repository, server: Server, tmp_path: Path
) -> None:
    repository.make(24 * MB)
    cuts = random.Random(5)
    server.faults["*"] = Fault(cut=lambda: cuts.randrange(1, 600_000), times=50)
    budget = Budget(tmp_path / "budget.json", 1)
    assert repository.fetch(HttpSource(server.url), budget)
    assert server.faults["*"].times == 0
    assert len(repository.content) <= server.body_bytes <= 1.02 * len(repository.content)
    assert budget.used("one") == len(repository.content)


def test_a_server_without_ranges_sends_all_of_it_again(
    repository: Repository, server: Server, tmp_path: Path
) -> None:
    repository.make(PIECE + 5)
    budget = Budget(tmp_path / "budget.json", 1, update_mb=20)
    server.faults["*"] = Fault(ranges=False)
    assert repository.fetch(HttpSource(server.url), budget)
    assert [one.range for one in server.requests][-1] == f"bytes=0-{PIECE + 4}"
    assert budget.used("one") == 2 * PIECE + 5
    updater.tidy(repository.partial, ())
    server.forget()
    cuts = count(2 * BLOCK, 2 * BLOCK)  # further each time, and never to the end
    server.faults["*"] = Fault(ranges=False, cut=lambda: next(cuts))
    with pytest.raises(FetchError, match="reset"):
        repository.fetch(HttpSource(server.url), budget)
    assert len(server.requests) <= TRIES + 2


PROGRAM = """
import sys, threading
from pathlib import Path
from services.updater.budget import Budget
from services.updater.download import download
from services.updater.sources import open_source
url, name, length, sha256, partial = sys.argv[1:]
budget = Budget(Path(partial).parent / "budget.json", 1)
download(open_source(url), name, int(length), sha256, Path(partial), budget,
         pause=threading.Event().wait, update="one", rate_b_s=60e6)
"""


def test_kills_at_any_moment_cost_at_most_a_piece_each(
    repository: Repository, server: Server
) -> None:
    repository.make(5 * PIECE)
    size, dice, kills = len(repository.content), random.Random(7), 8
    repository.partial.mkdir(parents=True)
    command = [sys.executable, "-c", PROGRAM, server.url, NAME, str(size), repository.sha256]
    budget = repository.partial.parent / "budget.json"
    for kill in range(kills + 1):
        process = subprocess.Popen([*command, repository.partial], cwd=PROJECT)
        try:
            until = server.body_bytes + dice.randrange(PIECE)
            while kill < kills and server.body_bytes < until and process.poll() is None:
                time.sleep(0.002)
            if kill < kills:
                process.send_signal(signal.SIGKILL)
            assert process.wait(60) in (0, -signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        synced = int(repository.note.read_bytes()) if repository.note.exists() else 0
        file = (repository.partial / repository.sha256).read_bytes()
        assert file[:synced] == repository.content[:synced]
        assert server.body_bytes <= Budget(budget, 1).used("one") <= size + (kill + 1) * PIECE
    assert synced == size
    assert repository.fetch(HttpSource(server.url))
    assert server.body_bytes <= size + kills * PIECE


# What a power cut, or a worn disk, leaves: the file, its note, and where the download goes on.
LEFT: dict[str, tuple[Callable[[bytes], bytes], str, int | None]] = {
    "more than is certain": (lambda right: right[:70_000], "50000", 50_000),
    "zeros beyond": (lambda right: right[:50_000] + bytes(90_000), "50000", 50_000),
    "more than will be": (lambda right: right + b"more", "50000", 50_000),
    "less than is certain": (lambda right: right[:40_000], "50000", 40_000),
    "no note": (lambda right: right[:50_000], "", 0),
    "a torn note": (lambda right: right[:50_000], "5\0\0", 0),
    "a note below zero": (lambda right: right[:50_000], "-5", 0),
    "all of it": (lambda right: right, "300000", None),
    "wrong bytes": (lambda right: bytes(50_000), "50000", 50_000),
    "more than all of it": (lambda right: right + b"more", "300004", None),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_download_goes_on_where_the_disk_is_certain(
    repository: Repository, server: Server, case: str
) -> None:
    left, note, goes_on = LEFT[case]
    repository.partial.mkdir(parents=True)
    (repository.partial / repository.sha256).write_bytes(left(repository.content))
    if note:
        repository.note.write_text(note)
    source = HttpSource(server.url)
    if case in ("wrong bytes", "more than all of it"):
        with pytest.raises(UntrustedError, match="signed are 300000"):
            repository.fetch(source)
    else:
        assert repository.fetch(source)
    asked = [] if goes_on is None else [f"bytes={goes_on}-299999"]
    assert [one.range for one in server.requests] == asked
    assert repository.fetch(source)


def test_a_stop_keeps_what_came_and_a_rate_is_kept(repository: Repository, server: Server) -> None:
    stop, pauses = Event(), 0

    def pause(seconds: float) -> bool:
        nonlocal pauses
        pauses += 1
        if pauses == 3:
            stop.set()
        return stop.wait(seconds)

    began = time.monotonic()
    assert not repository.fetch(HttpSource(server.url), pause=pause, rate_b_s=MB)
    kept = int(repository.note.read_bytes())
    assert 0 < kept < len(repository.content)
    assert repository.fetch(HttpSource(server.url), rate_b_s=MB)
    assert server.requests[-1].range == f"bytes={kept}-299999"
    assert time.monotonic() - began > 0.3 - BLOCK / MB


# -- budget ----------------------------------------------------------------------------------------


def test_no_more_is_asked_for_than_a_day_and_an_update_may_move(
    repository: Repository, server: Server, tmp_path: Path
) -> None:
    repository.make(5 * MB)
    path, source = tmp_path / "budget.json", HttpSource(server.url)
    for day, update_mb, moved_mb, told in (
        (10, 5, 2, "daily_mb: 2.0 of 2 MB"),
        (9, 5, 2, "daily_mb: 2.0 of 2 MB"),  # set back
        (10, 5, 4, "daily_mb: 2.0 of 2 MB"),
        (30000, 4, 4, "update_mb: 4.0 of 4 MB"),
    ):
        with pytest.raises(BudgetError, match=told):
            repository.fetch(source, Budget(path, day, daily_mb=2, update_mb=update_mb))
        assert server.body_bytes == moved_mb * MB
    assert repository.fetch(source, Budget(path, 30000))


def test_a_budget_counts_what_was_reserved_whatever_comes_after(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    assert Budget(path, 10, daily_mb=2).reserve("one", 5 * MB) == 2 * MB
    with pytest.raises(BudgetError):  # whoever comes after a kill
        Budget(path, 10, daily_mb=2).reserve("two", 1)
    Budget(path, 10).settle("one", MB)
    with pytest.raises(BudgetError, match=r"1\.5 more needed"):
        Budget(path, 10, daily_mb=2).reserve("two", 1_500_000, 1_500_000)
    budget = Budget(path, 10, daily_mb=2)
    assert budget.reserve("two", 5 * MB) == MB
    assert budget.used("one") == MB
    budget.tidy(["two"])
    budget = Budget(path, 10)
    assert (budget.used("one"), budget.used("two")) == (0, MB)
    path.write_bytes(path.read_bytes()[:-5])
    assert Budget(path, 10).used("two") == 0
    assert path.with_name("budget.json.broken").exists()


# -- folders ---------------------------------------------------------------------------------------


class Stick(FolderSource):
    """Pulled after so many reads: its folder is gone, or the file broken off."""

    def __init__(self, folder: Path, reads: int, torn: bool) -> None:
        super().__init__(folder)
        self.folder, self.reads, self.torn = folder, reads, torn

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        for block in super().read(path, start, end):
            yield block
            start, self.reads = start + len(block), self.reads - 1
            if self.reads == 0 and self.torn:
                os.truncate(self.folder / path, start)
            elif self.reads == 0:
                self.folder.rename(self.folder.with_name("away"))


def test_a_stick_pulled_at_any_read_is_gone_on_with(repository: Repository) -> None:
    repository.make(PIECE + 3 * BLOCK)
    blocks = len(repository.content) // BLOCK
    for torn, last in ((False, PIECE // BLOCK), (True, blocks - 1)):  # what is open can be read on
        for reads in (1, 2, 30, *range(blocks - 5, blocks + 1)):
            updater.tidy(repository.partial, ())
            source = Stick(repository.folder, reads, torn)
            if reads <= last:
                with pytest.raises(FetchError):
                    repository.fetch(source)
                kept = int(repository.note.read_bytes())
                assert kept == (reads * BLOCK if torn else PIECE)
            else:
                assert repository.fetch(source)
            if not torn:
                repository.folder.with_name("away").rename(repository.folder)
            (repository.folder / NAME).write_bytes(repository.content)
            assert repository.fetch(source)


@pytest.mark.parametrize(
    "path",
    ["link", "folder/../file", "/etc/passwd", "out/passwd", "fifo", "folder", "", "file/x", "none"],
)
def test_a_folder_gives_its_own_regular_files_only(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "fifo")
    source = FolderSource(tmp_path)
    assert b"".join(source.read("file", 2, 5)) == b"234"
    assert b"".join(source.read("file", 8, 50)) == b"89"
    with pytest.raises(FetchError, match=str(tmp_path)) as caught:
        b"".join(source.read(path))
    assert caught.value.status == 404


def test_a_medium_that_fails_is_told_from_a_file_that_is_not_there(tmp_path: Path) -> None:
    for source, path, told in (
        (FolderSource("/proc/self"), "mem", "Input/output error"),  # the kernel's own, at byte 0
        (FolderSource(tmp_path / "none"), "file", "no such folder"),
    ):
        with pytest.raises(FetchError, match=told) as caught:
            b"".join(source.read(path))
        assert caught.value.status == 0


# -- disk ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(repository: Repository) -> Iterator[Path]:
    """Partial downloads lie on a disk of 28 MiB."""
    repository.partial.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={28 << 20}", "none", str(repository.partial)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield repository.partial
    subprocess.run(["umount", repository.partial], check=True)


def test_a_full_disk_is_seen_before_the_first_byte_and_survived_in_the_middle(
    repository: Repository, server: Server, small_disk: Path
) -> None:
    repository.make(9 * MB)
    source, filler = HttpSource(server.url), small_disk / "filler"
    with pytest.raises(StorageError, match=r"29\.4 MB free, the update needs 29\.8 MB"):
        repository.fetch(source, room=4 * MB)
    assert server.requests == []
    for free in (0, RESERVE_BYTES // 2):  # torn within a piece, and no room for the next
        left = 20

        def pause(_: float, free: int = free) -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                volume = os.statvfs(small_disk)
                with filler.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, volume.f_bavail * volume.f_frsize - free)
            return False

        with pytest.raises(StorageError, match=r"No space left|make room"):
            repository.fetch(source, pause=pause)
        kept = (small_disk / repository.sha256).read_bytes()
        assert len(kept) > 0
        assert kept == repository.content[: len(kept)]
        filler.unlink()
    server.forget()
    kept_bytes = int(repository.note.read_bytes())
    assert kept_bytes >= PIECE
    assert repository.fetch(source)
    assert server.body_bytes == len(repository.content) - kept_bytes


def test_tidy_keeps_what_is_named(repository: Repository, server: Server) -> None:
    updater.tidy(repository.partial, ())  # which is not there yet
    assert repository.fetch(HttpSource(server.url))
    for name in ("0" * 64, f"{'0' * 64}.synced", f".{repository.sha256}.synced.new"):
        (repository.partial / name).write_bytes(b"")
    updater.tidy(repository.partial, [repository.sha256])
    left = {path.name for path in repository.partial.iterdir()}
    assert left == {repository.sha256, repository.note.name}


# -- passwords and certificates --------------------------------------------------------------------


def test_a_password_goes_to_its_own_server_only_and_never_in_the_clear(
    repository: Repository, server: Server, tmp_path: Path
) -> None:
    with (
        Server(repository.folder, tmp_path / "one") as secret,
        Server(repository.folder, tmp_path / "two") as other,
    ):
        assert secret.ca
        assert other.ca
        (tmp_path / "both").write_bytes(secret.ca.read_bytes() + other.ca.read_bytes())
        url = secret.url.replace("//", "//eye:s3cret%3Aw%40rd@")
        source = HttpSource(url, ca=tmp_path / "both")
        for place in (server, other):
            headers = {"Location": f"{place.url}/{quote(NAME)}"}
            secret.faults["*"] = Fault(times=1, status=302, headers=headers)
            if place is server:
                with pytest.raises(
                    FetchError, match=f"redirected to {server.url}.*https"
                ) as caught:
                    repository.fetch(source)
                assert "s3cret" not in str(caught.value)
        assert repository.fetch(source)
        assert {one.authorization for one in secret.requests} == {"Basic ZXllOnMzY3JldDp3QHJk"}
        assert [one.authorization for one in other.requests] == [""]
        assert server.requests == []
        asked = len(secret.requests)
        with pytest.raises(FetchError, match="certificate"):
            b"".join(HttpSource(url).read(NAME))
        assert len(secret.requests) == asked
    with pytest.raises(ConfigError, match=f"updates.ca: {tmp_path}/none"):
        HttpSource(url, ca=tmp_path / "none")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://eye:s3cret@127.0.0.1/", "updates.url: .* must go over https"),
        ("https://eye:s3cret@127.0.0.1/?a=b", "updates.url"),
        ("ftp://eye:s3cret@127.0.0.1/", "updates.url"),
        ("https://eye:s3cret@[::1", "updates.url"),
        ("https://eye:s3cret@host:port", "updates.url"),
        ("https://", "updates.url"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_without_its_password(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        HttpSource(url)
    assert "s3cret" not in str(caught.value)
