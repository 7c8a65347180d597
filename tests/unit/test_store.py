"""The record of slots on disk, whatever happens to its files, its lock or its disk."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import pytest

from common import durable, slots, store
from common.bell import Bell
from common.digest import digest
from common.errors import LockedError, StorageError, TransitionError
from common.frames import Ring, Shape
from common.paths import PROJECT, Paths
from common.processes import record_bell
from common.slots import FACTORY, PASS, SAFE_MARGIN, Record, Slot
from common.states import Phase, SlotState
from common.store import Store, parse, render

INSTALLED = Slot(SlotState.INSTALLED, name="new")


def opened(paths: Paths, boot: str = "boot 1") -> Store:
    return Store(paths, "main", 2, boot)


def started(record: Record) -> Record:
    return slots.start(record, "b")


def files(paths: Paths) -> dict[str, bytes]:
    """The versions on the disk."""
    return {path.name: path.read_bytes() for path in paths.models("main").glob("state.?")}


def unpacked(store: Store, content: bytes = b"weights") -> tuple[Path, str]:
    """A bundle in `staging`, and the name it will have."""
    folder = store.staging / "bundle"
    (folder / "samples").mkdir(parents=True)
    (folder / "model.bin").write_bytes(content)
    (folder / "samples" / "1.jpg").write_bytes(b"picture")
    return folder, digest(folder)


def adopted(store: Store, content: bytes = b"weights") -> str:
    folder, name = unpacked(store, content)
    store.adopt(folder, name, INSTALLED)
    return name


@contextmanager
def refusing_disk() -> Iterator[None]:
    """No file may grow beyond 0 bytes any more, as on a full disk; for everyone, root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


# -- reading and changing ------------------------------------------------------------------------


def test_the_first_record_is_the_factorys(paths: Paths) -> None:
    one = opened(paths)
    assert one.read().known_good == FACTORY
    assert not files(paths)  # reading writes nothing
    with one.held() as record:
        assert record.lanes.keys() == {"a", "b"}
        assert (record.live, record.boot) == ("a", "boot 1")
    assert one.read() == record
    assert one.problems == []


def test_commits_are_read_back_by_others(paths: Paths) -> None:
    one, other = opened(paths), opened(paths)
    for number in range(1, 6):
        record = one.commit(started)
        assert record.counter == number
        assert other.read() == opened(paths).read() == record
    sequences = sorted(parse(content)[0] for content in files(paths).values())
    assert sequences == [5, 6]  # one was the accounting for the boot
    assert not list(paths.models("main").glob("*.broken"))


def test_what_changes_nothing_is_not_written(paths: Paths) -> None:
    one = opened(paths)
    one.commit(started)
    before = files(paths)
    one.commit(lambda record: record)
    assert files(paths) == before
    with pytest.raises(TransitionError):
        one.commit(slots.request)
    assert files(paths) == before


def test_every_commit_rings_both_lanes(paths: Paths) -> None:
    bells = [Bell(paths.bell(record_bell("main", lane))) for lane in ("a", "b")]
    one = opened(paths)
    one.commit(started)
    assert [bell.heard() for bell in bells] == [True, True]
    for bell in bells:
        bell.close()


