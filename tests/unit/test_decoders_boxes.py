"""Every way in which detectors give boxes, against a slow decoder of its own: fixed tensors, as no
real model of most of them is at hand. The input is 96 wide and 64 high, so that a swap shows.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from common.engine.bundle import open_bundle
from common.engine.decoders import Decode, build
from common.engine.decoders.anchors import Anchors, make
from common.engine.model import Model
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError, UnsaidError
from common.messages import Item
from tests import onnx_files
from tests.naive_boxes import LABELS, floats, naive_overlap, naive_suppress, same, wanted

H, W = 64, 96
CELLS = 8 * 12 + 4 * 6 + 2 * 3
WHOLE = Geometry(W, H, 1.0, 1.0, 0, 0)
Floats = NDArray[np.float32]


def build_for(kind: str, values: list[Any], names: str = "abcd", **changes: Any) -> Decode:
    tensors = floats(*(value.shape for value in values), names=names)
    return build(kind, tensors, wanted(height=H, width=W, **changes))


def decoded(kind: str, values: list[Any], **changes: Any) -> list[Item]:
    before = [value.copy() for value in values]
    items = build_for(kind, values, **changes)(values, WHOLE)
    assert len(items) > 3
    for value, kept in zip(values, before, strict=True):
        assert np.array_equal(value, kept)  # outputs are not the decoder's to change
    return items


def scene(count: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Centres and sizes [N, 4] in pixels, objectness [N], classes [N, 3]; few are likely."""
    random = np.random.default_rng(seed)
    boxes = np.stack(
        [
            random.uniform(0, W, count), random.uniform(0, H, count),
            random.uniform(4, 40, count), random.uniform(4, 30, count),
        ],
        1,
    )  # fmt: skip
    return (
        boxes.astype(np.float32),
        random.uniform(0, 1, count).astype(np.float32) ** 2,
        random.uniform(0, 1, (count, 3)).astype(np.float32) ** 3,
    )


def naive(boxes: Any, things: Any, classes: Any, form: str = "xywh") -> list[Any]:
    """Boxes in pixels, as `form` has them."""
    found = []
    for box, thing, scores in zip(boxes.tolist(), things, classes.tolist(), strict=True):
        best = max(range(len(scores)), key=scores.__getitem__)
        if thing * scores[best] >= 0.4:
            a, b, c, d = box
            corners = [a - c / 2, b - d / 2, a + c / 2, b + d / 2] if form == "xywh" else box
            found.append((float(thing * scores[best]), best, corners))
    return naive_suppress(found, 0.45)


def to_corners(boxes: Floats) -> Floats:
    x, y, w, h = boxes.T
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)


SIZE = np.array([W, H, W, H], np.float32)


# --- the YOLO family ---------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("kind", "count"), [("yolov5", 3 * CELLS), ("yolov5", CELLS), ("yolo", 3 * CELLS)]
)
def test_objectness_times_class(kind: str, count: int, turned: bool, normalised: bool) -> None:
    """v5 and v7: three candidates a cell; v6, EdgeYOLO and a decoded YOLOX: one."""
    boxes, things, classes = scene(count)
    table = np.concatenate([boxes / (SIZE if normalised else 1), things[:, None], classes], 1)
    given = {"boxes": "xywh"} if kind == "yolo" else {}
    items = decoded(kind, [(table.T if turned else table)[None]], normalised=normalised, **given)
    same(items, naive(boxes, things, classes), W, H)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("thing", [False, True])
@pytest.mark.parametrize("told", ["labels", "objectness"])
def test_what_the_columns_are(told: str, thing: bool, turned: bool) -> None:
    """With one candidate a cell 5 + 3 columns may be 4 + 4: labels settle it, or the manifest."""
    boxes, things, classes = scene(CELLS)
    if not thing:
        things = np.ones_like(things)
    table = np.concatenate([boxes, *([things[:, None]] if thing else []), classes], 1)
    values = [(table.T if turned else table)[None]]
    given: dict[str, Any] = {"boxes": "xywh", "normalised": False}
    if told == "objectness":
        items = decoded("yolo", values, labels=None, objectness=thing, **given)
        assert items
        items = [
            Item(("scratch", "dent", "stain")[i.index], i.score, i.index, i.box) for i in items
        ]
    else:
        items = decoded("yolo", values, **given)
    same(items, naive(boxes, things, classes), W, H)


