"""Build a bundle from a model: its manifest, labels and reference samples in one tar.

The bundle is opened and tested as a device would do it, each variant that runs here; a tar is
written only where that went well. Latency limits are for the device: here they are only shown.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from common.archive import pack, unpack
from common.engine.bundle import MANIFEST, Bundle, open_bundle
from common.engine.model import Model
from common.engine.runtimes import RUNTIMES, CannotRunError
from common.engine.samples import (
    ANSWERS,
    FOLDER,
    SUFFIXES,
    load_samples,
    read_picture,
    self_test,
)
from common.errors import ModelError, StorageError, VigilError
from common.verdict import binned

MEASURED = "-"
ITEMS_LEAST = 50  # of which a histogram is taken

_EPILOG = """\
examples:
  scripts/bundle parts.tflite --name parts --version 1.3 --release 7 --labels labels.txt \\
      --samples pictures --accuracy 0.9 --confidence --out parts-1.3.tar
  scripts/bundle models/factory --release 2 --samples pictures --out factory-2.tar
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bundle",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a .onnx or .tflite file, or a bundle folder")
    add("--out", type=Path, required=True, metavar="FILE.tar", help="the bundle")
    add("--name", help="of the model, the same for all its versions")
    add("--version", help="for people")
    add("--release", type=int, metavar="N", help="a counter that grows")
    add("--manifest", type=Path, metavar="TOML", help="what neither the file nor an option says")
    add("--labels", type=Path, metavar="FILE", help="a class a line")
    add("--cpu-variant", type=Path, metavar="FILE", help="a model for when the accelerator is lost")
    add(
        "--samples", type=Path, metavar="DIR",
        help=f"reference pictures, with {ANSWERS} or else answered by the model itself",
    )  # fmt: skip
    add("--accuracy", type=float, metavar="SHARE", help="to reach on the samples, 0..1")
    add("--latency-p99-ms", type=float, metavar="MS", help="to keep on the device")
    add("--agreement", type=float, metavar="SHARE", help="with the live model in shadow, 0..1")
    add("--score-shift", type=float, metavar="SCORE", help="from the live model's, at most")
    add("--latency-ratio", type=float, metavar="RATIO", help="to the live model's, at most")
    add("--profile", help="of the devices that it is for (any)")
    add(
        "--confidence", nargs="?", const=MEASURED, metavar="FILE",
        help="shares of scores to expect, in ten bins: a JSON list, or a manifest's; without FILE "
        "as the model scores the samples",
    )  # fmt: skip
    return parser.parse_args()


def build(args: argparse.Namespace) -> list[str]:
    """Make the tar; returns what there is to tell.

    Raises:
        VigilError: something is missing or wrong, or the model fails its own samples.
    """
    with tempfile.TemporaryDirectory(prefix="vigil-bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        try:
            _collect(args, folder)
            said = _samples(args, folder)
            if args.confidence == MEASURED:
                said.append(_measure_confidence(folder))
            bundle = open_bundle(folder)
            said += _test(bundle)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from error
        except ModelError as error:
            raise ModelError(str(error).replace(f"{folder}/", "")) from error
        pack(folder, args.out)
        try:
            digest = unpack(args.out, Path(scratch) / "unpacked")  # as a device does
        except VigilError:
            args.out.unlink()
            raise
        assert digest == bundle.sha256
    manifest, size = bundle.manifest, args.out.stat().st_size
    return [
        f"{manifest.name} {manifest.version} (release {manifest.release})",
        *said,
        f"{args.out}: {size} bytes, {digest}",
    ]


def _collect(args: argparse.Namespace, folder: Path) -> None:
    """Bring model, labels and manifest together."""
    content: dict[str, Any] = {}
    if args.model.is_dir():
        shutil.copytree(args.model, folder)
        content = _toml(folder / MANIFEST)
    else:
        if not args.model.is_file():
            raise ModelError(
                f"{args.model}: no such file; expected a .onnx or .tflite file, or a bundle folder"
            )
        folder.mkdir()
        shutil.copy(args.model, folder)
        content = {"variants": _variants(args.model)}
    before = json.dumps(content)
    if args.manifest:
        for key, value in _toml(args.manifest).items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    if args.cpu_variant:
        shutil.copy(args.cpu_variant, folder)
        content["variants"] = [*content["variants"], *_variants(args.cpu_variant)]
    if args.labels:
        shutil.copy(args.labels, folder / "labels.txt")
        content.setdefault("decoder", {})["labels"] = "labels.txt"
    for key in ("name", "version", "release", "profile"):
        if getattr(args, key) is not None:
            content[key] = getattr(args, key)
        if key != "profile" and key not in content:
            raise ModelError(
                f"{args.model}: the bundle's {key} is missing: give --{key}, or {key} = ... in "
                "the file of --manifest"
            )
    for key in ("accuracy", "latency_p99_ms", "agreement", "score_shift", "latency_ratio"):
        if getattr(args, key) is not None:
            content.setdefault("limits", {})[key] = getattr(args, key)
    if args.confidence not in (None, MEASURED):
        content["confidence"] = _shares(Path(args.confidence))
    if json.dumps(content) != before:
        (folder / MANIFEST).write_text(_render(content))


def _variants(model: Path) -> list[dict[str, str]]:
    found = [
        {"runtime": runtime, "file": model.name}
        for runtime, row in RUNTIMES.items()
        if model.suffix[1:] in row.formats
    ][:1]
    if not found:
        raise ModelError(f"{model}: expected a .onnx or .tflite file, or a bundle folder")
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is no TOML: {error}") from error


def _render(content: dict[str, Any]) -> str:
    """A manifest as TOML, whose strings, numbers and arrays are written as JSON's are."""
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    plain = {key: value for key, value in content.items() if key not in (*tables, "variants")}
    parts = [_lines(plain)]
    parts += [f"\n[[variants]]\n{_lines(variant)}" for variant in content["variants"]]
    parts += [f"\n[{name}]\n{_lines(table)}" for name, table in tables.items()]
    return "".join(parts)


def _lines(table: dict[str, Any]) -> str:
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items()
    )


