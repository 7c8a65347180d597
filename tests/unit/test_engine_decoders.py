"""Decoders against the published formulas written out slowly, and against what must be refused."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.engine.decoders import DECODERS, Decode, build
from common.engine.decoders.boxes import best_of, suppress
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError
from tests.naive_boxes import (
    CELLS,
    FLOAT,
    SIDE,
    WHOLE,
    floats,
    naive_suppress,
    same,
    wanted,
)


def yolox_raw(seed: int = 0, classes: int = 3) -> NDArray[np.float32]:
    """A plausible raw output: few cells are sure of something."""
    random = np.random.default_rng(seed)
    raw = random.normal(0, 1, (1, CELLS, 5 + classes)).astype(np.float32)
    raw[..., 4:] = random.uniform(0, 1, (1, CELLS, 1 + classes)) ** 2
    return raw


def naive_yolox(raw: NDArray[np.float32], score: float = 0.4) -> list[Any]:
    """YOLOX's demo_postprocess and multiclass_nms, a cell at a time."""
    found = []
    row = iter(raw[0].tolist())
    for stride in (8, 16, 32):
        for y, x in itertools.product(range(SIDE // stride), repeat=2):
            dx, dy, dw, dh, objectness, *classes = next(row)
            best = max(range(len(classes)), key=classes.__getitem__)
            if objectness * classes[best] >= score:
                cx, cy = (x + dx) * stride, (y + dy) * stride
                w, h = math.exp(dw) * stride, math.exp(dh) * stride
                corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                found.append((objectness * classes[best], best, corners))
    return naive_suppress(found, 0.45)


# --- non-maximum suppression -------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.sampled_from([0.01, 0.3, 0.45, 0.9]))
def test_suppression_is_the_greedy_one_by_class(seed: int, count: int, iou: float) -> None:
    random = np.random.default_rng(seed)
    centres = random.uniform(5, 60, (count, 4)).astype(np.float32)
    scores = random.permutation(np.linspace(0.1, 0.9, count)).astype(np.float32)
    classes = random.integers(0, 3, count)
    corners = np.concatenate(
        [centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], 1
    )
    kept = suppress(corners, scores, classes, wanted(iou=iou))
    found = list(zip(scores.tolist(), classes.tolist(), corners.tolist(), strict=True))
    assert scores[kept].tolist() == [score for score, _, _ in naive_suppress(found, iou)]


def test_suppression_is_bounded() -> None:
    scores = np.linspace(0.2, 0.9, 5000, dtype=np.float32)
    chosen = best_of(scores, 0.3)
    assert chosen.tolist() == list(range(4999, 3999, -1))
    boxes = np.ones((1000, 4), np.float32)
    boxes[:, 0] = np.arange(1000) * 4
    boxes[:, 2] = boxes[:, 0] + 1
    boxes[:, 3] = 2
    kept = suppress(boxes, scores[chosen], np.zeros(1000, np.intp), wanted(max_items=7))
    assert kept.tolist() == list(range(7))


def test_best_of_keeps_the_order_of_equals() -> None:
    scores = np.array([0.5, 0.9, 0.2, 0.5, 0.9], np.float32)
    assert best_of(scores, 0.5).tolist() == [1, 4, 0, 3]
    many = best_of(np.full(5000, 0.5, np.float32), 0.5)
    assert len(many) == 1000
    assert (np.diff(many) > 0).all()


def test_classes_far_out_or_below_0_leave_each_other_alone() -> None:
    """Classes are parted by moving them beyond the largest coordinate."""
    boxes = np.array(
        [[-1e30, -1e30, 1e30, 1e30], [8, 8, 20, 20], [8, 8, 20, 21], [40, 40, 50, 50]], np.float32
    )
    scores, classes = np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([0, 1, 1, 1])
    assert suppress(boxes, scores, classes, wanted()).tolist() == [0, 1, 3]
    boxes = np.array([[50, 50, 60, 60], [-11, -11, -1, -1]], np.float32)
    assert suppress(boxes, scores[:2], classes[:2], wanted()).tolist() == [0, 1]


# --- YOLOX -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_yolox_is_its_formula(seed: int) -> None:
    raw = yolox_raw(seed)
    decode = build("yolox", floats(raw.shape), wanted())
    items = decode([raw], WHOLE)
    assert len(items) > 5
    same(items, naive_yolox(raw))
    assert decode([raw], WHOLE) == items  # the outputs were not changed


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_yolox_in_three_outputs_of_any_order(order: tuple[int, ...]) -> None:
    raw = yolox_raw()
    parts = [raw[..., :4], raw[..., 4:5], raw[..., 5:]]
    shuffled = [parts[place] for place in order]
    decode = build("yolox", floats(*(part.shape for part in shuffled)), wanted())
    same(decode(shuffled, WHOLE), naive_yolox(raw))


def test_yolox_outputs_of_equal_shape_are_told_apart_by_name() -> None:
    raw = yolox_raw(classes=1)
    parts = [raw[..., 5:], raw[..., 4:5], raw[..., :4]]
    tensors = [
        Tensor(name, part.shape, FLOAT)
        for name, part in zip(("cls_preds", "obj_preds", "reg_preds"), parts, strict=True)
    ]
    same(build("yolox", tensors, wanted(labels=("scratch",)))(parts, WHOLE), naive_yolox(raw))
    unnamed = floats(*(part.shape for part in parts))
    with pytest.raises(ModelError, match="decoder yolox can't read the outputs a"):
        build("yolox", unnamed, wanted(labels=None))


def test_yolox_int8_dequantises_each_output_by_its_own_scale() -> None:
    raw = yolox_raw()
    raw[..., :4] = raw[..., :4].clip(-2, 2)
    scales = [(4 / 255, 0), (1 / 256, -128), (1 / 256, -128)]
    parts, restored = [], []
    tensors: list[Tensor] = []
    for (scale, zero), part in zip(
        scales, (raw[..., :4], raw[..., 4:5], raw[..., 5:]), strict=True
    ):
        stored = np.clip(np.rint(part / scale) + zero, -128, 127).astype(np.int8)
        parts.append(stored)
        tensors.append(Tensor(f"t{len(tensors)}", part.shape, stored.dtype, (scale, zero)))
        restored.append((stored.astype(np.float32) - zero) * np.float32(scale))
    items = build("yolox", tensors, wanted())(parts, WHOLE)
    same(items, naive_yolox(np.concatenate(restored, 2)))


# --- YOLOv8 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_yolov8_is_its_formula(transposed: bool, quantised: bool) -> None:
    random = np.random.default_rng(3)
    raw = np.concatenate(
        [random.uniform(2, 60, (CELLS, 4)), random.uniform(0, 1, (CELLS, 3)) ** 3], 1
    )
    scale = 1 / 255 if quantised else None
    stored: NDArray[Any] = raw.astype(np.float32)
    if scale:  # as Ultralytics exports to TFLite: one scale for all, so boxes are normalised
        raw[:, :4] /= SIDE
        stored = np.rint(raw / scale).astype(np.uint8)
        raw = stored * scale
        raw[:, :4] *= SIDE
    found = []
    for cx, cy, w, h, *classes in raw.tolist():
        best = max(range(3), key=classes.__getitem__)
        if classes[best] >= 0.4:
            found.append((classes[best], best, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]))
    stored = stored[None] if transposed else stored.T[None]
    tensor = Tensor("o", stored.shape, stored.dtype, (scale, 0) if scale else None)
    items = build("yolov8", [tensor], wanted(normalised=quantised))([stored], WHOLE)
    kept = naive_suppress(found, 0.45)
    assert len(kept) > 5
    if quantised:  # equal scores may come in either order
        assert [item.score for item in items] == pytest.approx([score for score, _, _ in kept])
    else:
        same(items, kept)


# --- SSD ---------------------------------------------------------------------------------------

SSD_VALUES: dict[str, NDArray[np.float32]] = {
    "boxes": np.array([[[0.1, 0.2, 0.5, 0.6], [-0.1, 0.5, 0.3, 1.2], [0, 0, 1, 1]]], np.float32),
    "classes": np.array([[1, 0, 2]], np.float32),
    "scores": np.array([[0.5, 0.9, 0.8]], np.float32),
    "count": np.array([2], np.float32),
}
EXPORTERS = [
    ["TFLite_Detection_PostProcess", *(f"TFLite_Detection_PostProcess:{n}" for n in (1, 2, 3))],
    ["detection_boxes", "detection_classes", "detection_scores", "num_detections"],
    ["location", "category", "score", "number of detections"],
]


@pytest.mark.parametrize("names", EXPORTERS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_ssd_finds_outputs_by_name(names: list[str], order: tuple[int, ...]) -> None:
    values = list(SSD_VALUES.values())
    tensors = [Tensor(names[place], values[place].shape, FLOAT) for place in order]
    items = build("ssd", tensors, wanted())([values[place] for place in order], WHOLE)
    assert [(item.label, item.index) for item in items] == [("scratch", 0), ("dent", 1)]
    assert items[0].box == pytest.approx((32, 0, 64, 19.2))  # clipped
    assert items[1].box == pytest.approx((12.8, 6.4, 38.4, 32))


def test_ssd_trusts_the_graph_before_names_and_knows_nothing_without_either() -> None:
    roles = dict(zip(("o:3", "o:1", "o:0", "o:2"), SSD_VALUES, strict=True))
    tensors = [
        Tensor(name, values.shape, FLOAT)
        for name, values in zip(roles, SSD_VALUES.values(), strict=True)
    ]
    items = build("ssd", tensors, wanted(roles=roles))(list(SSD_VALUES.values()), WHOLE)
    assert [item.index for item in items] == [0, 1]
    with pytest.raises(ModelError, match=r"can't read the outputs o:3 \[1, 3, 4\] float32"):
        build("ssd", tensors, wanted())


def test_ssd_names_classes_without_a_label_by_their_index() -> None:
    tensors = [Tensor(name, v.shape, FLOAT) for name, v in SSD_VALUES.items()]
    items = build("ssd", tensors, wanted(labels=("???",)))(list(SSD_VALUES.values()), WHOLE)
    assert [item.label for item in items] == ["0", "1"]


# --- classification ----------------------------------------------------------------------------


def test_classification_activations() -> None:
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    softmax = np.exp(logits[0]) / np.exp(logits[0]).sum()
    sigmoid = 1 / (1 + np.exp(-logits[0]))
    for activation, scores in (("softmax", softmax), ("sigmoid", sigmoid)):
        decode = build("classification", floats((1, 3)), wanted(activation=activation, score=0.0))
        items = decode([logits], WHOLE)
        assert [(item.index, item.label) for item in items] == [
            (1, "dent"),
            (2, "stain"),
            (0, "scratch"),
        ]
        assert [item.score for item in items] == pytest.approx(sorted(scores, reverse=True))
        assert all(item.box is None for item in items)


def test_classification_of_a_quantised_softmax_needs_no_word() -> None:
    tensor = Tensor("o", (1, 1, 1, 3), np.dtype(np.uint8), (1 / 256, 0))
    values = np.array([[[[0, 192, 64]]]], np.uint8)
    items = build("classification", [tensor], wanted(score=0.0, max_items=2))([values], WHOLE)
    assert [(item.index, item.score) for item in items] == [(1, 0.75), (2, 0.25)]


def test_classification_asks_whether_values_are_probabilities() -> None:
    with pytest.raises(ModelError, match="--activation: none if it does, softmax"):
        build("classification", floats((1, 3)), wanted())


def test_logits_taken_for_probabilities_are_an_error() -> None:
    decode = build("classification", floats((1, 3)), wanted(activation="none"))
    with pytest.raises(EngineError, match="scores reach from -1 to 7, not 0 to 1"):
        decode([np.array([[7, -1, 2]], np.float32)], WHOLE)


# --- never "nothing seen" when blind -----------------------------------------------------------


def one_bad(shape: tuple[int, ...], place: tuple[int, ...], value: float) -> NDArray[np.float32]:
    values = np.full(shape, 0.9, np.float32)
    values[place] = value
    return values


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "shape", "place"),
    [
        ("yolox", (1, CELLS, 8), (0, 5, 0)),
        ("yolox", (1, CELLS, 8), (0, 5, 2)),
        ("yolox", (1, CELLS, 8), (0, 5, 4)),
        ("yolox", (1, CELLS, 8), (0, 5, 6)),
        ("yolov8", (1, 7, CELLS), (0, 1, 9)),
        ("yolov8", (1, 7, CELLS), (0, 6, 9)),
        ("classification", (1, 3), (0, 2)),
    ],
)
def test_nan_is_an_error(kind: str, shape: Any, place: Any, value: float) -> None:
    decode = build(kind, floats(shape), wanted(activation="none"))
    with pytest.raises(EngineError, match="NaN or infinity; the frame was not judged"):
        decode([one_bad(shape, place, value)], WHOLE)


