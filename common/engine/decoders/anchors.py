"""Anchors of SSD: boxes that those of the model are encoded against.

x = tx / fx * wa + xa, w = exp(tw / fw) * wa, and so for y and h: x, y the centre, a the anchor, f
the factors (tensorflow/models, object_detection/box_coders/faster_rcnn_box_coder.py; Caffe and
PyTorch multiply with variances, 1 / f). The anchors are given in a file, or by the numbers of
`ssd_anchor_generator` in a model's pipeline.config (anchor_generators/
multiple_grid_anchor_generator.py there; Liu et al., SSD: Single Shot MultiBox Detector, 2.2).
"""

from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from common.engine.decoders import Floats
from common.errors import ModelError

Above0 = Annotated[float, Meta(gt=0)]


class Anchors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[decoder.anchors]: either a file, or strides, scales and ratios."""

    file: str | None = None  # in the bundle; a line each, as `boxes` has it: "0.5, 0.5, 0.2, 0.1"
    strides: list[Annotated[int, Meta(gt=0)]] | None = None  # of the layers, finest first
    scales: tuple[Above0, Above0] | None = None  # of the first and last layer
    ratios: list[Above0] | None = None  # width by height, in the order of the config
    reduced: bool = True  # three a cell in the finest layer (reduce_boxes_in_lowest_layer)
    factors: tuple[Above0, Above0, Above0, Above0] = (10, 10, 5, 5)  # in the order of `boxes`

    def __post_init__(self) -> None:
        numbers = (self.strides, self.scales, self.ratios)
        if (self.file is None) != all(numbers) or (self.file is not None and any(numbers)):
            raise ValueError("expected either `file`, or `strides`, `scales` and `ratios`")
        if self.file is not None and (Path(self.file).is_absolute() or ".." in self.file):
            raise ValueError(f"file = {self.file!r}: lies outside the bundle; expected one inside")


def make(anchors: Anchors, folder: Path, y_first: bool, height: int, width: int) -> Floats:
    """[N, 4] centre x, y, width and height in pixels of an input of `height` x `width`.

    Raises:
        ModelError: the file is not there, or holds something else.
    """
    if anchors.file is not None:
        made = _read(folder / anchors.file)
        return (made[:, [1, 0, 3, 2]] if y_first else made) * np.array(
            [width, height] * 2, np.float32
        )
    assert anchors.strides
    assert anchors.scales
    assert anchors.ratios
    first, last = anchors.scales
    steps = max(1, len(anchors.strides) - 1)
    scales = [first + (last - first) * i / steps for i in range(len(anchors.strides))] + [1.0]
    layers: list[Floats] = []
    for stride, (scale, following) in zip(anchors.strides, pairwise(scales), strict=True):
        shapes = [(scale, ratio) for ratio in anchors.ratios] + [(sqrt(scale * following), 1.0)]
        if not layers and anchors.reduced:
            shapes = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
        side = min(height, width)
        sizes = [(size * sqrt(ratio) * side, size / sqrt(ratio) * side) for size, ratio in shapes]
        rows, columns = -(-height // stride), -(-width // stride)  # as "same" padding leaves them
        y, x, shape = np.meshgrid(
            (np.arange(rows) + 0.5) * (height / rows),
            (np.arange(columns) + 0.5) * (width / columns),
            np.arange(len(sizes)),
            indexing="ij",
        )
        at = np.stack([x, y], -1).reshape(-1, 2)
        layers.append(np.concatenate([at, np.array(sizes)[shape.ravel()]], 1, dtype=np.float32))
    return np.concatenate(layers)


def _read(path: Path) -> Floats:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        made = np.array([[float(part) for part in line.split(",")] for line in lines], np.float32)
    except OSError as error:
        raise ModelError(f"{path}: anchors can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: {error}; expected four numbers a line, with commas") from error
    if made.ndim != 2 or made.shape[1] != 4:
        raise ModelError(f"{path}: holds {list(made.shape)}; expected four numbers a line")
    return made
