"""A loaded model: prepare, infer, decode."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from common.engine import decoders, runtimes
from common.engine.bundle import Bundle
from common.engine.decoders import Decode, Settings
from common.engine.facts import Facts
from common.engine.preprocess import Geometry, InputSpec, Picture, Preprocessor
from common.engine.resolve import resolve
from common.engine.runtimes import CannotRunError, Options, Runtime
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
    task: str
    labels: tuple[str, ...] | None
    input: InputSpec
    fallback_reason: str  # why a variant preferred to this one is not used; "" if none is
    _runtime: Runtime
    _prepare: Preprocessor
    _decode: Decode

    BUFFERS: ClassVar[int] = runtimes.BUFFERS

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        options: Options | None = None,
        runtime: str | None = None,
    ) -> "Model":
        """Load the first variant that runs here.

        Args:
            options: how the runtime may use the machine.
            runtime: consider this runtime's variants only.

        Raises:
            CannotRunError: no variant runs here.
            ModelError: the manifest and the model contradict each other, or something is known
                from neither.
        """
        reasons: list[str] = []
        for variant, path, facts in zip(
            bundle.manifest.variants, bundle.files, bundle.facts, strict=True
        ):
            if runtime not in (None, variant.runtime):
                continue
            try:
                engine = runtimes.load(variant.runtime, path, options or Options())
                return cls._assemble(bundle, path, facts, engine, "; ".join(reasons))
            except CannotRunError as error:
                reasons.append(str(error))
        if not reasons:
            known = ", ".join(variant.runtime for variant in bundle.manifest.variants)
            raise ModelError(f"{bundle.path}: no variant for runtime {runtime}; it has {known}")
        raise CannotRunError("; ".join(reasons))

    @classmethod
    def _assemble(
        cls, bundle: Bundle, path: Path, facts: Facts, engine: Runtime, fallback: str
    ) -> "Model":
        manifest, given = bundle.manifest, bundle.manifest.decoder
        spec, kind = resolve(manifest, facts, engine.input, str(path))
        classifies = kind == "classification"
        if given.activation is not None and not classifies:
            raise ModelError(
                f"{path}: `activation` is for classification; decoder {kind} has its own"
            )
        planes = (spec.height, spec.width)
        buffers = engine.allocate(
            (1, spec.channels, *planes) if spec.layout == "nchw" else (1, *planes, spec.channels)
        )
        labels = bundle.labels or facts.labels
        settings = Settings(
            where=str(path),
            labels=labels,
            activation=given.activation or facts.activation,
            score=given.score if given.score is not None else 0.0 if classifies else 0.4,
            iou=given.iou,
            max_items=given.max_items or (5 if classifies else 100),
            height=spec.height,
            width=spec.width,
            roles=facts.roles,
        )
        return cls(
            name=manifest.name,
            version=manifest.version,
            release=manifest.release,
            slot=bundle.sha256[:12],
            runtime=engine.name,
            task="classification" if classifies else "detection",
            labels=labels,
            input=spec,
            fallback_reason=fallback,
            _runtime=engine,
            _prepare=Preprocessor(spec, buffers),
            _decode=decoders.build(kind, engine.outputs, settings),
        )

    def prepare(self, picture: Picture, buffer: int) -> Geometry:
        """Bring a picture, uint8 [H, W, 3] BGR or [H, W] grey, into an input buffer.

        Raises:
            EngineError: the picture has another shape or type.
        """
        return self._prepare(picture, buffer)

    def infer(self, buffer: int) -> Outputs:
        """Run the model. The outputs stay valid until the same buffer is inferred again.

        Raises:
            EngineError: the runtime failed.
        """
        return self._runtime.infer(buffer)

    def decode(self, outputs: Outputs, geometry: Geometry) -> list[Item]:
        """Items, best first; boxes in pixels of the picture that `geometry` is of.

        Raises:
            EngineError: the outputs hold NaN, or are otherwise no decision.
        """
        return self._decode(outputs, geometry)

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
        """Give the runtime's memory back. The model can't be used any more."""
        self._runtime.close()
