"""V4L2 as the kernel speaks it (linux/videodev2.h): what a device says of itself, its best mode.

No library: linuxpy, the one that is kept up, is under the GPL-3.0 and costs a process 15 MB.
"""

import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from ctypes import Structure, c_char, c_int32, c_int64, c_long, c_ubyte, c_uint32, c_uint64, c_ulong
from dataclasses import dataclass, field
from typing import NamedTuple

from common.errors import SourceError

# Formats that capture turns into BGR, best first: raw ones cost less and repeat no artefacts.
USABLE = ("YUYV", "UYVY", "YVYU", "NV12", "BGR3", "RGB3", "GREY", "MJPG", "JPEG")
LARGEST = (1280, 720)  # not taken beyond it unless asked
USUAL_FPS = 30.0  # nor faster
NEAR = 0.99  # 30000/1001 is 30

CAPTURE = 1  # v4l2_buf_type
MMAP = 1  # v4l2_memory
PROGRESSIVE = 1  # v4l2_field
CAP_CAPTURE, CAP_CAPTURE_MPLANE, CAP_STREAMING = 0x1, 0x1000, 0x04000000
BUFFER_ERROR, BUFFER_CLOCK, BUFFER_MONOTONIC = 0x40, 0xE000, 0x2000
SOURCE_CHANGE = 5  # v4l2_event
INTEGER, BOOLEAN, MENU, BUTTON, BITMASK, INTEGER_MENU = 1, 2, 3, 4, 8, 9  # v4l2_ctrl_type
DISABLED, GRABBED, READ_ONLY, INACTIVE = 0x1, 0x2, 0x4, 0x10
_NEXT = 0x80000000
_SETTABLE = (INTEGER, BOOLEAN, MENU, BUTTON, BITMASK, INTEGER_MENU)
_DISCRETE = 1
_MOST = 256  # of anything that is enumerated


def _words(names: str) -> list[tuple[str, type[c_uint32]]]:
    return [(name, c_uint32) for name in names.split()]


class Capability(Structure):
    _fields_ = [
        ("driver", c_char * 16), ("card", c_char * 32), ("bus", c_char * 32),
        *_words("version capabilities device_caps"), ("reserved", c_uint32 * 3),
    ]  # fmt: skip


class Description(Structure):
    _fields_ = [
        *_words("index type flags"), ("description", c_char * 32),
        *_words("pixelformat mbus"), ("reserved", c_uint32 * 3),
    ]  # fmt: skip


class Pixels(Structure):
    _fields_ = _words(
        "width height pixelformat field bytesperline sizeimage "
        "colorspace priv flags encoding quantization transfer"
    )


class _AnyFormat(ctypes.Union):
    _fields_ = [("pix", Pixels), ("pointer", ctypes.c_void_p), ("raw", c_ubyte * 200)]


class Format(Structure):
    _anonymous_ = ("any",)
    _fields_ = [("type", c_uint32), ("any", _AnyFormat)]


class FrameSize(Structure):
    """`sizes`: width and height, or smallest, largest and step of the width, then of the height."""

    _fields_ = [
        *_words("index pixelformat type"), ("sizes", c_uint32 * 6), ("reserved", c_uint32 * 2)
    ]  # fmt: skip


class FrameInterval(Structure):
    """`intervals`: a fraction of a second, or the shortest, the longest and the step."""

    _fields_ = [
        *_words("index pixelformat width height type"),
        ("intervals", c_uint32 * 6), ("reserved", c_uint32 * 2),
    ]  # fmt: skip


class Parameters(Structure):
    _fields_ = [
        *_words("type capability mode numerator denominator extended buffers"),
        ("raw", c_ubyte * 176),
    ]  # fmt: skip


class Buffers(Structure):
    _fields_ = _words("count type memory capabilities flags")


class Buffer(Structure):
    _fields_ = [
        *_words("index type bytesused flags field"), ("seconds", c_long), ("microseconds", c_long),
        ("timecode", c_uint32 * 4), *_words("sequence memory"), ("offset", c_ulong),
        *_words("length reserved request"),
    ]  # fmt: skip


