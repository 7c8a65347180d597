"""A loaded model: prepare, infer, decode."""

import fcntl
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.engine import decoders, runtimes
from common.engine.bundle import Bundle, Variant
from common.engine.decoders import Decode, Settings
from common.engine.facts import Facts
from common.engine.preprocess import Geometry, InputSpec, Picture, Preprocessor, Tensor
from common.engine.resolve import resolve
from common.engine.runtimes import AcceleratorBusyError, CannotRunError, Options, Runtime
from common.errors import ModelError
from common.messages import Item

Outputs = Sequence[NDArray[np.generic]]


@dataclass
class Model:
    """One thread may `prepare` a buffer and `decode` while another does `infer` on the other
    buffer; no call may run twice at a time.
    """

    name: str
    version: str
    release: int
    slot: str  # first 12 hex digits of the bundle's sha256
    runtime: str  # name and version
    task: decoders.Task
    labels: tuple[str, ...] | None
    input: InputSpec
    accelerator: str  # its device or library's name, "" on the CPU
    exclusive: bool  # no other process can use that accelerator meanwhile
    _runtime: Runtime
    _prepare: Preprocessor
    _decode: Decode
    _read: Sequence[int]  # which of what `infer` gives it takes
    _inputs: Sequence[NDArray[np.generic]]  # the buffers, where `infer` gives them too
    fallback_reason: str = ""  # why a variant preferred to this one is not used; "" if none is
    accelerator_busy: bool = False  # whether that is because another process has its accelerator
    _opened: ExitStack = field(default_factory=ExitStack)

    BUFFERS: ClassVar[int] = runtimes.BUFFERS

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        options: Options | None = None,
        runtime: str | None = None,
        *,
        accelerator: bool | None = None,
        lock_folder: Path | None = None,
    ) -> "Model":
        """Load the first variant that runs here.

        Args:
            options: how the runtime may use the machine.
            runtime: consider this runtime's variants only.
            accelerator: True: only variants that name an accelerator; False: only those that don't.
            lock_folder: where processes lock an exclusive accelerator; None: it is not locked.

        Raises:
            AcceleratorBusyError: no variant runs here, one of them because another process uses
                its accelerator.
            CannotRunError: no variant runs here.
            ModelError: the manifest and the model contradict each other, or something is known
                from neither.
        """
        reasons: list[str] = []
        busy = False
        for variant, path, facts in zip(
            bundle.manifest.variants, bundle.files, bundle.facts, strict=True
        ):
            if runtime not in (None, variant.runtime):
                continue
            if accelerator not in (None, bool(variant.accelerator)):
                continue
            try:
                model = cls._load(bundle, variant, path, facts, options or Options(), lock_folder)
            except CannotRunError as error:
                busy |= isinstance(error, AcceleratorBusyError)
                reasons.append(str(error))
            else:
                model.fallback_reason, model.accelerator_busy = "; ".join(reasons), busy
                return model
        if not reasons:
            wanted = f"runtime {runtime}" if runtime else "any runtime"
            if accelerator is not None:
                wanted += " with an accelerator" if accelerator else " on the CPU"
            known = ", ".join(variant.runtime for variant in bundle.manifest.variants)
            raise ModelError(f"{bundle.path}: no variant for {wanted}; it has {known}")
        raise (AcceleratorBusyError if busy else CannotRunError)("; ".join(reasons))

    @classmethod
    def _load(
        cls,
        bundle: Bundle,
        variant: Variant,
        path: Path,
        facts: Facts,
        options: Options,
        lock_folder: Path | None,
    ) -> "Model":
        _check_library(bundle, variant)
        with ExitStack() as opened:  # closed again unless all goes well
            if variant.exclusive and lock_folder is not None:
                opened.callback(os.close, _lock(lock_folder, variant))
            options = replace(
                options,
                delegate=variant.delegate,
                device=variant.device,
                constants=bundle.manifest.input.constants,
            )
            engine = runtimes.load(variant.runtime, path, options)
            opened.callback(engine.close)
            model = cls.assemble(bundle, variant, path, facts, engine)
            model._opened = opened.pop_all()
            return model

    @classmethod
    def assemble(
        cls, bundle: Bundle, variant: Variant, path: Path, facts: Facts, engine: Runtime
    ) -> "Model":
        """A variant on a runtime that has loaded it, and that whoever did so closes.

        Raises:
            ModelError: as for `load`.
        """
        manifest, given = bundle.manifest, bundle.manifest.decoder
        spec, kind = resolve(manifest, facts, engine.input, str(path))
        row = decoders.DECODERS[kind]
        classifies = row.task == "classification"
        options = {name: getattr(given, name) for name in decoders.OPTIONS}
        useless = [
            key for key, value in options.items() if value is not None and key not in row.takes
        ]
        if useless:
            raise ModelError(
                f"{path}: decoder {kind} has no use for `{useless[0]}` of [decoder]; "
                f"expected {' or '.join(row.takes) or 'none such'}"
            )
        for key in row.takes:
            if options[key] is None:
                options[key] = getattr(facts, key, None)

        def either(key: str, default: float | None = None) -> Any:
            value = getattr(given, key)
            value = getattr(facts, key) if value is None else value
            return default if value is None else value

        shape = (1, spec.channels, spec.height, spec.width)
        if spec.layout == "nhwc":
            shape = (1, spec.height, spec.width, spec.channels)
        buffers = engine.allocate(shape[-len(engine.input.shape) :])
        labels = bundle.labels or facts.labels
        if row.task == "anomaly":
            labels = (decoders.ANOMALY,)
            if bundle.labels is not None:
                raise ModelError(f"{path}: decoder {kind} has a label of its own, {labels[0]!r}")
        read = _read(given.outputs, engine.outputs, str(path))
        outputs = [engine.outputs[place] for place in read]
        # Classes that don't exclude each other, or a single one, are there or not.
        each = classifies and (
            options["activation"] == "sigmoid" or math.prod(outputs[0].shape) == 1
        )
        settings = Settings(
            where=str(path),
            labels=labels,
            score=either("score", 0.5 if each else 0.4 * (row.task == "detection")),
            iou=either("iou", 0.45),
            max_items=given.max_items or (5 if classifies and not each else 100),
            height=spec.height,
            width=spec.width,
            roles=facts.roles,
            folder=bundle.path if bundle.path.is_dir() else bundle.path.parent,
            **options,
        )
        if row.with_input:
            read.append(len(engine.outputs))
            outputs.append(replace(engine.input, shape=buffers[0].shape))
        return cls(
            name=manifest.name,
            version=manifest.version,
            release=manifest.release,
            slot=bundle.sha256[:12],
            runtime=engine.name,
            task=decoders.DECODERS[kind].task,
            labels=labels,
            input=spec,
            accelerator=variant.accelerator,
            exclusive=variant.exclusive,
            _runtime=engine,
            _prepare=Preprocessor(spec, [buffer.reshape(shape) for buffer in buffers]),
            _decode=decoders.build(kind, outputs, settings),
            _read=read,
            _inputs=buffers if row.with_input else (),
        )

    def prepare(self, picture: Picture, buffer: int) -> Geometry:
        """Bring a picture, uint8 [H, W, 3] BGR or [H, W] grey, into an input buffer.

        Raises:
            EngineError: the picture has another shape or type.
        """
        return self._prepare(picture, buffer)

    def infer(self, buffer: int) -> Outputs:
        """Run the model. The outputs, and the input behind them where the decoder needs it, stay
        valid until the same buffer is prepared or inferred again.

        Raises:
            AcceleratorLostError: the accelerator failed.
            EngineError: the runtime failed.
        """
        outputs = self._runtime.infer(buffer)
        return [*outputs, self._inputs[buffer]] if self._inputs else outputs

    def decode(self, outputs: Outputs, geometry: Geometry) -> list[Item]:
        """Items, best first; boxes in pixels of the picture that `geometry` is of.

        Raises:
            EngineError: the outputs hold NaN, or are otherwise no decision.
        """
        return self._decode([outputs[place] for place in self._read], geometry)

    def warm_up(self, runs: int = 3) -> None:
        """Go through all steps on a grey picture, so that the first real one is not slower.

        Raises:
            EngineError: as for the steps.
        """
        picture = np.full((self.input.height, self.input.width, 3), 127, np.uint8)
        for run in range(runs):
            geometry = self.prepare(picture, run % self.BUFFERS)
            self.decode(self.infer(run % self.BUFFERS), geometry)

    def close(self) -> None:
        """Give memory and accelerator back. The model can't be used any more."""
        self._opened.close()


def _check_library(bundle: Bundle, variant: Variant) -> None:
    """What an update brings is data: it must not bring code for this process along."""
    library, root = Path(variant.delegate or ""), bundle.path.resolve()
    if library.is_absolute() and library.resolve().is_relative_to(root):
        raise ModelError(
            f"{bundle.path}: delegate {variant.delegate} lies in the bundle; expected a library "
            "of the system"
        )


def _read(wanted: list[str] | None, outputs: Sequence[Tensor], where: str) -> list[int]:
    """Which outputs the decoder gets, in the order wanted."""
    names = [output.name for output in outputs]
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ModelError(
            f"{where}: `outputs` in [decoder] names {', '.join(unknown)}, but it has "
            f"{', '.join(names)}"
        )
    return list(range(len(names))) if wanted is None else [names.index(name) for name in wanted]


def _lock(folder: Path, variant: Variant) -> int:
    """A descriptor that holds an exclusive accelerator for this process, until it is closed.

    Raises:
        AcceleratorBusyError: another has it.
    """
    name = variant.accelerator
    lock = os.open(folder / f"accelerator-{name}.lock", os.O_RDWR | os.O_CREAT, 0o660)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise AcceleratorBusyError(f"accelerator {name}: in use by another process") from error
    return lock
