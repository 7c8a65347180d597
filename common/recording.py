"""Recordings: the messages of a system, and the pictures they are about, in an MCAP file.

MCAP (https://mcap.dev/spec) is an open container with chunks, checks and an index; ARCHITECTURE.md,
"Recordings", has what Vigil puts into it. A file that was cut off is good up to its last whole
chunk.
"""

import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import cv2
import msgspec
import numpy as np
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, Header, Message, Metadata
from mcap.stream_reader import breakup_chunk
from mcap.writer import MCAP0_MAGIC, CompressionType, Writer
from numpy.typing import NDArray

from common import messages, topics
from common.errors import SourceError, StorageError
from common.geometry import View
from common.states import Sight

FORMAT = "1"
PROFILE = "vigil"
ABOUT, COUNTS = "vigil", "vigil.counts"  # names of the metadata records: first and last
PIXELS = "pixels"
JPEG_QUALITY = 90
CHUNK_BYTES = 1 << 20

_HEAD = struct.Struct("<BQ")  # of a record: opcode, length
_SPAN = struct.Struct("<QQ")  # how a chunk begins: log times of its first and last message
# What the parts of mcap raise on bytes that are not what they should be.
_DAMAGE = (
    McapError, ValueError, ArithmeticError, struct.error, RuntimeError, zstandard.ZstdError,
    MemoryError,
)  # fmt: skip
_SECRET = re.compile(
    r"(?i)(\b(?:user|usr|username|pw|pwd|pass|passwd|password|token|user-id|user-pw|proxy-id|proxy-pw)"
    r"\s*=\s*)(?:\\?[\"'].*?[\"']|[^\s\"'!&]+)"
)
_CHUNK_LIMIT = 1 << 30
_EXPECTED = "expected what `vigil tap record` writes"


class Pixels(messages.Message, frozen=True):
    """`pixels/<cam>`: the picture in the ring that a `frame/<cam>` told of, with all that it told.

    `view` says how it lies in the camera's own full picture; None: it is that.
    """

    ring: int
    sequence: int
    captured_ns: int
    filled_ns: int
    sight: Sight
    trigger: int
    width: int
    height: int
    encoding: Literal["bgr.zst", "jpeg"]  # zst: rows x columns x 3 bytes, one Zstandard frame
    data: bytes
    view: View | None = None


_pixels = msgspec.msgpack.Decoder(Pixels)


def encode(
    picture: NDArray[np.uint8], *, lossless: bool
) -> tuple[Literal["bgr.zst", "jpeg"], bytes]:
    """A picture's bytes (BGR), and how they are written. Zstandard's level 1 is six times as fast
    as its default 3 on pictures, and hardly larger."""
    if lossless:
        return "bgr.zst", zstandard.ZstdCompressor(level=1).compress(picture.tobytes())
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "jpeg", data.tobytes()


def unpack(body: bytes) -> tuple[Pixels, NDArray[np.uint8]]:
    """What was recorded with a picture, and the picture: rows x columns x 3, BGR.

    Raises:
        SourceError: it is not what it says.
    """
    try:
        pixels = _pixels.decode(body)
    except msgspec.DecodeError as error:
        raise SourceError(f"a picture was recorded in a way that is not known: {error}") from error
    shape = pixels.height, pixels.width, 3
    picture = None
    with suppress(zstandard.ZstdError, ValueError, cv2.error):
        if pixels.encoding == "jpeg":
            picture = cv2.imdecode(np.frombuffer(pixels.data, np.uint8), cv2.IMREAD_COLOR)
        elif zstandard.frame_content_size(pixels.data) == shape[0] * shape[1] * 3:
            data = zstandard.decompress(pixels.data)
            picture = np.frombuffer(data, np.uint8).reshape(shape)
    if picture is None or picture.shape != shape:
        raise SourceError(
            f"frame {pixels.sequence}: its {len(pixels.data)} bytes are no {pixels.encoding} "
            f"picture of {pixels.width}x{pixels.height}"
        )
    return pixels, picture  # type: ignore[return-value]


def without_passwords(text: str) -> str:
    """A text such as vigil.toml, without user and password in its URLs and pipelines."""
    text = re.sub(r"://[^\s\"']*@", "://***@", text)
    return _SECRET.sub(r"\1***", text)


