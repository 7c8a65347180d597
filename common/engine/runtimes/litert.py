"""LiteRT (TFLite) on the CPU, through XNNPACK where its operators allow, or on an accelerator
through its delegate: a library that LiteRT hands operators to.

`ai_edge_litert` is preferred; old devices have only `tflite_runtime`, with the same interface.
The interpreter owns its input, so `infer` copies the prepared buffer into it (1.7 us for 224x224
uint8): the price of preparing the next frame meanwhile.

Delegates are tested with one of our own (tests/fake_delegate). A real Edge TPU (libedgetpu.so.1)
has not been tried yet.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.engine.facts import EDGETPU_OPERATOR, read_facts
from common.engine.preprocess import Array, Tensor
from common.engine.runtimes import (
    BUFFERS,
    CannotRunError,
    Constants,
    Options,
    split_inputs,
)
from common.errors import AcceleratorLostError, EngineError

try:
    from ai_edge_litert import __version__
    from ai_edge_litert.interpreter import Interpreter
except ModuleNotFoundError:
    from tflite_runtime import __version__
    from tflite_runtime.interpreter import Interpreter


class Delegate:
    """An accelerator's library and its device: what `Interpreter` takes as a delegate.

    LiteRT's own `load_delegate` keeps the interpreter's lock while the library looks for its device
    (seconds, for one on USB): all threads would stand still. Where it fails, it also leaves a
    traceback on stderr.
    """

    def __init__(self, library: str) -> None:
        """Raises OSError: there is no such library, or no device that it can use."""
        self._pointer: int | None = None
        self._library = ctypes.CDLL(library)
        texts = ctypes.POINTER(ctypes.c_char_p)
        report = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        reported: list[bytes] = []
        try:
            create = self._library.tflite_plugin_create_delegate
            self._destroy = self._library.tflite_plugin_destroy_delegate
        except AttributeError as error:
            raise OSError(f"is no TFLite delegate ({error})") from error
        create.argtypes, create.restype = [texts, texts, ctypes.c_size_t, report], ctypes.c_void_p
        self._destroy.argtypes, self._destroy.restype = [ctypes.c_void_p], None
        self._pointer = create(None, None, 0, report(reported.append))
        if self._pointer is None:
            said = b"; ".join(reported).decode(errors="replace").strip()
            raise OSError(said or "no device, or another process uses it")

    def _get_native_delegate_pointer(self) -> int | None:
        return self._pointer

    def __del__(self) -> None:
        # Not sooner: `Interpreter` drops its delegates after its graph, which still uses them.
        if self._pointer is not None:
            self._destroy(self._pointer)


class LiteRt:
    """See `common.engine.runtimes.Runtime`."""

    def __init__(self, path: Path, threads: int, library: str | None, constants: Constants) -> None:
        self.name = f"litert {__version__}"
        self._path, self._accelerated = path, library is not None
        self._views: list[Any] = []
        delegates = []
        if library is not None:
            self.name += f" on {Path(library).name}"
            try:
                delegates.append(Delegate(library))
            except OSError as error:
                raise CannotRunError(f"{path}: accelerator {library}: {error}") from error
        try:
            self._interpreter: Any = Interpreter(
                model_path=str(path), num_threads=threads, experimental_delegates=delegates
            )
            inputs = self._interpreter.get_input_details()
        except (RuntimeError, ValueError) as error:
            raise CannotRunError(f"{path}: LiteRT can't load it: {_first_line(error)}") from error
        tensors = [_tensor(entry, signature=True) for entry in inputs]
        self.input, held = split_inputs(tensors, constants, str(path))
        places = {entry["name"]: int(entry["index"]) for entry in inputs}
        self._index = places[self.input.name]
        self._held = [(places[name], values) for name, values in held.items()]
        self.outputs: tuple[Tensor, ...] = ()

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        try:
            wanted = {self._index: shape} | {index: held.shape for index, held in self._held}
            for entry in self._interpreter.get_input_details():
                if wanted[entry["index"]] != tuple(entry["shape"]):
                    self._interpreter.resize_tensor_input(
                        entry["index"], list(wanted[entry["index"]])
                    )
            self._interpreter.allocate_tensors()
            self._buffers = tuple(np.zeros(shape, self.input.dtype) for _ in range(BUFFERS))
            self._set(self._buffers[0])
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
        failure = ""
        try:
            self._set(self._buffers[buffer])
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            failure = f"{self._path}: {self.name} failed: {_first_line(error)}"
        if failure:
            # Raised out here, without a context: its traceback would keep the interpreter, and
            # so the device, for as long as somebody keeps the error.
            raise AcceleratorLostError(failure) if self._accelerated else EngineError(failure)
        results = self._results[buffer]
        for place, view in enumerate(self._views):
            values = view()
            if values.shape == results[place].shape:
                np.copyto(results[place], values)
            else:  # an output whose size depends on the picture
                results[place] = values.copy()
            del values  # the interpreter refuses to run while a view of its memory lives
        return results

    def _set(self, values: Array) -> None:
        self._interpreter.reset_all_variables()  # a stateful model begins anew: half a microsecond
        for index, held in self._held:
            self._interpreter.set_tensor(index, held)
        self._interpreter.set_tensor(self._index, values)

    def close(self) -> None:
        self._views.clear()
        self._interpreter = None


def load(path: Path, options: Options) -> LiteRt:
    """Threads sleep between runs and keep their memory, whatever the options: XNNPACK's do."""
    compiled = EDGETPU_OPERATOR in read_facts(path).custom_operators
    if options.delegate is None and compiled:
        raise CannotRunError(
            f"{path}: is compiled for an Edge TPU (operator {EDGETPU_OPERATOR}) and can't run on "
            "a CPU; use the model it was compiled from (usually the name without _edgetpu)"
        )
    if options.delegate is not None and "libedgetpu" in options.delegate and not compiled:
        raise CannotRunError(  # libedgetpu would take nothing of it, without a word
            f"{path}: is not compiled for an Edge TPU (no operator {EDGETPU_OPERATOR}) and would "
            "run on the CPU; compile it with edgetpu_compiler, or name no delegate"
        )
    return LiteRt(path, options.threads, options.delegate, options.constants)


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