class ControlQuery(Structure):
    _fields_ = [
        *_words("id type"), ("name", c_char * 32), ("minimum", c_int64), ("maximum", c_int64),
        ("step", c_uint64), ("default", c_int64), *_words("flags size elements dimensions"),
        ("reserved", c_uint32 * 36),
    ]  # fmt: skip


class MenuQuery(Structure):
    _fields_ = [*_words("id index"), ("name", c_ubyte * 32), ("reserved", c_uint32)]


class ControlValue(Structure):
    _fields_ = [("id", c_uint32), ("value", c_int32)]


class Subscription(Structure):
    _fields_ = [*_words("type id flags"), ("reserved", c_uint32 * 5)]


class Event(Structure):
    _fields_ = [
        ("type", c_uint32), ("data", c_int64 * 8), *_words("pending sequence"),
        ("time", c_long * 2), ("id", c_uint32), ("reserved", c_uint32 * 8),
    ]  # fmt: skip


class Timings(Structure):
    _fields_ = [("words", c_uint32 * 33)]


class Request(NamedTuple):
    name: str
    number: int


def _request(
    name: str, number: int, data: type, *, read: bool = True, write: bool = True
) -> Request:
    way = (2 if read else 0) | (1 if write else 0)
    return Request(name, way << 30 | ctypes.sizeof(data) << 16 | ord("V") << 8 | number)


QUERYCAP = _request("QUERYCAP", 0, Capability, write=False)
ENUM_FMT = _request("ENUM_FMT", 2, Description)
G_FMT = _request("G_FMT", 4, Format)
S_FMT = _request("S_FMT", 5, Format)
REQBUFS = _request("REQBUFS", 8, Buffers)
QUERYBUF = _request("QUERYBUF", 9, Buffer)
QBUF = _request("QBUF", 15, Buffer)
DQBUF = _request("DQBUF", 17, Buffer)
STREAMON = _request("STREAMON", 18, c_int32, read=False)
STREAMOFF = _request("STREAMOFF", 19, c_int32, read=False)
G_PARM = _request("G_PARM", 21, Parameters)
S_PARM = _request("S_PARM", 22, Parameters)
G_CTRL = _request("G_CTRL", 27, ControlValue)
S_CTRL = _request("S_CTRL", 28, ControlValue)
QUERYMENU = _request("QUERYMENU", 37, MenuQuery)
G_INPUT = _request("G_INPUT", 38, c_int32, write=False)
ENUM_FRAMESIZES = _request("ENUM_FRAMESIZES", 74, FrameSize)
ENUM_FRAMEINTERVALS = _request("ENUM_FRAMEINTERVALS", 75, FrameInterval)
S_DV_TIMINGS = _request("S_DV_TIMINGS", 87, Timings)
DQEVENT = _request("DQEVENT", 89, Event, write=False)
SUBSCRIBE_EVENT = _request("SUBSCRIBE_EVENT", 90, Subscription, read=False)
QUERY_DV_TIMINGS = _request("QUERY_DV_TIMINGS", 99, Timings, write=False)
QUERY_EXT_CTRL = _request("QUERY_EXT_CTRL", 103, ControlQuery)

NOT_THERE = (errno.EINVAL, errno.ENOTTY, errno.ENODATA)  # the driver has no such thing
_WHY = {
    errno.EBUSY: "another process uses it; end that one, or give each camera its own device",
    errno.ENOSPC: "its USB bus has no bandwidth left for this: a smaller size, a lower rate, MJPG, "
    "or another port",
    errno.ENODEV: "the device is gone",
    errno.ENXIO: "the device is gone",
    errno.EIO: "the device does not answer any more",
    errno.ENOENT: "no such device; `vigil cameras` says what is attached",
    errno.EACCES: "may not be used by this user, who has to be in the group video",
    errno.ENOTTY: "is no V4L2 device",
    errno.ENOLINK: "no signal at its input",
    errno.ENOLCK: "its input finds no lock on the signal",
}  # fmt: skip

