"""The factory model as it is shipped, how it was told what to answer, and how it is counted."""

import json

import numpy as np
import pytest

from common.engine import decoders
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.preprocess import Geometry, Tensor
from common.messages import Item
from common.paths import PROJECT
from scripts.bench.factory_bench import predict
from scripts.bench.factory_metrics import Count, Found, count, iou
from scripts.factory import data
from services.capture.scene import LABELS, VISIBLE, Scene, Thing
from services.capture.sprite import Box

FACTORY = PROJECT / "models" / "factory"
FILES = ("model.int8.tflite", "model.int8.onnx", "model.fp32.tflite", "model.fp32.onnx")


def load(name: str) -> Model:
    """One of the bundle's files by itself, with what the manifest says of it."""
    return Model.load(
        open_bundle(
            FACTORY / name, kind="yolox", labels=FACTORY / "labels.txt", resize="letterbox",
            colour="rgb", scale=1.0, score=0.4,
        )
    )  # fmt: skip


def test_the_bundle_is_small_and_what_its_record_says() -> None:
    bundle = open_bundle(FACTORY)
    assert bundle.labels == LABELS
    assert tuple(variant.file for variant in bundle.manifest.variants) == FILES
    record = json.loads((FACTORY / "training.json").read_text())
    sizes = {name: (FACTORY / name).stat().st_size for name in FILES}
    assert record["bytes"] == sizes
    assert sum(sizes.values()) <= 1_000_000
    assert record["domain"] == "train"


def test_the_first_variant_is_integers_from_end_to_end() -> None:
    model = Model.load(open_bundle(FACTORY))
    assert model.runtime.startswith("litert")
    assert model.fallback_reason == ""
    assert model.input.dtype == np.uint8
    outputs = model.infer(0)
    assert {output.dtype for output in outputs} == {np.dtype(np.int8)}
    model.close()


def test_all_four_files_see_the_same() -> None:
    models = [load(name) for name in FILES]
    pictures = [Scene(seed=seed, defects=1.2).render(90)[0] for seed in range(8)]
    seen = [[item for picture in pictures for item in predict(model, picture)] for model in models]
    reference = seen[-1]  # float ONNX
    assert len(reference) > 30
    for name, items in zip(FILES[:-1], seen[:-1], strict=True):
        least, tolerance = (1.0, 1e-3) if "fp32" in name else (0.95, 0.15)
        for some, others in ((items, reference), (reference, items)):
            matched = sum(any(alike(one, other, tolerance) for other in others) for one in some)
            assert matched >= least * len(some), name
    for model in models:
        model.close()


def alike(one: Found, other: Found, tolerance: float) -> bool:
    return (
        one.label == other.label
        and abs(one.score - other.score) <= tolerance
        and iou(one.box, other.box) >= 1 - 2 * tolerance
    )


def test_it_finds_parts_and_defects_of_a_line_it_was_not_trained_on() -> None:
    model = Model.load(open_bundle(FACTORY))
    whole = Count()
    for seed in range(30):
        scene = Scene(seed=seed, domain="demo", defects=1.2)
        found = predict(model, scene.render(55)[0])
        whole = sum(count(found, scene.things(55)).values(), whole)
    model.close()
    assert whole.right > 150
    assert whole.precision >= 0.93
    assert whole.recall >= 0.93


def test_answers_decoded_by_the_engine_are_the_truth() -> None:
    """What training asks of the network is what the engine's decoder reads from it."""
    pictures, boxes = data.render_scene(7, "train", frames=3)
    assert pictures.shape == (3, data.HEIGHT, data.WIDTH, 3)
    n = len(data.CELLS)
    outputs = [Tensor("reg", (1, n, 4), np.dtype("f4")), Tensor("obj", (1, n, 1), np.dtype("f4")),
               Tensor("cls", (1, n, len(LABELS)), np.dtype("f4"))]  # fmt: skip
    settings = decoders.Settings("test", LABELS, None, 0.4, 0.99, 200, data.HEIGHT, data.WIDTH, {})
    decode = decoders.build("yolox", outputs, settings)
    for rows in boxes:
        for seen in (rows, data.mirrored(rows, across=True, down=True)):
            kind, target = data.answers(seen)
            column, row, stride = data.CELLS.T
            x1, y1, x2, y2 = target.T
            with np.errstate(divide="ignore"):
                reg = np.stack(
                    [
                        (x1 + x2) / 2 / stride - column,
                        (y1 + y2) / 2 / stride - row,
                        np.log((x2 - x1) / stride),
                        np.log((y2 - y1) / stride),
                    ],
                    1,
                )
            reg[kind < 0] = 0
            obj = (kind >= 0).astype(np.float32)[:, None]
            cls = (kind[:, None] == np.arange(len(LABELS))).astype(np.float32)
            whole = Geometry(data.WIDTH, data.HEIGHT, 1.0, 1.0, 0, 0)
            items = decode([reg[None].astype(np.float32), obj[None], cls[None]], whole)
            truth = [
                (LABELS[int(line[0])], *line[1:5]) for line in seen.tolist() if line[5] >= VISIBLE
            ]
            assert len(truth) > 3
            for label, *box in truth:
                assert any(is_at(item, label, box) for item in items), label
            for item in items:
                assert any(is_at(item, label, box) for label, *box in truth), item


def is_at(item: Item, label: str, box: list[float]) -> bool:
    return item.label == label and np.allclose(item.box or (), box, atol=0.02)


PART: Box = (100, 100, 200, 200)


def thing(label: str = "part", box: Box = PART, visible: float = 1.0) -> Thing:
    return Thing(label, box, visible)


def found(label: str = "part", box: Box = PART, score: float = 0.9) -> Found:
    return Found(label, score, box)


@pytest.mark.parametrize(
    ("predictions", "things", "expected"),
    [
        ([], [], (0, 0, 0)),
        ([found()], [thing()], (1, 0, 0)),
        ([found(box=(100, 100, 200, 151))], [thing()], (1, 0, 0)),  # IoU 0.51
        ([found(box=(100, 100, 200, 149))], [thing()], (0, 1, 1)),  # IoU 0.49
        ([found(), found(score=0.8)], [thing()], (1, 1, 0)),  # one thing, found twice
        ([found("dent")], [thing()], (0, 1, 1)),  # of another class
        ([found()], [thing(), thing(box=(300, 300, 400, 400))], (1, 0, 1)),
        ([], [thing(box=(-60, 100, 40, 200), visible=0.4)], (0, 0, 0)),  # hardly visible: no truth
        ([found(box=(0, 100, 40, 200))], [thing(box=(-60, 100, 40, 200), visible=0.4)], (0, 0, 0)),
        ([found("dent", (0, 100, 40, 200))], [thing(box=(-60, 100, 40, 200), visible=0.4)],
         (0, 1, 0)),
        ([found(box=(0, 100, 60, 200))], [thing(box=(-40, 100, 60, 200), visible=0.6)], (1, 0, 0)),
    ],
)  # fmt: skip
def test_counting(
    predictions: list[Found], things: list[Thing], expected: tuple[int, int, int]
) -> None:
    whole = sum(count(predictions, things).values(), Count())
    assert (whole.right, whole.wrong, whole.missed) == expected


def test_figures_of_a_count() -> None:
    whole = Count(right=6, wrong=2, missed=4)
    assert (whole.precision, whole.recall) == (0.75, 0.6)
    assert whole.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
