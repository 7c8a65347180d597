"""Reference samples: pictures in a bundle with the answers expected, and the self-test on them.

    samples/samples.json   [{"file": "a.png", "items": [{"label": "nut", "box": [x1, y1, x2, y2]}]}]
    samples/a.png ...      PNG or JPEG; boxes are in pixels of that picture

An anomalous picture's answer has an item `anomaly`, a normal one's has none.

A model is accepted where it finds what is expected, fast enough, on the device's own accelerator.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import msgspec
import numpy as np
from msgspec import Meta

from common.engine.bundle import Bundle
from common.engine.decoders import ANOMALY, DECODERS
from common.engine.matching import Box, match
from common.engine.model import Model
from common.engine.preprocess import Picture
from common.errors import AcceleratorLostError, EngineError, ModelError
from common.messages import Item

FOLDER, ANSWERS = "samples", "samples.json"
SUFFIXES = (".png", ".jpg", ".jpeg")
TIMED = 30  # inferences at the least
TIMED_WELL = 100  # as many as these, unless it takes too long; one outlier is then none
TIMED_S = 1.0


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that a model should report."""

    label: str
    box: Box | None = None  # None for a classification
    score: Annotated[float, Meta(ge=0, le=1)] | None = None  # what it was when recorded


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: str
    items: tuple[Expected, ...]


@dataclass(frozen=True)
class Sample:
    path: Path
    items: tuple[Expected, ...]  # best first, where it is a classification

    def picture(self) -> Picture:
        """Decode it: uint8 [H, W, 3] BGR, turned as its EXIF says.

        Raises:
            ModelError: it is missing or damaged.
        """
        return read_picture(self.path)


@dataclass(frozen=True)
class SelfTest:
    """What a model reached. `refused` says which limit it missed, "" if none."""

    accuracy: float | None  # 0..1: F1, or the share judged rightly; None without samples
    latency_p99_ms: float | None  # of `infer` alone; None where it did not get so far
    samples: int
    refused: str


