"""Durable files, and where everything lies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import durable
from common.errors import StorageError
from common.paths import PROJECT, Paths

FULL_DISK = """
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
print("mounted")
from common import durable
from common.errors import StorageError
durable.write(folder / "state", b"old" * 1000)
try:
    durable.write(folder / "state", bytes(100_000))
except StorageError as error:
    print(error)
print([p.name for p in folder.iterdir()], (folder / "state").read_bytes() == b"old" * 1000)
"""


def test_write_replaces_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.0"
    durable.write(path, b"one", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / ".state.0.new").write_bytes(b"left by a process that was killed")
    before = path.open("rb")
    durable.write(path, b"two")
    assert path.read_bytes() == b"two"
    with before:
        assert before.read() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["state.0"]


def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, tmp_path],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if not done.stdout.startswith("mounted"):
        pytest.skip(f"needs a mount namespace of its own: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        f"{tmp_path}/state: can't be written: No space left on device",
        "['state'] True",
    ]


def test_where_it_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{tmp_path}/no/x: can't be written: No such file"):
        durable.write(tmp_path / "no" / "x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder: can't be written: Is a directory"):
        durable.write(tmp_path / "folder", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_order_in_which_it_reaches_the_disk(tmp_path: Path) -> None:
    """Content before the name, the name before the return: seen in the system calls themselves."""
    probe = subprocess.run(["strace", "-V"], capture_output=True)
    if probe.returncode:
        pytest.skip("needs strace")
    code = "import sys; from common import durable; from pathlib import Path; "
    code += "durable.write(Path(sys.argv[1]), b'x')"
    calls = tmp_path / "calls"
    done = subprocess.run(
        ["strace", "-o", calls, "-e", "trace=write,fsync,rename,renameat,renameat2", "-P",
         tmp_path / ".state.new", "-P", tmp_path, "-P", tmp_path / "state",
         sys.executable, "-c", code, tmp_path / "state"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"strace is not allowed here: {done.stderr[-200:]}")
    names = [line.partition("(")[0] for line in calls.read_text().splitlines() if "(" in line]
    assert [n.removesuffix("at2").removesuffix("at") for n in names] == [
        "write", "fsync", "rename", "fsync",
    ]  # fmt: skip


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.1"
    path.write_bytes(b"\0garbage")
    assert durable.set_aside(path) == tmp_path / "state.1.broken"
    assert (tmp_path / "state.1.broken").read_bytes() == b"\0garbage"
    assert not path.exists()


# -- paths ---------------------------------------------------------------------------------------


def test_everything_is_under_one_root_and_one_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIGIL_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("VIGIL_RUN", str(tmp_path / "run"))
    paths = Paths.from_environment()
    assert (paths.root, paths.run) == (tmp_path / "root", tmp_path / "run")
    assert paths.endpoint("p") == f"ipc://{tmp_path}/run/p.ipc"
    paths.make()
    paths.make()
    for folder in (paths.rings, paths.accounts, paths.programs, paths.logs):
        assert folder.is_dir()
        assert folder.parent == paths.run
        assert folder.stat().st_mode & 0o007 == 0


def test_the_run_folder_lies_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIGIL_RUN", raising=False)
    one, two = Paths.under(tmp_path / "one"), Paths.under(tmp_path / "two")
    assert one.run.parent == Path("/dev/shm")
    assert one.run != two.run
    assert Paths.under(tmp_path / "x" / ".." / "one") == one
    in_memory = Path("/dev/shm") / f"vigil-test-{os.getpid()}"
    (in_memory / "run").mkdir(parents=True)
    try:
        assert Paths.under(in_memory).run == in_memory / "run"
    finally:
        (in_memory / "run").rmdir()
        in_memory.rmdir()


def test_relative_folders_mean_the_same_wherever_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIGIL_ROOT", "root")
    monkeypatch.setenv("VIGIL_RUN", "run")
    assert Paths.from_environment() == Paths(tmp_path / "root", tmp_path / "run")


def test_paths_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="100 bytes are too long for a socket; set VIGIL_RUN"):
        Paths(tmp_path, Path("/" + "r" * 90)).endpoint("xxxx")
    assert Paths(tmp_path, Path("/" + "r" * 89)).endpoint("xxxx")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"{tmp_path}/file/run: can't be made: Not a directory"):
        Paths(tmp_path, tmp_path / "file" / "run").make()