def test_a_single_class_of_yolov7_is_its_objectness() -> None:
    boxes, things, classes = scene(3 * CELLS)
    values = [np.concatenate([boxes, things[:, None], classes[:, :1]], 1)[None]]
    one = np.ones((len(boxes), 1), np.float32)
    same(decoded("yolov7", values, labels=("scratch",)), naive(boxes, things, one), W, H)
    assert len(decoded("yolov7", values, labels=None)) == len(naive(boxes, things, one))
    same(decoded("yolov5", values, labels=("scratch",)), naive(boxes, things, classes[:, :1]), W, H)


@pytest.mark.parametrize("turned", [False, True])
def test_labels_alone_settle_the_columns_of_another_number_of_candidates(turned: bool) -> None:
    """RT-DETR as Ultralytics exports it: [1, 300, 4 + C], normalised."""
    boxes, things, classes = scene(300)
    given: dict[str, Any] = {"boxes": "xywh", "normalised": True, "max_items": 300}
    for parts, sure in (([], np.ones(300)), ([things[:, None]], things)):
        table = np.concatenate([boxes / SIZE, *parts, classes], 1)
        values = [(table.T if turned else table)[None]]
        same(decoded("yolo", values, **given), naive(boxes, sure, classes), W, H)
    for kind, labels in (("yolo", None), ("yolo", LABELS[:2]), ("yolov5", LABELS)):
        with pytest.raises(ModelError, match="can't read"):
            build_for(kind, values, labels=labels, **given if kind == "yolo" else {})


def test_half_precision() -> None:
    boxes, _, classes = scene(CELLS)
    table = np.concatenate([boxes, classes], 1).astype(np.float16)
    kept = naive(table[:, :4].astype(float), np.ones(CELLS), table[:, 4:].astype(float))
    for turned in (table.T[None], table[None]):
        tensor = Tensor("o", turned.shape, turned.dtype)
        items = build("yolov8", [tensor], wanted(height=H, width=W))([turned], WHOLE)
        same(items, kept, W, H)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("form", ["xyxy", "yxyx", "xywh", "yxhw"])
def test_boxes_and_scores_apart(form: str, order: tuple[int, int]) -> None:
    """YOLO-NAS, and what differs from it in the order of numbers."""
    boxes, _, classes = scene(77)  # a number of candidates that no grid has
    numbers = to_corners(boxes) if form in ("xyxy", "yxyx") else boxes
    if form.startswith("y"):
        numbers = numbers[:, [1, 0, 3, 2]]
    values = [numbers[None], classes[None]]
    values = [values[place] for place in order]
    kept = naive(boxes, np.ones(77), classes)
    same(decoded("yolo", values, boxes=form, normalised=False), kept, W, H)
    if form == "xyxy":
        same(decoded("yolo-nas", values), kept, W, H)


def test_levels_of_larger_models() -> None:
    """Four strides, from 8 (P6) or from 4 (P2)."""
    for count in (CELLS + 1, 16 * 24 + CELLS):
        boxes, _, classes = scene(count)
        values = [np.concatenate([boxes, classes], 1).T[None]]
        same(decoded("yolov8", values, max_items=1000), naive(boxes, np.ones(count), classes), W, H)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_each_output_by_its_own_scale(dtype: Any) -> None:
    boxes, _, classes = scene(60)
    zero = 0 if dtype == np.uint8 else -128
    tensors, values, real = list[Tensor](), list[Any](), list[Any]()
    for part, scale in ((to_corners(boxes).clip(0, 100), 100 / 255), (classes, 1 / 256)):
        info = np.iinfo(dtype)
        stored = np.clip(np.rint(part / scale) + zero, info.min, info.max).astype(dtype)
        tensors.append(Tensor("ab"[len(tensors)], (1, *part.shape), stored.dtype, (scale, zero)))
        values.append(stored[None])
        real.append((stored.astype(np.float32) - zero) * np.float32(scale))
    items = build("yolo-nas", tensors, wanted(height=H, width=W))(values, WHOLE)
    kept = naive(real[0], np.ones(60), real[1], "xyxy")
    assert len(kept) > 3
    assert [item.score for item in items] == pytest.approx([score for score, _, _ in kept])


