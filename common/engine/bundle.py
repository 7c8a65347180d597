"""Bundles: a folder of manifest.toml, model files and labels; or a bare model file.

The manifest says only what the model files don't. `open_bundle` checks that every file is whole
and of its type; whether model and manifest fit together shows when `Model.load` opens the runtime.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from common.digest import digest
from common.engine.decoders import DECODERS, Task
from common.engine.decoders.anchors import Anchors
from common.engine.facts import SUFFIXES, Facts, read_facts, read_labels, read_text
from common.engine.preprocess import Colour, Resize
from common.engine.runtimes import RUNTIMES, Constants
from common.errors import ModelError

MANIFEST = "manifest.toml"

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(gt=0)]
Histogram = Annotated[  # ten equal bins from 0 to 1
    list[Annotated[float, Meta(ge=0)]], Meta(min_length=10, max_length=10)
]
Column = Literal["image", "x1", "y1", "x2", "y2", "score", "class"]
Channels = float | Annotated[list[float], Meta(min_length=1, max_length=3)]


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model file and the runtime that runs it, on an accelerator where it names one: a device of
    the runtime's own, or the library of one.

    The library is the system's, never the bundle's: a name for the dynamic linker, such as
    "libedgetpu.so.1", or an absolute path.
    """

    runtime: str
    file: str
    delegate: str | None = None
    device: str | None = None  # None: the runtime's first, the CPU if it has one
    exclusive: bool = False  # only one process at a time can use the accelerator

    def __post_init__(self) -> None:
        row = RUNTIMES.get(self.runtime)
        if row is not None and self.device not in (None, *row.devices):
            known = ", ".join(row.devices) or "none"
            raise ValueError(
                f"runtime {self.runtime} has no device {self.device!r}; expected {known}"
            )
        if self.delegate is not None:
            if row is not None and not row.delegates:
                raise ValueError(f"runtime {self.runtime} takes no delegate")
            if not self.delegate or ("/" in self.delegate and not self.delegate.startswith("/")):
                raise ValueError(
                    f"delegate = {self.delegate!r}: expected the name of a system library, or an "
                    "absolute path"
                )
        if self.exclusive and not self.accelerator:
            raise ValueError("`exclusive` is for an accelerator; expected a `delegate` or `device`")

    @property
    def accelerator(self) -> str:
        """Its device, or its library's name; "" for the CPU."""
        if self.delegate is not None:
            return Path(self.delegate).name
        row = RUNTIMES.get(self.runtime)
        device = self.device or (next(iter(row.devices)) if row is not None else "CPU")
        return "" if device == "CPU" else device


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model wants to see. A value of its input is (pixel - mean) / scale."""

    resize: Resize | None = None
    pad: Annotated[int, Meta(ge=0, le=255)] | None = None  # beside a letterboxed picture; 114
    colour: Colour | None = None
    mean: Channels | None = None  # one value, or one a channel in the order of `colour`
    scale: Channels | None = None  # divides: 255 brings pixels to 0..1
    layout: Literal["nchw", "nhwc"] | None = None
    size: tuple[Positive, Positive] | None = None  # height, width, where the model leaves it open
    constants: Constants = {}  # what other inputs hold: a number that fills one, or all its values


class Decoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the outputs are read."""

    kind: str | None = None
    labels: str | None = None  # file beside the manifest
    activation: Literal["none", "softmax", "sigmoid"] | None = None  # still to be applied
    score: Share | None = None  # report nothing below; boxes 0.4, sigmoid 0.5, others 0
    iou: Share | None = None  # overlap at which the weaker of two boxes of a class goes; 0.45
    max_items: Positive | None = None  # default 100, classification 5 unless by sigmoid
    outputs: Annotated[list[str], Meta(min_length=1)] | None = None  # those to be read; all
    threshold: float | None = None  # from this score on, as the model gives it, an anomaly
    pixel_threshold: float | None = None  # the same for a place in a map; default: threshold
    minimum: float | None = None  # least score in validation
    maximum: float | None = None  # largest
    error: Literal["squared", "absolute"] | None = None  # whose mean is its score; squared
    boxes: Literal["xyxy", "yxyx", "xywh", "yxhw"] | None = None  # corners, or centre and size
    normalised: bool | None = None  # boxes reach from 0 to 1; else they are in pixels of the input
    objectness: bool | None = None  # whether a score that there is anything precedes the classes'
    background: bool | None = None  # whether the first class is that there is nothing
    columns: list[Column] | None = None  # of an output with a row a detection
    anchors: Anchors | None = None  # that boxes are encoded against

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in DECODERS:
            raise ValueError(f"kind = {self.kind!r}: expected one of {', '.join(DECODERS)}")
        columns = self.columns or get_args(Column)
        if len({*columns, "image"}) != 7 or len({*columns}) != len(columns):
            raise ValueError(
                f"columns = {self.columns}: expected x1, y1, x2, y2, score and class, each once, "
                "and perhaps image"
            )


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model has to reach to be accepted."""

    accuracy: Share | None = None  # on the bundle's reference samples
    agreement: Share | None = None  # with the live model, in shadow
    latency_p99_ms: Annotated[float, Meta(gt=0)] | None = None
    score_shift: Annotated[float, Meta(gt=0, le=1)] | None = None  # from the live model's, at most
    latency_ratio: Annotated[float, Meta(gt=0)] | None = None  # to the live model's, at most


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """manifest.toml."""

    name: Annotated[str, Meta(min_length=1)]
    version: str
    release: Annotated[int, Meta(ge=0)]
    variants: Annotated[list[Variant], Meta(min_length=1)]  # in order of preference
    task: Task | None = None
    input: Input = Input()
    decoder: Decoder = Decoder()
    limits: Limits = Limits()
    profile: str = "any"  # of devices, which this one is for
    confidence: Histogram | None = None  # expected shares of the scores of its items

    def __post_init__(self) -> None:
        if self.confidence is not None and abs(sum(self.confidence) - 1) > 0.01:
            raise ValueError(
                f"confidence: the shares make {sum(self.confidence):g} together; expected 1"
            )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its files are whole and of the types their names say."""

    path: Path  # the folder, or the bare file
    manifest: Manifest
    files: tuple[Path, ...]  # of the variants, in their order
    facts: tuple[Facts, ...]
    labels: tuple[str, ...] | None  # from the manifest's file; the model's own are in its facts
    sha256: str  # over names and bytes of all files


