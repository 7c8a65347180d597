"""Small ONNX models made by the tests that need one no exporter gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path,
    nodes: Sequence[Any],
    output: Sequence[int | str],
    input: Sequence[int | str] = (1, 3, 8, 8),
    type: int = TensorProto.FLOAT,
    constants: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    domains: Sequence[str] = (),
    output_type: int | None = None,
) -> Path:
    """A model from `x` to `y` of these nodes, each (operator, inputs, outputs, attributes)."""
    graph = helper.make_graph(
        [
            helper.make_node(operator, inputs, outputs, **attributes)
            for operator, inputs, outputs, attributes in nodes
        ],
        "made",
        [helper.make_tensor_value_info("x", type, input)],
        [helper.make_tensor_value_info("y", output_type or type, output)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (constants or {}).items()
        ],
    )
    opsets = [helper.make_opsetid(domain, 17 if not domain else 1) for domain in ("", *domains)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    helper.set_model_props(model, metadata or {})
    onnx.save(model, str(path))
    return path


def classifier(path: Path, classes: int = 3, weight: float = 1, **changes: Any) -> Path:
    """Mean of each channel, times a weight a class, through a softmax."""
    weights = np.linspace(-weight, weight, 3 * classes, dtype=np.float32).reshape(3, classes)
    nodes: list[Any] = [
        ("GlobalAveragePool", ["x"], ["mean"], {}),
        ("Flatten", ["mean"], ["flat"], {}),
        ("MatMul", ["flat", "w"], ["logits"], {}),
        ("Softmax", ["logits"], ["y"], {}),
    ]
    return save(path, nodes, (1, classes), constants={"w": weights}, **changes)


def manifest(name: str, version: str, release: int, more: str = "") -> str:
    """Of a bundle with a classifier as `m.onnx`; `more` goes before the tables."""
    return f"""\
name = "{name}"
version = "{version}"
release = {release}
task = "classification"
{more}
[[variants]]
runtime = "onnxruntime"
file = "m.onnx"
[input]
resize = "stretch"
colour = "rgb"
scale = 255
[decoder]
kind = "classification"
"""