def test_ultraface_has_a_background() -> None:
    boxes, _, classes = scene(50)
    faces = classes[:, :1]
    values = [np.concatenate([1 - faces, faces], 1)[None], (to_corners(boxes) / SIZE)[None]]
    items = decoded("ultraface", values, labels=("scratch",))
    same(items, naive(boxes, np.ones(50), faces), W, H)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_logits(activation: str) -> None:
    boxes, _, classes = scene(60)
    logits = np.log(classes / (1 - classes))
    if activation == "softmax":
        logits[7] += 100  # its powers are infinite, their shares are not
        powers = np.exp(logits.astype(np.longdouble))
        classes = powers / powers.sum(1, keepdims=True)
    values = [boxes[None], logits[None]]
    given: dict[str, Any] = {"boxes": "xywh", "normalised": False}
    items = decoded("yolo", values, activation=activation, **given)
    same(items, naive(boxes, np.ones(60), classes), W, H)
    with pytest.raises(EngineError, match=r"scores reach from .*'none'; are these logits"):
        build_for("yolo", values, **given)(values, WHOLE)


def test_the_wrong_unit_is_told() -> None:
    boxes, _, classes = scene(60)
    for normalised, numbers in ((True, boxes), (False, boxes / SIZE)):
        values = [numbers[None], classes[None]]
        decode = build_for("yolo", values, boxes="xywh", normalised=normalised)
        with pytest.raises(EngineError, match=f"give normalised = {str(not normalised).lower()} "):
            decode(values, WHOLE)


# --- SSD with anchors --------------------------------------------------------------------------

NUMBERS: dict[str, Any] = {"strides": [16, 32, 64], "scales": [0.2, 0.8], "ratios": [1.0, 2.0, 0.5]}


def naive_anchors() -> list[tuple[float, float, float, float]]:
    """Centre x, y, width, height in pixels, as create_ssd_anchors and tile_anchors make them."""
    shapes = [
        [(0.1, 1.0), (0.2, 2.0), (0.2, 0.5)],
        [(0.5, 1.0), (0.5, 2.0), (0.5, 0.5), (math.sqrt(0.5 * 0.8), 1.0)],
        [(0.8, 1.0), (0.8, 2.0), (0.8, 0.5), (math.sqrt(0.8 * 1.0), 1.0)],
    ]
    made = []
    for (rows, columns), layer in zip([(4, 6), (2, 3), (1, 2)], shapes, strict=True):
        for row in range(rows):
            for column in range(columns):
                for scale, ratio in layer:
                    width, height = scale * math.sqrt(ratio) * H, scale / math.sqrt(ratio) * H
                    made.append(
                        ((column + 0.5) / columns * W, (row + 0.5) / rows * H, width, height)
                    )
    return made


@pytest.mark.parametrize("form", ["xywh", "yxhw"])
@pytest.mark.parametrize("given", ["numbers", "file"])
@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_ssd_with_anchors(tmp_path: Path, activation: str, given: str, form: str) -> None:
    """faster_rcnn_box_coder's formula, a box at a time."""
    anchors = naive_anchors()
    random = np.random.default_rng(5)
    codes = random.normal(0, 2, (len(anchors), 4))  # tx, ty, tw, th
    scores = random.normal(-1, 3, (len(anchors), 4))  # of background and three classes
    boxes = [
        (ax + tx / 10 * aw, ay + ty / 10 * ah, math.exp(tw / 5) * aw, math.exp(th / 5) * ah)
        for (tx, ty, tw, th), (ax, ay, aw, ah) in zip(codes.tolist(), anchors, strict=True)
    ]
    if activation == "softmax":
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    else:
        shares = 1 / (1 + np.exp(-scores))
    order = [1, 0, 3, 2] if form == "yxhw" else [0, 1, 2, 3]
    if given == "file":
        lines = [np.array(anchor)[order] / np.array([W, H, W, H])[order] for anchor in anchors]
        text = "\n".join(",".join(map(repr, line.tolist())) for line in lines)
        (tmp_path / "anchors.csv").write_text(text + "\n\n")
        made = Anchors(file="anchors.csv")
    else:
        made = Anchors(**NUMBERS)
    given_scores = shares if activation == "none" else scores
    values = [codes[:, order].astype(np.float32)[None], given_scores.astype(np.float32)[None]]
    items = decoded(
        "ssd-anchors", values, names=["loc", "cls"], activation=activation, boxes=form,
        anchors=made, folder=tmp_path,
    )  # fmt: skip
    same(items, naive(np.array(boxes), np.ones(len(boxes)), shares[:, 1:]), W, H)