class RecordingWriter:
    """Writes a recording; every method raises StorageError where the disk does not take it."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        """
        Args:
            path: a new file.
            about: what the first metadata record says beside the format.
        """
        self.path = path
        self._channels: dict[tuple[str, str], int] = {}
        self._schemas: dict[type[messages.Message], int] = {}
        try:
            self._file = path.open("xb")
        except OSError as error:
            self._fail(error)
        self._writer = Writer(self._file, CHUNK_BYTES, CompressionType.LZ4)
        try:
            self._writer.start(PROFILE, "vigil")
            self._writer.add_metadata(ABOUT, {"format": FORMAT, **about})
        except OSError as error:
            self._fail(error)
        self.flush()

    def add(self, process: str, topic: str, at_ns: int, body: bytes) -> None:
        """A message as it was heard, from whom, and when (CLOCK_MONOTONIC)."""
        try:
            if (process, topic) not in self._channels:
                self._channels[process, topic] = self._channel(process, topic)
            self._writer.add_message(self._channels[process, topic], at_ns, body, at_ns)
        except OSError as error:
            self._fail(error)

    def _channel(self, process: str, topic: str) -> int:
        row = topics.row(topic)
        kind = row.message if row else Pixels if topic.startswith(f"{PIXELS}/") else None
        if kind and kind not in self._schemas:
            schema = msgspec.json.encode(json_schema(kind))
            self._schemas[kind] = self._writer.register_schema(kind.__name__, "jsonschema", schema)
        schema_id = self._schemas[kind] if kind else 0
        return self._writer.register_channel(topic, "msgpack", schema_id, {"process": process})

    def flush(self) -> None:
        """End the chunk: what was added until now is good, whatever happens."""
        try:
            self._writer.flush()
        except OSError as error:
            self._fail(error)

    def end(self, counts: dict[str, str]) -> int:
        """Write counts and index; returns the size in bytes."""
        try:
            self._writer.flush()
            self._writer.add_metadata(COUNTS, counts)
            self._writer.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
        except OSError as error:
            self._fail(error)
        return size

    def _fail(self, error: OSError) -> NoReturn:
        if isinstance(error, FileExistsError):
            raise StorageError(f"{self.path}: is there already; give another name") from error
        kept = ""
        if hasattr(self, "_file"):
            with suppress(OSError):  # it would write once more
                self._file.close()
            kept = f"; what was recorded before is readable ({self.path.stat().st_size} bytes)"
        raise StorageError(f"{self.path}: can't be written: {error.strerror}{kept}") from error


def json_schema(kind: type[messages.Message]) -> dict[str, object]:
    """A message's JSON Schema, the places of its array titled as its fields."""
    schema = msgspec.json.schema(kind)
    for name, definition in schema["$defs"].items():
        struct_type = kind if name == kind.__name__ else getattr(messages, name, None)
        for field, place in zip(
            getattr(struct_type, "__struct_fields__", ()),
            definition.get("prefixItems", ()),
            strict=False,
        ):
            place["title"] = field
    return schema


@dataclass(frozen=True)
class Recorded:
    at_ns: int  # when it was heard, CLOCK_MONOTONIC of the recording's boot
    process: str
    topic: str
    body: bytes


