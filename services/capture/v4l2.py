"""A V4L2 camera (USB, CSI, HDMI grabber): from the driver's buffers straight into the ring slot."""

import errno
import mmap
import select
import time
from ctypes import c_int32
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from common import v4l2
from common.config import Camera
from common.errors import SourceError
from common.states import Policy
from common.v4l2 import Buffer, Device
from services.capture.source import BadPictureError, Format, Picture, SizeChangedError, Stamp

BUFFERS = {Policy.LATEST: 4, Policy.EVERY: 8}  # the driver drops what finds none free
DAMAGED = 30  # so many in a row: the camera is to be connected anew
NEWER_NS = 5_000_000_000  # a time stamp further back is none


class Layout(NamedTuple):
    """How a raw picture lies in a buffer: `depth` bytes a pixel, `rows` times its height."""

    depth: int
    rows: float
    to_bgr: int | None


RAW = {
    "YUYV": Layout(2, 1, cv2.COLOR_YUV2BGR_YUYV),
    "UYVY": Layout(2, 1, cv2.COLOR_YUV2BGR_UYVY),
    "YVYU": Layout(2, 1, cv2.COLOR_YUV2BGR_YVYU),
    "NV12": Layout(1, 1.5, cv2.COLOR_YUV2BGR_NV12),
    "BGR3": Layout(3, 1, None),
    "RGB3": Layout(3, 1, cv2.COLOR_RGB2BGR),
    "GREY": Layout(1, 1, cv2.COLOR_GRAY2BGR),
}  # all others of common.v4l2.USABLE are JPEG