def test_anchors_are_as_high_as_wide_where_the_input_is_not() -> None:
    for height, width in ((H, W), (W, H)):
        made = make(Anchors(**NUMBERS), Path(), False, height, width)
        assert made[0, 2:] == pytest.approx((6.4, 6.4))
    assert len(make(Anchors(**NUMBERS, reduced=False), Path(), False, H, W)) == 4 * (24 + 6 + 2)


def test_the_anchors_of_the_real_ssd(shared_data: Path) -> None:
    """Those of its pipeline.config are the ones in its file, and its raw outputs decoded here are
    what its own post-processing makes of them.
    """
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    path = shared_data / "models/tflite/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29.tflite"
    with pytest.warns(UserWarning, match="experimental_preserve_all_tensors"):
        engine = litert.Interpreter(str(path), experimental_preserve_all_tensors=True)
    engine.allocate_tensors()
    golden = np.load(shared_data / f"golden/{path.name}.npz")
    engine.set_tensor(engine.get_input_details()[0]["index"], golden["input"])
    engine.invoke()
    made = {detail["name"]: detail for detail in engine.get_tensor_details()}
    tensors, values = [], []
    for name in ("Squeeze", "convert_scores", "anchors"):
        values.append(engine.get_tensor(made[name]["index"]))
        tensors.append(Tensor(name, values[-1].shape, values[-1].dtype, made[name]["quantization"]))
    anchors = Anchors(
        strides=[16, 32, 64, 128, 256, 512], scales=(0.2, 0.95), ratios=[1, 2, 0.5, 3, 1 / 3]
    )
    ours = make(anchors, Path(), False, 300, 300)
    step = made["anchors"]["quantization"][0] * 300
    theirs = values.pop().astype(float) * step
    assert np.abs(ours[:, [1, 0, 3, 2]] - theirs).max() <= step
    settings = wanted(
        labels=None, height=300, width=300, boxes="yxhw", anchors=anchors, activation="none",
        iou=0.6, score=0.3, max_items=10,
    )  # fmt: skip
    items = build("ssd-anchors", tensors[:2], settings)(values, Geometry(300, 300, 1, 1, 0, 0))
    boxes, classes, scores, _ = (
        engine.get_tensor(detail["index"])[0] for detail in engine.get_output_details()
    )
    theirs_too = 0
    for box, index, score in zip(boxes[:, [1, 0, 3, 2]] * 300, classes, scores, strict=True):
        if score >= 0.3:
            item = next(item for item in items if item.index == index and item.score == score)
            assert item.box == pytest.approx(box.clip(0, 300), abs=2)
            theirs_too += 1
    assert theirs_too == 3
    # Theirs lets one class suppress another: a chair that is nearly the cat on it.
    (other,) = (item for item in items if item.score not in scores)
    assert other.box is not None
    assert items[0].box is not None
    assert naive_overlap(other.box, items[0].box) > 0.6


# --- chosen by the model -----------------------------------------------------------------------

CHOSEN = np.array(  # x1, y1, x2, y2, score, class
    [
        [10, 8, 40, 30, 0.5, 1], [50, 20, 90, 60, 0.9, 0], [-4, 30, 20, 70, 0.8, 2],
        [52, 20, 90, 60, 0.7, 0], [1, 1, 9, 9, 0.3, 0],
    ],
    np.float32,
)  # fmt: skip