def test_a_boot_is_accounted_for_before_anything_else(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    one.commit(lambda record: slots.activate(record, name))
    one.commit(started)
    assert one.read().slots[name].tries == slots.TRIES - 1
    seen: list[Record] = []

    def change(record: Record) -> Record:
        seen.append(record)
        return record

    opened(paths, "boot 2").commit(change)
    assert (seen[0].boot, seen[0].slots[name].tries) == ("boot 2", slots.TRIES)
    assert opened(paths, "boot 2").read() == seen[0]  # and durably so
    with opened(paths, "boot 3").held() as record:
        assert record.boot == "boot 3"


def test_the_lanes_of_another_configuration(paths: Paths) -> None:
    opened(paths).commit(started)
    with Store(paths, "main", 1, "boot 1").held() as record:
        assert set(record.lanes) == {"a"}
    with opened(paths).held() as record:
        assert set(record.lanes) == {"a", "b"}


# -- damage --------------------------------------------------------------------------------------


@pytest.fixture
def two_versions(paths: Paths) -> tuple[Record, Record]:
    """The last record but one, and the last."""
    one = opened(paths)
    one.commit(started)
    return one.commit(started), one.commit(lambda record: slots.take_over(record, "b", "it died"))


def newest(paths: Paths) -> Path:
    versions = paths.models("main").glob("state.?")
    return max(versions, key=lambda path: parse(path.read_bytes())[0])


def broken_in(content: bytes) -> Iterator[bytes]:
    """Torn at each length, and each single bit flipped."""
    for length in range(len(content)):
        yield content[:length]
    for at in range(len(content)):
        for bit in range(8):
            yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def test_no_torn_version_and_no_flipped_bit_is_taken_for_a_record(
    paths: Paths, two_versions: tuple[Record, Record]
) -> None:
    contents = files(paths).values()
    tried = 0
    for content in contents:
        for damaged in broken_in(content):
            tried += 1
            with pytest.raises(ValueError):  # noqa: PT011 - decoding errors are ValueErrors too
                parse(damaged)
    assert tried == 9 * sum(map(len, contents))


@pytest.mark.parametrize("which", ["newest", "older"])
def test_the_other_version_counts_whatever_is_damaged(
    paths: Paths, two_versions: tuple[Record, Record], which: str
) -> None:
    last = newest(paths)
    victim = last if which == "newest" else next(p for p in last.parent.glob("*.?") if p != last)
    whole, kept = victim.read_bytes(), two_versions[0 if which == "newest" else 1]
    for damaged in broken_in(whole):
        victim.write_bytes(damaged)
        assert Store.read(opened(paths)) == kept


@pytest.mark.parametrize("which", ["newest", "older"])
@pytest.mark.parametrize("damage", ["torn", "empty", "flipped"])
def test_what_is_damaged_is_set_aside_and_numbers_jump(
    paths: Paths, two_versions: tuple[Record, Record], which: str, damage: str
) -> None:
    last = newest(paths)
    victim = last if which == "newest" else next(p for p in last.parent.glob("*.?") if p != last)
    kept = two_versions[0 if which == "newest" else 1]
    whole = victim.read_bytes()
    flipped = whole[:60] + bytes([whole[60] ^ 4]) + whole[61:]
    bad = {"torn": whole[:90], "empty": b"", "flipped": flipped}[damage]
    victim.write_bytes(bad)
    one = opened(paths)
    with one.held() as record:
        assert record == msgspec.structs.replace(kept, counter=kept.counter + SAFE_MARGIN)
    assert victim.with_name(f"{victim.name}.broken").read_bytes() == bad
    assert one.problems == [f"{victim}: the record of slots is damaged; set aside"]
    assert len(files(paths)) == 2
    again = opened(paths)
    with again.held() as record:
        assert record.counter == kept.counter + SAFE_MARGIN  # once
    assert again.problems == []
    assert again.commit(started).lanes["b"].run > two_versions[1].counter


def test_with_both_damaged_the_factorys_model_is_live_and_may_decide(
    paths: Paths, two_versions: tuple[Record, Record]
) -> None:
    with Ring.create(paths.rings, paths.accounts, "belt", Shape(8, 8)) as ring:
        ring.raise_fence(4711)
        for path in paths.models("main").glob("state.?"):
            path.write_bytes(path.read_bytes()[:-1])
        one = opened(paths)
        with one.held() as record:
            assert record.counter == 4711 + SAFE_MARGIN
            assert (record.known_good, record.live) == (FACTORY, "a")
        record = one.commit(lambda record: slots.start(record, "a"))
        assert ring.raise_fence(record.epoch)
    assert len(one.problems) == 3
    assert "beginning anew with the factory's" in one.problems[2]
    assert len(list(paths.models("main").glob("*.broken"))) == 2


def test_with_both_gone_while_rings_are_there_numbers_go_on(
    paths: Paths, two_versions: tuple[Record, Record]
) -> None:
    with Ring.create(paths.rings, paths.accounts, "belt", Shape(8, 8)) as ring:
        ring.raise_fence(50)
    for path in paths.models("main").glob("state.?"):
        path.unlink()
    with opened(paths).held() as record:
        assert record.counter == 50 + SAFE_MARGIN


def test_killed_between_setting_aside_and_writing_numbers_still_jump(
    paths: Paths, two_versions: tuple[Record, Record]
) -> None:
    newest(paths).write_bytes(b"torn")

    def mend() -> None:
        with opened(paths).held():
            pass

    killed_in(mend, lambda: patch(store.Store, "_write", die))
    with opened(paths).held() as record:
        assert record.counter > two_versions[1].counter


# -- a disk that refuses -------------------------------------------------------------------------


def test_what_may_be_volatile_counts_until_the_next_boot(paths: Paths) -> None:
    one = opened(paths)
    last = one.commit(started)
    before = files(paths)
    with refusing_disk(), pytest.raises(StorageError, match="can't be written"):
        one.commit(started)
    assert opened(paths).read() == last
    assert files(paths) == before


def take_over(record: Record) -> Record:
    return slots.take_over(record, record.other or "", "it died")


@pytest.fixture
def full_disk(tmp_path: Path, paths: Paths) -> Iterator[Callable[[bool], None]]:
    """The models on a small file system of its own, which can be filled and emptied again."""
    folder = paths.root / "models"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")

    def fill(full: bool) -> None:
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        if full:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(512))

    yield fill
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(paths: Paths, full_disk: Callable[[bool], None]) -> None:
    one = opened(paths)
    last = one.commit(started)
    on_disk = files(paths)
    folder, name = unpacked(one)
    full_disk(True)
    for change in (started, take_over):
        with pytest.raises(StorageError, match="No space left"):
            one.commit(change)
        assert opened(paths).read() == last
    over = one.commit(take_over, volatile=True)
    assert over.live == "b"
    assert "what was decided counts until the next boot" in one.problems[0]
    assert opened(paths).read() == over  # for everyone
    back = opened(paths).commit(take_over, volatile=True)
    assert (back.live, back.epoch) == ("a", over.epoch + 1)
    assert files(paths) == on_disk
    with pytest.raises(StorageError):
        one.adopt(folder, name, INSTALLED)
    assert not one.read().slots

    full_disk(False)
    kept = opened(paths).commit(take_over)
    assert kept.epoch == back.epoch + 1
    assert opened(paths).read() == kept
    assert parse(newest(paths).read_bytes())[1] == kept
    assert opened(paths).commit(started).counter == kept.counter + 1