class V4l2Source:
    def __init__(self, camera: Camera, path: Path | None) -> None:
        assert camera.device is not None
        self._camera, self._path = camera, camera.device
        self._device: Device | None = None
        self._poll = select.poll()
        self._maps: list[mmap.mmap] = []
        self._pictures: list[Picture] = []  # over the maps, in the driver's layout
        self._held: Buffer | None = None  # filled, and not given back yet
        self._damaged = 0
        self._next = self._lost = 0  # the driver's next sequence; its frames that never came

    def open(self) -> Format:
        self.close()
        device = self._device = Device(self._path)
        can = device.capability()
        if not (can.device_caps & v4l2.CAP_CAPTURE and can.device_caps & v4l2.CAP_STREAMING):
            several = " (only multi-planar; a gstreamer camera may take it)"
            raise SourceError(
                f"{self._path}: {can.card.decode('latin-1')} is no camera that streams"
                f"{several if can.device_caps & v4l2.CAP_CAPTURE_MPLANE else ''}; "
                "`vigil cameras` says which are"
            )
        self._poll.register(device.fd, select.POLLIN | select.POLLPRI)
        chosen = c_int32()
        device.ask(v4l2.G_INPUT, chosen, *v4l2.NOT_THERE)
        change = v4l2.Subscription(v4l2.SOURCE_CHANGE, chosen.value)
        device.ask(v4l2.SUBSCRIBE_EVENT, change, *v4l2.NOT_THERE)
        return self._start(device)

    def _start(self, device: Device) -> Format:
        """Agree on a format with the driver, and let it stream."""
        timings = v4l2.Timings()
        if device.ask(v4l2.QUERY_DV_TIMINGS, timings, *v4l2.NOT_THERE):  # of an HDMI grabber
            device.ask(v4l2.S_DV_TIMINGS, timings)
        format = self._format = self._negotiate(device)
        for name, value in self._camera.controls.items():
            set_control(device, name, value)
        buffers = v4l2.Buffers(BUFFERS[self._camera.policy], v4l2.CAPTURE, v4l2.MMAP)
        device.ask(v4l2.REQBUFS, buffers)
        for index in range(buffers.count):
            buffer = Buffer(index=index, type=v4l2.CAPTURE, memory=v4l2.MMAP)
            device.ask(v4l2.QUERYBUF, buffer)
            self._maps.append(mmap.mmap(device.fd, buffer.length, offset=buffer.offset))
            self._pictures.append(self._view(self._maps[-1]))
            device.ask(v4l2.QBUF, buffer)
        device.ask(v4l2.STREAMON, c_int32(v4l2.CAPTURE))
        return format

    def _negotiate(self, device: Device) -> Format:
        camera = self._camera
        fps = {"source": v4l2.USUAL_FPS, "max": 1e3}.get(str(camera.fps)) or float(camera.fps)
        name, size, rate = v4l2.choose(device, camera.format, camera.size, fps)
        asked = v4l2.Format(type=v4l2.CAPTURE)
        pix = asked.pix
        pix.width, pix.height = size
        pix.pixelformat, pix.field = v4l2.code(name), v4l2.PROGRESSIVE
        device.ask(v4l2.S_FMT, asked)
        if (pix.width, pix.height, pix.pixelformat) != (*size, v4l2.code(name)):
            gives = f"{pix.width}x{pix.height} {v4l2.fourcc(pix.pixelformat)}"
            raise SourceError(f"{device.path}: gives {gives} for {size[0]}x{size[1]} {name}")
        self._stride, self._bytes = pix.bytesperline, 0
        if name in RAW:
            self._bytes = round(pix.height * RAW[name].rows) * pix.bytesperline
        agreed = v4l2.Parameters(type=v4l2.CAPTURE)
        if rate:
            agreed.numerator, agreed.denominator = rate.seconds, rate.frames
            device.ask(v4l2.S_PARM, agreed, *v4l2.NOT_THERE)
        else:
            device.ask(v4l2.G_PARM, agreed, *v4l2.NOT_THERE)
        known = agreed.numerator and agreed.denominator
        rate_fps = agreed.denominator / agreed.numerator if known else None
        return Format(*size, rate_fps, name, raw=name in RAW)

    def _view(self, buffer: mmap.mmap) -> Picture:
        """A buffer as its layout says; of a JPEG, its bytes."""
        if self._format.name not in RAW:
            return np.frombuffer(buffer, np.uint8)
        layout = RAW[self._format.name]
        shape = [round(self._format.height * layout.rows), self._format.width]
        strides = [self._stride, layout.depth]
        if layout.depth > 1:
            shape, strides = [*shape, layout.depth], [*strides, 1]
        return np.ndarray(shape, np.uint8, buffer, strides=strides)

    def wait(self, timeout_s: float) -> bool:
        until_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        device = self._device
        assert device is not None
        left_ms = 0.0  # at first only a look: what the driver tells comes before its pictures
        while True:
            for _, events in self._poll.poll(left_ms):
                if events & select.POLLPRI:
                    self._hear(device)
                elif events & select.POLLERR and not self._take(device):
                    raise SourceError(f"{self._path}: the driver has given up streaming")
            if self._take(device):
                return True
            left_ms = (until_ns - time.monotonic_ns()) / 1e6
            if left_ms <= 0:
                return False

    def _take(self, device: Device) -> bool:
        """Whether a picture is held: the newest, or under `every` the oldest."""
        while self._held is None or self._camera.policy is Policy.LATEST:
            buffer = Buffer(type=v4l2.CAPTURE, memory=v4l2.MMAP)
            if not device.ask(v4l2.DQBUF, buffer, errno.EAGAIN):
                break
            self.skip()
            self._held = buffer
            self._lost += max(0, buffer.sequence - self._next) if self._next else 0
            self._next = buffer.sequence + 1
        return self._held is not None

    def _hear(self, device: Device) -> None:
        """What the driver tells: the picture that an HDMI grabber gets has another size."""
        event = v4l2.Event()
        if not device.ask(v4l2.DQEVENT, event, errno.ENOENT):
            return
        if event.type == v4l2.SOURCE_CHANGE:
            self._stop(device)
            self._start(device)

    def skip(self) -> None:
        if self._held is not None and self._device is not None:
            buffer, self._held = self._held, None
            self._device.ask(v4l2.QBUF, buffer)

    def read(self, into: Picture) -> Stamp | None:
        buffer = self._held
        assert buffer is not None, "wait comes first"
        if into.shape != (self._format.height, self._format.width, 3):
            raise SizeChangedError(self._format.width, self._format.height)
        stamp, damage = _stamp(buffer, self._lost), ""
        self._lost = 0
        if buffer.flags & v4l2.BUFFER_ERROR:
            damage = "the driver says that it is damaged"
        elif buffer.bytesused < self._bytes:
            damage = f"{buffer.bytesused} bytes of {self._bytes}"
        else:
            damage = self._convert(buffer.index, buffer.bytesused, into)
        self.skip()
        self._damaged = self._damaged + 1 if damage else 0
        if self._damaged >= DAMAGED:
            raise SourceError(f"{self._path}: {DAMAGED} damaged pictures in a row: {damage}")
        if damage:
            raise BadPictureError(f"picture {stamp.mark}: {damage}")
        return stamp

    def _convert(self, index: int, size: int, into: Picture) -> str:
        """Fill `into` in place; what is wrong where the buffer holds no whole picture.

        No local name holds a view of a map: a traceback would keep it from being unmapped.
        """
        layout = RAW.get(self._format.name)
        if layout is None:
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(self._pictures[index][:size])
                if (height, width) != into.shape[:2]:
                    return f"a JPEG of {width}x{height}"
                simplejpeg.decode_jpeg(self._pictures[index][:size], "BGR", buffer=into)
            except ValueError as error:
                return f"no whole JPEG: {error}"
        elif layout.to_bgr is None:
            np.copyto(into, self._pictures[index])
        else:
            cv2.cvtColor(self._pictures[index], layout.to_bgr, dst=into)
        return ""

    def _stop(self, device: Device) -> None:
        device.ask(v4l2.STREAMOFF, c_int32(v4l2.CAPTURE))
        self._unmap()
        device.ask(v4l2.REQBUFS, v4l2.Buffers(0, v4l2.CAPTURE, v4l2.MMAP))

    def _unmap(self) -> None:
        self._held = None
        self._pictures.clear()
        while self._maps:
            self._maps.pop().close()

    def close(self) -> None:
        self._unmap()  # first: a map keeps the device in use
        if self._device is not None and self._device.fd >= 0:
            self._poll = select.poll()
            self._device.close()
        self._device, self._damaged = None, 0
        self._next = self._lost = 0