def naive_chosen(rows: Floats = CHOSEN) -> list[Any]:
    found = [(float(row[4]), int(row[5]), row[:4]) for row in rows if row[4] >= 0.4]
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ("x1 y1 x2 y2 score class", (1, 5, 6)),  # YOLOv10, Ultralytics with nms=True
        ("image x1 y1 x2 y2 score class", (5, 7)),  # YOLO-NAS flat
        ("image x1 y1 x2 y2 class score", (5, 7)),  # YOLOv7's own ONNX
        ("class score x1 y1 x2 y2", (5, 6)),  # PaddleDetection
    ],
)
def test_rows_by_their_columns(columns: str, shape: tuple[int, ...]) -> None:
    names = columns.split()
    order = [["x1", "y1", "x2", "y2", "score", "class", "image"].index(name) for name in names]
    table = np.concatenate([CHOSEN, np.zeros((5, 1), np.float32)], 1)[:, order].reshape(shape)
    items = decoded("nms", [table], columns=names, normalised=False)
    same(items, naive_chosen(), W, H)
    two = build_for("nms", [table], columns=names, normalised=False, max_items=2)
    assert two([table], WHOLE) == items[:2]


def test_yolov8_with_nms_built_in() -> None:
    table = np.zeros((1, 300, 6), np.float32)
    table[0, :5] = CHOSEN
    same(decoded("yolov8", [table]), naive_chosen(), W, H)
    two = np.full((1, CELLS, 6), 0.9, np.float32)  # a box and two classes a cell: no such rows
    two[0, :, :4] = [30, 30, 10, 10]
    (item,) = build_for("yolov8", [two], labels=LABELS[:2])([two], WHOLE)
    assert item.box == pytest.approx((25, 25, 35, 35))
    empty = build_for("yolov8", [table], score=0.0)
    assert empty([np.zeros((1, 300, 6), np.float32)], WHOLE) == []


def test_detection_output_ends_at_a_negative_image() -> None:
    """OpenVINO: image, class, score, x1, y1, x2, y2; what is left of an older picture follows."""
    table = np.zeros((1, 1, 200, 7), np.float32)
    table[0, 0, :5] = np.concatenate([np.zeros((5, 1)), CHOSEN[:, [5, 4]], CHOSEN[:, :4] / SIZE], 1)
    table[0, 0, 5] = [-1, 0, 0, 0, 0, 0, 0]
    table[0, 0, 6] = [0, 1, 0.99, 0.1, 0.1, 0.5, 0.5]
    same(decoded("detection-output", [table]), naive_chosen(), W, H)
    table[0, 0, 0, 0] = -1
    assert build_for("detection-output", [table])([table], WHOLE) == []


EFFICIENT_NMS = ["num_dets", "det_boxes", "det_scores", "det_classes"]


@pytest.mark.parametrize("form", ["xyxy", "yxyx"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        EFFICIENT_NMS,
        ["num_detections", "detection_boxes", "detection_scores", "detection_classes"],
        ["num_predictions", "pred_boxes", "pred_scores", "pred_classes"],  # YOLO-NAS
    ],
)
def test_efficient_nms(names: list[str], normalised: bool, form: str) -> None:
    boxes = CHOSEN[:, :4] / (SIZE if normalised else 1)
    boxes = boxes[:, [1, 0, 3, 2]] if form == "yxyx" else boxes
    values: list[Any] = [
        np.array([[4]], np.int32), boxes[None], CHOSEN[None, :, 4], CHOSEN[None, :, 5].astype("i4"),
    ]  # fmt: skip
    given: dict[str, Any] = {"names": names, "boxes": form, "normalised": normalised}
    items = decoded("nms", values, **given)
    same(items, naive_chosen(CHOSEN[:4]), W, H)
    assert build_for("nms", values, **given, max_items=2)(values, WHOLE) == items[:2]
    values[0][:] = 6
    with pytest.raises(EngineError, match="reports 6 boxes of at most 5"):
        build_for("nms", values, **given)(values, WHOLE)
    same(decoded("nms", values[1:], **given | {"names": names[1:]}), naive_chosen(), W, H)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "shapes", "place", "given"),
    [
        ("nms", [(1, 9, 6)], (0, 3, 4), {"columns": ["x1", "y1", "x2", "y2", "score", "class"]}),
        ("nms", [(1, 9, 6)], (0, 3, 1), {"columns": ["x1", "y1", "x2", "y2", "score", "class"]}),
        ("detection-output", [(1, 1, 9, 7)], (0, 0, 3, 2), {}),
        ("yolo", [(1, 9, 3), (1, 9, 4)], (0, 3, 1), {"boxes": "xyxy"}),
        ("yolo", [(1, 9, 4), (1, 9, 3)], (0, 3, 1), {"boxes": "xyxy"}),
        ("yolo", [(1, 9, 3), (1, 9, 4)], (0, 3, 1), {"boxes": "xywh", "activation": "softmax"}),
        ("yolo", [(1, 9, 3), (1, 9, 4)], (0, 3, 1), {"boxes": "xywh", "activation": "sigmoid"}),
    ],
)
def test_nan_is_never_nothing_seen(
    kind: str, shapes: list[Any], place: Any, given: dict[str, Any], bad: float
) -> None:
    values = [np.full(shape, 0.7, np.float32) for shape in shapes]
    values[0][place] = bad
    if given.get("activation") != "sigmoid" or math.isnan(bad):  # that of infinity is 1
        with pytest.raises(EngineError, match="NaN or infinity; the frame was not judged"):
            build_for(kind, values, **{"normalised": True} | given)(values, WHOLE)


