"""What pre-processing and decoding need, from the manifest, the file's own metadata and the input
tensor. What none of them settles is asked for, all of it at once; nothing is guessed.
"""

from typing import Literal

import numpy as np

from common.engine.bundle import Channels, Input, Manifest
from common.engine.decoders import DECODERS
from common.engine.facts import Facts
from common.engine.preprocess import Colour, InputSpec, Tensor
from common.errors import ModelError, UnsaidError

_LEAST_SCALE = 0.02  # what is smaller was meant to be multiplied with


def resolve(manifest: Manifest, facts: Facts, tensor: Tensor, where: str) -> tuple[InputSpec, str]:
    """The input's specification and the kind of decoder.

    Raises:
        ModelError: the manifest contradicts the model, or something is not known.
    """
    given, missing = manifest.input, dict[str, str]()  # flag -> what it says
    layout, channels = _layout(given, tensor, where)
    size = _size(given, facts, tensor, layout, where, missing)
    colour = _colour(given, facts, channels, where, missing)
    resize = given.resize or facts.resize
    if resize is None:
        missing["--resize"] = (
            "how a picture is brought to the input's size (`resize` in [input], or --resize "
            "letterbox, letterbox-top-left or stretch)"
        )
    pads = [pad for pad in (given.pad, facts.pad, 114) if pad is not None]
    channels = 1 if colour == "grey" else 3
    mean, scale = _normalisation(given, facts, tensor, channels, where, missing)
    kind = manifest.decoder.kind or facts.decoder
    if kind is None:
        missing["--decoder"] = (
            f"how the outputs are read (`kind` in [decoder], or --decoder {', '.join(DECODERS)})"
        )
    if missing or kind is None or colour is None or resize is None:
        unsaid = "; nor ".join(missing.values())
        raise UnsaidError(f"{where}: the file doesn't say {unsaid}", missing)
    task = DECODERS[kind].task
    if manifest.task not in (None, task):
        raise ModelError(
            f"{where}: decoder {kind} does {task}, but the manifest's task is {manifest.task}"
        )
    spec = InputSpec(
        layout=layout, height=size[0], width=size[1], dtype=tensor.dtype,
        quantisation=tensor.quantisation, resize=resize, colour=colour, pad=pads[0],
        mean=mean, scale=scale,
    )  # fmt: skip
    return spec, kind


def _layout(given: Input, tensor: Tensor, where: str) -> tuple[Literal["nchw", "nhwc"], int]:
    """Layout and number of channels, -1 where it is left open."""
    shape = _four(tensor)
    if len(shape) != 4 or shape[0] not in (1, -1):
        raise ModelError(
            f"{where}: input {tensor} takes no single picture; expected [1, height, width, "
            "channels] or [1, channels, height, width], or the same without the 1"
        )
    if tensor.dtype not in (np.uint8, np.int8, np.float16, np.float32):
        raise ModelError(f"{where}: input {tensor}: expected uint8, int8, float16 or float32")
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if len(tensor.shape) == 3:
        first |= shape[1] == -1  # it may be the batch's
    layout = given.layout
    if layout is None:
        if first == last:
            raise UnsaidError(
                f"{where}: input {tensor} doesn't show where its channels are; give `layout` in "
                "[input], or --layout: nchw or nhwc",
                {"--layout": "where its channels are (--layout nchw or nhwc)"},
            )
        layout = "nchw" if first else "nhwc"
    channels = shape[1] if layout == "nchw" else shape[3]
    if channels not in (1, 3, -1):
        raise ModelError(f"{where}: input {tensor} as {layout} has {channels} channels, not 1 or 3")
    return layout, channels


def _four(tensor: Tensor) -> tuple[int, ...]:
    """The input's shape with a batch. In [1, height, width] the first is as well a grey picture's
    channel: its bytes are the same."""
    return (1, *tensor.shape) if len(tensor.shape) == 3 else tensor.shape


def _size(
    given: Input,
    facts: Facts,
    tensor: Tensor,
    layout: Literal["nchw", "nhwc"],
    where: str,
    missing: dict[str, str],
) -> tuple[int, int]:
    shape = _four(tensor)
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    wanted = given.size or facts.size
    if height > 0 and width > 0:
        if wanted not in (None, (height, width)):
            raise ModelError(
                f"{where}: input {tensor} is {height} high and {width} wide, but "
                f"{'the manifest' if given.size else 'its metadata'} says {list(wanted or ())}"
            )
        return height, width
    if wanted is None:
        missing["--size"] = "its input's size (`size` = [height, width] in [input], or --size HxW)"
    return wanted or (0, 0)


def _colour(
    given: Input, facts: Facts, channels: int, where: str, missing: dict[str, str]
) -> Colour | None:
    colour = given.colour or facts.colour or ("grey" if channels == 1 else None)
    if colour is None:
        missing["--colour"] = (
            "the order of its colours (`colour` in [input], or --colour rgb or bgr"
            f"{', or grey' * (channels < 0)})"
        )
    elif channels > 0 and (colour == "grey") != (channels == 1):
        raise ModelError(
            f"{where}: has an input of {channels} channel{'s' * (channels > 1)}, but colour "
            f"{colour!r}; expected {'grey' if channels == 1 else 'rgb or bgr'}"
        )
    return colour


def _normalisation(
    given: Input, facts: Facts, tensor: Tensor, channels: int, where: str, missing: dict[str, str]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and scale, a value a channel. Integer inputs take pixels as they are unless told: TFLite
    has metadata for the real values that they stand for, and int8 is less 128 by its convention."""
    mean, scale = given.mean, given.scale
    if mean is None and scale is None:
        if tensor.dtype == np.uint8 or tensor.quantisation is not None:
            return None, None
        if tensor.dtype != np.int8:
            mean, scale = facts.mean, facts.scale
        if mean is None and scale is None:
            missing["--scale"] = (
                "the range of its values, (pixel - mean) / scale (`mean` and `scale` in [input], "
                "or --mean and --scale: scale 255 for 0 to 1, mean 127.5 and scale 127.5 for "
                "-1 to 1, scale 1 for pixels as they are, mean 128 and scale 1 for pixels less 128)"
            )
            return None, None
    means = _each(mean, 0.0, channels, "mean", where)
    scales = _each(scale, 1.0, channels, "scale", where)
    if min(scales) < _LEAST_SCALE:
        hint = f"; for {min(scales):g} give {1 / min(scales):g}" if min(scales) > 0 else ""
        raise ModelError(
            f"{where}: scale = {min(scales):g}: values are divided by it, (pixel - mean) / scale, "
            f"expected at least {_LEAST_SCALE}{hint}"
        )
    return means, scales


def _each(
    value: Channels | None, default: float, channels: int, name: str, where: str
) -> tuple[float, ...]:
    values = [default] if value is None else value if isinstance(value, list) else [value]
    if len(values) not in (1, channels):
        raise ModelError(f"{where}: {name} = {values}: expected one value, or {channels}")
    return tuple(float(entry) for entry in (values * channels)[:channels])
