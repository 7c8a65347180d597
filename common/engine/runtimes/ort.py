"""ONNX Runtime on the CPU, or through the execution provider of the variant's device with the CPU
for what that can't run. The provider for OpenVINO was tried on a CPU; CUDA's and TensorRT's are
*untested* but for their absence.

Inputs and outputs are bound once: the session reads the prepared buffer and writes the results
where they lie, nothing is copied on the CPU.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from common.engine.preprocess import Array, Tensor
from common.engine.runtimes import BUFFERS, RUNTIMES, CannotRunError, Options, split_inputs
from common.errors import AcceleratorLostError, EngineError, ModelError

_DTYPES = {
    "float": np.float32, "float16": np.float16, "double": np.float64, "bool": np.bool_,
    "uint8": np.uint8, "int8": np.int8, "int32": np.int32, "int64": np.int64,
}  # fmt: skip
_PROVIDERS = {
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
    "openvino": ["OpenVINOExecutionProvider"],
}
# Its exceptions have no base of their own but Exception.
_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        value
        for value in vars(onnxruntime_pybind11_state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)


class OnnxRuntime:
    """See `common.engine.runtimes.Runtime`."""

    def __init__(self, path: Path, wanted: Options) -> None:
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self._path, self._accelerated = path, wanted.device in _PROVIDERS
        if self._accelerated:
            self.name += f" on {wanted.device}"
        self._bindings: list[Any] = []
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach us as exceptions
        options.intra_op_num_threads = wanted.threads
        options.enable_cpu_mem_arena = wanted.memory_arena
        options.enable_mem_pattern = False  # 4 to 9 MB a model, and not faster for one fixed shape
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", str(int(wanted.spinning))
        )
        providers = _providers(wanted, path)
        if self._accelerated:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=providers, enable_fallback=0
            )
            self._session.disable_fallback()  # the keyword alone is not known to older ones
            if self._accelerated:
                self._check_provider(providers[0][0], str(wanted.device))
        except _ERRORS as error:
            raise CannotRunError(f"{path}: ONNX Runtime can't load it: {_plain(error)}") from error
        inputs = [_tensor(entry) for entry in self._session.get_inputs()]
        self.input, self._held = split_inputs(inputs, wanted.constants, str(path))
        self.outputs = tuple(_tensor(entry) for entry in self._session.get_outputs())

    def _check_provider(self, provider: str, device: str) -> None:
        """ONNX Runtime goes on on the CPU without a word, as a whole or node by node.

        Raises:
            CannotRunError: the provider runs nothing of the model.
        """
        said = f"{self._path}: ONNX Runtime runs it on the CPU, not on {device}: "
        if provider not in self._session.get_providers():
            raise CannotRunError(f"{said}{provider} finds no device, or lacks libraries of it")
        if hasattr(self._session, "get_provider_graph_assignment_info"):  # since 1.24
            parts = self._session.get_provider_graph_assignment_info()
            if provider not in {part.ep_name for part in parts}:
                raise CannotRunError(f"{said}{provider} has none of its operators")

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        buffers = tuple(np.zeros(shape, self.input.dtype) for _ in range(BUFFERS))
        try:
            first = self._session.run(None, {self.input.name: buffers[0], **self._held})
        except _ERRORS as error:
            raise CannotRunError(
                f"{self._path}: ONNX Runtime can't run it: {_plain(error)}"
            ) from error
        # A size left open beyond the batch may depend on the picture: its output stays unbound.
        fixed = [min(output.shape[1:], default=1) >= 0 for output in self.outputs]
        self.outputs = tuple(
            Tensor(output.name, values.shape if known else output.shape, values.dtype)
            for output, values, known in zip(self.outputs, first, fixed, strict=True)
        )
        self._buffers = buffers
        self._results: list[list[Array | None]] = []
        for values in buffers:
            binding = self._session.io_binding()
            binding.bind_input(
                self.input.name, "cpu", 0, values.dtype, values.shape, values.ctypes.data
            )
            for name, held in self._held.items():
                binding.bind_input(name, "cpu", 0, held.dtype, held.shape, held.ctypes.data)
            results: list[Array | None] = []
            for output, known in zip(self.outputs, fixed, strict=True):
                if known:
                    result = np.zeros(output.shape, output.dtype)
                    binding.bind_output(
                        output.name, "cpu", 0, result.dtype, result.shape, result.ctypes.data
                    )
                    results.append(result)
                else:
                    binding.bind_output(output.name, "cpu")
                    results.append(None)
            self._results.append(results)
            self._bindings.append(binding)
        return buffers

    def infer(self, buffer: int) -> Sequence[Array]:
        binding, failure = self._bindings[buffer], ""
        results = self._results[buffer]
        try:
            self._session.run_with_iobinding(binding)
            if any(result is None for result in results):
                made = binding.get_outputs()
                return [
                    made[place].numpy() if result is None else result
                    for place, result in enumerate(results)
                ]
        except _ERRORS as error:
            failure = f"{self._path}: {self.name} failed: {_plain(error)}"
        if failure:  # out here, without a context that would keep the device
            raise (AcceleratorLostError if self._accelerated else EngineError)(failure)
        return [result for result in results if result is not None]

    def close(self) -> None:
        self._bindings.clear()
        self._session = None


def load(path: Path, options: Options) -> OnnxRuntime:
    return OnnxRuntime(path, options)


def _providers(wanted: Options, path: Path) -> list[tuple[str, dict[str, str]]]:
    """With their options; the CPU's is always last.

    Raises:
        CannotRunError: the installed build has no provider for the device.
    """
    names = _PROVIDERS.get(wanted.device or "CPU", [])
    if names and names[0] not in onnxruntime.get_available_providers():
        packages = " or ".join(RUNTIMES["onnxruntime"].devices[str(wanted.device)].packages)
        raise CannotRunError(
            f"{path}: the installed onnxruntime has no {names[0]}; the package {packages} has it, "
            "in place of onnxruntime"
        )
    cache = {}
    if wanted.cache is not None:
        cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(wanted.cache)}
    return [
        (name, cache if name.startswith("Tensorrt") else {})
        for name in (*names, "CPUExecutionProvider")
    ]


def _tensor(entry: Any) -> Tensor:
    dtype = _DTYPES.get(entry.type.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise ModelError(f"tensor {entry.name} is a {entry.type}; expected numbers")
    shape = tuple(size if isinstance(size, int) else -1 for size in entry.shape)
    return Tensor(entry.name, shape, np.dtype(dtype))


def _plain(error: Exception) -> str:
    """The message without ONNX Runtime's codes, source paths and repetition of the file."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"^Load model from .* failed: ?", "", text)
    text = re.sub(r"^/\S+:\d+ .*?\) ", "", text)
    return text.splitlines()[0] if text else type(error).__name__