def open_bundle(path: Path, **overrides: Any) -> Bundle:
    """Read and check a bundle.

    Args:
        path: a bundle folder, or a model file.
        overrides: fields of `Input` and `Decoder` by name, put in place of the manifest's;
            a `labels` file is looked for from the current folder. None is no override.

    Raises:
        ModelError: a file is missing, damaged or of another type, or the manifest is wrong.
    """
    folder = path.is_dir()
    where = path / MANIFEST if folder else path
    content = _read_toml(where) if folder else _implicit(path)
    _convert(content, where)  # so that the tables are tables
    labels = overrides.pop("labels", None)
    for name, value in overrides.items():
        if value is not None:
            table = "input" if name in Input.__struct_fields__ else "decoder"
            content.setdefault(table, {})[name] = value
    manifest = _convert(content, where)
    root = path if folder else path.parent
    files = tuple(_inside(root, variant.file, where) for variant in manifest.variants)
    for variant, file in zip(manifest.variants, files, strict=True):
        _check_runtime(variant, file, where)
    facts = tuple(read_facts(file) for file in files)
    if labels is None and manifest.decoder.labels is not None:
        labels = _inside(root, manifest.decoder.labels, where)
    contents = (
        [file for file in sorted(path.rglob("*")) if file.is_file()]
        if folder
        else [path, *(root / name for name in facts[0].beside)]
    )
    return Bundle(
        path,
        manifest,
        files,
        facts,
        None if labels is None else _labels(Path(labels)),
        digest(root, contents),
    )


def _implicit(path: Path) -> dict[str, Any]:
    """The manifest of a bare file: every runtime that reads it on the CPU."""
    runtimes = [
        name
        for name, row in RUNTIMES.items()
        if path.suffix[1:] in row.formats and "CPU" in row.devices
    ]
    if not path.exists() or not runtimes:
        read_facts(path)  # says what is wrong
    variants = [{"runtime": runtime, "file": path.name} for runtime in runtimes]
    return {"name": path.stem, "version": "", "release": 0, "variants": variants}


def _read_toml(where: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(where.read_text())
    except FileNotFoundError as error:
        raise ModelError(
            f"{where.parent}: has no {MANIFEST}; expected a bundle folder, or a {SUFFIXES} file"
        ) from error
    except OSError as error:
        raise ModelError(f"{where}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{where}: is no TOML: {error}") from error


def _convert(content: dict[str, Any], where: Path) -> Manifest:
    try:
        return msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.input.pad`"
        what, _, place = str(error).partition(" - at `$")
        value: Any = content
        for key in re.findall(r"\w+", place):
            value = value[int(key) if key.isdigit() else key]
        key = place.strip("`.") or "the whole"
        shown = "" if isinstance(value, dict | list) else f" = {value!r}"
        raise ModelError(f"{where}: {key}{shown}: {what}") from error


def _inside(root: Path, name: str, where: Path) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"{where}: file {name!r} lies outside the bundle; expected one inside")
    return root / name


def _check_runtime(variant: Variant, file: Path, where: Path) -> None:
    row = RUNTIMES.get(variant.runtime)
    if row is None:
        known = ", ".join(RUNTIMES)
        raise ModelError(
            f"{where}: variants.runtime = {variant.runtime!r}: expected one of {known}"
        )
    if file.suffix[1:] not in row.formats:
        known = " and ".join(f".{suffix}" for suffix in row.formats)
        raise ModelError(
            f"{where}: runtime {variant.runtime} reads {known} files, not {file.name!r}"
        )


def _labels(path: Path) -> tuple[str, ...]:
    return read_labels(read_text(path, "labels"), str(path))
