"""Anomaly maps and scores, in the output sets of Anomalib's exports (PaDiM, PatchCore and others).

    anomaly_map  float [1, 1, H, W]    how unusual each place is; any H and W, over the whole input
    pred_score   float [1]             of the whole picture; where absent, the map's largest value
    pred_label   bool or integer [1]   whether the picture is anomalous; newer exports
    pred_mask    bool or integer [1, 1, H, W]    which places are; newer exports

Axes of size 1 may be more or fewer. Outputs are known by these names, else by type and shape.

An anomalous picture gives one item without a box, then one for each region of the map at or above
the pixel threshold (8-connected, at least LEAST_SHARE of the map, the largest where all would be
more than `max_items`), best first. A normal picture gives none, whatever its map has.

Scores are scaled as Anomalib does (min-max normalisation: (s - threshold) / (maximum - minimum) +
0.5, clipped to 0..1), so that 0.5 is the threshold. A model with `pred_label` has done so itself:
its label decides, its scores have to be 0..1, and its mask counts unless there is a
`pixel_threshold`.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from common.engine.decoders import (
    ANOMALY,
    Array,
    Decode,
    Floats,
    Settings,
    check_finite,
    real,
    refuse,
)
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError, UnsaidError
from common.messages import Item

LEAST_SHARE = 0.0001  # of the map; what is smaller is noise
_NAMES = {"anomaly_map", "pred_score", "pred_label", "pred_mask"}
_ASKED = {
    "--threshold": "the score from which on a picture is anomalous",
    "--minimum": "the least score in validation",
    "--maximum": "the largest score in validation",
}
_ASK = (
    f"give {', '.join(_ASKED.values())}, as the model counts (`threshold`, `minimum` and `maximum` "
    f"in [decoder], or {', '.join(_ASKED)})"
)
_OWN = "name `outputs` in [decoder] without it, and give threshold, minimum and maximum"


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    places, where = _places(outputs, settings), settings.where
    own = "pred_label" in places
    if own and {settings.threshold, settings.minimum, settings.maximum} != {None}:
        raise ModelError(
            f"{where}: decides itself, in its output {outputs[places['pred_label']]}; {_OWN}, or "
            "leave threshold, minimum and maximum out"
        )
    threshold, span = (0.5, 1.0) if own else bounds(settings)
    edge = threshold if settings.pixel_threshold is None else settings.pixel_threshold

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        read = {name: real(outputs[place], values[place]) for name, place in places.items()}
        for numbers in read.values():
            check_finite(numbers, where)
        score = float(read["pred_score" if "pred_score" in read else "anomaly_map"].max())
        if own and not -0.01 <= score <= 1.01:
            raise EngineError(f"{where}: score {score:.3g} is not normalised to 0..1; {_OWN}")
        if not (read["pred_label"].any() if own else score >= threshold):
            return []
        level = max(0.5, scaled(score, threshold, span))
        heat = _plane(read["anomaly_map"], where) if "anomaly_map" in read else None
        mask = None if heat is None else heat >= edge
        if "pred_mask" in read and (heat is None or settings.pixel_threshold is None):
            mask = _plane(read["pred_mask"], where) != 0
        regions = []
        if mask is not None:
            boxes, peaks = _regions(mask, heat, settings)
            for box, peak in zip(geometry.to_picture(boxes).tolist(), peaks, strict=True):
                if box[0] < box[2] and box[1] < box[3]:  # else beside a letterboxed picture
                    sure = level if peak is None else max(0.5, scaled(peak, edge, span))
                    regions.append(Item(ANOMALY, sure, 0, tuple(box)))
        regions.sort(key=lambda item: -item.score)
        return [
            item for item in (Item(ANOMALY, level, 0), *regions) if item.score >= settings.score
        ]

    return decode


def bounds(settings: Settings) -> tuple[float, float]:
    """The threshold, and how far apart the least and largest score are.

    Raises:
        ModelError: they are not known.
    """
    threshold, least, most = settings.threshold, settings.minimum, settings.maximum
    if threshold is None or least is None or most is None:
        raise UnsaidError(
            f"{settings.where}: nothing tells which scores are anomalous; {_ASK}", _ASKED
        )
    if not least < most:
        raise ModelError(
            f"{settings.where}: minimum = {least:g} and maximum = {most:g}; expected the larger "
            "one as maximum"
        )
    return threshold, most - least


def scaled(score: float, threshold: float, span: float) -> float:
    """0..1, 0.5 at the threshold."""
    return min(max((score - threshold) / span + 0.5, 0.0), 1.0)


def _places(outputs: Sequence[Tensor], settings: Settings) -> dict[str, int]:
    """Which output is which."""
    names = [output.name for output in outputs]
    if not set(names) <= _NAMES:
        names = [_name(output) for output in outputs]
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names) or not {"anomaly_map", "pred_score"} & places.keys():
        raise refuse(
            "anomaly", outputs, settings,
            "anomaly_map [1, 1, H, W] or pred_score [1], or both, and pred_label and pred_mask "
            "where the model has them; name those to be read as `outputs` in [decoder]",
        )  # fmt: skip
    return places


def _name(output: Tensor) -> str:
    """By type and shape; an output that is something else keeps its name."""
    decided = output.dtype.kind in "biu" and output.quantisation is None
    sides = [size for size in output.shape if size != 1]
    if not sides:
        return "pred_label" if decided else "pred_score"
    if len(sides) == 2:
        return "pred_mask" if decided else "anomaly_map"
    return output.name


def _plane(values: Floats, where: str) -> Floats:
    """[H, W]"""
    plane = values.squeeze()
    if plane.ndim != 2:
        raise EngineError(f"{where}: an anomaly map of shape {list(values.shape)}; expected one")
    return plane


def _regions(
    mask: NDArray[np.bool_], heat: Floats | None, settings: Settings
) -> tuple[Floats, list[float | None]]:
    """Boxes [N, 4] in pixels of the input, and the highest value of the map in each."""
    height, width = mask.shape
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA].copy()
    area[0] = 0  # what is in no region
    largest = np.argsort(-area, kind="stable")[: settings.max_items - 1]
    largest = largest[area[largest] >= max(1.0, LEAST_SHARE * mask.size)]
    boxes = stats[largest, :4].astype(np.float32)  # left, top, width, height
    boxes[:, 2:] += boxes[:, :2]
    peaks: list[float | None] = [None] * len(largest)
    if heat is not None:
        for place, part in enumerate(largest):
            left, top, wide, high = stats[part, :4]
            window = slice(top, top + high), slice(left, left + wide)
            peaks[place] = float(heat[window][parts[window] == part].max())
    boxes *= np.array([settings.width / width, settings.height / height] * 2, np.float32)
    return boxes, peaks
