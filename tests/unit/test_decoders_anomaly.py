"""Anomaly decoders on each set of outputs that exporters make, and what must be refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.engine.decoders import Settings, build
from common.engine.decoders.anomaly import LEAST_SHARE
from common.engine.preprocess import Geometry, Tensor
from common.errors import EngineError, ModelError
from common.messages import Item

HEIGHT, WIDTH = 40, 60
TWICE = Geometry(2 * WIDTH, 2 * HEIGHT, 0.5, 0.5, 0, 0)  # the picture has twice the input's size
RAW = {"threshold": 20.0, "minimum": 4.0, "maximum": 44.0}  # a score of 20 becomes 0.5, 30 0.75


def wanted(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "where": "m.onnx", "labels": None, "activation": None, "score": 0.0, "iou": 0.45,
        "max_items": 100, "height": HEIGHT, "width": WIDTH, "roles": {},
    }  # fmt: skip
    return Settings(**values | changes)


def heat(**places: float) -> NDArray[np.float32]:
    """A quiet map; `y3_x5=30` heats a spot of 4 x 4 there."""
    values = np.full((HEIGHT, WIDTH), 8, np.float32)
    for place, value in places.items():
        y, x = (int(part[1:]) for part in place.split("_"))
        values[y : y + 4, x : x + 4] = value
        values[y + 1, x + 1] = value + 1
    return values


def decode(
    outputs: dict[str, Any], settings: Settings, shapes: Sequence[tuple[int, ...]] = ()
) -> list[Item]:
    arrays = [np.asarray(value) for value in outputs.values()]
    shapes = shapes or [array.shape for array in arrays]
    tensors = [
        Tensor(name, shape, array.dtype)
        for name, shape, array in zip(outputs, shapes, arrays, strict=True)
    ]
    return build("anomaly", tensors, settings)(arrays, TWICE)


def box(x: int, y: int) -> tuple[float, float, float, float]:
    """Of a spot in `heat`, in the picture."""
    return (2.0 * x, 2.0 * y, 2.0 * (x + 4), 2.0 * (y + 4))


MAP = heat(y3_x5=29, y20_x30=39)
REGIONS = [
    Item("anomaly", 1.0, 0, box(30, 20)),  # 40, clipped
    Item("anomaly", 0.75, 0, box(5, 3)),
]


@pytest.mark.parametrize("shape", [(1, 1, HEIGHT, WIDTH), (1, HEIGHT, WIDTH), (HEIGHT, WIDTH)])
@pytest.mark.parametrize("name", ["anomaly_map", "output"])
def test_a_map_alone(shape: tuple[int, ...], name: str) -> None:
    """Its largest value is the picture's score, and what is above the threshold has a place."""
    items = decode({name: MAP.reshape(shape)}, wanted(**RAW))
    assert items == [Item("anomaly", 1.0, 0), *REGIONS]
    assert decode({name: heat(y3_x5=18).reshape(shape)}, wanted(**RAW)) == []


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
@pytest.mark.parametrize("name", ["pred_score", "output"])
def test_a_score_alone(shape: tuple[int, ...], name: str) -> None:
    for value, score in ((20, 0.5), (30, 0.75), (99, 1.0)):
        scores = np.full(shape, value, np.float32)
        assert decode({name: scores}, wanted(**RAW)) == [Item("anomaly", score, 0)]
    assert decode({name: np.full(shape, 19.9, np.float32)}, wanted(**RAW)) == []


@pytest.mark.parametrize("names", [("pred_score", "anomaly_map"), ("output", "1234")])
def test_both(names: tuple[str, str]) -> None:
    """The score decides; the map says where. PatchCore's score is not its map's largest value."""
    score = np.array([30], np.float32)
    outputs = dict(zip(names, (score, MAP[None, None]), strict=True))
    assert decode(outputs, wanted(**RAW)) == [Item("anomaly", 0.75, 0), *REGIONS]
    assert decode(outputs | {names[0]: score - 11}, wanted(**RAW)) == []


def test_sizes_left_open_are_those_of_the_values() -> None:
    outputs = {"anomaly_map": MAP[None, None], "pred_score": np.array([30], np.float32)}
    items = decode(outputs, wanted(**RAW), [(-1, -1, -1, -1), (1,)])
    assert items == [Item("anomaly", 0.75, 0), *REGIONS]


