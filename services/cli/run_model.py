"""Run one model on pictures, without any service.

Prints a line of JSON for each picture, its decisions and the time each step took, and writes the
picture with the decisions drawn into it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from common.engine.bundle import open_bundle
from common.engine.decoders import DECODERS
from common.engine.model import Model
from common.engine.preprocess import Colour, Resize
from common.engine.runtimes import RUNTIMES, Options
from common.errors import SourceError, StorageError
from services.cli.draw import draw

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
    add("model", type=Path, metavar="MODEL", help="a bundle folder, or a .onnx or .tflite file")
    add("pictures", type=Path, nargs="+", metavar="PICTURE")
    add("--out", type=Path, default=Path(), metavar="DIR", help="for the drawn pictures (here)")
    add("--threads", type=int, default=1, metavar="N", help="of the runtime (1)")
    add("--runtime", choices=RUNTIMES, help="only this runtime's variants of a bundle")
    group = parser.add_argument_group("what the file doesn't say, or says wrong")
    add = group.add_argument
    add("--labels", type=Path, metavar="FILE", help="a class a line")
    add("--decoder", dest="kind", choices=DECODERS, help="how the outputs are read")
    add("--activation", choices=("none", "softmax", "sigmoid"), help="still to be applied")
    add("--score", type=float, metavar="S", help="report nothing below (0.4; classes: 0)")
    add("--colour", choices=get_args(Colour), help="order of the input's channels")
    add("--mean", type=_numbers, metavar="M[,M,M]", help="input = (pixel - mean) / scale")
    add("--scale", type=_numbers, metavar="S[,S,S]", help="255 for 0..1, 127.5 for -1..1")
    add("--resize", choices=get_args(Resize), help="how a picture comes to the input's size")
    add("--size", type=_size, metavar="HxW", help="of an input that leaves it open")
    add("--layout", choices=("nchw", "nhwc"), help="where the shape leaves it open")


def run(args: argparse.Namespace) -> int:
    """Raises VigilError where nothing can be done at all."""
    flags = ("kind", "activation", "score", "colour", "mean", "scale", "resize", "size", "layout")
    bundle = open_bundle(
        args.model, labels=args.labels, **{key: getattr(args, key) for key in flags}
    )
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
            print(json.dumps(_judge(model, path, args.out, names)), flush=True)
            done += 1
        except SourceError as error:
            print(f"vigil: {error}", file=sys.stderr)
    model.close()
    return 0 if done == len(args.pictures) else PARTLY if done else 1


def _judge(model: Model, path: Path, out: Path, names: set[str]) -> dict[str, Any]:
    """One picture through the model, drawn and told."""
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
    name, count = path.stem, 1
    while name in names:  # pictures of one name from several folders
        count += 1
        name = f"{path.stem}-{count}"
    names.add(name)
    target = out / f"{name}.vigil.png"
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


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _size(text: str) -> list[int]:
    height, width = text.lower().split("x")
    return [int(height), int(width)]
