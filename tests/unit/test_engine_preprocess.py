"""Pre-processing is bit for bit what the plain, slow way gives, in every combination."""

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.engine.preprocess import Geometry, InputSpec, Preprocessor
from common.errors import EngineError

PAD = 114
MEAN, SCALE = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def spec(
    layout: str = "nhwc",
    dtype: type = np.uint8,
    resize: str = "stretch",
    colour: str = "rgb",
    size: tuple[int, int] = (24, 40),
    mean: tuple[float, ...] | None = None,
    scale: tuple[float, ...] | None = None,
    quantisation: tuple[float, int] | None = None,
) -> InputSpec:
    values: Any = (layout, *size, np.dtype(dtype), quantisation, resize, colour, PAD, mean, scale)
    return InputSpec(*values)


def picture(height: int, width: int, grey: bool = False, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width) if grey else (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def empty(spec: InputSpec) -> NDArray[Any]:
    planes = (spec.height, spec.width)
    shape = (spec.channels, *planes) if spec.layout == "nchw" else (*planes, spec.channels)
    return np.full((1, *shape), 77, spec.dtype)


def naive(image: NDArray[np.uint8], spec: InputSpec) -> NDArray[Any]:
    """Resize, pad, reorder, convert, transpose: a new array at each step."""
    height, width = image.shape[:2]
    new_height, new_width, top, left = spec.height, spec.width, 0, 0
    if spec.resize != "stretch":
        ratio = min(spec.height / height, spec.width / width)
        whole: Any = int if spec.resize == "letterbox-top-left" else round
        new_height, new_width = whole(height * ratio), whole(width * ratio)
        if spec.resize == "letterbox":
            top, left = (spec.height - new_height) // 2, (spec.width - new_width) // 2
    small = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    if spec.colour == "grey":
        small = small if small.ndim == 2 else cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
        small = small[..., None]
    else:
        small = cv2.cvtColor(small, cv2.COLOR_GRAY2BGR) if small.ndim == 2 else small
        small = small[..., ::-1] if spec.colour == "rgb" else small
    canvas = np.full((spec.height, spec.width, spec.channels), spec.pad, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = small
    values: Any = canvas
    if spec.dtype.kind == "f":
        factor = (1 / np.array(spec.scale)).astype(np.float32)
        offset = (-np.array(spec.mean) / np.array(spec.scale)).astype(np.float32)
        values = (canvas.astype(np.float32) * factor + offset).astype(spec.dtype)
    elif spec.mean is not None and spec.scale is not None:
        step, zero = spec.quantisation or (1.0, 0)
        real = (canvas - np.array(spec.mean)) / np.array(spec.scale) / step
        stored = np.sign(real) * np.floor(np.abs(real) + 0.5) + zero
        limits = np.iinfo(np.int8 if spec.dtype == np.int8 else np.uint8)
        values = np.clip(stored, limits.min, limits.max).astype(spec.dtype)
    elif spec.dtype == np.int8:
        values = (canvas.astype(np.int16) - 128).astype(np.int8)
    values = values[None]
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2) if spec.layout == "nchw" else values)


NORMALISATIONS: list[tuple[Any, ...]] = [
    (np.uint8, None, None, None),
    (np.int8, None, None, (1 / 255, -128)),
    (np.uint8, (127.5,), (127.5,), (1 / 128, 128)),
    (np.int8, MEAN, SCALE, (0.0186, -14)),
    (np.uint8, MEAN, SCALE, (0.0186, 114)),
    (np.int8, (0.0,), (255.0,), (1 / 255, -128)),
    (np.float32, (0.0,), (1.0,), None),
    (np.float32, (0.0,), (255.0,), None),
    (np.float32, (127.5,), (127.5,), None),
    (np.float32, MEAN, SCALE, None),
    (np.float16, (0.0,), (255.0,), None),
    (np.float16, MEAN, SCALE, None),
]


