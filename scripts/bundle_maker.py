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
from pathlib import Path
from typing import Any

import msgspec

from common.archive import pack, unpack
from common.engine.bundle import MANIFEST, Bundle, open_bundle
from common.engine.facts import SUFFIXES as MODELS
from common.engine.model import Model
from common.engine.runtimes import CannotRunError
from common.engine.samples import (
    ANSWERS,
    FOLDER,
    SUFFIXES,
    load_samples,
    read_picture,
    self_test,
)
from common.errors import EngineError, ModelError, StorageError, VigilError
from common.verdict import binned
from scripts.bundle_manifest import IDENTITY, MEASURED, collect, read_toml, render
from services.cli.flags import add_flags
from services.cli.run_model import judge

ITEMS_LEAST = 50  # of which a histogram is taken

_EPILOG = """\
examples:
  scripts/bundle parts.tflite --name parts --version 1.3 --release 7 --labels labels.txt \\
      --samples pictures --accuracy 0.9 --confidence --out parts-1.3.tar
  scripts/bundle models/factory --release 2 --samples pictures --out factory-2.tar
"""


def arguments(prog: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """All that a bundle can be told, for `scripts/import` too."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} MODEL --out FILE.tar [OPTION ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=f"a {MODELS} file, or a bundle folder")
    add("--out", type=Path, required=True, metavar="FILE.tar", help="the bundle")
    add("--name", help=IDENTITY["name"])
    add("--version", help=IDENTITY["version"])
    add("--release", type=int, metavar="N", help=IDENTITY["release"])
    add("--manifest", type=Path, metavar="TOML", help="what neither the file nor an option says")
    add("--cpu-variant", type=Path, metavar="FILE", help="a model for when the accelerator is lost")
    add(
        "--samples", type=Path, metavar="DIR",
        help=f"reference pictures, with {ANSWERS} or else answered by the model itself",
    )  # fmt: skip
    add("--picture", type=Path, metavar="FILE", help="to show what the model sees on it")
    add("--show", type=Path, metavar="PNG", help="where, drawn (NAME.vigil.png beside the bundle)")
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
    add_flags(parser)
    return parser


def build(args: argparse.Namespace) -> list[str]:
    """Make the tar; returns what there is to tell.

    Raises:
        VigilError: something is missing or wrong, or the model fails its own samples.
    """
    with tempfile.TemporaryDirectory(prefix="vigil-bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        try:
            collect(args, folder)
            said = [] if args.picture is None else _show(args, folder)
            said += _samples(args, folder)
            if args.confidence == MEASURED:
                said.append(_measure_confidence(folder))
            bundle = open_bundle(folder)
            said += _test(bundle)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from error
        except (ModelError, EngineError) as error:
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


def _show(args: argparse.Namespace, folder: Path) -> list[str]:
    """What the model sees on a picture, also drawn."""
    target = args.show or args.out.parent / f"{args.picture.stem}.vigil.png"
    model = Model.load(open_bundle(folder))
    model.warm_up()
    seen = judge(model, args.picture, target)
    model.close()
    things = [
        f"  {item['score']:.3f} {item['label']}" + (f" {item['box']}" if item["box"] else "")
        for item in seen["items"]
    ]
    where = f"on {args.picture}, by {seen['runtime']}, drawn in {target}:"
    return [where, *(things or ["  nothing"])]


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
    content = read_toml(folder / MANIFEST)
    content["confidence"] = [round(count / len(scores), 4) for count in binned(scores)]
    (folder / MANIFEST).write_text(render(content))
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
            said.append(f"{what}: not tested here: {str(error).replace(f'{file}: ', '')}")
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
        args = arguments("scripts/bundle", __doc__, _EPILOG).parse_args()
        print("\n".join(build(args)))
    except VigilError as error:
        print("bundle:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
