"""Ring files that can't be made or trusted: the error says what, and nothing is left behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import RingError
from common.frames import LAYOUT, MAGIC, Ring, Shape, generations
from common.paths import PROJECT, Paths
from common.states import Policy

SHAPE = Shape(64, 48, policy=Policy.EVERY)


def attach(paths: Paths, shape: Shape = SHAPE) -> Ring:
    return Ring.attach(paths.rings, paths.accounts, "belt", shape)


IN_SMALL_TMPFS = """
import os, subprocess, sys
from pathlib import Path
folder, pages, leave = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "none", folder], check=True)
print("mounted", flush=True)
from common.errors import RingError
from common.frames import Ring, Shape
(folder / "rings").mkdir()
(folder / "accounts").mkdir()
def create(camera, shape):
    return Ring.attach(folder / "rings", folder / "accounts", camera, shape)
if leave:
    ring = create("first", Shape(64, 48))
    ring.begin()[:] = bytes(ring.shape.picture_bytes)
    ring.publish(1, 2)
    free = os.statvfs(folder)
    fill = free.f_bavail * free.f_frsize - leave
    (folder / "fill").write_bytes(bytes(fill))
try:
    create("belt", Shape(640, 480))
except RingError as error:
    print(error, flush=True)
left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
print(left, flush=True)
if leave:
    ring.begin()[:] = bytes(ring.shape.picture_bytes)
    assert ring.publish(1, 2) == 2 and ring.account().balanced
"""


def small_tmpfs(folder: Path, pages: int, leave: int) -> list[str]:
    """Run the script above with its own tmpfs; skip where that is not allowed."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", IN_SMALL_TMPFS, folder, str(pages), str(leave)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if "mounted" not in done.stdout:
        pytest.skip(f"needs a mount namespace of its own: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def test_no_room_names_both_sizes_and_leaves_nothing(tmp_path: Path) -> None:
    message, left = small_tmpfs(tmp_path, pages=512, leave=0)
    needed = Shape(640, 480).file_bytes / 1e6
    assert message.startswith(f"{tmp_path}/rings/belt.1: no room for {needed:.1f} MB (4 slots of ")
    assert f"2.1 MB are free in {tmp_path}/rings: make that tmpfs larger, or use fewer" in message
    assert left == "[]"


def test_no_room_for_a_second_camera_leaves_the_first_alone(tmp_path: Path) -> None:
    message, left = small_tmpfs(tmp_path, pages=512, leave=64 * 4096)
    assert "rings/belt.1: no room for" in message
    assert "0.3 MB are free" in message
    assert left == "['accounts/first', 'fill', 'rings/first.1']"


def test_no_room_for_the_account_alone(tmp_path: Path) -> None:
    """The last page is missing: the ring that did fit goes too."""
    message, left = small_tmpfs(tmp_path, pages=2048, leave=Shape(640, 480).file_bytes)
    assert "accounts/belt: no room for 0.0 MB (account); 0.0 MB are free" in message
    assert left == "['accounts/first', 'fill', 'rings/first.1']"


def word(path: Path, index: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(index * 8)
        file.write(value.to_bytes(8, "little"))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes are no ring"),
    "a few bytes": (lambda p: p.write_bytes(b"x" * 100), "100 bytes are no ring"),
    "an HTML page": (lambda p: p.write_bytes(b"<html>" * 1000), "not a ring of layout 2"),
    "zeros": (lambda p: p.write_bytes(bytes(8192)), f"not a ring of layout {LAYOUT}"),
    "another layout": (lambda p: word(p, 1, LAYOUT + 1), f"not a ring of layout {LAYOUT}"),
    "random after the magic": (
        lambda p: p.write_bytes(b"VIGILRNG" + LAYOUT.to_bytes(8, "little") + os.urandom(4096)),
        "contradicts its name or size",
    ),
    "truncated": (lambda p: os.truncate(p, SHAPE.file_bytes - 1), "contradicts its name or size"),
    "too long": (lambda p: os.truncate(p, SHAPE.file_bytes + 1), "contradicts its name or size"),
    "another generation": (lambda p: word(p, 2, 2), "contradicts its name or size"),
    "another width": (lambda p: word(p, 3, 4096), "contradicts its name or size"),
    "no slots": (lambda p: word(p, 6, 0), "contradicts its name or size"),
    "unknown policy": (lambda p: word(p, 7, 2), "contradicts its name or size"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_ring(paths: Paths, case: str) -> None:
    damage, text = BAD[case]
    attach(paths).close()
    path = paths.rings / "belt.1"
    damage(path)
    content = path.read_bytes()
    for writable in (False, True):
        with pytest.raises(RingError, match=f"{path}: .*{text}.*; remove it"):
            Ring.open(paths.rings, paths.accounts, "belt", 1, writable=writable)
    with pytest.raises(RingError, match="remove it"):
        attach(paths)
    assert path.read_bytes() == content
    path.unlink()  # what the message says
    with attach(paths) as ring:
        assert ring.written == 0


def test_there_is_no_ring(paths: Paths) -> None:
    with pytest.raises(RingError, match=f"belt: no ring 3 in {paths.rings}"):
        Ring.open(paths.rings, paths.accounts, "belt", 3)


def test_an_account_of_another_size(paths: Paths) -> None:
    attach(paths).close()
    account = paths.accounts / "belt"
    os.truncate(account, 8)
    with pytest.raises(RingError, match=f"{account}: is no account; remove it"):
        Ring.open(paths.rings, paths.accounts, "belt", 1)


def test_looking_needs_no_right_to_write(paths: Paths) -> None:
    with attach(paths) as ring:
        ring.begin()[:] = bytes(SHAPE.picture_bytes)
        ring.publish(1, 2)
    for path in (paths.rings / "belt.1", paths.accounts / "belt"):
        path.chmod(0o440)
    with Ring.open(paths.rings, paths.accounts, "belt", 1) as reader:
        assert (reader.written, reader.account().in_flight) == (1, 1)
        with pytest.raises(TypeError, match="read-only"):
            reader.attempt(1)


def test_leftovers_of_a_killed_capture_go(paths: Paths) -> None:
    for name in (".belt.1.new", ".belt.7.new", ".belt2.1.new"):
        (paths.rings / name).write_bytes(bytes(100))
    attach(paths).close()
    assert sorted(p.name for p in paths.rings.iterdir()) == [".belt2.1.new", "belt.1"]


def test_cameras_do_not_see_each_other(paths: Paths) -> None:
    for camera in ("belt", "belt-2", "belt_2"):
        Ring.attach(paths.rings, paths.accounts, camera, SHAPE).close()
    (paths.rings / "belt.txt").write_text("?")
    assert generations(paths.rings, "belt") == [1]
    assert generations(paths.rings, "other") == []


def test_sizes_are_whole_pages_and_the_magic_is_readable() -> None:
    odd = Shape(33, 7, 3, 3)
    assert odd.picture_bytes == 693
    assert (odd.slot_bytes, odd.pixels_at % 4096, odd.file_bytes % 4096) == (4096, 0, 0)
    assert odd.pixels_at >= odd.journal_at + 128 * 8192
    assert MAGIC.to_bytes(8, "little") == b"VIGILRNG"