def _samples(args: argparse.Namespace, folder: Path) -> list[str]:
    """Take the pictures in; where nobody gave the answers, the model does."""
    if args.samples is None:
        if (folder / FOLDER).is_dir():
            return []
        if args.accuracy is not None:
            raise ModelError("--accuracy needs reference pictures: give --samples DIR")
        return ["no reference samples: a device can't tell whether the model sees anything"]
    target = folder / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    pictures = [p for p in sorted(args.samples.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not pictures:
        raise ModelError(f"{args.samples}: has no pictures; expected some {', '.join(SUFFIXES)}")
    bundle = open_bundle(folder)
    target.mkdir()
    for picture in pictures:
        shutil.copy(picture, target)
    if (args.samples / ANSWERS).exists():
        shutil.copy(args.samples / ANSWERS, target)
        return []
    model = Model.load(bundle)
    rows = []
    for picture in pictures:
        geometry = model.prepare(read_picture(picture), 0)
        items = model.decode(model.infer(0), geometry)
        rows.append({"file": picture.name, "items": [_answer(item) for item in items]})
    (target / ANSWERS).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    things = sum(len(row["items"]) for row in rows)
    said = f"answers recorded from {model.name} itself on {model.runtime}: {things} in all"
    model.close()
    return [said]


def _shares(path: Path) -> Any:
    """A histogram as a JSON list, or the one of a manifest."""
    if path.suffix == ".toml":
        content = _toml(path)
        if "confidence" not in content:
            raise ModelError(f"{path}: has no confidence; expected ten shares")
        return content["confidence"]
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is no JSON list of ten shares: {error}") from error


def _measure_confidence(folder: Path) -> str:
    """Write into the manifest how the model's scores lie on its own samples."""
    bundle = open_bundle(folder)
    model = Model.load(bundle)
    scores: list[float] = []
    for sample in load_samples(bundle):
        geometry = model.prepare(sample.picture(), 0)
        scores += [item.score for item in model.decode(model.infer(0), geometry)]
    runtime = model.runtime
    model.close()
    if len(scores) < ITEMS_LEAST:
        raise ModelError(
            f"--confidence: the model finds {len(scores)} things on its samples; at least "
            f"{ITEMS_LEAST} are needed: give more --samples DIR, or --confidence FILE"
        )
    content = _toml(folder / MANIFEST)
    content["confidence"] = [round(count / len(scores), 4) for count in binned(scores)]
    (folder / MANIFEST).write_text(_render(content))
    return f"confidence measured on {len(scores)} items, on {runtime}"


def _answer(item: Any) -> dict[str, Any]:
    answer = {"label": item.label, "score": round(item.score, 4)}
    return answer if item.box is None else answer | {"box": [round(side, 2) for side in item.box]}


def _test(bundle: Bundle) -> list[str]:
    """Each variant by itself.

    Raises:
        ModelError: none runs here, or one fails.
    """
    said, ran = [], 0
    limits = bundle.manifest.limits
    shown = "" if limits.latency_p99_ms is None else f", {limits.latency_p99_ms:g} on the device"
    untimed = msgspec.structs.replace(limits, latency_p99_ms=None)
    for variant, file, facts in zip(
        bundle.manifest.variants, bundle.files, bundle.facts, strict=True
    ):
        manifest = msgspec.structs.replace(bundle.manifest, variants=[variant], limits=untimed)
        one = dataclasses.replace(bundle, manifest=manifest, files=(file,), facts=(facts,))
        what = f"{variant.file} on {variant.runtime}"
        try:
            model = Model.load(one)
        except CannotRunError as error:
            said.append(f"{what}: not tested here: {error}")
            continue
        model.warm_up()
        result = self_test(model, one)
        model.close()
        if result.refused:
            raise ModelError(f"{what}: {result.refused}")
        score = "" if result.accuracy is None else f"accuracy {result.accuracy:.3f} on "
        said.append(
            f"{what}: {score}{result.samples} samples, "
            f"p99 {result.latency_p99_ms:.1f} ms here{shown}"
        )
        ran += 1
    if not ran:
        raise ModelError("; ".join(said))
    return said


def main() -> int:
    try:
        print("\n".join(build(arguments())))
    except VigilError as error:
        print("bundle:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
