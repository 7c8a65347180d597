"""Bundles as tar files: the same bytes each time, and nothing hostile gets through."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from common import archive
from common.archive import Limits, pack, scan, unpack
from common.digest import digest
from common.errors import BundleError, StorageError

Build = Callable[[tarfile.TarFile], None]


def file(tar: tarfile.TarFile, name: str, content: bytes = b"x", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "") -> Build:
    def build(tar: tarfile.TarFile) -> None:
        file(tar, "a")
        file(tar, name, b"", type=kind, linkname=target)

    return build


def names(*names: str) -> Build:
    def build(tar: tarfile.TarFile) -> None:
        for name in names:
            if name.endswith("/"):
                file(tar, name, b"", type=tarfile.DIRTYPE)
            else:
                file(tar, name)

    return build


def pax(**headers: str) -> Build:
    return lambda tar: file(tar, "a", pax_headers=headers)


def made(path: Path, build: Build, kind: int = tarfile.USTAR_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=kind) as tar:  # type: ignore[call-overload]
        build(tar)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "samples").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "manifest.toml").write_text('name = "parts"\n')
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 5)
    (folder / "samples/a.png").write_bytes(b"\x89PNG")
    (folder / "samples/nothing").write_bytes(b"")
    return folder


def test_what_is_packed_is_unpacked(good: Path, tmp_path: Path) -> None:
    pack(good, tmp_path / "1.tar")
    (good / "manifest.toml").touch()
    (good / "model.onnx").chmod(0o600)
    pack(good, tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    into = tmp_path / "out"
    assert unpack(tmp_path / "1.tar", into) == digest(good) == digest(into)
    assert {path.relative_to(into) for path in into.rglob("*")} == {
        path.relative_to(good) for path in good.rglob("*")
    }
    assert (into / "model.onnx").stat().st_mode & 0o777 == 0o640
    assert (into / "samples").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_what_tar_itself_makes_is_fine(tmp_path: Path, good: Path, kind: int) -> None:
    """With ./ before each name, folders listed or only implied."""
    for way in (lambda tar: tar.add(good, "."), names("./a/b", "a/c")):
        tar = made(tmp_path / "t.tar", way, kind)
        with tarfile.open(tar) as read:
            listed = [name for name in read.getnames() if name != "."]
        assert [entry.name for entry in scan(tar)] == [n.removeprefix("./") for n in listed]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (special("l", tarfile.SYMTYPE, "/etc/passwd"), "'l' is a symbolic link"),
        (special("l", tarfile.LNKTYPE, "a"), "'l' is a hard link"),
        (special("l", tarfile.CHRTYPE), "'l' is a device"),
        (special("l", tarfile.BLKTYPE), "'l' is a device"),
        (special("l", tarfile.FIFOTYPE), "'l' is a FIFO"),
        (special("l", tarfile.GNUTYPE_SPARSE), "'l' is a sparse file"),
        (special("l", tarfile.CONTTYPE), "'l' is of unknown type b'7'"),
        (special("l", b"Z"), "'l' is of unknown type b'Z'"),
        (names("/etc/passwd"), "'/etc/passwd' leaves the bundle's folder"),
        (names("../a"), "'../a' leaves the bundle's folder"),
        (names("a/../../b"), "leaves the bundle's folder"),
        (names("a/.."), "leaves the bundle's folder"),
        (names("a//b"), "no plain path"),
        (names("a/./b"), "no plain path"),
        (names("a/"), "holds no file"),
        (names(), "holds no file"),
        (names("a\nb"), "no plain path"),
        (names("a\x1b[2J"), "no plain path"),
        (names("a", "a"), "'a' occurs twice"),
        (names("a/", "a/"), "'a' occurs twice"),
        (names("a", "./a"), "'a' occurs twice"),
        (names("a", "a/b"), "'a' is both a file and a folder"),
        (names("a/b", "a"), "'a' is both a file and a folder"),
        (names("manifest.toml", "Manifest.toml"), "only by case"),
        (names("a/x", "A/y"), "only by case"),
        (names("stra\u00dfe", "STRASSE"), "only by case"),
        (names("caf\u00e9", "cafe\u0301"), "only by case or normalisation"),
        (names("a/b/c/d/e"), "more than 4 deep"),
        (names("a" * 110 + "/" + "b" * 95), "(more than 200 bytes|GNU extension)"),
        (names(*(f"{i}" for i in range(2001))), "more than the 2000 entries"),
        (lambda tar: file(tar, "a", b"x" * 3_000_001), "more than the 3000000 bytes"),
    ],
)
def test_hostile_tars(tmp_path: Path, build: Build, words: str, kind: int) -> None:
    refuses(made(tmp_path / "h.tar", build, kind), words)


def refuses(tar: Path, words: str) -> None:
    """Nothing is written, nothing left."""
    into = tar.parent / "out"
    with pytest.raises(BundleError, match=words) as error:
        unpack(tar, into, Limits(total_bytes=3_000_000))
    assert str(tar) in str(error.value)
    assert not into.exists()


@pytest.mark.parametrize(
    "headers", [{"path": "/etc/passwd"}, {"size": "5"}, {"GNU.sparse.major": "1"}, {"mtime": "1.5"}]
)
def test_pax_headers_are_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    refuses(made(tmp_path / "p.tar", pax(**headers), tarfile.PAX_FORMAT), "a PAX extension")


def test_global_pax_headers_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "g.tar", "w", pax_headers={"path": "../x"}) as tar:
        file(tar, "a")
    refuses(tmp_path / "g.tar", "a PAX extension")


@pytest.mark.parametrize("way", ["gz", "bz2", "xz"])
def test_compression_is_refused(tmp_path: Path, way: str) -> None:
    refuses(made(tmp_path / f"b.tar.{way}", names("a"), mode=f"w:{way}"), "is compressed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off at byte 0"),
        (b"<html>not found</html>" * 100, "at byte 0: no valid tar header"),
        (bytes(10240), "holds no file"),
    ],
)
def test_what_is_no_tar(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "n.tar").write_bytes(content)
    refuses(tmp_path / "n.tar", words)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    for path in (tmp_path, tmp_path / "absent.tar", tmp_path / "fifo.tar"):
        with pytest.raises(BundleError, match="is no file"):
            scan(path)


def test_torn_at_every_block(good: Path, tmp_path: Path) -> None:
    pack(good, tmp_path / "t.tar")
    whole = (tmp_path / "t.tar").read_bytes()
    used = len(whole.rstrip(b"\0"))
    for length in range(0, used + 512, 512):
        (tmp_path / "torn.tar").write_bytes(whole[:length])
        refuses(tmp_path / "torn.tar", "cut off|holds no file")
    (tmp_path / "torn.tar").write_bytes(whole[: used + 100])
    refuses(tmp_path / "torn.tar", "cut off")


def test_flipped_headers_are_refused(good: Path, tmp_path: Path) -> None:
    pack(good, tmp_path / "t.tar")
    whole = (tmp_path / "t.tar").read_bytes()
    headers = [entry.offset - 512 for entry in scan(tmp_path / "t.tar")]
    for at in (header + byte for header in headers for byte in range(0, 500, 7)):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        (tmp_path / "f.tar").write_bytes(flipped)
        refuses(tmp_path / "f.tar", f"at byte {at // 512 * 512}: no valid tar header")


def patched(tar: Path, at: int, value: bytes) -> None:
    """Change a header's field and mend its checksum."""
    content = bytearray(tar.read_bytes())
    content[at : at + len(value)] = value
    head = content[:148] + b" " * 8 + content[156:512]
    content[148:156] = f"{sum(head):06o}\0 ".encode()
    tar.write_bytes(content)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"77777777777\0", "more than the 3000000 bytes"),
        (b"00000100000\0", "is cut off"),
        (b"\x80" + b"\xff" * 11, "has no valid size"),  # base-256
        (b"\xff" * 12, "has no valid size"),  # base-256, negative
        (b"-0000000001\0", "has no valid size"),
        (b"           \0", "has no valid size"),
    ],
)
def test_sizes_that_lie(tmp_path: Path, value: bytes, words: str) -> None:
    tar = made(tmp_path / "s.tar", names("a"))
    patched(tar, 124, value)
    refuses(tar, words)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    tar = made(tmp_path / "s.tar", names("a"))
    patched(tar, 0, b"\xff\xfe")
    refuses(tar, "is not UTF-8")


