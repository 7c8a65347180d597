"""Run one model on pictures, without any service.

Prints a line of JSON for each picture, its decisions and the time each step took, and writes the
picture with the decisions drawn into it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from common.engine.bundle import open_bundle
from common.engine.facts import SUFFIXES
from common.engine.model import Model
from common.engine.runtimes import RUNTIMES, Options
from common.errors import SourceError, StorageError
from services.cli.draw import draw
from services.cli.flags import add_flags, overrides

PARTLY = 2  # exit status: done, but not for every picture

_EPILOG = """\
examples:
  vigil run-model models/factory part.jpg
  vigil run-model ssd.tflite *.jpg --out seen        a file whose own metadata suffices
  vigil run-model yolox.onnx a.jpg --decoder yolox --labels coco.txt --colour bgr --scale 1 \\
      --resize letterbox-top-left                    one that says nothing of itself
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=f"a bundle folder, or a {SUFFIXES} file")
    add("pictures", type=Path, nargs="+", metavar="PICTURE")
    add("--out", type=Path, default=Path(), metavar="DIR", help="for the drawn pictures (here)")
    add("--threads", type=int, default=1, metavar="N", help="of the runtime (1)")
    add("--runtime", choices=RUNTIMES, help="only this runtime's variants of a bundle")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Raises VigilError where nothing can be done at all."""
    bundle = open_bundle(args.model, labels=args.labels, **overrides(args))
    model = Model.load(bundle, Options(threads=args.threads), args.runtime)
    model.warm_up()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{args.out}: can't be made: {error.strerror}") from error
    done = 0
    names: set[str] = set()
    for path in args.pictures:
        try:
            target = args.out / f"{_name(path, names)}.vigil.png"
            print(json.dumps(judge(model, path, target)), flush=True)
            done += 1
        except SourceError as error:
            print(f"vigil: {error}", file=sys.stderr)
    model.close()
    return 0 if done == len(args.pictures) else PARTLY if done else 1


def judge(model: Model, path: Path, target: Path) -> dict[str, Any]:
    """One picture through the model, drawn into `target` and told.

    Raises:
        SourceError: the picture can't be read.
        StorageError: the drawn one can't be written.
    """
    picture = _read(path)
    times = [time.monotonic_ns()]
    geometry = model.prepare(picture, 0)
    times.append(time.monotonic_ns())
    outputs = model.infer(0)
    times.append(time.monotonic_ns())
    items = model.decode(outputs, geometry)
    times.append(time.monotonic_ns())
    steps = ("prepare", "infer", "decode")
    spent = {
        step: round((after - before) / 1e6, 3)
        for step, before, after in zip(steps, times, times[1:], strict=False)
    }
    caption = f"{path.name}  {model.name} {model.version}  {spent['infer']:.1f} ms"
    ok, data = cv2.imencode(".png", draw(picture, items, caption))
    if not ok:
        raise StorageError(f"{target}: OpenCV can't encode a picture {picture.shape}")
    try:
        target.write_bytes(data.tobytes())
    except OSError as error:
        raise StorageError(f"{target}: can't be written: {error.strerror}") from error
    return {
        "picture": str(path),
        "width": geometry.width,
        "height": geometry.height,
        "items": [_plain(msgspec.structs.asdict(item)) for item in items],
        "ms": spent,
        "model": model.name,
        "version": model.version,
        "release": model.release,
        "slot": model.slot,
        "runtime": model.runtime,
        "fallback_reason": model.fallback_reason,
        "drawn": str(target),
    }


def _name(path: Path, names: set[str]) -> str:
    """The picture's name, with a number where another folder's has it too."""
    name, count = path.stem, 1
    while name in names:
        count += 1
        name = f"{path.stem}-{count}"
    names.add(name)
    return name


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    box = item["box"]
    rounded = None if box is None else [round(value, 1) for value in box]
    return item | {"score": round(item["score"], 4), "box": rounded}


def _read(path: Path) -> NDArray[np.uint8]:
    """A picture [H, W, 3] BGR, turned as its EXIF says.

    Raises:
        SourceError: it can't be read, or is no picture.
    """
    try:
        data = np.fromfile(path, np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror}") from error
    except cv2.error as error:
        raise SourceError(f"{path}: can't be decoded: {error.err}") from error
    if picture is None:
        what = "is empty" if not data.size else "is no picture, or damaged"
        raise SourceError(f"{path}: {what}; expected a JPEG, PNG, BMP or another that OpenCV reads")
    return np.asarray(picture, np.uint8)
