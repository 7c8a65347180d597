"""YOLOv8 and what follows its layout: [1, 4 + C, N] of centre x, y, width, height in pixels of the
input, then a probability a class, no objectness; or the same transposed, [1, N, 4 + C].
"""

from collections.abc import Sequence

import numpy as np

from common.engine.decoders import Array, Decode, Settings, check_finite, real, refuse
from common.engine.decoders.boxes import corners, grid, suppress, to_items
from common.engine.preprocess import Geometry, Tensor
from common.messages import Item

_STRIDES = (8, 16, 32)


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    count = len(grid(settings.height, settings.width, _STRIDES)[0])
    expected = f"one [1, 4 + C, {count}] for an input of {settings.width}x{settings.height}"
    if len(outputs) != 1 or len(outputs[0].shape) != 3 or outputs[0].shape[0] != 1:
        raise refuse("yolov8", outputs, settings, expected)
    rows, columns = outputs[0].shape[1:]
    if (rows == count) == (columns == count) or min(rows, columns) < 5:
        raise refuse("yolov8", outputs, settings, expected)
    transposed = rows == count
    settings.check_classes((columns if transposed else rows) - 4)

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        stored = values[0][0].T if transposed else values[0][0]
        best = real(outputs[0], stored[4:].max(0))
        check_finite(best, settings.where)
        chosen = np.flatnonzero(best >= settings.score)
        best = best[chosen]
        classes = stored[4:, chosen].argmax(0)
        centres = real(outputs[0], stored[:4, chosen].T)
        check_finite(centres, settings.where)
        kept = suppress(centres, best, classes, settings)
        return to_items(corners(centres[kept]), best[kept], classes[kept], geometry, settings)

    return decode
