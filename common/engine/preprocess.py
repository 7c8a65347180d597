"""From a camera's picture into the model's own input buffer, without copies in between.

A value of the model's input is (pixel - mean) / scale, and for quantised inputs that, divided by
the tensor's scale, plus its zero point. The steps: resize; arrange (colour order, layout);
convert. For a uint8 NHWC model in the camera's colour order the first writes the buffer itself,
for other integer inputs the second does, for float inputs the third. Everything else is scratch
that is allocated once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from common.errors import EngineError

Array = NDArray[np.generic]
Picture = NDArray[np.uint8]
Resize = Literal["letterbox", "letterbox-top-left", "stretch"]
Colour = Literal["rgb", "bgr", "grey"]

_MAX_PLANS = 8  # sizes of pictures remembered at once


@dataclass(frozen=True)
class Tensor:
    """An input or output as a runtime reports it; -1 in `shape` is a size left open.

    `quantisation` is (scale, zero point), for real = (stored - zero point) * scale; None for
    tensors that store real values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    quantisation: tuple[float, int] | None = None

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class InputSpec:
    """All that pre-processing has to know of a model's input. `mean` and `scale` are a value a
    channel in the model's own order, or None: integer inputs then take the pixels as they are
    (int8: less 128), as TFLite's convention has it.
    """

    layout: Literal["nchw", "nhwc"]
    height: int
    width: int
    dtype: np.dtype[np.generic]
    quantisation: tuple[float, int] | None
    resize: Resize
    colour: Colour
    pad: int
    mean: tuple[float, ...] | None
    scale: tuple[float, ...] | None

    @property
    def channels(self) -> int:
        return 1 if self.colour == "grey" else 3


