"""Every runtime on the real models of ../shared/data, one thread each.

Keys: ratio_to_bare, the rate of `Model.infer` to that of the runtime's own loop on tensors that lie
ready, the worst of all runtimes and models (ratios has each); models_right of models_tried: the
files whose results are those verified on them, each in the first runtime that reads it;
decode_vs_nms, decoding 8,400 candidates of a YOLO (64 things, 1,200 candidates above the threshold)
to cv2.dnn.NMSBoxes alone on the same boxes, as lists, which it reads fastest; engines_list_s, what
`vigil engines` takes.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common.engine import decoders, runtimes
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.preprocess import Geometry, Tensor
from common.engine.runtimes import RUNTIMES, CannotRunError, Options
from common.paths import PROJECT
from scripts.bench.measure import Figures, interleaved, report
from tests.replay import test_anomaly as anomaly
from tests.replay.test_engine_models import (
    FLAGS,
    enlarged,
    pil_resize,
    read,
    see,
    tolerance,
    unmatched,
)

DATA = PROJECT.parent / "shared/data"
PERSON, FACES = "openvino/person-detection-retail-0013.xml", "onnx/version-RFB-320.onnx"
PADIM = [name.removeprefix("models/") for name in (anomaly.PADIM, anomaly.PADIM_IR)]
CLASSES = "openvino/mobilenet_v1_0.25_224.xml"
PART_S = 0.3  # of one round


def flags(name: str, folder: Path) -> dict[str, Any]:
    """What is to be said of a picture model beside its file."""
    if name in (PERSON, FACES):
        labels = folder / "labels.txt"
        labels.write_text("???\nperson\n" if name == PERSON else "face\n")
        seen = {"resize": "stretch", "labels": labels}
        if name == PERSON:
            return seen | {"colour": "bgr", "scale": 1, "score": 0.5}
        seen |= {"kind": "ultraface", "colour": "rgb", "mean": 127, "scale": 128}
        return seen | {"score": 0.7, "iou": 0.3}
    all_flags = FLAGS | dict.fromkeys(PADIM, anomaly.FLAGS)
    given = dict(all_flags["onnx/mobilenet_v1_0.25_224_fp32.onnx" if name == CLASSES else name])
    if "labels" in given:
        given["labels"] = DATA / "labels" / given["labels"]
    return given


# -- rates ----------------------------------------------------------------------------------------


def bare(runtime: str, path: Path, values: Any) -> Callable[[], object]:
    """One run of the runtime itself, on a tensor that lies ready."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: values}
        return lambda: session.run(None, feed)
    if runtime == "openvino":
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({0: list(values.shape)})
        settings = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # else it is other arithmetic on some CPUs
        }  # fmt: skip
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(0, openvino.Tensor(values, shared_memory=True))
        return lambda: request.infer(share_outputs=True)
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, values.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, values)
    places = [entry["index"] for entry in interpreter.get_output_details()]
    return lambda: (interpreter.invoke(), [interpreter.get_tensor(place) for place in places])


def ratio(top: Callable[[], object], bottom: Callable[[], object], rounds: int) -> float:
    """Of the times that two take, called in turn: what disturbs one disturbs the other."""

    def case() -> Figures:
        took: tuple[list[float], list[float]] = ([], [])
        end = time.monotonic() + PART_S
        while time.monotonic() < end or len(took[0]) < 5:
            for run, times in zip((top, bottom), took, strict=True):
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
        return {"ratio": statistics.median(took[0]) / statistics.median(took[1])}

    return interleaved({"both": case}, rounds)["both"]["ratio"]


def ratios(rounds: int, folder: Path) -> dict[str, float]:
    found = {}
    picture = read(DATA / "images/classify/parrot.jpg")
    for name in (*FLAGS, *PADIM, PERSON, FACES, CLASSES):
        path = DATA / "models" / name
        for runtime, row in RUNTIMES.items():
            if path.suffix[1:] not in row.formats or "CPU" not in row.devices:
                continue
            try:
                model = Model.load(open_bundle(path, **flags(name, folder)), Options(), runtime)
            except CannotRunError as error:
                print(error, file=sys.stderr)
                continue
            model.prepare(picture, 0)
            values = model._prepare._buffers[0][None].copy()
            run = bare(runtime, path, values)
            found[f"{runtime} {name}"] = ratio(run, lambda model=model: model.infer(0), rounds)  # type: ignore[misc]
            print(f"{runtime:12}{name:60}{found[f'{runtime} {name}']:.3f}", file=sys.stderr)
            model.close()
    return found


# -- results --------------------------------------------------------------------------------------


def right(name: str, folder: Path) -> bool:
    """Whether a file of the shared data gives what was verified on it."""
    path = DATA / "models" / name
    if name.startswith("edgetpu/") and not name.endswith("128_quant.tflite"):
        try:
            runtimes.load("litert", path, Options())
        except CannotRunError as error:
            return "is compiled for an Edge TPU" in str(error)
        return False
    if "ad01" in name or "fan_low" in name:
        return _vectors(name, path)
    model = Model.load(open_bundle(path, **flags(name, folder)))
    if model.task == "detection":
        if name == FACES:
            expected = json.loads((DATA / "expected/faces_rfb320.json").read_text())
        else:
            every = json.loads((DATA / "expected/detections.json").read_text())
            expected = every[name if name in every else path.name]["images"]
        return _detects(model, name, expected)
    if model.task == "anomaly":
        scores = json.loads((DATA / "expected/bsd_padim_scores.json").read_text())
        column = "openvino_fp16" if path.suffix == ".xml" else "onnx"
        unlike = sum(
            bool(see(model, pil_resize(read(DATA / place), 576, 240)))
            != (row[column] >= anomaly.THRESHOLD)
            for place, row in scores.items()
            if column in row  # not all of those it was trained on
        )
        return bool(unlike <= 1)  # one at the threshold
    if "pcb" in name:
        rows = json.loads((DATA / f"expected/pcb_patches_{path.stem[-4:]}.json").read_text())
        return all(see(model, read(DATA / at))[0].index == row[1] for at, row in rows.items())
    table = re.findall(  # "top-1 with cv2 INTER_LINEAR", which is how Model resizes
        r"^\| (\S+)[^|]*\| (\S+) \| (\d+) [^|]*\| [\d.]+ \| (same|\d+)[^|]*\([\d.]+\) \|$",
        (DATA / "README.md").read_text(),
        re.MULTILINE,
    )
    rows = [row[1:] for row in table if name.endswith(row[0])]
    return bool(rows) and all(
        see(model, read(DATA / "images/classify" / at))[0].index
        == int(top if same == "same" else same)
        for at, top, same in rows
    )