@pytest.mark.parametrize("name", SSD_VALUES)
def test_nan_of_ssd_is_an_error(name: str) -> None:
    tensors = [Tensor(key, values.shape, FLOAT) for key, values in SSD_VALUES.items()]
    bad = {key: values.copy() for key, values in SSD_VALUES.items()}
    bad[name].reshape(-1)[0] = math.nan
    with pytest.raises(EngineError, match="not judged"):
        build("ssd", tensors, wanted())(list(bad.values()), WHOLE)


def test_an_overflowing_box_is_an_error_and_no_warning() -> None:
    raw = yolox_raw()
    raw[0, 3, :] = [0, 0, 500, 0, 1, 1, 1, 1]
    with pytest.raises(EngineError, match="not judged"):
        build("yolox", floats(raw.shape), wanted())([raw], WHOLE)


# --- refused at load ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shapes", "says"),
    [
        ("yolox", [(1, CELLS + 3, 8)], f"N = {CELLS} for an input of 64x64"),
        ("yolox", [(1, CELLS, 5)], r"a \[1, 84, 5\] float32"),
        ("yolox", [(CELLS, 8)], r"expected one \[1, N, 5 \+ C\]"),
        ("yolox", [(1, CELLS, 8), (1, CELLS, 8)], "can't read the outputs"),
        ("yolov8", [(1, 7, CELLS + 3)], rf"expected one \[1, N, 4 \+ C\], .* N = {CELLS}"),
        ("yolov8", [(1, CELLS, CELLS)], "can't read the outputs"),
        ("yolov8", [(1, 300, 7)], r"\[1, 300, 7\]"),
        ("ssd", [(1, 10, 4), (1, 10), (1, 10)], "made by the operator"),
        ("classification", [(1, 7, CELLS)], r"expected one output \[1, C\]"),
        ("classification", [(1, 3), (1, 3)], r"expected one output \[1, C\]"),
    ],
)
def test_unknown_layouts_are_refused(kind: str, shapes: list[Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        build(kind, floats(*shapes), wanted(activation="none"))
    assert f"(decoders: {', '.join(DECODERS)})" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("yolox", (1, CELLS, 9)), ("yolov8", (1, 8, CELLS)), ("classification", (1, 4))],
)
def test_a_label_for_each_class(kind: str, shape: Any) -> None:
    with pytest.raises(ModelError, match=r"4 classes but 3 labels \('scratch' to 'stain'\)"):
        build(kind, floats(shape), wanted(activation="none"))


def test_boxes_in_the_padding_are_nothing() -> None:
    """A letterbox's border is not the picture, whatever the model thinks it sees there."""
    geometry = Geometry(640, 320, 0.1, 0.1, 0, 16)
    raw = np.full((1, CELLS, 8), 0.0, np.float32)
    raw[0, 3] = [0, 0, 0, 0, 1, 1, 0, 0]  # row 0: y from -4 to 4, above the picture
    raw[0, 8 * 3 + 3] = [0, 0, 0, 0, 1, 1, 0, 0]  # row 3: y from 20 to 28
    decode: Decode = build("yolox", floats(raw.shape), wanted())
    items = decode([raw], geometry)
    assert [item.box for item in items] == [pytest.approx((200, 40, 280, 120), abs=1e-3)]