class Recording:
    """Reads a recording. What is damaged is left out, and `problems` says so."""

    def __init__(self, path: Path) -> None:
        """Raises: SourceError: it can't be read, is no recording, or of another format."""
        self.path = path
        self.about: dict[str, str] = {}
        self.counts: dict[str, str] = {}
        self.problems: list[str] = []
        self._chunks: list[tuple[int, int]] = []  # where each is, and its length
        self._from_ns = self._to_ns = 0
        self._channels: dict[int, Channel] = {}
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise SourceError(f"{path}: can't be read: {error.strerror}") from error
        try:
            self._survey()
        except OSError as error:
            raise SourceError(f"{path}: can't be read: {error.strerror}") from error
        except SourceError:
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """From its first message to the last one that is whole."""
        return (self._to_ns - self._from_ns) / 1e9

    @property
    def cameras(self) -> list[str]:
        """Those recorded with pixels."""
        return self.about.get("pixels", "").split()

    @property
    def processes(self) -> list[str]:
        """Those that were recorded."""
        return self.about.get("processes", "").split()

    def _survey(self) -> None:
        """Find the chunks without reading what is in them; nothing behind a cut or a record whose
        length can't be right is found any more."""
        file, size = self._file, os.fstat(self._file.fileno()).st_size
        start = file.read(len(MCAP0_MAGIC))
        if start != MCAP0_MAGIC:
            found = f"begins with {start!r}" if start else "is empty"
            raise SourceError(f"{self.path}: is no recording: it {found}; {_EXPECTED} (MCAP)")
        at, opcode, whole = len(MCAP0_MAGIC), 0, False
        while opcode != Opcode.FOOTER and at + _HEAD.size <= size:
            file.seek(at)
            opcode, length = _HEAD.unpack(file.read(_HEAD.size))
            if at + _HEAD.size + length > size:
                break
            if not self.about and opcode not in (Opcode.HEADER, Opcode.METADATA):
                break
            if opcode == Opcode.CHUNK:
                self._add_chunk(at + _HEAD.size, length)
            elif opcode in (Opcode.HEADER, Opcode.METADATA, Opcode.CHANNEL):
                try:
                    self._take(opcode, ReadDataStream(io.BytesIO(file.read(length))))
                except _DAMAGE:
                    self.problems.append(f"byte {at} is damaged")
            whole = whole or opcode == Opcode.DATA_END
            at += _HEAD.size + length
        if not self.about:
            raise SourceError(
                f"{self.path}: is no whole recording: it has no beginning; {_EXPECTED}"
            )
        if not whole:
            self.problems.append(f"cut off after {self.seconds:.1f} s, at byte {at} of {size}")

    def _add_chunk(self, at: int, length: int) -> None:
        if not _SPAN.size <= length < _CHUNK_LIMIT:
            self.problems.append(f"the chunk at byte {at} is damaged: {length} bytes are no chunk")
            return
        first, last = _SPAN.unpack(self._file.read(_SPAN.size))
        if not self._chunks:
            self._from_ns = first
        self._to_ns = last
        self._chunks.append((at, length))

    def _take(self, opcode: int, stream: ReadDataStream) -> None:
        if opcode == Opcode.HEADER:
            header = Header.read(stream)
            if header.profile != PROFILE:
                raise SourceError(
                    f"{self.path}: is MCAP, but no recording of Vigil: its profile is "
                    f"{header.profile!r}; {_EXPECTED}"
                )
        elif opcode == Opcode.CHANNEL:
            channel = Channel.read(stream)
            self._channels[channel.id] = channel
        else:
            record = Metadata.read(stream)
            if record.name == COUNTS:
                self.counts = record.metadata
            elif record.name == ABOUT:
                self.about = record.metadata
                if self.about.get("format") != FORMAT:
                    raise SourceError(
                        f"{self.path}: is of format {self.about.get('format')}; this Vigil reads "
                        f"format {FORMAT}"
                    )

    def messages(self, *wanted: str) -> Iterator[Recorded]:
        """The messages of these topics, or all, in the order in which they were heard."""
        for at, length in self._chunks:
            try:
                self._file.seek(at)
                chunk = Chunk.read(ReadDataStream(io.BytesIO(self._file.read(length))))
                if not chunk.uncompressed_crc:
                    raise ValueError("it has no CRC")
                records = breakup_chunk(chunk, validate_crc=True)
            except OSError as error:
                raise SourceError(f"{self.path}: can't be read: {error.strerror}") from error
            except _DAMAGE as error:
                self._say(f"the chunk at byte {at} is damaged and left out ({error})")
                continue
            for record in records:
                if isinstance(record, Channel):
                    self._channels[record.id] = record
                elif isinstance(record, Message):
                    channel = self._channels.get(record.channel_id)
                    if channel is None:
                        self._say(f"channel {record.channel_id} is lost with a damaged chunk")
                    elif not wanted or channel.topic in wanted:
                        process = channel.metadata.get("process", "")
                        yield Recorded(record.log_time, process, channel.topic, record.data)

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def close(self) -> None:
        self._file.close()
