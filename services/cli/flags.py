"""Flags for a manifest's [input] and [decoder], a flag for each of their fields."""

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from common.engine.bundle import Decoder, Input
from common.engine.decoders import DECODERS

# What a manifest calls otherwise, or what is not to be written as TOML has it.
_NAMES = {"kind": "--decoder"}
_HELP = {
    "resize": "how a picture comes to the input's size",
    "pad": "pixel value beside a letterboxed picture (114)",
    "colour": "order of the input's channels",
    "mean": "M or M,M,M: input = (pixel - mean) / scale",
    "scale": "S or S,S,S: 255 for 0..1, 127.5 for -1..1",
    "layout": "where the shape leaves it open",
    "size": "HxW, of an input that leaves it open",
    "constants": "'NAME = [1.0, 1.0]', of inputs beside the picture",
    "labels": "a file with a class a line",
    "kind": "how the outputs are read",
    "activation": "still to be applied",
    "score": "report nothing below (0.4; classes, anomalies: 0)",
    "iou": "of two boxes that overlap more the weaker goes (0.45)",
    "max_items": "at the most (100; classes: 5)",
    "outputs": "NAME,NAME: those to be read, where there are others too",
    "threshold": "from this score on, as the model gives it, an anomaly",
    "pixel_threshold": "the same for a place in a map (threshold)",
    "minimum": "least score in validation",
    "maximum": "largest score in validation",
    "error": "whose mean is a reconstruction's score (squared)",
    "boxes": "corners, or centre and size",
    "normalised": "true: boxes reach from 0 to 1; false: they are in pixels",
    "objectness": "true: a score that there is anything precedes the classes'",
    "background": "true: the first class is that there is nothing",
    "columns": "NAME,NAME..: of an output with a row a detection",
    "anchors": "'file = \"anchors.txt\"', or strides, scales and ratios",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the file doesn't say, or says wrong")
    for field in (*msgspec.structs.fields(Input), *msgspec.structs.fields(Decoder)):
        flag = _NAMES.get(field.name) or "--" + field.name.replace("_", "-")
        choices = tuple(DECODERS) if field.name == "kind" else _choices(field.type)
        group.add_argument(
            flag,
            dest=field.name,
            choices=choices,
            type=Path if field.name == "labels" else str if choices else _value,
            metavar=None if choices else field.name.upper(),
            help=_HELP.get(field.name),
        )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, without `labels`."""
    fields = (*msgspec.structs.fields(Input), *msgspec.structs.fields(Decoder))
    found = {field.name: getattr(args, field.name) for field in fields if field.name != "labels"}
    return {name: value for name, value in found.items() if value is not None}


def _choices(kind: Any) -> tuple[str, ...] | None:
    info = inspect.type_info(kind)
    kinds = info.types if isinstance(info, inspect.UnionType) else (info,)
    values = [
        value for kind in kinds if isinstance(kind, inspect.LiteralType) for value in kind.values
    ]
    return tuple(str(value) for value in values) or None


def _value(text: str) -> Any:
    """As TOML has it, `a,b` being a list; what is no TOML is a text. The manifest's types decide
    whether it is right.
    """
    if size := re.fullmatch(r"(\d+)[xX](\d+)", text):
        return [int(size[1]), int(size[2])]
    for guess in (text, f"[{text}]", f"{{{text}}}"):
        try:
            return tomllib.loads(f"value = {guess}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text.split(",")
