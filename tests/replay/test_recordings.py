"""Recordings as cameras: the same pictures, the same results; what of a file is whole is played.

belt.mcap: two seconds of the virtual camera (240x176, seed 7), `vigil tap record --pixels jpeg`.
belt.json: what the factory model found in its pictures. VIGIL_RENEW=1 writes it anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcap.reader import make_reader
from mcap.records import Chunk
from mcap.records import Message as McapMessage
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import Writer

from common import bus
from common.config import Camera
from common.errors import SourceError, StorageError
from common.geometry import View
from common.messages import Message, Result, Truth, TruthItem
from common.paths import PROJECT, Paths
from common.recording import (
    Pixels,
    Recorded,
    Recording,
    RecordingWriter,
    encode,
    unpack,
    without_passwords,
)
from common.states import Sight
from common.topics import TOPICS
from services.capture.recording import RecordingSource
from services.capture.source import Picture, SizeChangedError
from services.cli.replay import MOMENTS
from tests.support import Journal, System, until

BELT = Path(__file__).with_name("belt.mcap")
REFERENCE = BELT.with_suffix(".json")
FRAMES = 24
SCORE, PLACE = 0.05, 3.0  # by how much scores, and boxes in pixels, may differ on another CPU
THRESHOLD = 0.4  # of the factory model


def content(path: Path) -> list[Recorded]:
    recording = Recording(path)
    try:
        return list(recording.messages())
    finally:
        recording.close()


def opened(path: Path) -> Recording | str:
    """A recording, or why it is none."""
    try:
        return Recording(path)
    except SourceError as error:
        return str(error)


@pytest.fixture(scope="module")
def whole() -> list[Recorded]:
    return content(BELT)


def camera(**keys: Any) -> Camera:
    return Camera("recording", path="belt.mcap", **keys)


def read_all(source: RecordingSource) -> list[Picture]:
    """Every picture, as capture reads them."""
    format = source.open()
    pictures: list[Picture] = []
    while True:
        into = np.zeros((format.height, format.width, 3), np.uint8)
        if source.read(into) is None:
            source.close()
            return pictures
        pictures.append(into)


def test_reference(system: Callable[[str], System], paths: Paths) -> None:
    """A committed recording through a real lane gives the results committed with it."""
    config = f"""
    [cameras.desk]
    source = "recording"
    path = "{BELT}"
    fps = "max"
    loop = false
    policy = "every"
    [groups.main]
    model = "{PROJECT}/models/factory"
    lanes = 1
    """
    system(config)
    journal = Journal(paths, "desk")
    until(lambda: len(journal.results) >= FRAMES, 60, "every frame judged")
    found = [
        [(item.label, item.score, item.box) for item in result.items] for result in journal.stop()
    ]
    if "VIGIL_RENEW" in os.environ:
        REFERENCE.write_text(json.dumps(found, indent=0))
    expected = json.loads(REFERENCE.read_text())
    assert len(found) == len(expected) == FRAMES
    assert sum(map(len, expected)) > 2 * FRAMES
    for sequence, (new, reference) in enumerate(zip(found, expected, strict=True), start=1):
        for some, others in ((new, reference), (reference, new)):
            for item in some:
                near = any(_like(item, other) for other in others)
                assert near or item[1] < THRESHOLD + SCORE, (sequence, item, others)


def _like(item: Any, other: Any) -> bool:
    far: float = max(abs(a - b) for a, b in zip(item[2], other[2], strict=True))
    return bool(item[0] == other[0] and abs(item[1] - other[1]) <= SCORE and far <= PLACE)


def test_source(whole: list[Recorded]) -> None:
    """Pictures, size, rate and truth as recorded; opened again, and looped, the same."""
    source = RecordingSource(camera(), BELT)
    format = source.open()
    assert (format.width, format.height, format.name) == (240, 176, "recorded jpeg")
    assert format.fps == pytest.approx(12, rel=0.05)
    recorded = [unpack(m.body) for m in whole if m.topic == "pixels/belt"]
    truths = [bus.decode(m.topic, m.body) for m in whole if m.topic == "truth/belt"]
    true = {t.sequence: t.items for t in truths if isinstance(t, Truth)}
    assert len(recorded) == len(true) == FRAMES
    into = np.zeros((176, 240, 3), np.uint8)
    for i in range(2 * FRAMES):  # it loops
        stamp = source.read(into)
        pixels, picture = recorded[i % FRAMES]
        assert stamp is not None
        assert stamp.truth == true[pixels.sequence]
        assert np.array_equal(into, picture)
    with pytest.raises(SizeChangedError):
        source.read(np.zeros((2, 2, 3), np.uint8))
    assert source.read(into), "what had another size comes again"
    assert np.array_equal(into, recorded[0][1])
    for _ in range(3):
        source.open()
        source.read(into)
        assert np.array_equal(into, recorded[0][1])
    source.close()
    source.close()


def test_pictures_that_were_cut_and_turned(tmp_path: Path) -> None:
    """The recorded picture is the full one of its new camera; the truth moves with it."""
    view = View.make((200, 100), (40, 20, 60, 40), 90, "none", (20, 30))
    picture = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)
    encoding, data = encode(picture, lossless=True)
    pixels = Pixels(1, 5, 10, 20, Sight.DARK, 0, 20, 30, encoding, data, view)
    items = (
        TruthItem("inside", (50.0, 30.0, 60.0, 40.0)),
        TruthItem("across", (90.0, 50.0, 180.0, 90.0)),
        TruthItem("outside", (150.0, 70.0, 180.0, 90.0)),
    )
    path = tmp_path / "a.mcap"
    writer = RecordingWriter(path, {"pixels": "left"})
    writer.add("capture-left", "pixels/left", 30, bus.encode(pixels))
    writer.add("capture-left", "truth/left", 40, bus.encode(Truth(1, 4, items)))  # of another
    writer.add("capture-left", "truth/left", 40, bus.encode(Truth(1, 5, items)))
    writer.end({})
    source = RecordingSource(camera(loop=False), path)
    assert source.open().fps is None
    into = np.zeros((30, 20, 3), np.uint8)
    stamp = source.read(into)
    assert stamp is not None
    assert np.array_equal(into, picture)
    assert stamp.sight is Sight.DARK, "as it was in the field"
    seen = {item.label: item.box for item in stamp.truth or ()}
    assert seen.keys() == {"inside", "across"}
    # A quarter clockwise: x runs down from 40, y runs left from 60; two pixels are one.
    assert seen["inside"] == pytest.approx((10, 5, 15, 10))
    assert seen["across"] == pytest.approx((0, 25, 5, 30))
    assert source.read(into) is None
    source.close()


def test_cut_off_anywhere(whole: list[Recorded], tmp_path: Path) -> None:
    """A file cut off at any byte gives what its whole chunks hold, and says that it was cut."""
    data = BELT.read_bytes()
    summary = make_reader(BytesIO(data)).get_summary()
    assert summary is not None
    ends = [c.chunk_start_offset + c.chunk_length for c in summary.chunk_indexes]
    chunks = [
        record
        for record in StreamReader(BytesIO(data), emit_chunks=True).records
        if isinstance(record, Chunk)
    ]
    counts = list(
        accumulate(sum(isinstance(r, McapMessage) for r in breakup_chunk(c)) for c in chunks)
    )
    assert len(ends) >= 2
    assert counts[-1] == len(whole)
    path = tmp_path / "cut.mcap"
    around = [end + by for end in ends for by in (-1, 0, 1)]
    for size in sorted({*range(0, 2000, 37), *range(0, len(data), 9973), *around}):
        path.write_bytes(data[:size])
        kept = max((n for end, n in zip(ends, counts, strict=True) if end <= size), default=0)
        found = opened(path)
        if isinstance(found, str):
            assert size < ends[0] - 1, f"{size}: {found}"
            continue
        assert list(found.messages()) == whole[:kept], size
        assert len(found.problems) == (size < ends[-1] + 1000), (size, found.problems)
        found.close()


def test_damaged_anywhere(whole: list[Recorded], tmp_path: Path) -> None:
    """Whatever byte is wrong: a clear error, or what is left, and never something that was not
    recorded."""
    data = BELT.read_bytes()
    path = tmp_path / "bad.mcap"
    known = set(whole)
    lost = 0
    dice = np.random.default_rng(4)
    ends = [*range(0, 1500, 13), *range(len(data) - 1500, len(data), 29)]
    for place in (*ends, *dice.integers(0, len(data), 60)):
        bad = bytearray(data)
        bad[place] ^= int(dice.integers(1, 256))
        path.write_bytes(bad)
        found = opened(path)
        if isinstance(found, str):
            assert str(path) in found
            continue
        messages = list(found.messages())
        assert set(messages) <= known, place
        assert len(messages) == len(whole) or found.problems, place
        lost += len(messages) < len(whole)
        found.close()
    assert lost > 20


def text(path: Path) -> None:
    path.write_text("[cameras.belt]\n")


def empty(path: Path) -> None:
    path.touch()


def folder(path: Path) -> None:
    path.mkdir()


def of_another_program(path: Path) -> None:
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start("ros2", "somebody")
        writer.finish()


def of_a_later_format(path: Path) -> None:
    path.write_bytes(
        BELT.read_bytes().replace(b"format\x01\x00\x00\x001", b"format\x01\x00\x00\x007")
    )


def without_pictures(path: Path) -> None:
    RecordingWriter(path, {"pixels": ""}).end({})


def of_two(path: Path) -> None:
    RecordingWriter(path, {"pixels": "left right"}).end({})


def without_one(path: Path) -> None:
    RecordingWriter(path, {"pixels": "left"}).end({})


def cut_before_any_picture(path: Path) -> None:
    path.write_bytes(BELT.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "recorded", "words"),
    [
        (lambda path: None, None, ["No such file"]),
        (folder, None, ["Is a directory"]),
        (empty, None, ["is empty", "vigil tap record"]),
        (text, None, ["[camera", "vigil tap record"]),
        (of_another_program, None, ["ros2", "vigil tap record"]),
        (of_a_later_format, None, ["format 7", "format 1"]),
        (without_pictures, None, ["no pictures", "--pixels"]),
        (of_two, None, ["left, right", "recorded ="]),
        (of_two, "belt", ["left, right", "recorded =", "not belt"]),
        (without_one, None, ["no whole picture of left"]),
        (cut_before_any_picture, None, ["no whole picture of belt"]),
    ],
)  # fmt: skip
def test_no_recording(
    make: Callable[[Path], None], recorded: str | None, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.mcap"
    make(path)
    source = RecordingSource(camera(recorded=recorded), path)
    with pytest.raises(SourceError) as caught:
        source.open()
    source.close()
    assert all(word in str(caught.value) for word in (*words, str(path))), caught.value


@pytest.mark.parametrize("what", ["cut", "damaged"])
def test_what_is_whole_is_played(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A recording cut off, or with a damaged chunk, in the middle: the rest is played, and the
    camera says that it is not all."""
    data = bytearray(BELT.read_bytes())
    if what == "cut":
        del data[len(data) * 3 // 4 :]
    else:
        data[len(data) // 4] ^= 1
    path = tmp_path / "part.mcap"
    path.write_bytes(data)
    source = RecordingSource(camera(loop=False), path)
    assert source.open().name == "recorded jpeg, damaged or cut off"
    pictures = read_all(source)
    assert 0 < len(pictures) < FRAMES
    every = read_all(RecordingSource(camera(loop=False), BELT))
    part = every[: len(pictures)] if what == "cut" else every[-len(pictures) :]
    assert all(map(np.array_equal, pictures, part))
    assert ("cut off after" if what == "cut" else "is damaged and left out") in caplog.text


def test_pictures_that_are_not_what_they_say() -> None:
    encoding, data = encode(np.zeros((4, 4, 3), np.uint8), lossless=True)
    good = Pixels(1, 1, 0, 0, Sight.CLEAR, 0, 4, 4, encoding, data)
    assert unpack(bus.encode(good))[1].shape == (4, 4, 3)
    for bad in (
        Pixels(1, 1, 0, 0, Sight.CLEAR, 0, 4, 5, encoding, data),
        Pixels(1, 1, 0, 0, Sight.CLEAR, 0, 4, 4, encoding, data[:-2]),
        Pixels(1, 1, 0, 0, Sight.CLEAR, 0, 4, 4, "jpeg", b"no jpeg"),
        Pixels(1, 1, 0, 0, Sight.CLEAR, 0, 4, 4, "jpeg", b""),
        Truth(1, 1, ()),
    ):
        with pytest.raises(SourceError):
            unpack(bus.encode(bad))


ON_SMALL_DISK = """
import random, subprocess, sys
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", sys.argv[1]], check=True)
print("mounted", flush=True)
from common.errors import StorageError
from common.recording import Recording, RecordingWriter
path = Path(sys.argv[1], "full.mcap")
writer = RecordingWriter(path, {"pixels": ""})
noise = random.Random(1).randbytes(100_000)
try:
    for added in range(100):
        writer.add("capture-belt", "frame/belt", added, noise)
except StorageError as error:
    print(error)
found = [message.body for message in Recording(path).messages()]
assert found == [noise] * len(found)
print(added, len(found))
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The error says what is left; that is readable."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", ON_SMALL_DISK, tmp_path],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if "mounted" not in done.stdout:
        pytest.skip(f"needs a mount namespace of its own: {done.stderr.strip()[-200:]}")
    assert (done.returncode, done.stderr) == (0, "")
    _, error, counts = done.stdout.splitlines()
    assert "full.mcap: can't be written: No space left on device; what was" in error
    assert "is readable" in error
    added, found = map(int, counts.split())
    assert 10 <= found < added < 30


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match="is there already"):
        RecordingWriter(path, {})
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("secret", "plain"),
    [
        ('"rtsp://admin:s3cret@10.0.0.9/a"', '"rtsp://***@10.0.0.9/a"'),
        ('"rtsp://admin:s3/c@ret@10.0.0.9/a"', '"rtsp://***@10.0.0.9/a"'),
        ('"http://cam/?user=bob&password=s3cret&x=1"', '"http://cam/?user=***&password=***&x=1"'),
        ('"rtspsrc user-id=bob user-pw=s3 ! x"', '"rtspsrc user-id=*** user-pw=*** ! x"'),
        ("'rtspsrc user-pw=\"s3 cret\" ! x'", "'rtspsrc user-pw=*** ! x'"),
        ('"rtspsrc user-pw=\\"s3 cret\\" ! x"', '"rtspsrc user-pw=*** ! x"'),
        ('"rtsp://10.0.0.9/a"\nfps = 5', '"rtsp://10.0.0.9/a"\nfps = 5'),
    ],
)
def test_passwords_are_not_recorded(secret: str, plain: str) -> None:
    assert without_passwords(secret) == plain


def test_every_moment_is_known() -> None:
    """Whoever adds a field `..._ns` says whether a replay has to move it."""
    durations = {"age_ns"}

    def fields(kind: type[Message]) -> set[str]:
        return {name for name in kind.__struct_fields__ if name.endswith("_ns")}

    nested = {kind for kind in Message.__subclasses__() if kind.__module__ == "common.messages"}
    assert {row.message for row in TOPICS} <= nested
    assert set().union(*map(fields, nested)) == MOMENTS | durations
    assert "age_ns" in fields(Result)
