"""YOLOX: raw outputs on a grid, as its `demo_utils.demo_postprocess` decodes them.

centre = (offset + cell) * stride, size = exp(value) * stride, score = objectness * class; the last
two come out of the model as probabilities. One output [1, N, 5 + C] of x, y, w, h, objectness,
classes; or three, [1, N, 4], [1, N, 1] and [1, N, C], so that int8 gives each a scale of its own.
"""

from collections.abc import Sequence

import numpy as np

from common.engine.decoders import Array, Decode, Settings, check_finite, real, refuse
from common.engine.decoders.boxes import corners, grid, suppress, to_items
from common.engine.preprocess import Geometry, Tensor
from common.messages import Item

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (8, 16))
_EXPECTED = "one [1, N, 5 + C], or [1, N, 4], [1, N, 1] and [1, N, C]"
_NAMES = (("reg", "box"), ("obj",), ("cls", "class"))


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    if any(len(output.shape) != 3 or output.shape[0] != 1 for output in outputs):
        raise refuse("yolox", outputs, settings, _EXPECTED)
    order: list[int] | None = [0] if len(outputs) == 1 else _split(outputs)
    if order is None or (len(order) == 1 and outputs[0].shape[2] < 6):
        raise refuse("yolox", outputs, settings, _EXPECTED)
    count = outputs[0].shape[1]
    for strides in _STRIDES:
        cells, sizes = grid(settings.height, settings.width, strides)
        if len(cells) == count:
            break
    else:
        raise refuse(
            "yolox", outputs, settings,
            f"{_EXPECTED} with N = {len(grid(settings.height, settings.width, _STRIDES[0])[0])} "
            f"for an input of {settings.width}x{settings.height}",
        )  # fmt: skip
    settings.check_classes(outputs[order[-1]].shape[2] - (5 if len(order) == 1 else 0))

    tensors = [outputs[place] for place in order]
    box_of, object_of, class_of = tensors if len(tensors) == 3 else tensors * 3

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        parts = [values[place][0] for place in order]
        if len(parts) == 1:
            parts = [parts[0][:, :4], parts[0][:, 4:5], parts[0][:, 5:]]
        objectness = real(object_of, parts[1][:, 0])
        check_finite(objectness, settings.where)
        # A class is at most certain, so that objectness alone rules out nearly all cells.
        likely = np.flatnonzero(objectness >= settings.score)
        stored = parts[2][likely]
        classes = stored.argmax(1)
        best = real(class_of, stored[np.arange(len(likely)), classes]) * objectness[likely]
        check_finite(best, settings.where)
        chosen = np.flatnonzero(best >= settings.score)
        likely, classes, best = likely[chosen], classes[chosen], best[chosen]
        centres = real(box_of, parts[0][likely]) + 0  # a copy: outputs are not ours to change
        centres[:, :2] += cells[likely]
        with np.errstate(over="ignore"):  # infinity is an error told below
            np.exp(centres[:, 2:], out=centres[:, 2:])
        centres *= sizes[likely]
        check_finite(centres, settings.where)
        kept = suppress(centres, best, classes, settings)
        return to_items(corners(centres[kept]), best[kept], classes[kept], geometry, settings)

    return decode


def _split(outputs: Sequence[Tensor]) -> list[int] | None:
    """Places of boxes, objectness and classes: by shape, or by name where that leaves a choice."""
    if len(outputs) != 3 or len({output.shape[1] for output in outputs}) != 1:
        return None
    widths = [output.shape[2] for output in outputs]
    if widths.count(4) == 1 and widths.count(1) == 1:
        box, obj = widths.index(4), widths.index(1)
        return [box, obj, 3 - box - obj]
    order = []
    for words, width in zip(_NAMES, (4, 1, None), strict=True):
        found = [
            place
            for place, output in enumerate(outputs)
            if any(word in output.name.lower() for word in words)
            and width in (None, output.shape[2])
        ]
        if len(found) != 1:
            return None
        order.append(found[0])
    return order if len(set(order)) == 3 else None
