"""OpenVINO on Intel's CPUs, and on their GPUs and NPUs (these two *untested*).

It reads its own IR (.xml, with the weights in the .bin beside), ONNX and TFLite files. Each buffer
has a request of its own, which reads the prepared array and writes results where they lie.
Pictures are prepared outside its graph: PrePostProcessor's way, uint8 NHWC converted by the graph,
made yolox_nano 11 % slower on one core, and it is the engine that others wait for.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from common.engine.binary import Table
from common.engine.preprocess import Array, Tensor
from common.engine.runtimes import BUFFERS, CannotRunError, Options, split_inputs
from common.errors import AcceleratorLostError, EngineError


class OpenVino:
    """See `common.engine.runtimes.Runtime`."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path, self._device = path, options.device or "CPU"
        self.name = f"openvino {openvino.__version__.split('-')[0]}"
        if self._device != "CPU":
            self.name += f" on {self._device}"
        self._core: Any = openvino.Core()
        here = sorted({name.split(".")[0] for name in self._core.available_devices})
        if self._device not in here:
            raise CannotRunError(
                f"{path}: OpenVINO finds no {self._device}; it has {', '.join(here)} here"
            )
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._device == "CPU":
            self._settings |= {
                "INFERENCE_NUM_THREADS": options.threads,
                "ENABLE_CPU_PINNING": False,  # both lanes would be pinned to the same cores
                # Newer CPUs would choose bfloat16: another device decides otherwise.
                "INFERENCE_PRECISION_HINT": "f32",
            }
        elif options.cache is not None:  # to compile for the others takes long
            self._settings["CACHE_DIR"] = str(options.cache)
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise CannotRunError(f"{path}: OpenVINO can't load it: {_plain(error)}") from error
        self._quantisation = _quantisation(path) if path.suffix == ".tflite" else {}
        inputs = [self._tensor(port) for port in self._model.inputs]
        self.input, self._held = split_inputs(inputs, options.constants, str(path))
        self._places = {tensor.name: place for place, tensor in enumerate(inputs)}
        self.outputs = tuple(self._tensor(port) for port in self._model.outputs)

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        self._buffers = tuple(np.zeros(shape, self.input.dtype) for _ in range(BUFFERS))
        try:
            shapes = {name: list(held.shape) for name, held in self._held.items()}
            shapes[self.input.name] = list(shape)
            self._model.reshape({self._places[name]: sizes for name, sizes in shapes.items()})
            compiled = self._core.compile_model(self._model, self._device, self._settings)
            self._requests = [self._request(compiled, values) for values in self._buffers]
            first = self._requests[0]
            self._stateful = bool(first.query_state())
            first.infer(share_outputs=True)
        except RuntimeError as error:
            raise CannotRunError(f"{self._path}: OpenVINO can't run it: {_plain(error)}") from error
        ports = [self._tensor(port) for port in compiled.outputs]
        # An output whose size depends on the picture stays unbound, and is asked for each time.
        self._unbound = [place for place, port in enumerate(ports) if -1 in port.shape]
        self.outputs = tuple(ports)
        self._results: list[list[Array]] = []
        for request in self._requests:
            results = [np.zeros([abs(size) for size in port.shape], port.dtype) for port in ports]
            for place, result in enumerate(results):
                if place not in self._unbound:
                    request.set_output_tensor(place, openvino.Tensor(result, shared_memory=True))
            self._results.append(list(results))
        return self._buffers

    def infer(self, buffer: int) -> Sequence[Array]:
        request, results = self._requests[buffer], self._results[buffer]
        failure = ""
        try:
            if self._stateful:
                request.reset_state()
            request.infer(share_outputs=True)
            for place in self._unbound:
                results[place] = request.get_output_tensor(place).data
        except RuntimeError as error:
            failure = f"{self._path}: {self.name} failed: {_plain(error)}"
        if failure:  # out here, without a context that would keep the device
            raise (EngineError if self._device == "CPU" else AcceleratorLostError)(failure)
        return results

    def close(self) -> None:
        self._requests, self._model, self._core = [], None, None

    def _request(self, compiled: Any, values: Array) -> Any:
        request = compiled.create_infer_request()
        for name, array in {**self._held, self.input.name: values}.items():
            request.set_input_tensor(self._places[name], openvino.Tensor(array, shared_memory=True))
        return request

    def _tensor(self, port: Any) -> Tensor:
        """A port may have several names; TFLite's own is among them."""
        names = sorted(port.get_names()) or [port.get_node().get_friendly_name()]
        name = next((name for name in names if name in self._quantisation), names[0])
        sizes = port.get_partial_shape()
        shape = tuple(size.get_length() if size.is_static else -1 for size in sizes)
        dtype = np.dtype(port.get_element_type().to_dtype())
        return Tensor(name, shape, dtype, self._quantisation.get(name))


def load(path: Path, options: Options) -> OpenVino:
    return OpenVino(path, options)


def _quantisation(path: Path) -> dict[str, tuple[float, int]]:
    """Scale and zero point of a TFLite file's inputs and outputs, of which OpenVINO says nothing.
    Fields as in tensorflow's schema.fbs."""
    found = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        graph = Table.root(data).tables(2)[0]
        tensors = graph.tables(0)
        for place in (*graph.numbers(1, "i"), *graph.numbers(2, "i")):
            given = tensors[place].table(4)
            if given is not None and (scale := given.floats(2)):
                found[tensors[place].text(3)] = scale[0], (given.numbers(3, "q") or [0])[0]
    return found


def _plain(error: Exception) -> str:
    """The message's last line: those before say where in OpenVINO's sources."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