def test_a_full_disk_over_a_boot(paths: Paths, full_disk: Callable[[bool], None]) -> None:
    one = opened(paths)
    last = one.commit(started)
    full_disk(True)
    one.commit(take_over, volatile=True)
    for path in paths.run.glob("state-*"):  # the power is cut
        path.unlink()
    second = opened(paths, "boot 2")
    with second.held() as record:
        assert record == msgspec.structs.replace(last, boot="boot 2")
    assert len(second.problems) == 1


def test_a_read_only_disk(paths: Paths, full_disk: Callable[[bool], None]) -> None:
    one = opened(paths)
    one.commit(started)
    folder = paths.root / "models"
    name = adopted(one)
    one.commit(lambda record: slots.activate(record, name))
    last = one.commit(lambda record: slots.abandon(record, "too slow"))
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with pytest.raises(StorageError, match="Read-only"):
        one.commit(started)
    with pytest.raises(StorageError, match="Read-only"):
        one.clean_up()
    assert one.commit(take_over, volatile=True).live == "b"
    assert opened(paths).read().live == "b"
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    assert opened(paths).commit(take_over).epoch == last.counter + 2


def test_a_read_only_disk_from_the_start(paths: Paths, full_disk: Callable[[bool], None]) -> None:
    folder = paths.root / "models"
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    one = opened(paths)
    assert len(one.problems) == 2  # its folders
    first = one.commit(lambda record: slots.start(record, "a"), volatile=True)
    assert (first.lanes["a"].slot, first.epoch) == (FACTORY, 1)
    again = opened(paths).commit(lambda record: slots.start(record, "a"), volatile=True)
    assert again.epoch == 2
    with pytest.raises(StorageError, match="No such file"):
        one.clean_up()


