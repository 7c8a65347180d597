"""Two small readers, of FlatBuffers and of Protocol Buffers: enough to find the few fields that
`facts` needs, without a library on the device. Data that is cut short or damaged raises
struct.error, IndexError or UnicodeDecodeError.
"""

import mmap
import struct
from collections.abc import Iterator


class Table:
    """A FlatBuffer table at `position`. Offsets outside the data raise struct.error, and so does
    reading far more than there is: a few vectors that thousands of tables point to.
    """

    def __init__(
        self, data: mmap.mmap | bytes, position: int, left: list[int] | None = None
    ) -> None:
        self._data, self._position = data, position
        self._left = [4 * len(data) + 10_000] if left is None else left  # bytes, of all tables
        self._vtable = position - self._read("i", position)
        self._length = self._read("H", self._vtable)

    @staticmethod
    def root(data: mmap.mmap | bytes) -> "Table":
        return Table(data, struct.unpack_from("<I", data, 0)[0])

    def _read(self, kind: str, position: int) -> int:
        if position < 0:
            raise struct.error("offset before the start")
        return int(struct.unpack_from("<" + kind, self._data, position)[0])

    def _at(self, index: int) -> int:
        """Position of a field, 0 where the table lacks it."""
        entry = 4 + 2 * index
        offset = self._read("H", self._vtable + entry) if entry < self._length else 0
        return self._position + offset if offset else 0

    def _target(self, index: int) -> int:
        at = self._at(index)
        return at + self._read("I", at) if at else 0

    def number(self, index: int, kind: str) -> int:
        at = self._at(index)
        return self._read(kind, at) if at else 0

    def span(self, index: int) -> tuple[int, int]:
        """Start and length of a vector of bytes."""
        at = self._target(index)
        return (at + 4, self._read("I", at)) if at else (0, 0)

    def _vector(self, index: int, size: int) -> tuple[int, int]:
        """The same, of elements that are read now."""
        start, count = self.span(index)
        self._left[0] -= size * count
        if self._left[0] < 0:
            raise struct.error("vectors larger than the file")
        return start, count

    def text(self, index: int) -> str:
        start, count = self._vector(index, 1)
        return self._data[start : start + count].decode()

    def real(self, index: int) -> float:
        at = self._at(index)
        return float(struct.unpack_from("<f", self._data, at)[0]) if at else 0.0

    def numbers(self, index: int, kind: str) -> list[int]:
        start, count = self._vector(index, struct.calcsize(kind))
        return list(struct.unpack_from(f"<{count}{kind}", self._data, start)) if count else []

    def floats(self, index: int) -> list[float]:
        start, count = self._vector(index, 4)
        return list(struct.unpack_from(f"<{count}f", self._data, start)) if count else []

    def table(self, index: int) -> "Table | None":
        at = self._target(index)
        return Table(self._data, at, self._left) if at else None

    def tables(self, index: int) -> "list[Table]":
        start, count = self._vector(index, 4)
        places = range(start, start + 4 * count, 4)
        return [Table(self._data, at + self._read("I", at), self._left) for at in places]


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, start and end of the content of each field of a Protocol Buffer message."""
    while start < end:
        key, start = _varint(data, start)
        kind = key & 7
        if kind == 0:
            content, (_, start) = start, _varint(data, start)
        elif kind == 2:
            size, content = _varint(data, start)
            start = content + size
        elif kind in (1, 5):
            content, start = start, start + (8 if kind == 1 else 4)
        else:
            raise IndexError(f"byte {start} is no Protocol Buffer field")
        if start > end:
            raise IndexError(f"a field reaches to byte {start} of {end}")
        yield key >> 3, content, start


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError(f"byte {at} is no number")
