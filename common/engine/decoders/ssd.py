"""SSD with its post-processing inside the model (TFLite_Detection_PostProcess).

Boxes [1, N, 4] as ymin, xmin, ymax, xmax in 0..1 of the input, classes [1, N], scores [1, N] and
their count [1]. Which output is which is read from the graph, else from names: exporters differ in
the order. Formula: tensorflow/lite/kernels/detection_postprocess.cc.
"""

from collections.abc import Sequence

import numpy as np

from common.engine.decoders import Array, Decode, Settings, check_finite, real, refuse
from common.engine.decoders.boxes import to_items
from common.engine.facts import SSD_OPERATOR, SSD_ROLES
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError
from common.messages import Item

_EXPECTED = (
    "boxes [1, N, 4], classes [1, N], scores [1, N] and a count [1], made by the operator "
    f"{SSD_OPERATOR} or named so"
)


def build(outputs: Sequence[Tensor], settings: Settings) -> Decode:
    """See `common.engine.decoders.build`."""
    places: dict[str, int] = {}
    for place, output in enumerate(outputs):
        role = settings.roles.get(output.name) or _role(output.name)
        if role is None or role in places:
            raise refuse("ssd", outputs, settings, _EXPECTED)
        places[role] = place
    if set(places) != set(SSD_ROLES):
        raise refuse("ssd", outputs, settings, _EXPECTED)
    boxes_at, classes_at, scores_at, count_at = (places[role] for role in SSD_ROLES)
    most = outputs[boxes_at].shape[1] if len(outputs[boxes_at].shape) == 3 else 0
    shapes = [outputs[place].shape for place in (boxes_at, classes_at, scores_at)]
    if shapes != [(1, most, 4), (1, most), (1, most)]:
        raise refuse("ssd", outputs, settings, _EXPECTED)
    size = np.array([settings.width, settings.height] * 2, np.float32)

    def decode(values: Sequence[Array], geometry: Geometry) -> list[Item]:
        number = real(outputs[count_at], values[count_at]).reshape(-1)
        check_finite(number, settings.where)
        count = int(number[0])
        if not 0 <= count <= most:
            raise EngineError(f"{settings.where}: reports {count} boxes of at most {most}")
        scores = real(outputs[scores_at], values[scores_at][0, :count])
        check_finite(scores, settings.where)
        chosen = np.flatnonzero(scores >= settings.score)
        chosen = chosen[np.argsort(-scores[chosen], kind="stable")][: settings.max_items]
        classes = real(outputs[classes_at], values[classes_at][0, chosen])
        check_finite(classes, settings.where)
        boxes = real(outputs[boxes_at], values[boxes_at][0, chosen])[:, [1, 0, 3, 2]] * size
        return to_items(boxes, scores[chosen], classes.astype(np.intp), geometry, settings)

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