def test_a_folder_that_can_not_be_synced(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(paths).commit(started)
    killed_in(lambda: opened(paths).commit(started), lambda: patch(durable, "sync_folder", die))

    def fails(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable, "sync_folder", fails)
    with pytest.raises(StorageError, match="can't be synced: Input/output error"):
        opened(paths).commit(started)
    monkeypatch.undo()
    assert opened(paths).commit(started).counter == 3


# -- one at a time -------------------------------------------------------------------------------


def in_a_child(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - the child must not return to pytest
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return child


def patch(where: object, name: str, value: object) -> None:
    """For good: in a child."""
    setattr(where, name, value)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in(action: Callable[[], object], prepare: Callable[[], object]) -> None:
    """Run `action` in a child that is SIGKILLed in the function that `prepare` replaces."""

    def run() -> None:
        prepare()
        action()

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(run), 0)[1]) == -signal.SIGKILL


def test_processes_that_commit_at_once_lose_nothing(paths: Paths) -> None:
    opened(paths).commit(started)

    def commits() -> None:
        one = opened(paths)
        for _ in range(100):
            one.commit(started)

    children = [in_a_child(commits) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert opened(paths).read().counter == 401


def test_a_writer_killed_before_it_synced_is_synced_by_the_next(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(paths).commit(started)
    lock = opened(paths).lock_path
    assert lock.read_bytes() == b"0"
    killed_in(lambda: opened(paths).commit(started), lambda: patch(durable, "sync_folder", die))
    assert lock.read_bytes() == b"1"
    assert opened(paths).read().counter == 2  # visible, not durable
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    with opened(paths).held() as record:
        assert record.counter == 2
        assert synced == [paths.models("main")]
        assert lock.read_bytes() == b"0"
    with opened(paths).held():
        assert len(synced) == 1


def test_a_writer_killed_before_its_rename_changed_nothing(paths: Paths) -> None:
    last = opened(paths).commit(started)
    killed_in(lambda: opened(paths).commit(started), lambda: patch(Path, "rename", die))
    assert opened(paths).read() == last
    assert opened(paths).commit(started).counter == last.counter + 1


def test_a_lock_that_is_held_is_an_error_in_time(paths: Paths) -> None:
    program = (
        "import fcntl, os, signal, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    one = opened(paths)
    command = [sys.executable, "-c", program, str(one.lock_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for wait_s in (0.0, 0.1):
            started_s = time.monotonic()
            with pytest.raises(LockedError, match=f"held by another process for {wait_s:g} s"):
                one.commit(started, wait_s=wait_s)
            assert wait_s <= time.monotonic() - started_s < wait_s + 0.5
        assert one.read() == opened(paths).read()  # reading needs no lock
        holder.kill()
    assert one.commit(started, wait_s=1.0).counter == 1  # the kernel freed it


def test_the_lock_is_not_inherited_by_programs(paths: Paths) -> None:
    one = opened(paths)
    with one.held():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        one.commit(started, wait_s=0.0)
    finally:
        child.kill()
        child.wait()


def test_the_cameras_lock_is_never_waited_for_under_the_state_lock(paths: Paths) -> None:
    with Ring.create(paths.rings, paths.accounts, "belt", Shape(8, 8)) as ring:
        fd = os.open(paths.accounts / "belt", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with opened(paths).held() as record:
            assert not ring.raise_fence(record.epoch + 1, wait=False)
        os.close(fd)
        assert ring.raise_fence(1, wait=False)
        assert ring.fence == 1


# -- folders -------------------------------------------------------------------------------------


def test_adopted_slots_verify_and_one_flipped_bit_does_not(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    assert one.read().slots[name] == INSTALLED
    assert one.verifies(name)
    assert one.verifies(FACTORY)
    assert one.verifies(PASS)
    assert not one.verifies("3" * 64)
    assert list(one.staging.iterdir()) == []
    for file in ("model.bin", "samples/1.jpg"):
        path = one.path(name) / file
        content = path.read_bytes()
        for at in range(len(content)):
            for bit in range(8):
                path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
                assert not one.verifies(name)
        path.write_bytes(content)
    assert one.verifies(name)
    (one.path(name) / "more").touch()
    assert not one.verifies(name)


def test_a_slot_is_adopted_once(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    record = one.read()
    assert adopted(one) == name
    assert one.read() == record
    assert one.verifies(name)


def test_a_slot_that_does_not_verify_any_more_is_replaced(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    (one.path(name) / "model.bin").write_bytes(b"weightz")
    record = one.read()
    assert adopted(one) == name
    assert one.verifies(name)
    assert one.read() == record
    assert one.clean_up() == []
    assert list(one.staging.iterdir()) == []


def test_a_bad_slot_is_not_adopted_again(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    one.commit(lambda record: slots.activate(record, name))
    one.commit(lambda record: slots.abandon(record, "too slow"))
    assert one.clean_up() == [name]
    with pytest.raises(TransitionError, match="is bad"):
        adopted(one)
    assert not one.path(name).exists()


def test_clean_up_drops_the_reference_first(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened(paths)
    names = [adopted(one, b"%d" % number) for number in range(3)]
    for name in names[:2]:
        one.commit(partial(slots.activate, name=name))
        one.commit(slots.request)
        one.commit(slots.hand_over)
        one.commit(slots.mark_good)
    one.commit(lambda record: slots.activate(record, names[2]))
    one.commit(lambda record: slots.abandon(record, "too slow"))
    stray = one.slots / ("4" * 64)
    stray.mkdir()
    moved: list[str] = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        if path.parent == one.slots:
            on_disk = parse(newest(paths).read_bytes())[1]
            assert path.name not in on_disk.references
            moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    assert sorted(one.clean_up()) == sorted(moved) == sorted([names[2], stray.name])
    assert {path.name for path in one.slots.iterdir()} == set(names[:2])
    assert one.read().state(names[2]) is SlotState.BAD
    assert list(one.staging.iterdir()) == []
    assert one.clean_up() == []


def test_clean_up_goes_on_where_it_was_killed(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    one.commit(lambda record: slots.activate(record, name))
    one.commit(lambda record: slots.abandon(record, "too slow"))
    killed_in(one.clean_up, lambda: patch(shutil, "rmtree", die))
    assert [path.name for path in one.staging.iterdir()] == [f"{name}.gone"]
    assert one.clean_up() == []
    assert list(one.staging.iterdir()) == []


def test_clean_up_where_a_power_cut_left_a_folder_under_both_its_names(paths: Paths) -> None:
    one = opened(paths)
    name = adopted(one)
    shutil.copytree(one.path(name), one.staging / f"{name}.gone")
    one.commit(lambda record: slots.discard(record, name))
    assert one.clean_up() == [name]
    assert list(one.staging.iterdir()) == []


def test_the_format(paths: Paths) -> None:
    record = slots.fitted(Record(), 2)
    content = render(7, record)
    assert content.startswith(b"vigil-state 1 7 ")
    assert parse(content) == (7, record)
    for other in (
        content.replace(b"vigil-state 1", b"vigil-state 2"),
        content.replace(b" 7 ", b" 8 "),
        b"\xff\xfe",
        b"",
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - decoding errors are ValueErrors too
            parse(other)
    assert record.txn.phase is Phase.NONE
