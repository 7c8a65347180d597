"""Videos and pictures as the field has them: what can be read is read, the rest says what it is."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from common.config import Camera
from common.errors import SourceError
from services.capture.folder import FolderSource
from services.capture.source import BadPictureError, Picture, SizeChangedError, Source
from services.capture.video import VideoSource

FRAMES = 12
COLOURS = ((30, 40, 200), (60, 180, 40), (200, 60, 30), (128, 128, 128))  # of the quarters, BGR


def quarters(width: int = 160, height: int = 120) -> Picture:
    picture = np.empty((height, width, 3), np.uint8)
    for number, colour in enumerate(COLOURS):
        rows = slice(0, height // 2) if number < 2 else slice(height // 2, height)
        picture[rows, slice(0, width // 2) if number % 2 == 0 else slice(width // 2, width)] = (
            colour
        )
    return picture


def encoded(
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str = "mp4",
    size: tuple[int, int] = (160, 120),
    steps: tuple[int, ...] = (1,),
) -> bytes:
    """A video of the quarters; `steps`: ticks between its frames, again and again."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"x265-params": "log-level=none"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        at = 0
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(quarters(*size), format="bgr24")
            frame.pts, frame.time_base = at, Fraction(1, 25)
            at += steps[number % len(steps)]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def quarter_turn(video: bytes) -> bytes:
    """The display matrix of the track turned by 90 degrees (ISO 14496-12, tkhd, version 0)."""
    at = video.index(b"tkhd") + 4 + 40
    one, minus = 1 << 16, (1 << 32) - (1 << 16)
    matrix = struct.pack(">9I", 0, one, 0, minus, 0, 0, 120 << 16, 0, 1 << 30)
    return video[:at] + matrix + video[at + 36 :]


def more_in_the_header(video: bytes) -> bytes:
    """AVI: 9,999 frames by its headers (avih, dwTotalFrames; strh, dwLength)."""
    changed = bytearray(video)
    struct.pack_into("<I", changed, video.index(b"avih") + 8 + 16, 9999)
    struct.pack_into("<I", changed, video.index(b"strh") + 8 + 32, 9999)
    return bytes(changed)