def read_picture(path: Path) -> Picture:
    """Raises ModelError: there is no such picture, or it is damaged."""
    try:
        data = np.fromfile(path, np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except OSError as error:
        raise ModelError(f"{path}: the sample can't be read: {error.strerror}") from error
    except cv2.error as error:
        raise ModelError(f"{path}: the sample can't be decoded: {error.err}") from error
    if picture is None:
        raise ModelError(f"{path}: the sample is no whole picture; expected a PNG or JPEG")
    return np.asarray(picture, np.uint8)


def load_samples(bundle: Bundle) -> list[Sample]:
    """The bundle's samples in their order; none where it has no samples folder.

    Raises:
        ModelError: samples.json is missing or malformed, names a file that is missing, outside the
            folder or no picture, or a label that the bundle does not have.
    """
    folder = bundle.path / FOLDER
    if not folder.is_dir():
        return []
    kind = bundle.manifest.decoder.kind or bundle.facts[0].decoder
    if kind is not None and DECODERS[kind].task == "anomaly":
        return read_samples(folder, [ANOMALY])
    return read_samples(folder, bundle.labels or bundle.facts[0].labels)


def read_samples(folder: Path, labels: Sequence[str] | None) -> list[Sample]:
    """As `load_samples`; `labels` None: any will do."""
    where = folder / ANSWERS
    try:
        rows = msgspec.json.decode(where.read_bytes(), type=list[_Row])
    except OSError as error:
        raise ModelError(f"{where}: can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ModelError(
            f'{where}: {error}; expected [{{"file": .., "items": [{{"label": .., "box": ..}}]}}]'
        ) from error
    return [_sample(folder, row, labels, where) for row in rows]


def _sample(folder: Path, row: _Row, labels: Sequence[str] | None, where: Path) -> Sample:
    name = Path(row.file)
    if name.is_absolute() or ".." in name.parts:
        raise ModelError(f"{where}: file {row.file!r} lies outside the folder; expected one inside")
    if name.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{where}: file {row.file!r}: expected one of {', '.join(SUFFIXES)}")
    if not (folder / name).is_file():
        raise ModelError(f"{where}: file {row.file!r} is not there; expected {folder / name}")
    for item in row.items:
        # A class without a name is reported by its number.
        if labels is not None and item.label not in labels and not item.label.isdigit():
            known = ", ".join(labels[:10])
            raise ModelError(f"{where}: {row.file}: label {item.label!r}: expected one of {known}")
    return Sample(folder / name, row.items)


def self_test(
    model: Model, bundle: Bundle, *, stop: Callable[[], bool] = lambda: False
) -> SelfTest:
    """Judge every sample, time at least TIMED inferences, and hold both to the manifest's limits.

    The model should be warm. Without samples it is timed on a grey picture.

    Args:
        stop: asked before each inference; once it says so the rest is left out, and refused.

    Raises:
        AcceleratorLostError: as for `Model.infer`.
    """
    limits = bundle.manifest.limits
    try:
        samples = load_samples(bundle)
        if not samples and limits.accuracy is not None:
            raise ModelError(
                f"limits.accuracy = {limits.accuracy:g}, but the bundle has no samples"
            )
        accuracy, times_ms = _run(model, samples, stop)
    except AcceleratorLostError:
        raise  # says nothing of the model
    except (EngineError, ModelError) as error:
        return SelfTest(None, None, 0, str(error))
    p99_ms = percentile(times_ms, 99)
    refused = []
    if len(times_ms) < max(TIMED, len(samples)):
        refused.append("stopped before its end")
    if accuracy is not None and limits.accuracy is not None and accuracy < limits.accuracy:
        refused.append(
            f"accuracy {accuracy:.3f} on {len(samples)} samples, wanted {limits.accuracy:g}"
        )
    if p99_ms is not None and limits.latency_p99_ms is not None and p99_ms > limits.latency_p99_ms:
        refused.append(
            f"latency p99 {p99_ms:.1f} ms over {len(times_ms)} inferences, wanted "
            f"{limits.latency_p99_ms:g} ms"
        )
    return SelfTest(accuracy, p99_ms, len(samples), "; ".join(refused))


def _run(
    model: Model, samples: list[Sample], stop: Callable[[], bool]
) -> tuple[float | None, list[float]]:
    """Accuracy over all samples, and how long each inference took, going round the samples."""
    grey = np.full((model.input.height, model.input.width, 3), 127, np.uint8)
    answers: list[list[Item]] = []
    times_ms: list[float] = []
    enough, until = max(TIMED, len(samples)), time.monotonic() + TIMED_S
    while len(times_ms) < enough or (len(times_ms) < TIMED_WELL and time.monotonic() < until):
        if stop():
            break
        count = len(times_ms)
        picture = samples[count % len(samples)].picture() if samples else grey
        geometry = model.prepare(picture, count % model.BUFFERS)
        started = time.monotonic_ns()
        outputs = model.infer(count % model.BUFFERS)
        times_ms.append((time.monotonic_ns() - started) / 1e6)
        items = model.decode(outputs, geometry)  # each time: NaN may come late
        if count < len(samples):
            answers.append(items)
    judged = samples[: len(answers)]
    return (accuracy(model.task, answers, judged) if judged else None), times_ms


def accuracy(task: str, answers: Sequence[Sequence[Item]], samples: Sequence[Sample]) -> float:
    """0..1 over all samples together.

    Detection: F1 = 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall (van
    Rijsbergen, Information Retrieval, 1979, chapter 7), things matched as `matching` has it; 1
    where nothing is expected and nothing found. Classification: the share of samples with the
    expected class first (top-1). Anomaly: the share rightly found anomalous, or normal.
    """
    if task != "detection":
        right = sum(
            [item.label for item in items[:1]] == [item.label for item in sample.items[:1]]
            for items, sample in zip(answers, samples, strict=True)
        )
        return right / len(samples)
    right = found = expected = 0
    for items, sample in zip(answers, samples, strict=True):
        matched, wrong = match(items, sample.items)
        right += matched
        found += matched + len(wrong)
        expected += len(sample.items)
    return 2 * right / (found + expected) if found + expected else 1.0


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By nearest rank: the smallest value that so many percent do not exceed; None without any."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)] if ranked else None