@pytest.mark.parametrize("rest", [b"x", bytes(5000) + b"x", bytes(512) + b"\x1f\x8b"])
def test_nothing_may_follow_the_end(good: Path, tmp_path: Path, rest: bytes) -> None:
    pack(good, tmp_path / "t.tar")
    whole = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(whole + rest)
    refuses(tmp_path / "t.tar", "something follows its end")


def test_no_room_is_no_fault_of_the_bundle(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(good, tmp_path / "t.tar")
    monkeypatch.setattr(archive, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(StorageError, match=r"MB free, the bundle needs \d+ MB; make room"):
        unpack(tmp_path / "t.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(good: Path, tmp_path: Path) -> None:
    pack(good, tmp_path / "t.tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").touch()
    with pytest.raises(StorageError, match="File exists"):
        unpack(tmp_path / "t.tar", tmp_path / "out")
    assert (tmp_path / "out/kept").exists()


@pytest.mark.parametrize("what", ["a symlink", "a name too long"])
def test_what_is_not_packed(good: Path, tmp_path: Path, what: str) -> None:
    if what == "a symlink":
        (good / "link").symlink_to("/etc/passwd")
    else:
        (good / ("x" * 150)).touch()
    with pytest.raises(BundleError, match=re.escape(str(good))):
        pack(good, tmp_path / "t.tar")
    assert not [path for path in tmp_path.iterdir() if "t.tar" in path.name]