WHOLE = FRAMES, (120, 160)
VIDEOS: dict[str, tuple[Callable[[], bytes], tuple[int, tuple[int, int]] | str]] = {
    "empty": (lambda: b"", "not a video that can be opened"),
    "no video at all": (lambda: b"<html>404</html>", "not a video that can be opened"),
    "sound only": (sound, "not a video that can be opened"),
    "cut off before its index": (lambda: encoded()[:1500], "not a video that can be opened"),
    "of an unknown codec": (
        lambda: encoded("mpeg4", container="avi").replace(b"FMP4", b"XYZ0"),
        "not a video that can be",
    ),
    "whole": (encoded, WHOLE),
    "HEVC of 10 bits": (lambda: encoded("libx265", "yuv420p10le"), WHOLE),
    "of a variable rate": (lambda: encoded(steps=(1, 7, 2, 30)), WHOLE),
    "grey": (lambda: encoded(pixels="gray"), WHOLE),
    "of an odd size": (
        lambda: encoded("ffv1", "yuv444p", "matroska", (161, 121)), (FRAMES, (121, 161)),
    ),
    "turned": (lambda: quarter_turn(encoded()), (FRAMES, (160, 120))),
    "with more frames in its header than it has": (
        lambda: more_in_the_header(encoded("mjpeg", "yuvj420p", "avi")), WHOLE,
    ),
    "cut off": (
        lambda: (whole := encoded("mjpeg", "yuvj420p", "avi"))[: len(whole) * 6 // 10],
        (FRAMES // 3, (120, 160)),
    ),
}  # fmt: skip


def read_all(source: Source) -> list[Picture]:
    """Every picture to the end; what a source says while opening and reading is not caught."""
    format = source.open()
    into: Picture = np.empty((format.height, format.width, 3), np.uint8)
    pictures: list[Picture] = []
    try:
        while True:
            try:
                if source.read(into) is None:
                    return pictures
                pictures.append(into.copy())
            except SizeChangedError as change:
                into = np.empty((change.height, change.width, 3), np.uint8)
            except BadPictureError:
                pass
    finally:
        source.close()


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video(tmp_path: Path, name: str) -> None:
    make, expected = VIDEOS[name]
    path = tmp_path / "video"
    path.write_bytes(make())
    source = VideoSource(Camera("video", path=str(path), loop=False), path)
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=rf"{path}: {expected}"):
            source.open()
        source.close()
        return
    count, shape = expected
    pictures = read_all(source)
    if name == "cut off":
        assert count <= len(pictures) < FRAMES
    else:
        assert len(pictures) == count
    reference = quarters(shape[1], shape[0])
    if name == "turned":
        reference = np.ascontiguousarray(np.rot90(quarters(), -1))
    for picture in pictures[: count - 1]:
        assert picture.shape[:2] == shape
        middle = (picture[::8, ::8].astype(int) - reference[::8, ::8])[1:-1, 1:-1]
        if name == "grey":
            assert (picture[..., 0] == picture[..., 2]).all()
        else:
            assert np.median(abs(middle)) < 16


def jpeg(mode: str = "RGB", turned: bool = False) -> bytes:
    image = Image.fromarray(quarters()[..., ::-1]).convert(mode)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # to be shown a quarter turned, clockwise
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def png16() -> bytes:
    return cv2.imencode(".png", quarters().astype(np.uint16) * 257)[1].tobytes()


def grey() -> bytes:
    return cv2.imencode(".png", quarters()[..., 1])[1].tobytes()


PICTURES: dict[str, tuple[Callable[[], bytes], str, Callable[[Picture], Picture] | None]] = {
    "whole": (jpeg, "jpg", lambda p: p),
    "CMYK": (lambda: jpeg("CMYK"), "jpg", lambda p: p),
    "of 16 bits": (png16, "png", lambda p: p),
    "grey": (grey, "png", lambda p: np.repeat(p[..., 1:2], 3, axis=2)),
    "turned by EXIF": (lambda: jpeg(turned=True), "jpg", lambda p: np.rot90(p, -1)),
    "cut off": (lambda: jpeg()[:-300], "jpg", None),
    "cut off behind its thumbnail": (
        lambda: jpeg()[:20] + jpeg()[-40:] + jpeg()[20:-300], "jpg", None,
    ),
    "a cut off PNG": (lambda: png16()[:-30], "png", None),
    "empty": (lambda: b"", "png", None),
    "a page": (lambda: b"<html>404</html>", "jpg", None),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_between_two_whole_ones(tmp_path: Path, name: str) -> None:
    make, suffix, change = PICTURES[name]
    good = cv2.imencode(".png", quarters())[1].tobytes()
    (tmp_path / "1.png").write_bytes(good)
    (tmp_path / f"2.{suffix}").write_bytes(make())
    (tmp_path / "3.png").write_bytes(good)
    source = FolderSource(Camera("folder", path=str(tmp_path), loop=False), tmp_path)
    pictures = read_all(source)
    assert (pictures[0] == quarters()).all()
    assert (pictures[-1] == quarters()).all()
    if change is None:
        assert len(pictures) == 2, "the bad one is passed over"
        return
    assert len(pictures) == 3
    expected = change(quarters())
    assert pictures[1].shape == expected.shape
    assert np.median(abs(pictures[1].astype(int) - expected)) <= 4


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    for number in (1, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), quarters())
    (tmp_path / "2.jpg").write_bytes(jpeg()[:-300])
    source = FolderSource(Camera("folder", path=str(tmp_path), loop=False), tmp_path)
    format = source.open()
    into = np.empty((format.height, format.width, 3), np.uint8)
    source.read(into)
    with pytest.raises(BadPictureError, match=rf"{tmp_path}/2.jpg: cut off after \d+ bytes"):
        source.read(into)
    assert source.read(into) is not None


def test_a_folder_that_changes(tmp_path: Path) -> None:
    """What goes is passed over, what comes is seen in the next round, what is bad only is lost."""
    for number in (1, 2, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), quarters())
    source = FolderSource(Camera("folder", path=str(tmp_path)), tmp_path)
    source.open()
    into = np.empty((120, 160, 3), np.uint8)
    assert source.read(into) is not None
    (tmp_path / "2.png").unlink()
    cv2.imwrite(str(tmp_path / "4.png"), quarters())
    with pytest.raises(BadPictureError, match=r"2\.png: can't be read: No such file"):
        source.read(into)
    seen = [source.read(into) for _ in range(4)]
    assert all(seen), "3, then 1, 3, 4"
    for path in tmp_path.iterdir():
        path.write_bytes(b"rubbish")
    for _ in range(2):
        with pytest.raises(BadPictureError):
            source.read(into)
    with pytest.raises(SourceError, match=r"none of its pictures can be decoded: .*4\.png"):
        source.read(into)