Size = tuple[int, int]  # width, height


class Rate(NamedTuple):
    """Frames in so many seconds, exact: drivers compare fractions."""

    frames: int
    seconds: int

    def __float__(self) -> float:
        return self.frames / self.seconds

    def __str__(self) -> str:
        return f"{float(self):.4g}"


Rates = list[tuple[Rate, Rate]]  # lowest and highest of each; the same where there is but one


class Sizes(NamedTuple):
    smallest: Size
    largest: Size
    step: Size

    def hold(self, size: Size) -> bool:
        return all(
            low <= one <= high and (one - low) % (step or 1) == 0
            for one, low, high, step in zip(
                size, self.smallest, self.largest, self.step, strict=True
            )
        )

    @property
    def one(self) -> bool:
        return self.smallest == self.largest

    def __str__(self) -> str:
        ends = (self.smallest,) if self.one else (self.smallest, self.largest)
        return " to ".join(f"{width}x{height}" for width, height in ends)


@dataclass(frozen=True)
class Control:
    id: int
    name: str
    type: int
    minimum: int
    maximum: int
    step: int
    default: int
    flags: int
    menu: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.menu:
            return f"{self.name} {', '.join(f'{key} ({word})' for key, word in self.menu.items())}"
        if self.type == BUTTON:
            return f"{self.name} a button"
        step = f" by {self.step}" if self.step > 1 else ""
        return f"{self.name} {self.minimum} to {self.maximum}{step}"


class Choice(NamedTuple):
    format: str
    size: Size
    rate: Rate | None  # None: the driver tells no rates