def test_a_coarse_map_lies_over_the_whole_input() -> None:
    coarse = np.full((1, 1, 10, 15), 8, np.float32)
    coarse[0, 0, 2, 3:5] = 30
    items = decode({"anomaly_map": coarse}, wanted(**RAW))
    assert items[1:] == [Item("anomaly", 0.75, 0, (24.0, 16.0, 40.0, 24.0))]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
@pytest.mark.parametrize("names", ["pred_score anomaly_map pred_label pred_mask", "a b c d"])
def test_a_model_that_decides_itself(dtype: type, names: str) -> None:
    """Its label and mask are its own, whatever the scores, which it has brought to 0..1."""
    mask: Any = np.zeros((1, 1, HEIGHT, WIDTH), dtype)
    mask[0, 0, 3:7, 5:9] = 1
    field = (MAP[None, None] / 100).astype(np.float32)
    score: Any = np.array([[0.45]], np.float32)
    label: Any = np.ones((1, 1), dtype)
    outputs = dict(zip(names.split(), (score, field, label, mask), strict=True))
    assert decode(outputs, wanted()) == [
        Item("anomaly", 0.5, 0),
        Item("anomaly", 0.5, 0, box(5, 3)),
    ]
    assert decode(outputs | {names.split()[2]: label * 0}, wanted()) == []
    items = decode(outputs, wanted(pixel_threshold=0.35))
    assert items[1:] == [Item("anomaly", items[1].score, 0, box(30, 20))]
    assert items[1].score == pytest.approx(0.55)
    with pytest.raises(ModelError, match=r"decides itself, in its output .*; name `outputs` in"):
        decode(outputs, wanted(threshold=22.0))


def test_a_mask_without_a_map() -> None:
    mask = np.zeros((1, HEIGHT, WIDTH), np.bool_)
    mask[0, 20:24, 30:34] = True
    outputs = {"pred_score": np.array([0.75]), "pred_label": np.array([True]), "pred_mask": mask}
    assert decode(outputs, wanted()) == [
        Item("anomaly", 0.75, 0), Item("anomaly", 0.75, 0, box(30, 20)),
    ]  # fmt: skip


def test_scores_that_the_model_does_not_normalise_are_refused() -> None:
    outputs = {"pred_score": np.array([30.0]), "pred_label": np.array([True])}
    with pytest.raises(EngineError, match=r"score 30 is not normalised to 0\.\.1; name `outputs`"):
        decode(outputs, wanted())


def test_the_pixel_threshold_is_its_own() -> None:
    items = decode({"anomaly_map": MAP}, wanted(**RAW, pixel_threshold=35.0))
    assert items == [Item("anomaly", 1.0, 0), Item("anomaly", 0.625, 0, box(30, 20))]


def test_regions_are_bounded_and_specks_are_left_out() -> None:
    spots = {f"y{y}_x{x}": 30.0 for y in range(0, HEIGHT - 4, 6) for x in range(0, WIDTH - 4, 6)}
    values = heat(**spots, y36_x56=39)
    values[36:40, 50:60] = 25  # the largest, though not the hottest
    items = decode({"anomaly_map": values}, wanted(**RAW, max_items=10))
    assert len(items) == 10
    assert (100.0, 72.0, 120.0, 80.0) in [item.box for item in items]
    assert items[1:] == sorted(items[1:], key=lambda item: -item.score)
    large = np.full((1, 1, 300, 300), 8, np.float32)
    least = round(LEAST_SHARE * large.size)
    large[0, 0, 0, :least] = 30
    large[0, 0, 9, : least - 1] = 30
    (_, region) = decode({"anomaly_map": large}, wanted(**RAW))
    assert region.box is not None
    assert region.box[1] == 0


def test_what_lies_beside_a_letterboxed_picture_is_no_region() -> None:
    beside = Geometry(WIDTH, 20, 1.0, 1.0, 0, 10)
    tensor = Tensor("anomaly_map", (HEIGHT, WIDTH), np.dtype(np.float32))
    shown = build("anomaly", [tensor], wanted(**RAW))
    (_, region) = shown([heat(y2_x5=30, y8_x30=30)], beside)
    assert region.box == (30, 0, 34, 2)


