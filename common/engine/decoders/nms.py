"""Detections that the model has chosen itself, non-maximum suppression done.

Boxes [1, K, 4], classes [1, K], scores [1, K] and mostly their count [1]: of TensorFlow's
TFLite_Detection_PostProcess (kind `ssd`: y1, x1, y2, x2 in 0..1; tensorflow/lite/kernels/
detection_postprocess.cc), or of TensorRT's EfficientNMS plugin and the exporters that took its
names over, whose boxes are as the model's were (NVIDIA/TensorRT, plugin/efficientNMSPlugin).
Which output is which is read from the graph, else from names: exporters differ in the order.

Or one output, a row a detection, with `columns` in the order that the manifest tells:
YOLOv10 x1 y1 x2 y2 score class; YOLO-NAS flat image x1 y1 x2 y2 score class; YOLOv7's ONNX
image x1 y1 x2 y2 class score; OpenVINO's DetectionOutput-1 and -8 (kind `detection-output`) image
class score x1 y1 x2 y2 in 0..1. The first row of an image below 0 ends the list.
"""

from collections.abc import Sequence

import numpy as np

from common.engine.decoders import (
    Array,
    Decode,
    Settings,
    ask,
    check_finite,
    real,
    refuse,
)
from common.engine.decoders.boxes import best_of, to_items, to_pixels
from common.engine.facts import SSD_OPERATOR, SSD_ROLES
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError
from common.messages import Item


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    if len(outputs) == 1 and settings.kind != "ssd":
        return _rows(outputs[0], settings)
    expected = (
        "boxes [1, K, 4], classes [1, K], scores [1, K] and a count [1], "
        f"made by the operator {SSD_OPERATOR} or named so"
    )
    places: dict[str, int] = {}
    for place, output in enumerate(outputs):
        role = settings.roles.get(output.name) or _role(output.name)
        if role is None or role in places:
            raise refuse(settings.kind, outputs, settings, expected)
        places[role] = place
    if not {"boxes", "classes", "scores"} <= places.keys():
        raise refuse(settings.kind, outputs, settings, expected)
    boxes_at, classes_at, scores_at = (places[role] for role in ("boxes", "classes", "scores"))
    shapes = [outputs[place].shape for place in (boxes_at, classes_at, scores_at)]
    most = shapes[1][-1] if shapes[1] else 0
    if shapes != [(1, most, 4), (1, most), (1, most)]:
        raise refuse(settings.kind, outputs, settings, expected)
    if settings.boxes is None:
        raise ask(settings, "in which order the corners of its boxes come", "boxes", "xyxy or yxyx")
    order = [1, 0, 3, 2] if settings.boxes == "yxyx" else [0, 1, 2, 3]
    pixels = to_pixels(settings)

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        count = most = values[scores_at].shape[1]
        if "count" in places:
            number = real(outputs[places["count"]], values[places["count"]]).reshape(-1)
            check_finite(number, settings.where)
            count = int(number[0])
        if not 0 <= count <= most:
            raise EngineError(f"{settings.where}: reports {count} boxes of at most {most}")
        scores = real(outputs[scores_at], values[scores_at][0, :count])
        check_finite(scores, settings.where)
        chosen = best_of(scores, settings.score)[: settings.max_items]
        classes = real(outputs[classes_at], values[classes_at][0, chosen])
        check_finite(classes, settings.where)
        boxes = pixels(real(outputs[boxes_at], values[boxes_at][0, chosen])[:, order])
        return to_items(boxes, scores[chosen], classes.astype(np.intp), geometry, settings)

    return decode


def _rows(output: Tensor, settings: Settings) -> Decode:
    columns, width = settings.columns, output.shape[-1]
    if columns is None:
        raise ask(
            settings,
            f"what the {width} columns of {output} are",
            "columns",
            "their names in order, image x1 y1 x2 y2 score class among them",
        )
    if len(columns) != width or set(output.shape[:-2]) > {1}:
        raise refuse(settings.kind, [output], settings, f"one [1, K, {len(columns)}]: {columns}")
    image = columns.index("image") if "image" in columns else None
    score, kind = columns.index("score"), columns.index("class")
    corners = [columns.index(name) for name in ("x1", "y1", "x2", "y2")]
    pixels = to_pixels(settings)

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        table = real(output, values[0].reshape(-1, width))
        check_finite(table, settings.where)
        if image is not None:
            table = table[: np.append(table[:, image] < 0, True).argmax()]
        scores = table[:, score]
        chosen = best_of(scores, settings.score)[: settings.max_items]
        table = table[chosen]
        boxes = pixels(table[:, corners])
        return to_items(boxes, scores[chosen], table[:, kind].astype(np.intp), geometry, settings)

    return decode


def _role(name: str) -> str | None:
    """The role that an output's name tells."""
    if name.startswith(SSD_OPERATOR):
        suffix = name.removeprefix(SSD_OPERATOR)
        return dict(zip(("", ":1", ":2", ":3"), SSD_ROLES, strict=True)).get(suffix)
    lower = name.lower()
    for role, words in (
        ("count", ("num", "count")),  # first: num_detections, number_of_boxes
        ("scores", ("score",)),
        ("classes", ("class", "categor")),
        ("boxes", ("box", "location")),
    ):
        if any(word in lower for word in words):
            return role
    return None