# --- asked for, refused ------------------------------------------------------------------------

TWO = [np.zeros((1, 50, 4), np.float32), np.zeros((1, 50, 3), np.float32)]


@pytest.mark.parametrize(
    ("kind", "values", "given", "flag"),
    [
        ("yolo", TWO, {}, "--boxes"),
        ("yolo", TWO, {"boxes": "xyxy"}, "--normalised"),
        ("yolo", [np.zeros((1, CELLS, 9))], {"labels": None}, "--objectness"),
        ("ssd-anchors", TWO, {"labels": LABELS[:2]}, "--boxes"),
        ("ssd-anchors", TWO, {"labels": LABELS[:2], "boxes": "xyxy"}, "--boxes"),
        ("ssd-anchors", TWO, {"labels": LABELS[:2], "boxes": "xywh"}, "--anchors"),
        (
            "ssd-anchors",
            [np.zeros((1, 104, 4)), np.zeros((1, 104, 3))],
            {"labels": LABELS[:2], "boxes": "xywh", "anchors": Anchors(**NUMBERS)},
            "--activation",
        ),
        ("nms", [np.zeros((1, 50, 6))], {}, "--columns"),
        ("nms", [np.zeros((1, 50, 6))], {"columns": "abcdef"}, "--normalised"),
    ],
)
def test_asked_for(kind: str, values: list[Any], given: dict[str, Any], flag: str) -> None:
    if given.get("columns"):
        given = {"columns": ["x1", "y1", "x2", "y2", "score", "class"]}
    with pytest.raises(UnsaidError, match=f"decoder {kind}: nothing tells .*`{flag[2:]}`") as error:
        build_for(kind, values, **given)
    assert list(error.value.missing) == [flag]