def test_items_below_the_score_are_left_out() -> None:
    items = decode({"anomaly_map": MAP}, wanted(**RAW, score=0.8))
    assert items == [Item("anomaly", 1.0, 0), REGIONS[0]]


@pytest.mark.parametrize("name", ["anomaly_map", "pred_score"])
def test_numbers_that_are_none_are_no_decision(name: str) -> None:
    outputs = {"anomaly_map": MAP.copy(), "pred_score": np.array([30], np.float32)}
    outputs[name].flat[0] = np.nan
    with pytest.raises(EngineError, match="the frame was not judged"):
        decode(outputs, wanted(**RAW))


SCORE, BYTES = np.zeros(1, np.float32), np.zeros(1, np.uint8)


@pytest.mark.parametrize(
    ("outputs", "changes", "says"),
    [
        ({"a": SCORE, "b": SCORE}, RAW, "can't read the outputs a .*, b .*; expected anomaly_map"),
        ({"a": MAP, "b": MAP, "c": SCORE}, RAW, "name those to be read as `outputs` in .decoder"),
        ({"pred_label": BYTES, "pred_mask": MAP > 9}, RAW, "can't read the outputs pred_label"),
        ({"a": np.zeros((1, 3, 8, 8), np.float32)}, RAW, "decoder anomaly can't read the outputs"),
        ({"a": SCORE}, {}, "which scores are anomalous; give the score from .*--threshold, --m"),
        ({"a": SCORE}, RAW | {"minimum": None}, "nothing tells which scores are anomalous"),
        ({"a": SCORE}, RAW | {"maximum": 4.0}, "minimum = 4 and maximum = 4; expected the larger"),
    ],
)
def test_refused(outputs: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        decode(outputs, wanted(**changes))


# --- reconstruction ----------------------------------------------------------------------------


def rebuild(made: NDArray[Any], given: NDArray[Any], settings: Settings, *steps: Any) -> list[Item]:
    tensors = [
        Tensor(name, array.shape, array.dtype, step)
        for name, array, step in zip("yx", (made, given), steps or (None, None), strict=True)
    ]
    return build("reconstruction", tensors, settings)([made, given], TWICE)


@pytest.mark.parametrize(("error", "score"), [("squared", 0.04), ("absolute", 0.1)])
def test_reconstruction_error(error: str, score: float) -> None:
    given = np.zeros((1, 3, 4, 4), np.float32)
    made = given.copy()
    made[0, :, :2, :2] = 0.4  # a quarter of it is off by 0.4
    settings = wanted(threshold=score - 0.01, minimum=0.0, maximum=0.1, error=error)
    (item,) = rebuild(made, given, settings)
    assert (item.label, item.index, item.box) == ("anomaly", 0, None)
    assert item.score == pytest.approx(0.6, abs=1e-6)
    settings = wanted(threshold=score + 0.01, minimum=0.0, maximum=0.1, error=error)
    assert rebuild(made, given, settings) == []


def test_reconstruction_error_of_quantised_tensors_is_of_what_they_stand_for() -> None:
    given, made = np.full((1, 8), 10, np.int8), np.full((1, 8), 30, np.int8)
    settings = wanted(threshold=3.9, minimum=0.0, maximum=1.0)
    (item,) = rebuild(made, given, settings, (0.1, 0), (0.1, 0))  # 3 - 1
    assert item.score == pytest.approx(0.6, abs=1e-6)
    assert rebuild(made, given, settings, (0.1, 0), (0.1, -20)) == []  # 3 - 3


def test_reconstruction_refuses() -> None:
    two = np.zeros((1, 2), np.float32)
    with pytest.raises(ModelError, match=r"expected one output of the input's shape \[1, 3\]"):
        rebuild(two, np.zeros((1, 3), np.float32), wanted(**RAW))
    with pytest.raises(ModelError, match="nothing tells which scores are anomalous"):
        rebuild(two, two, wanted())
    with pytest.raises(EngineError, match="the frame was not judged"):
        rebuild(two * np.nan, two, wanted(**RAW))