@dataclass(frozen=True)
class Geometry:
    """Where a picture of `width` x `height` lies in the model's input: x_in = x * fx + left."""

    width: int
    height: int
    fx: float
    fy: float
    left: int
    top: int

    def to_picture(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes [N, 4] x1, y1, x2, y2 from input pixels to picture pixels, clipped to it."""
        moved = boxes - np.array([self.left, self.top] * 2, np.float32)
        moved /= np.array([self.fx, self.fy] * 2, np.float32)
        limits = np.array([self.width, self.height] * 2, np.float32)
        return np.clip(moved, 0, limits, out=moved)


@dataclass(frozen=True)
class _Plan:
    """Made once for each size of picture: its place, and scratch for the steps between."""

    geometry: Geometry
    window: tuple[slice, ...]  # the picture's part of the input [H, W, C] or [C, H, W]
    resized: Picture | None  # [h, w(, 3)]; None where the picture has that size already
    arranged: Picture | None  # [h, w, C] or [C, h, w], for float inputs
    exact: NDArray[np.float32] | None  # the same, for float16 ones: rounded once, at the end
    factor: NDArray[np.float32]  # shaped to be multiplied with `arranged`, rows flattened
    offset: NDArray[np.float32] | None


class Preprocessor:
    """Prepares pictures for one model. Not for two threads at once.

    Args:
        spec: the model's input.
        buffers: the arrays to fill, each [1, H, W, C] or [1, C, H, W] of the input's dtype.
    """

    def __init__(self, spec: InputSpec, buffers: Sequence[NDArray[np.generic]]) -> None:
        self._spec = spec
        self._buffers = [buffer[0] for buffer in buffers]
        self._plans: dict[object, _Plan] = {}  # by shape and type of the picture
        self._padded: list[Geometry | None] = [None] * len(buffers)
        self._float = spec.dtype.kind == "f"
        self._table = None if self._float else _integer_table(spec)
        self._less_128 = self._table is not None and bool((self._table == _LESS_128).all())

    def __call__(self, picture: Picture, buffer: int) -> Geometry:
        """Fill `buffer` from a picture [H, W, 3] BGR or [H, W] grey.

        Raises:
            EngineError: the picture has another shape or type.
        """
        plan = self._plans.get((picture.shape, picture.dtype)) or self._plan(picture)
        if self._padded[buffer] != plan.geometry:
            self._fill(buffer)
            self._padded[buffer] = plan.geometry
        window = self._buffers[buffer][plan.window]
        pixels = window.view(np.uint8) if plan.arranged is None else plan.arranged
        self._arrange(picture, plan.resized, pixels)
        if self._float:
            _to_float(pixels, window, plan)
        elif self._table is not None:
            self._translate(pixels, self._table)
        return plan.geometry

    def _plan(self, picture: Picture) -> _Plan:
        shape = picture.shape
        fits = picture.ndim == 2 or (picture.ndim == 3 and shape[2] == 3)
        if not fits or picture.dtype != np.uint8 or picture.size == 0:
            raise EngineError(
                f"picture {list(shape)} {picture.dtype}: expected uint8, "
                "[height, width, 3] BGR or [height, width] grey"
            )
        spec = self._spec
        geometry, height, width = _place(spec, shape[0], shape[1])
        rows = slice(geometry.top, geometry.top + height)
        columns = slice(geometry.left, geometry.left + width)
        nchw = spec.layout == "nchw"
        size = (spec.channels, height, width) if nchw else (height, width, spec.channels)
        factor, offset = _float_terms(spec, width)
        plan = _Plan(
            geometry,
            (slice(None), rows, columns) if nchw else (rows, columns),
            None if (height, width) == shape[:2] else np.empty((height, width, *shape[2:]), "u1"),
            np.empty(size, np.uint8) if self._float else None,
            np.empty(size, np.float32) if spec.dtype == np.float16 else None,
            factor,
            offset,
        )
        if len(self._plans) >= _MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[shape, picture.dtype] = plan
        return plan

    def _arrange(self, picture: Picture, scratch: Picture | None, target: Picture) -> None:
        """Resize `picture` and bring its channels into `target`, [h, w, C] or [C, h, w]."""
        colour, nchw = self._spec.colour, self._spec.layout == "nchw"
        grey = picture.ndim == 2
        if colour == "grey":
            target = target[0] if nchw else target[..., 0]
        if (grey and colour == "grey") or (not grey and colour == "bgr" and not nchw):
            _resize(picture, target)
            return
        source = picture if scratch is None else _resize(picture, scratch)
        if colour == "grey":
            cv2.cvtColor(source, cv2.COLOR_BGR2GRAY, dst=target)
        elif grey:
            np.copyto(target, source if nchw else source[..., None])
        elif nchw:
            cv2.split(source, list(target if colour == "bgr" else target[::-1]))
        else:
            cv2.cvtColor(source, cv2.COLOR_BGR2RGB, dst=target)

    def _translate(self, pixels: Picture, table: NDArray[np.uint8]) -> None:
        """pixels = table[channel, pixels], in place."""
        if self._less_128:
            np.bitwise_xor(pixels, 128, out=pixels)  # the same, and ten times as fast
        elif self._spec.layout == "nchw":
            for plane, row in zip(pixels, table, strict=True):
                cv2.LUT(plane, row, dst=plane)
        else:
            cv2.LUT(pixels, np.ascontiguousarray(table.T)[None], dst=pixels)

    def _fill(self, buffer: int) -> None:
        """The pad value into the whole of a buffer."""
        spec, target = self._spec, self._buffers[buffer]
        values: NDArray[np.generic]
        if self._float:
            factor, offset = _float_values(spec)
            values = np.float32(spec.pad) * factor + offset
        elif self._table is not None:
            values = self._table[:, spec.pad].view(spec.dtype)
        else:
            values = np.full(spec.channels, spec.pad, spec.dtype)
        target[...] = values[:, None, None] if spec.layout == "nchw" else values


def _place(spec: InputSpec, height: int, width: int) -> tuple[Geometry, int, int]:
    """Where the picture goes, and the height and width it gets."""
    if spec.resize == "stretch":
        new_height, new_width = spec.height, spec.width
    else:
        ratio = min(spec.height / height, spec.width / width)
        # YOLOX cuts the fraction off, the others round; both as in the training code.
        whole = int if spec.resize == "letterbox-top-left" else round
        new_height, new_width = max(1, whole(height * ratio)), max(1, whole(width * ratio))
    centred = spec.resize == "letterbox"
    left = (spec.width - new_width) // 2 if centred else 0
    top = (spec.height - new_height) // 2 if centred else 0
    geometry = Geometry(width, height, new_width / width, new_height / height, left, top)
    return geometry, new_height, new_width


def _resize(picture: Picture, target: Picture) -> Picture:
    if picture.shape == target.shape:
        np.copyto(target, picture)
    else:
        size = target.shape[1], target.shape[0]
        cv2.resize(picture, size, dst=target, interpolation=cv2.INTER_LINEAR)
    return target


def _float_values(spec: InputSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and offset a channel, so that value = pixel * factor + offset."""
    mean, scale = np.array(spec.mean or 0.0, np.float64), np.array(spec.scale or 1.0, np.float64)
    shape = (spec.channels,)
    factor, offset = np.broadcast_to(1 / scale, shape), np.broadcast_to(-mean / scale, shape)
    return factor.astype(np.float32), offset.astype(np.float32)


def _float_terms(
    spec: InputSpec, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The same, shaped to go with rows [h, w * C] or planes [C, h, w]; scalars are fastest."""
    terms = _float_values(spec)
    if all((term == term[0]).all() for term in terms):
        terms = terms[0][0], terms[1][0]
    elif spec.layout == "nchw":
        terms = terms[0][:, None, None], terms[1][:, None, None]
    else:
        terms = np.tile(terms[0], width), np.tile(terms[1], width)
    return np.asarray(terms[0]), np.asarray(terms[1]) if np.any(terms[1]) else None


def _to_float(pixels: Picture, window: NDArray[np.generic], plan: _Plan) -> None:
    """window = pixels * factor + offset, in float32."""
    target, window = window, window if plan.exact is None else plan.exact
    if plan.factor.ndim == 1:  # a value a channel in NHWC: one long row is ten times as fast
        pixels, window = pixels.reshape(len(pixels), -1), window.reshape(len(window), -1)
    np.multiply(pixels, plan.factor, out=window, dtype=np.float32)
    if plan.offset is not None:
        np.add(window, plan.offset, out=window)
    if plan.exact is not None:
        np.copyto(target, plan.exact, casting="same_kind")


def _integer_table(spec: InputSpec) -> NDArray[np.uint8] | None:
    """What each pixel value becomes, [C, 256]; None where it stays as it is."""
    pixels = np.arange(256, dtype=np.float64)
    if spec.mean is None and spec.scale is None:
        if spec.dtype == np.uint8:
            return None
        return np.repeat(_LESS_128, spec.channels, 0)
    mean, scale = np.array(spec.mean or 0.0), np.array(spec.scale or 1.0)
    real = (pixels - mean.reshape(-1, 1)) / scale.reshape(-1, 1)
    step, zero = spec.quantisation or (1.0, 0)
    # Half away from zero, as TFLite's own quantise operator rounds.
    stored = np.trunc(real / step + np.copysign(0.5, real)) + zero
    limits = np.iinfo(np.int8 if spec.dtype == np.int8 else np.uint8)
    table = np.clip(stored, limits.min, limits.max).astype(spec.dtype).view(np.uint8)
    if (table == np.arange(256)).all():
        return None
    return np.ascontiguousarray(np.broadcast_to(table, (spec.channels, 256)))


_LESS_128 = (np.arange(256, dtype=np.uint8) ^ 128)[None]
