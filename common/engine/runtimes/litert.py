"""LiteRT (TFLite) on the CPU, through XNNPACK where its operators allow.

`ai_edge_litert` is preferred; old devices have only `tflite_runtime`, with the same interface.
The interpreter owns its input, so `infer` copies the prepared buffer into it (1.7 us for 224x224
uint8): the price of preparing the next frame meanwhile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.engine.facts import EDGETPU_OPERATOR, read_facts
from common.engine.preprocess import Tensor
from common.engine.runtimes import BUFFERS, Array, CannotRunError, Options
from common.errors import EngineError, ModelError

try:
    from ai_edge_litert import __version__
    from ai_edge_litert.interpreter import Interpreter
except ModuleNotFoundError:
    from tflite_runtime import __version__
    from tflite_runtime.interpreter import Interpreter


class LiteRt:
    """See `common.engine.runtimes.Runtime`."""

    def __init__(self, path: Path, threads: int) -> None:
        self.name = f"litert {__version__}"
        self._path = path
        try:
            self._interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
            inputs = self._interpreter.get_input_details()
        except (RuntimeError, ValueError) as error:
            raise CannotRunError(f"{path}: LiteRT can't load it: {_first_line(error)}") from error
        if len(inputs) != 1:
            names = ", ".join(entry["name"] for entry in inputs)
            raise ModelError(f"{path}: has {len(inputs)} inputs ({names}); expected one")
        self._index: int = inputs[0]["index"]
        self.input = _tensor(inputs[0], signature=True)
        self.outputs: tuple[Tensor, ...] = ()

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        try:
            if shape != tuple(self._interpreter.get_input_details()[0]["shape"]):
                self._interpreter.resize_tensor_input(self._index, list(shape))
            self._interpreter.allocate_tensors()
            self._buffers = tuple(np.zeros(shape, self.input.dtype) for _ in range(BUFFERS))
            self._interpreter.set_tensor(self._index, self._buffers[0])
            self._interpreter.invoke()  # outputs of some operators have no shape before
        except (RuntimeError, ValueError) as error:
            raise CannotRunError(
                f"{self._path}: LiteRT can't run it: {_first_line(error)}"
            ) from error
        details = self._interpreter.get_output_details()
        self.outputs = tuple(_tensor(entry) for entry in details)
        self._views = [self._interpreter.tensor(entry["index"]) for entry in details]
        self._results = tuple(
            [np.zeros(output.shape, output.dtype) for output in self.outputs]
            for _ in range(BUFFERS)
        )
        return self._buffers

    def infer(self, buffer: int) -> Sequence[Array]:
        try:
            self._interpreter.set_tensor(self._index, self._buffers[buffer])
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"{self._path}: LiteRT failed: {_first_line(error)}") from error
        results = self._results[buffer]
        for place, view in enumerate(self._views):
            values = view()
            if values.shape == results[place].shape:
                np.copyto(results[place], values)
            else:  # an output whose size depends on the picture
                results[place] = values.copy()
            del values  # the interpreter refuses to run while a view of its memory lives
        return results

    def close(self) -> None:
        self._views.clear()
        self._interpreter = None


def load(path: Path, options: Options) -> LiteRt:
    """Only `threads` has a meaning here: XNNPACK's sleep between runs and keep their memory."""
    if EDGETPU_OPERATOR in read_facts(path).custom_operators:
        raise CannotRunError(
            f"{path}: is compiled for an Edge TPU (operator {EDGETPU_OPERATOR}) and can't run on "
            "a CPU; use the model it was compiled from (usually the name without _edgetpu)"
        )
    return LiteRt(path, options.threads)


def _tensor(details: dict[str, Any], signature: bool = False) -> Tensor:
    shape = details["shape_signature" if signature else "shape"]
    if not len(shape):
        shape = details["shape"]
    scale, zero = details["quantization"]
    return Tensor(
        details["name"],
        tuple(int(size) for size in shape),
        np.dtype(details["dtype"]),
        (float(scale), int(zero)) if scale else None,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