class Device:
    """An opened device. Raises SourceError, which names it and what it could not do."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(self._why("", error)) from error

    def ask(self, request: Request, data: object, *none: int) -> bool:
        """Put a request; False where the driver answers with one of the errors `none`."""
        while True:
            try:
                fcntl.ioctl(self.fd, request.number, data)  # type: ignore[call-overload]
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in none:
                    return False
                raise SourceError(self._why(request.name, error)) from error
            return True

    def _why(self, request: str, error: OSError) -> str:
        why = _WHY.get(error.errno or 0, error.strerror)
        return f"{self.path}: {why}{f' (at {request})' if request else ''}"

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def capability(self) -> Capability:
        found = Capability()
        self.ask(QUERYCAP, found)
        if not found.device_caps:  # drivers from before 3.4
            found.device_caps = found.capabilities
        return found

    def formats(self) -> dict[str, str]:
        """What it gives, and what each is in words."""
        one = Description(type=CAPTURE)
        return {fourcc(one.pixelformat): text(one.description) for _ in self._each(ENUM_FMT, one)}

    def sizes(self, format: str) -> list[Sizes]:
        """Empty where the driver does not tell."""
        one = FrameSize(pixelformat=code(format))
        found = []
        for _ in self._each(ENUM_FRAMESIZES, one):
            a, b, c, d, e, f = one.sizes
            same = Sizes((a, b), (a, b), (1, 1))
            found.append(same if one.type == _DISCRETE else Sizes((a, d), (b, e), (c, f)))
        return found

    def rates(self, format: str, size: Size) -> Rates:
        """Empty where the driver does not tell."""
        one = FrameInterval(pixelformat=code(format), width=size[0], height=size[1])
        found = []
        for _ in self._each(ENUM_FRAMEINTERVALS, one):
            a, b, c, d, _, _ = one.intervals
            high = Rate(b, a or 1)
            found.append((high if one.type == _DISCRETE else Rate(d, c or 1), high))
        return sorted(found, key=lambda ends: float(ends[1]))

    def _each(self, request: Request, one: Structure) -> Iterator[None]:
        for one.index in range(_MOST):
            if not self.ask(request, one, *NOT_THERE):
                return
            yield

    def controls(self) -> dict[str, Control]:
        """Those that can be set, by the names that v4l2-ctl gives them too."""
        query, found = ControlQuery(id=_NEXT), {}
        while self.ask(QUERY_EXT_CTRL, query, *NOT_THERE):
            name = re.sub("[^a-z0-9]+", "_", text(query.name).lower()).strip("_")
            if query.type in _SETTABLE and not query.flags & (DISABLED | READ_ONLY):
                found[name] = Control(
                    query.id, name, query.type, query.minimum, query.maximum, query.step,
                    query.default, query.flags, self._menu(query),
                )  # fmt: skip
            query = ControlQuery(id=query.id | _NEXT)
        return found

    def _menu(self, query: ControlQuery) -> dict[int, str]:
        if query.type not in (MENU, INTEGER_MENU):
            return {}
        found = {}
        for index in range(query.minimum, min(query.maximum, query.minimum + _MOST) + 1):
            one = MenuQuery(id=query.id, index=index)
            if self.ask(QUERYMENU, one, *NOT_THERE):
                raw = bytes(one.name)
                word = text(raw.split(b"\0")[0])
                number = int.from_bytes(raw[:8], "little", signed=True)
                found[index] = word if query.type == MENU else str(number)
        return found

    def value(self, control: Control) -> int:
        one = ControlValue(id=control.id)
        self.ask(G_CTRL, one, errno.EACCES, *NOT_THERE)
        return int(one.value)

    def format(self) -> Pixels:
        """The one that is set."""
        found = Format(type=CAPTURE)
        self.ask(G_FMT, found)
        return Pixels.from_buffer_copy(found.pix)


def code(format: str) -> int:
    return int.from_bytes(format.encode("latin-1"), "little")


def fourcc(code: int) -> str:
    word = text((code & 0x7FFFFFFF).to_bytes(4, "little"))
    return f"{word}-BE" if code >> 31 else word


def text(raw: bytes) -> str:
    """What a driver wrote, fit for one line."""
    return "".join(char if char.isprintable() else "?" for char in raw.decode("utf-8", "replace"))


def choose(device: Device, format: str | None, size: Size | None, fps: float) -> Choice:
    """The best mode: of the size asked, else the largest up to LARGEST (where the driver tells no
    single sizes: the one that is set); then of a rate not below `fps`; then as USABLE has them.

    Raises:
        SourceError: there is none; it lists what there is.
    """
    there = list(device.formats())
    wanted = [one for one in USABLE if one in there and format in (None, one)]
    if not wanted:
        can = f"Vigil takes {', '.join(USABLE)}"
        raise SourceError(
            f"{device.path}: gives {', '.join(there) or 'no format'}; "
            + (f"format = {format!r} is to be one of these, and {can}" if format else can)
        )
    sizes = {one: device.sizes(one) for one in wanted}
    size = size or _largest(device, sizes)
    fitting = [
        one for one, given in sizes.items() if not given or any(some.hold(size) for some in given)
    ]
    if not fitting:
        lists = "; ".join(f"{one} {', '.join(map(str, sizes[one]))}" for one in wanted)
        raise SourceError(f"{device.path}: gives no {size[0]}x{size[1]}, but {lists}")
    choices = [Choice(one, size, nearest(device.rates(one, size), fps)) for one in fitting]
    for choice in choices:
        if choice.rate is None or float(choice.rate) >= fps * NEAR:
            return choice
    return max(choices, key=lambda choice: float(choice.rate or Rate(0, 1)))


def _largest(device: Device, sizes: dict[str, list[Sizes]]) -> Size:
    single = [some.largest for given in sizes.values() for some in given if some.one]
    if not single:
        current = device.format()
        return current.width, current.height
    fitting = [one for one in single if one[0] <= LARGEST[0] and one[1] <= LARGEST[1]]
    return max(fitting, key=lambda one: one[0] * one[1]) if fitting else min(single)


def nearest(rates: Rates, fps: float) -> Rate | None:
    """The lowest that is not below `fps`, else the highest."""
    for low, high in rates:
        if float(high) >= fps * NEAR:
            return low if float(low) >= fps * NEAR else Rate(round(fps * 1000), 1000)
    return rates[-1][1] if rates else None
