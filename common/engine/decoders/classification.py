"""Classification: one output with a value for each class; or with a single one, how likely the last
of two classes is, or the only one.
"""

import math
from collections.abc import Sequence

import numpy as np

from common.engine.decoders import Array, Decode, Floats, Settings, check_finite, real, refuse
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError, UnsaidError
from common.messages import Item


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    shape = outputs[0].shape
    if len(outputs) != 1 or min(shape, default=1) < 1 or sorted(shape)[:-1] != [1] * len(shape[1:]):
        raise refuse("classification", outputs, settings, "one output [1, C] or [C]")
    output, count = outputs[0], math.prod(shape)
    labels = settings.labels
    if count > 1:
        settings.check_classes(count)
    elif labels is None or len(labels) > 2:
        raise ModelError(
            f"{settings.where}: output {output} has a single value; expected one label, of what it "
            "is the score, or two, the second of what it is the score"
        )
    activation = settings.activation or _from_quantisation(output)
    if activation is None:
        raise UnsaidError(
            f"{settings.where}: nothing tells whether {output} holds probabilities; give "
            "`activation` in [decoder] of the manifest, or --activation: none if it does, "
            "softmax (or sigmoid, where several classes can be true) if it holds logits",
            {"--activation": "how its values become probabilities (none, softmax or sigmoid)"},
        )
    if activation == "softmax" and count == 1:
        raise ModelError(
            f"{settings.where}: activation 'softmax' makes 1 of any single value; expected "
            "sigmoid, or none"
        )
    both = count == 1 and labels is not None and len(labels) == 2

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        scores = _activate(real(output, values[0].reshape(-1)), activation)
        check_finite(scores, settings.where)
        if both:
            scores = np.append(1 - scores, scores)
        order = np.argsort(-scores, kind="stable")[: settings.max_items]
        best = scores[order]
        if best[0] > 1.01 or scores.min() < -0.01:
            raise EngineError(
                f"{settings.where}: scores reach from {scores.min():.3g} to {best[0]:.3g}, not "
                f"0 to 1, after activation {activation!r}; softmax is likely to be right"
            )
        return [
            Item(settings.label(index), min(max(score, 0.0), 1.0), index)
            for score, index in zip(best.tolist(), order.tolist(), strict=True)
            if score >= settings.score and score > 0
        ]

    return decode


def _from_quantisation(output: Tensor) -> str | None:
    """Steps of 1/256 from 0 are how TFLite stores what a Softmax or Sigmoid gives."""
    return "none" if output.quantisation in ((1 / 256, 0), (1 / 256, -128)) else None


def _activate(values: Floats, activation: str) -> Floats:
    if activation == "softmax":
        powers: Floats = np.exp(values - values.max())
        powers /= powers.sum()
        return powers
    if activation == "sigmoid":
        with np.errstate(over="ignore"):
            sigmoid: Floats = np.reciprocal(1 + np.exp(-values))
        return sigmoid
    return values