@pytest.mark.parametrize(
    ("kind", "shapes", "given", "says"),
    [
        (
            "yolov5",
            [(1, 3 * CELLS + 1, 8)],
            {},
            rf"N = {CELLS} \(or {3 * CELLS} with an objectness",
        ),
        ("yolov8", [(1, 3 * CELLS, 7)], {}, "expected one"),  # three a cell have an objectness
        ("yolov5", [(1, CELLS, 9)], {}, "has 4 classes but 3 labels"),
        ("yolov8", [(2, 7, CELLS)], {}, r"\[2, 7, 126\]"),
        ("yolo", [(1, 7, 7)], {}, "can't read"),
        ("yolo-nas", [(1, 50, 4), (1, 51, 3)], {}, r"boxes \[1, N, 4\] and scores \[1, N, C\]"),
        ("yolo-nas", [(1, 50, 4), (1, 50, 4)], {"labels": None}, "can't read"),  # which is which?
        ("yolo-nas", [(1, 50, 4), (1, 50, 1), (1, 50, 3)], {}, "can't read"),
        ("yolo-nas", [(1, 50, 4)] * 4, {}, "can't read"),
        ("ultraface", [(1, CELLS, 7)], {}, r"expected boxes \[1, N, 4\] and scores"),
        ("ultraface", [(1, 50, 2), (1, 50, 4)], {}, "has 1 classes but 3 labels"),
        (
            "ssd-anchors",
            [(1, 50, 4), (1, 50, 4)],
            {"names": ["box", "class"], "boxes": "xywh", "anchors": Anchors(**NUMBERS)},
            r"has 50 boxes, but \[decoder.anchors\] makes 104",
        ),
        ("detection-output", [(1, 1, 200, 6)], {}, r"expected one \[1, K, 7\]"),
        ("detection-output", [(2, 1, 200, 7)], {}, r"expected one \[1, K, 7\]"),
        ("nms", [(1, 50, 4), (1, 50)], {"boxes": "xyxy"}, "expected boxes"),
    ],
)
def test_refused(kind: str, shapes: list[Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_for(kind, [np.zeros(shape) for shape in shapes], **given)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a.csv: anchors can't be read: No such file"),
        ("", r"a.csv: holds \[0\]; expected four numbers a line"),
        ("1,2,3\n4,5,6", r"a.csv: holds \[2, 3\]"),
        ("1,2,3,4\n5", "a.csv: .*; expected four numbers a line, with commas"),
        ("x,y,w,h", "could not convert"),
    ],
)
def test_a_wrong_file_of_anchors(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_text(content)
    given: dict[str, Any] = {"boxes": "xywh", "anchors": Anchors(file="a.csv"), "folder": tmp_path}
    with pytest.raises(ModelError, match=says):
        build_for("ssd-anchors", TWO, labels=LABELS[:2], **given)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("boxes = 'xyxyxy'", "decoder.boxes = 'xyxyxy': Invalid enum"),
        ("columns = ['x1', 'y1', 'x2', 'y2', 'score', 'score']", "columns = .*each once"),
        ("columns = ['x1', 'y1', 'x2', 'y2', 'score', 'image']", "columns = .*each once"),
        ("anchors = {}", "expected either `file`, or `strides`, `scales` and `ratios`"),
        ("anchors = {file = 'a.csv', ratios = [1.0]}", "expected either `file`"),
        ("anchors = {file = '../a.csv'}", "outside the bundle"),
        ("anchors = {strides = [8], scales = [0.2, 0.0], ratios = [1.0]}", "Expected `float` > 0"),
        (
            "boxes = 'xyxy'",
            "classification has no use for `boxes` of .*; expected activation",
        ),
    ],
)
def test_the_manifest(tmp_path: Path, key: str, says: str) -> None:
    onnx_files.classifier(tmp_path / "m.onnx")
    (tmp_path / "manifest.toml").write_text(onnx_files.manifest("m", "1", 1) + key + "\n")
    with pytest.raises(ModelError, match=says):
        Model.load(open_bundle(tmp_path))


def test_anchors_through_a_bundle(tmp_path: Path) -> None:
    """From a manifest to items: the file of anchors is read beside it."""
    table = np.array([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]], np.float32)[None]
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["b"], ["boxes"]),
            helper.make_node("Identity", ["s"], ["scores"]),
        ],
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, H, W])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("boxes", [1, 2, 4]), ("scores", [1, 2, 2]))
        ],
        [
            numpy_helper.from_array(np.ascontiguousarray(part), name)
            for name, part in (("b", table[..., :4]), ("s", table[..., 4:]))
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    onnx.save(made, str(tmp_path / "m.onnx"))
    (tmp_path / "anchors.csv").write_text("0.5,0.25,0.5,0.25\n0.1,0.1,0.1,0.1\n")
    manifest = onnx_files.manifest("m", "1", 1).replace("classification", "detection", 1)
    (tmp_path / "manifest.toml").write_text(
        manifest.replace('kind = "classification"', 'kind = "ssd-anchors"')
        + 'boxes = "yxhw"\nactivation = "none"\nanchors = {file = "anchors.csv"}\n'
    )
    model = Model.load(open_bundle(tmp_path))
    geometry = model.prepare(np.zeros((H, W, 3), np.uint8), 0)
    (item,) = model.decode(model.infer(0), geometry)
    assert item.box == pytest.approx((W * (0.25 - 0.125), H * 0.25, W * (0.25 + 0.125), H * 0.75))
    model.close()
