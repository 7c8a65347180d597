"""Runtimes: a row each. The module is imported only when its runtime is chosen.

To add one: a module with `load(path, options) -> Runtime`, and a row here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from common.errors import ModelError

if TYPE_CHECKING:  # `vigil engines` reads the table without them
    from common.engine.preprocess import Array, Tensor

BUFFERS = 2  # one is prepared while the other is inferred
KEPT = 32  # files in a cache
Constants = dict[str, float | list[float]]  # of inputs beside the picture, by name


class CannotRunError(ModelError):
    """This runtime is not installed, or can't run this file: another variant may do."""


class AcceleratorBusyError(CannotRunError):
    """The accelerator is in use by another process, and only one can have it."""


class Runtime(Protocol):
    """A loaded model. `infer` may run on one thread while another fills the other buffer."""

    name: str  # as results tell it: name and version
    input: Tensor
    outputs: tuple[Tensor, ...]

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        """Settle the input's shape; the `BUFFERS` arrays, zeroed, that `infer` reads from.
        `outputs` then has the shapes that outputs really get.

        Raises:
            CannotRunError: the model can't be run at that shape.
        """

    def infer(self, buffer: int) -> Sequence[Array]:
        """Run; the outputs stay valid until the same buffer is inferred again.

        Raises:
            AcceleratorLostError: the accelerator failed.
            EngineError: the runtime failed.
        """

    def close(self) -> None: ...


class _Module(Protocol):
    def load(self, path: Path, options: Options) -> Runtime: ...


@dataclass(frozen=True)
class Options:
    """How a runtime may use the machine."""

    threads: int = 1
    spinning: bool = False  # threads burn CPU between runs instead of sleeping (ONNX Runtime)
    memory_arena: bool = True  # memory in one arena: less of it, and faster (ONNX Runtime)
    cache: Path | None = None  # folder for what is built for this very device; None: nothing kept
    delegate: str | None = None  # the variant's: library of the accelerator to run on (LiteRT)
    device: str | None = None  # the variant's: which of the runtime's devices to run on
    constants: Constants = field(default_factory=dict)  # the manifest's


@dataclass(frozen=True)
class Device:
    """What a variant's `device` or `delegate` may be.

    A sign is a pattern of files below /, such as `dev/nvidia[0-9]*`; behind a `=`, how such a file
    has to begin.
    """

    packages: tuple[str, ...] = ()  # distributions whose build of the runtime has it; (): any
    signs: tuple[str, ...] = ()  # any of them shows that it is here
    tried: bool = False  # whether Vigil was ever run on it


@dataclass(frozen=True)
class Row:
    module: str
    formats: tuple[str, ...]  # suffixes of the files it reads
    extra: str  # of pyproject.toml, which installs it
    packages: tuple[str, ...]  # distributions that it comes in, any of them
    devices: dict[str, Device]  # the first is the one where a variant names none
    delegates: dict[str, Device] = field(default_factory=dict)  # libraries of accelerators


_CPU = Device(tried=True)
_NVIDIA = ("dev/nvidia[0-9]*", "dev/nvhost-gpu", "dev/nvgpu/igpu*")  # the latter two: Jetson
_EDGE_TPU = (  # on PCIe; on USB before its first use and after
    "dev/apex_*", "sys/bus/usb/devices/*/modalias=usb:v1A6Ep089A",
    "sys/bus/usb/devices/*/modalias=usb:v18D1p9302",
)  # fmt: skip
_CUDA = Device(("onnxruntime-gpu",), _NVIDIA)

RUNTIMES = {
    "litert": Row(
        "common.engine.runtimes.litert", ("tflite",), "litert",
        ("ai-edge-litert", "tflite-runtime"), {"CPU": _CPU},
        {"libedgetpu.so.1": Device(signs=_EDGE_TPU)},  # any other works the same way
    ),
    "onnxruntime": Row(
        "common.engine.runtimes.ort", ("onnx",), "onnx",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        {
            "CPU": _CPU, "cuda": _CUDA, "tensorrt": _CUDA,
            "openvino": Device(("onnxruntime-openvino",), tried=True),  # on a CPU
        },
    ),
    "openvino": Row(
        "common.engine.runtimes.openvino", ("xml", "onnx", "tflite"), "openvino", ("openvino",),
        {
            "CPU": _CPU, "GPU": Device(signs=("sys/class/drm/renderD*/device/vendor=0x8086",)),
            "NPU": Device(signs=("dev/accel/accel*",)),
        },
    ),
    "tensorrt": Row(
        "common.engine.runtimes.tensorrt", ("onnx",), "tensorrt",
        ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"), {"cuda": Device(signs=_NVIDIA)},
    ),
}  # fmt: skip


def load(runtime: str, path: Path, options: Options) -> Runtime:
    """Import a runtime and load a checked file into it.

    Raises:
        CannotRunError: the runtime is not installed, the file has operators it lacks, or the
            accelerator is not there.
        ModelError: the runtime can't make sense of the file.
    """
    try:
        module = cast(_Module, importlib.import_module(RUNTIMES[runtime].module))
    except ImportError as error:
        raise CannotRunError(
            f"{path.name}: runtime {runtime} is not installed ({error}); "
            f"install the extra `{RUNTIMES[runtime].extra}`"
        ) from error
    if options.cache is not None:
        _trim(options.cache)
    return module.load(path, options)


def _trim(folder: Path) -> None:
    """Keep the newest `KEPT` of what was built for this device."""
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found[KEPT:]:
            path.unlink()
    except OSError:  # there is none, another process does the same, or the disk is read-only
        return


def split_inputs(
    inputs: Sequence[Tensor], constants: Constants, where: str
) -> tuple[Tensor, dict[str, Array]]:
    """The input that takes the picture, and what the others hold at each run, as stored.

    A list is laid out in the input's shape; a number fills it, sizes left open being 1. So a state
    that goes in and comes out again begins anew with each frame.

    Raises:
        ModelError: there is not just one input left for the picture, or a constant doesn't fit.
    """
    import numpy as np  # here: the table above is read without it

    names = ", ".join(tensor.name for tensor in inputs)
    rest = [tensor for tensor in inputs if tensor.name not in constants]
    if len(rest) + len(constants) != len(inputs):
        raise ModelError(
            f"{where}: has the inputs {names}, but `constants` has {', '.join(constants)}"
        )
    if len(rest) != 1:
        raise ModelError(
            f"{where}: has {len(rest)} inputs ({', '.join(tensor.name for tensor in rest)}); "
            "expected one, the picture's; give what each other holds as `constants` in [input], "
            "{name = [values]}"
        )
    held = {}
    for tensor in inputs:
        if tensor.name not in constants:
            continue
        value = constants[tensor.name]
        try:
            if isinstance(value, list):
                held[tensor.name] = np.array(value, tensor.dtype).reshape(tensor.shape)
            else:
                held[tensor.name] = np.full(
                    [abs(size) for size in tensor.shape], value, tensor.dtype
                )
        except (ValueError, OverflowError) as error:
            raise ModelError(f"{where}: constant for input {tensor}: {error}") from error
    return rest[0], held
