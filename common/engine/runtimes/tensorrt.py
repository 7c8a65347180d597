"""TensorRT on NVIDIA's GPUs. *Untested*: no such device was at hand.

An engine is built from ONNX for one device, TensorRT and input shape, which takes minutes; that
happens in `allocate`, never later (a group's `load_s` has to allow for it). It is kept in the
options' cache under the model's hash, the device and the version. What lies there and is damaged
or another's is refused and built anew: an engine is code for the GPU, and TensorRT says that it
may crash on a foreign one.
"""

import ctypes
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt

from common import durable
from common.digest import digest
from common.engine.preprocess import Array, Tensor
from common.engine.runtimes import BUFFERS, CannotRunError, Options, split_inputs
from common.errors import AcceleratorLostError, EngineError, StorageError

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_MOST = 4 << 30  # bytes of an engine


class Cuda:
    """The few calls of the CUDA runtime's C API that are needed. Raises EngineError."""

    def __init__(self) -> None:
        """Raises CannotRunError: there is no such library."""
        for name in _LIBRARIES:
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise CannotRunError(f"none of {', '.join(_LIBRARIES)} is there: is CUDA installed?")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        for name in ("cudaFree", "cudaFreeHost", "cudaStreamSynchronize", "cudaStreamDestroy"):
            getattr(self._library, name).argtypes = [ctypes.c_void_p]
        self._library.cudaMemcpyAsync.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
        ]  # fmt: skip

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            said = self._library.cudaGetErrorString(status).decode()
            raise EngineError(f"{name}: {said} ({status})")

    def device(self) -> str:
        found = ctypes.create_string_buffer(8192)  # cudaDeviceProp, which begins with the name
        self.call("cudaGetDeviceProperties", found, 0)
        return found.value.decode()

    def pointer(self, name: str, *arguments: Any) -> int:
        """What a call that gives a pointer gives."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)


class TensorRt:
    """See `common.engine.runtimes.Runtime`."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path, self._cache = path, options.cache
        self.name = f"tensorrt {tensorrt.__version__} on cuda"
        self._cuda = Cuda()
        self._logger: Any = tensorrt.Logger(tensorrt.Logger.ERROR)
        try:
            self._builder: Any = tensorrt.Builder(self._logger)
        except (RuntimeError, TypeError) as error:  # the latter: its constructor gave nothing
            raise CannotRunError(f"{path}: TensorRT finds no device: {error}") from error
        self._network = self._builder.create_network(0)
        parser = tensorrt.OnnxParser(self._network, self._logger)
        if not parser.parse_from_file(str(path)):
            said = "; ".join(parser.get_error(place).desc() for place in range(parser.num_errors))
            raise CannotRunError(f"{path}: TensorRT can't load it: {said}")
        inputs = [self._network.get_input(place) for place in range(self._network.num_inputs)]
        self.input, self._held = split_inputs(
            [_tensor(entry) for entry in inputs], options.constants, str(path)
        )
        self.outputs: tuple[Tensor, ...] = ()
        self._made: list[tuple[str, int]] = []  # memory and the stream, with how to give it back

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        shapes = {name: held.shape for name, held in self._held.items()} | {self.input.name: shape}
        try:
            self._prepare(shapes)
        except EngineError as error:
            raise CannotRunError(f"{self._path}: TensorRT can't run it: {error}") from error
        return self._buffers

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        runtime = tensorrt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(self._plan(shapes))
        if engine is None:
            raise EngineError("its engine can't be loaded")
        self._engine: tuple[Any, ...] = runtime, engine  # the runtime has to live as long
        self._context = engine.create_execution_context()
        self._stream = self._keep("cudaStreamDestroy", self._cuda.pointer("cudaStreamCreate"))
        for name, sizes in shapes.items():
            self._context.set_input_shape(name, sizes)
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self.outputs = tuple(
            Tensor(
                name,
                tuple(self._context.get_tensor_shape(name)),
                np.dtype(tensorrt.nptype(engine.get_tensor_dtype(name))),
            )
            for name in names
            if name not in shapes
        )
        for output in self.outputs:
            if -1 in output.shape:
                raise EngineError(f"output {output} depends on the picture")
        self._on_device = {
            tensor.name: self._address(tensor) for tensor in (self._sized(shapes), *self.outputs)
        }
        for name, held in self._held.items():
            address = self._address(Tensor(name, held.shape, held.dtype))
            self._copy(address, held, _TO_DEVICE)
        self._buffers = tuple(self._pinned(self._sized(shapes)) for _ in range(BUFFERS))
        self._results = [[self._pinned(output) for output in self.outputs] for _ in range(BUFFERS)]
        self.infer(0)

    def infer(self, buffer: int) -> Sequence[Array]:
        results, failure = self._results[buffer], ""
        try:
            self._copy(self._on_device[self.input.name], self._buffers[buffer], _TO_DEVICE)
            if not self._context.execute_async_v3(self._stream):
                failure = "it was not run"
            for output, result in zip(self.outputs, results, strict=True):
                self._copy(self._on_device[output.name], result, _TO_HOST)
            self._cuda.call("cudaStreamSynchronize", self._stream)
        except EngineError as error:
            failure = str(error)
        if failure:  # out here, without a context that would keep the device
            raise AcceleratorLostError(f"{self._path}: {self.name} failed: {failure}")
        return results

    def close(self) -> None:
        self._context = self._network = self._builder = None
        self._engine = ()
        while self._made:
            name, pointer = self._made.pop()
            try:
                self._cuda.call(name, pointer)
            except EngineError as error:  # a lost device has given back everything
                print(f"{self._path}: {error}", file=sys.stderr)

    def _plan(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        """The engine, from the cache or built now."""
        device = self._cuda.device()
        place = None
        if self._cache is not None:
            place = engine_path(self._cache, self._path, device, tensorrt.__version__, shapes)
            plan, why = read_engine(place)
            if plan is not None:
                return plan
            print(f"{self._path}: building its engine for {device}: {why}", file=sys.stderr)
        settings = self._builder.create_builder_config()
        profile = self._builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, sizes, sizes, sizes)
        settings.add_optimization_profile(profile)
        plan = self._builder.build_serialized_network(self._network, settings)
        if plan is None:
            raise EngineError("its engine can't be built")
        if place is not None:
            try:
                write_engine(place, bytes(plan))
            except (OSError, StorageError) as error:  # it is built again next time
                print(error, file=sys.stderr)
        return plan

    def _sized(self, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        return Tensor(self.input.name, shapes[self.input.name], self.input.dtype)

    def _keep(self, undo: str, pointer: int) -> int:
        self._made.append((undo, pointer))
        return pointer

    def _address(self, tensor: Tensor) -> int:
        """Memory for a tensor on the device, where the engine looks for it."""
        size = ctypes.c_size_t(_bytes(tensor))
        address = self._keep("cudaFree", self._cuda.pointer("cudaMalloc", size))
        self._context.set_tensor_address(tensor.name, address)
        return address

    def _pinned(self, tensor: Tensor) -> Array:
        """Memory of the host that the device can copy from and to by itself, zeroed."""
        size = _bytes(tensor)
        place = self._cuda.pointer("cudaHostAlloc", ctypes.c_size_t(size), ctypes.c_uint(0))
        raw = (ctypes.c_ubyte * size).from_address(self._keep("cudaFreeHost", place))
        array = np.ctypeslib.as_array(raw).view(tensor.dtype).reshape(tensor.shape)
        array.fill(0)
        return array

    def _copy(self, address: int, array: Array, way: int) -> None:
        ends = (address, array.ctypes.data) if way == _TO_DEVICE else (array.ctypes.data, address)
        self._cuda.call("cudaMemcpyAsync", *ends, array.nbytes, way, self._stream)


def load(path: Path, options: Options) -> TensorRt:
    return TensorRt(path, options)


def engine_path(
    folder: Path, model: Path, device: str, version: str, shapes: dict[str, tuple[int, ...]]
) -> Path:
    """Where the engine of a model lies: named after all that it was built from."""
    sizes = "_".join("x".join(map(str, shape)) for _, shape in sorted(shapes.items()))
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", device).strip("-")
    return folder / f"{digest(model.parent, [model])[:16]}-{plain}-{version}-{sizes}.engine"


def write_engine(place: Path, plan: bytes) -> None:
    """Raises StorageError, or OSError: there is no such folder, and it can't be made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    durable.write(place, f"{place.name} {zlib.crc32(plan):08x}\n".encode() + plan)


def read_engine(place: Path) -> tuple[bytes | None, str]:
    """What `write_engine` wrote, or why it is not to be used."""
    try:
        head, _, plan = durable.read(place, _MOST).partition(b"\n")
    except FileNotFoundError:
        return None, "there is none yet"
    except OSError as error:
        return None, f"{place}: can't be read: {error.strerror}"
    name, _, checksum = head.decode(errors="replace").partition(" ")
    if name != place.name:
        return None, f"{place}: is the engine {name[:200]}, of another model, device or TensorRT"
    if checksum != f"{zlib.crc32(plan):08x}":
        return None, f"{place}: is damaged"
    return plan, ""


def _tensor(entry: Any) -> Tensor:
    return Tensor(entry.name, tuple(entry.shape), np.dtype(tensorrt.nptype(entry.dtype)))


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * tensor.dtype.itemsize
