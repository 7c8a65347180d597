"""Autoencoders: how far what they make of the input lies from it, over the whole of it.

One output of the input's shape. The score is the mean of (output - input) squared, or of its
absolute value (`error` in [decoder]), both as real values; threshold and scaling as for `anomaly`.
"""

from collections.abc import Sequence

import numpy as np

from common.engine.decoders import ANOMALY, Array, Decode, Settings, check_finite, real, refuse
from common.engine.decoders.anomaly import bounds, scaled
from common.engine.preprocess import Geometry, Tensor
from common.messages import Item


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`; the last of `outputs` is the model's input."""
    *made, given = outputs
    if len(made) != 1 or made[0].shape != given.shape:
        expected = f"one output of the input's shape {list(given.shape)}"
        raise refuse("reconstruction", made, settings, expected)
    threshold, span = bounds(settings)

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        difference = (real(made[0], values[0]) - real(given, values[1])).ravel()
        if settings.error == "squared":
            score = float(difference @ difference) / difference.size
        else:
            score = float(np.abs(difference).mean())
        check_finite(np.array(score, np.float32), settings.where)
        if score < threshold:
            return []
        item = Item(ANOMALY, scaled(score, threshold, span), 0)
        return [item] if item.score >= settings.score else []

    return decode