def _detects(model: Model, name: str, expected: dict[str, Any]) -> bool:
    """Nothing that was found or missed is far above the threshold."""
    least = min((box[1] for boxes in expected.values() for box in boxes), default=0)
    for place, boxes in expected.items():
        picture = read(DATA / place)
        height, width = picture.shape[:2]
        items = see(model, pil_resize(picture, 300, 300) if "ssd" in name else picture)
        if "ssd" in name:
            items = [enlarged(item, width / 300, height / 300) for item in items]
        left = unmatched(items, boxes, (width, height), name)
        if any(score >= least + tolerance(name) for score in left):
            return False
    return True


def _vectors(name: str, path: Path) -> bool:
    """The mean squared error of what it makes of its input, through the runtime alone."""
    golden = DATA / f"golden/{path.name}.npz"
    if golden.exists():
        tensors = np.load(golden)
        pairs = [(tensors["input"], np.asarray(tensors["output0"], float))]
    else:
        rows = json.loads((DATA / "expected/vibration_fan.json").read_text())
        raw = path.suffix == ".onnx"
        pairs = [
            (
                np.loadtxt(DATA / at, delimiter=",", ndmin=2)[None] if raw else [row["features"]],
                row[f"{path.stem}_mse"],
            )
            for at, row in rows.items()
        ]
    runtime = "onnxruntime" if path.suffix == ".onnx" else "litert"
    engine = runtimes.load(runtime, path, Options())
    buffers = engine.allocate(np.shape(pairs[0][0]))
    for values, wanted in pairs:
        buffers[0][...] = values
        made = np.asarray(engine.infer(0)[0], float)
        if not isinstance(wanted, float):
            near = bool(np.allclose(made, wanted, rtol=1e-3, atol=1e-3))
        else:  # as printed, of features as printed
            near = bool(
                np.isclose(np.square(made - buffers[0]).mean(), wanted, rtol=0.02, atol=1e-7)
            )
        if not near:
            return False
    return True


# -- decoding and the list ------------------------------------------------------------------------


def decode_vs_nms(rounds: int) -> float:
    """640x640, [1, 84, 8400] as YOLOv8 gives them."""
    random = np.random.default_rng(6)
    raw = np.zeros((1, 84, 8400), np.float32)
    raw[0, :2] = random.uniform(20, 620, (2, 8400))
    raw[0, 2:4] = random.uniform(10, 200, (2, 8400))
    raw[0, 4:] = random.uniform(0, 0.1, (80, 8400))
    things = raw[0, :, :64].copy()
    for place in random.choice(8400, 1200, replace=False):
        thing = things[:4, place % 64]
        raw[0, :4, place] = thing + random.normal(0, 3, 4)
        raw[0, 4 + place % 64, place] = random.uniform(0.3, 0.95)
    raw[0, 2:4] = np.maximum(raw[0, 2:4], 4)
    settings = decoders.Settings(
        where="bench", labels=None, activation=None, score=0.25, iou=0.45, max_items=300,
        height=640, width=640, roles={},
    )  # fmt: skip
    output = Tensor("output0", raw.shape, raw.dtype)
    decode = decoders.build("yolov8", [output], settings)
    geometry = Geometry(640, 640, 1, 1, 0, 0)
    boxes = (raw[0, :4] - np.concatenate([raw[0, 2:4] / 2, np.zeros((2, 8400), np.float32)])).T
    lists, scores = boxes.tolist(), raw[0, 4:].max(0).tolist()
    assert 60 <= len(decode([raw], geometry)) <= 300
    return ratio(
        lambda: decode([raw], geometry),
        lambda: cv2.dnn.NMSBoxes(lists, scores, 0.25, 0.45),
        rounds,
    )


def engines_list_s() -> float:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        command = [sys.executable, "-m", "services.cli.main", "engines"]
        subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/runtimes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files = [
            str(path.relative_to(DATA / "models"))
            for path in sorted((DATA / "models").glob("*/*"))
            if path.suffix in (".onnx", ".tflite", ".xml")
        ]
        results = {name: right(name, folder) for name in files}
        for name, good in results.items():
            print(f"{name:60}{'right' if good else 'WRONG'}", file=sys.stderr)
        rates = ratios(rounds, folder)
    report(
        {
            "ratio_to_bare": round(min(rates.values()), 3),
            "ratios": {name: round(ratio, 3) for name, ratio in rates.items()},
            "models_right": sum(results.values()),
            "models_tried": len(results),
            "decode_vs_nms": round(decode_vs_nms(rounds), 2),
            "engines_list_s": round(engines_list_s(), 3),
        }
    )


if __name__ == "__main__":
    main()