@pytest.mark.parametrize("resize", ["letterbox", "letterbox-top-left", "stretch"])
@pytest.mark.parametrize("colour", ["rgb", "bgr", "grey"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_equals_the_naive_way(layout: str, colour: str, resize: str) -> None:
    tried = 0
    for (dtype, mean, scale, step), grey in itertools.product(NORMALISATIONS, (False, True)):
        if colour == "grey" and mean is not None:
            mean, scale = mean[:1], scale[:1]
        elif mean is not None:
            mean, scale = (mean * 3)[:3], (scale * 3)[:3]
        wanted = spec(layout, dtype, resize, colour, (24, 40), mean, scale, step)
        buffers = [empty(wanted), empty(wanted)]
        prepare = Preprocessor(wanted, buffers)
        # Larger, smaller, of its own size, back again: what one leaves must not show in the next.
        sizes = [(60, 50), (7, 90), (24, 40), (60, 50), (13, 9)]
        for seed, (height, width) in enumerate(sizes):
            image = picture(height, width, grey, seed)
            prepare(image, seed % 2)
            assert np.array_equal(buffers[seed % 2], naive(image, wanted)), (wanted, image.shape)
            tried += 1
    assert tried == 120


def test_float_values_are_those_of_opencv_and_of_the_formula() -> None:
    wanted = spec("nchw", np.float32, "stretch", "rgb", (32, 32), (0.0,) * 3, (255.0,) * 3)
    buffers = [empty(wanted)]
    image = picture(32, 32)
    Preprocessor(wanted, buffers)(image, 0)
    assert np.array_equal(buffers[0], cv2.dnn.blobFromImage(image, 1 / 255, swapRB=True))
    wanted = spec("nhwc", np.float32, "stretch", "bgr", (32, 32), MEAN, SCALE)
    buffers = [empty(wanted)]
    Preprocessor(wanted, buffers)(image, 0)
    assert np.allclose(buffers[0][0], (image - np.array(MEAN)) / np.array(SCALE), atol=1e-6)


def test_reads_a_ring_slot_and_writes_the_model_s_memory_in_place() -> None:
    """A read-only view into a larger mapping is a picture; a picture is never changed."""
    memory = np.frombuffer(bytes(range(256)) * 60, np.uint8)
    image = memory[100 : 100 + 50 * 60 * 3].reshape(50, 60, 3)
    wanted = spec(resize="letterbox")
    buffers = [empty(wanted)]
    address = buffers[0].ctypes.data
    Preprocessor(wanted, buffers)(image, 0)
    assert buffers[0].ctypes.data == address
    assert np.array_equal(buffers[0], naive(image, wanted))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
        np.zeros((0, 10, 3), np.uint8),
        np.zeros(10, np.uint8),
    ],
)
def test_refuses_what_is_no_picture(image: NDArray[Any]) -> None:
    wanted = spec()
    with pytest.raises(EngineError, match=r"expected uint8, \[height, width, 3\] BGR"):
        Preprocessor(wanted, [empty(wanted)])(image, 0)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    resize=st.sampled_from(["letterbox", "letterbox-top-left", "stretch"]),
)
def test_boxes_come_back_to_the_picture(height: int, width: int, resize: str) -> None:
    wanted = spec(resize=resize, size=(96, 160))
    geometry = Preprocessor(wanted, [empty(wanted)])(np.zeros((height, width), np.uint8), 0)
    inner = np.array([[0, 0, width, height], [width / 4, height / 4, width / 2, height / 2]])
    scale, shift = [geometry.fx, geometry.fy] * 2, [geometry.left, geometry.top] * 2
    seen = (inner * scale + shift).astype(np.float32)
    assert seen.min() >= 0
    assert (seen[:, 2] <= 160.01).all()
    assert (seen[:, 3] <= 96.01).all()
    assert np.allclose(geometry.to_picture(seen), inner, atol=1e-3 * max(height, width))
    far = geometry.to_picture(np.array([[-1e6, -1e6, 1e6, 1e6]], np.float32))
    assert far.tolist() == [[0, 0, width, height]]


def test_letterbox_cuts_sizes_as_yolox_does() -> None:
    wanted = spec(resize="letterbox-top-left", size=(416, 416))
    geometry = Preprocessor(wanted, [empty(wanted)])(picture(341, 512), 0)
    assert geometry == Geometry(512, 341, 416 / 512, 277 / 341, 0, 0)  # 277.06
