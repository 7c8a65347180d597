"""The trained network as ONNX and TFLite, in float and in integers, and how well they agree."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import tensorflow as tf
import tf2onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tensorflow import keras

from scripts.factory.data import HEIGHT, WIDTH

Outputs = list[NDArray[np.float32]]


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        self.rest = iter(pictures)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        picture = next(self.rest, None)
        return None if picture is None else {"image": picture[None].astype(np.float32)}


def write(model: keras.Model, samples: NDArray[np.uint8], out: Path) -> dict[str, dict[str, float]]:
    """Write model.{fp32,int8}.{onnx,tflite}; `samples` [n, H, W, 3] set the integers' ranges.

    Returns: for each file the largest difference from the model itself over some samples: of
    boxes in strides, and of scores.
    """
    # One picture at a time: a fixed batch lets runtimes plan their memory.
    picture = keras.Input((HEIGHT, WIDTH, 3), batch_size=1, name="image")
    fixed = keras.Model(picture, dict(zip(("reg", "obj", "cls"), model(picture), strict=True)))
    samples = samples.copy()
    samples[0, 0, 0], samples[0, 0, 1] = 0, 255  # so that an integer input is the pixel itself
    onnx_file(fixed, samples, out)
    tflite_file(fixed, samples, out)
    wanted = [run_keras(fixed, sample) for sample in samples[:20]]
    agreement = {}
    for name in ("model.fp32.onnx", "model.int8.onnx", "model.fp32.tflite", "model.int8.tflite"):
        run = run_onnx if name.endswith("onnx") else run_tflite
        told = run(out / name, samples[:20])
        pairs = [
            np.abs(a - b)
            for one, other in zip(told, wanted, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        agreement[name] = {
            "box_max": round(float(max(p.max() for p in pairs[0::3])), 5),
            "box_mean": round(float(np.mean([p.mean() for p in pairs[0::3]])), 5),
            "score_max": round(float(max(p.max() for p in pairs[1::3])), 5),
            "score_mean": round(float(np.mean([p.mean() for p in pairs[1::3]])), 5),
        }
    return agreement


def onnx_file(model: keras.Model, samples: NDArray[np.uint8], out: Path) -> None:
    spec = (tf.TensorSpec((1, HEIGHT, WIDTH, 3), tf.float32, name="image"),)
    function = tf.function(lambda image: model(image, training=False))
    tf2onnx.convert.from_function(
        function, spec, opset=17, output_path=str(out / "model.fp32.onnx")
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(out / "model.fp32.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out / "model.int8.onnx"),
            Samples(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def tflite_file(model: keras.Model, samples: NDArray[np.uint8], out: Path) -> None:
    for name in ("fp32", "int8"):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if name == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [sample[None].astype(np.float32)] for sample in samples
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = tf.uint8
            converter.inference_output_type = tf.int8
        (out / f"model.{name}.tflite").write_bytes(converter.convert())


def ordered(outputs: list[NDArray[np.float32]]) -> Outputs:
    """reg, obj, cls, whatever order a file has them in: told apart by their last size."""
    return sorted(outputs, key=lambda output: {4: 0, 1: 1}.get(output.shape[-1], 2))


def run_keras(model: keras.Model, sample: NDArray[np.uint8]) -> Outputs:
    told = model(sample[None].astype(np.float32), training=False)
    return ordered([np.asarray(output) for output in told.values()])


def run_onnx(file: Path, samples: NDArray[np.uint8]) -> list[Outputs]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [
        ordered(session.run(None, {"image": sample[None].astype(np.float32)})) for sample in samples
    ]


def run_tflite(file: Path, samples: NDArray[np.uint8]) -> list[Outputs]:
    interpreter = tf.lite.Interpreter(str(file))
    interpreter.allocate_tensors()
    given, told = interpreter.get_input_details()[0], interpreter.get_output_details()
    found = []
    for sample in samples:
        interpreter.set_tensor(given["index"], sample[None].astype(given["dtype"]))
        interpreter.invoke()
        outputs = []
        for output in told:
            stored = interpreter.get_tensor(output["index"]).astype(np.float32)
            scale, zero = output["quantization"]
            outputs.append((stored - zero) * scale if scale else stored)
        found.append(ordered(outputs))
    return found