def _stamp(buffer: Buffer, lost: int) -> Stamp:
    """The driver's time, where it is of our clock and can be right."""
    now = time.monotonic_ns()
    taken = buffer.seconds * 1_000_000_000 + buffer.microseconds * 1000
    monotonic = buffer.flags & v4l2.BUFFER_CLOCK == v4l2.BUFFER_MONOTONIC
    right = monotonic and 0 <= now - taken < NEWER_NS
    return Stamp(taken if right else now, lost=lost, mark=buffer.sequence)


def set_control(device: Device, name: str, value: int | bool | str) -> None:
    """
    Raises:
        SourceError: there is none of this name, or it can't have this value, now or ever.
    """
    controls = device.controls()
    control = controls.get(name)
    at = f"{device.path}: control {name}"
    if control is None:
        raise SourceError(f"{at}: there is none; there are {', '.join(controls) or 'none at all'}")
    if isinstance(value, str):
        found = [key for key, word in control.menu.items() if word.lower() == value.lower()]
        number = found[0] if found else None
    else:
        number = int(value)
        on_step = (number - control.minimum) % (control.step or 1) == 0
        in_range = control.minimum <= number <= control.maximum and on_step
        if not (number in control.menu if control.menu else in_range):
            number = None
    if number is None and control.type != v4l2.BUTTON:
        raise SourceError(f"{at} = {value!r}: it takes {control}")
    if control.flags & v4l2.INACTIVE:
        raise SourceError(f"{at}: inactive while another decides it (an automatic one?); set that")
    if control.flags & v4l2.GRABBED:
        raise SourceError(f"{at}: held by another process or by the stream")
    device.ask(v4l2.S_CTRL, v4l2.ControlValue(control.id, number or 0))
