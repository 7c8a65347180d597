"""What exporters write into a model file or beside it.

Ultralytics: `names`, `imgsz`, `task` and others, as ONNX properties (Python literals), as JSON or
a Python literal packed into a TFLite file, as metadata.yaml beside an OpenVINO file.
OpenVINO Model API and its users (OTX, Geti, DL Streamer): `model_info` in rt_info, or ONNX
properties whose names begin so. Anomalib before 2: `image_threshold`, `pred_scores.min` and others
in metadata.json beside the file, or as ONNX properties; later ones have it in the graph.
"""

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

from common.engine.facts import Facts, read_text
from common.errors import ModelError

_TOKEN = re.compile(
    # One that is not closed reaches to the end: else each quote in it would be tried for itself.
    r"""'(?:[^'\\]|\\.)*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$)|[()]|\b(?:True|False|None)\b|\b\d+(?=\s*:)""",
    re.DOTALL,
)
_JSON = {"(": "[", ")": "]", "True": "true", "False": "false", "None": "null"}


def literal(text: str, path: Path, where: str) -> Any:
    """JSON, or a Python literal made of dicts, lists, tuples, strings and numbers. Keys are text.

    Raises:
        ModelError: it is neither.
    """
    try:
        return json.loads(_TOKEN.sub(_token, text))
    except (ValueError, SyntaxError, RecursionError) as error:
        raise ModelError(f"{path}: {where} can't be read ({error})") from error


def _token(match: re.Match[str]) -> str:
    token = match[0]
    if token[0] == "'":
        return json.dumps(ast.literal_eval(token))  # one string: nothing to nest in
    if token[0] == '"':
        try:
            json.loads(token, strict=False)
        except ValueError:  # Python's escapes
            return json.dumps(ast.literal_eval(token))
        return token
    return _JSON.get(token) or f'"{token}"'


def properties(said: dict[str, str], facts: Facts, path: Path) -> None:
    """Those of an ONNX file (metadata_props)."""
    where = "its metadata_props"
    if {"names", "stride"} <= said.keys():
        names = literal(said["names"], path, f"`names` in {where}")
        size = literal(said.get("imgsz", "null"), path, f"`imgsz` in {where}")
        ultralytics(said | {"names": names, "imgsz": size}, facts, path, where)
    prefix = "model_info "
    info = {key.removeprefix(prefix): said[key] for key in said if key.startswith(prefix)}
    model_info(info, facts, path, where)
    anomalib(said, facts, path, where)


def beside(facts: Facts, path: Path) -> None:
    """metadata.yaml and metadata.json in the file's folder."""
    for name in ("metadata.yaml", "metadata.json"):
        file, known = path.parent / name, len(facts.said)
        if not file.is_file():
            continue
        text = read_text(file, "metadata")
        if name.endswith(".json"):
            anomalib(literal(text, path, f"{name} beside it"), facts, path, f"{name} beside it")
        elif facts.format == "xml" and re.search(r"^stride:", text, re.MULTILINE):
            ultralytics(_yaml(text, file), facts, path, f"{name} beside it")
        if len(facts.said) > known:
            facts.beside += (name,)


def _yaml(text: str, file: Path) -> dict[str, Any]:
    """`task`, `imgsz` and `names`, as `yaml.safe_dump` writes them.

    Raises:
        ModelError: a name is written otherwise.
    """
    task = re.search(r"^task: (\w+)$", text, re.MULTILINE)
    sizes = re.search(r"^imgsz:((?: \d{1,9}|\n *- \d{1,9})+)$", text, re.MULTILINE)
    block = re.search(r"^names:\n((?: .*(?:\n|$))+)", text, re.MULTILINE)
    chosen = re.search(r"^(end2end|  nms): true$", text, re.MULTILINE)
    names = dict[str, str]()
    for line in block[1].splitlines() if block else ():
        entry = re.fullmatch(r"  (\d+): ([^'\"].*|'(?:[^']|'')*'|\"(?:[^\"\\]|\\[^x])*\")", line)
        if entry is None:
            raise ModelError(f"{file}: `{line.strip()}` can't be read; expected INDEX: NAME")
        quote = entry[2][0]
        plain = entry[2][1:-1].replace("''", "'") if quote == "'" else entry[2]
        names[entry[1]] = json.loads(plain) if quote == '"' else plain
    size = [int(number) for number in re.findall(r"\d+", sizes[1])] if sizes else None
    size = size and (size * 2)[:2]
    return {"task": task and task[1], "imgsz": size, "names": names, "end2end": bool(chosen)}


def ultralytics(said: Any, facts: Facts, path: Path, where: str) -> None:
    """Raises ModelError: `names` or `imgsz` is malformed, or the task is none of Vigil's."""
    try:
        names, size = said["names"], said.get("imgsz")
        if isinstance(names, dict):
            names = [names[str(index)] for index in range(len(names))]
        labels = tuple(str(name) for name in names)
        if not labels or isinstance(names, str):
            raise ValueError("no names")
        height, width = size or (0, 0)
        shape = (int(height), int(width)) if size else None
        if shape and not all(0 < side < 1 << 16 for side in shape):
            raise ValueError(f"size {shape}")
        task = said.get("task")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{path}: `names` or `imgsz` can't be read from {where} ({error!r}); expected "
            "{0: 'first', 1: 'second', ...} and [height, width]"
        ) from error
    if task not in (None, "detect", "classify"):
        raise ModelError(f"{path}: {where} says task {task!r}; expected detect or classify")
    facts.say(where, labels=labels, size=shape, colour="rgb", mean=[0.0], scale=[255.0])
    if task == "classify":  # cut to a square first, which Vigil doesn't: `resize` is asked for
        facts.say(where, decoder="classification", activation="none")
    else:
        facts.say(where, resize="letterbox", pad=114, normalised=facts.format == "tflite")
        chosen = str(said.get("end2end")) == "True" or "'nms': True" in str(said.get("args"))
        if chosen:  # its boxes are final
            facts.say(where, decoder="nms", columns=("x1", "y1", "x2", "y2", "score", "class"))
        facts.say(where, decoder="yolov8" if task else "yolov5")  # that one's has no task yet


def anomalib(said: Any, facts: Facts, path: Path, where: str) -> None:
    """Raises ModelError: a threshold, or an end of the range that goes with it, is no number."""
    if not isinstance(said, dict) or "image_threshold" not in said:
        return
    keys = ("image_threshold", "pixel_threshold", "pred_scores.min", "pred_scores.max")
    if "pred_scores.min" not in said:  # before 1.0: of map and score together
        keys = (*keys[:2], "min", "max")
    threshold, pixels, minimum, maximum = (_number(said, key, path, where) for key in keys)
    facts.say(where, threshold=threshold, pixel_threshold=pixels, minimum=minimum, maximum=maximum)
    facts.say(where, decoder="anomaly")
    _transform(said.get("transform"), facts, path, where)


def _transform(said: Any, facts: Facts, path: Path, where: str) -> None:
    """Anomalib's preparation: `to_dict` of an albumentations Compose, of RGB."""
    compose = said.get("transform") if isinstance(said, dict) else None
    steps = compose.get("transforms") if isinstance(compose, dict) else None
    unknown, resized = "", None
    for step in steps if isinstance(steps, list) else ():
        name = str(step.get("__class_fullname__")).rsplit(".")[-1] if isinstance(step, dict) else ""
        if name == "Resize":
            resized = "stretch"
        elif name == "Normalize":  # (pixel / most - mean) / std
            most = _number(step, "max_pixel_value", path, where) or 1.0
            for key, field in (("mean", "mean"), ("std", "scale")):
                values = step.get(key)
                values = values if isinstance(values, list) else [values]
                numbers = [_number({key: value}, key, path, where) or 0.0 for value in values[:3]]
                facts.say(where, **{field: [most * number for number in numbers]})
        elif name != "ToTensorV2":
            unknown = name
    if unknown:  # a crop, say: then the whole picture is not what is resized
        facts.notes.append(f"{where} says transform {unknown}: not followed")
        resized = None
    facts.say(where, resize=resized, colour="rgb" if steps else None)


_RESIZES = {
    "standard": "stretch", "fit_to_window": "letterbox-top-left",
    "fit_to_window_letterbox": "letterbox",
}  # fmt: skip
_KINDS = {
    "yolov5": "yolov8", "yolov8": "yolov8", "yolo_v8": "yolov8", "yolo11": "yolov8",
    "yolox": "yolox", "classification": "classification", "label": "classification",
    "anomalydetection": "anomaly",
}  # fmt: skip  # Model API's YOLOv5 is Ultralytics' newer layout, without objectness


def model_info(said: dict[str, str], facts: Facts, path: Path, where: str) -> None:
    """Raises ModelError: a number is none, or a resize is none of Vigil's."""
    if not said:
        return
    kind, resize = said.get("model_type", "").lower(), said.get("resize_type")
    decoder = _KINDS.get(kind)
    if kind and decoder is None and kind not in ("yolo", "ssd"):  # whose outputs are told apart
        facts.notes.append(f"{where} says model_type {said['model_type']}: not followed")
    if said.get("embedded_processing", "").lower() in ("true", "yes"):
        facts.notes.append(
            f"{where} says embedded_processing: its mean, scale, resize not followed"
        )
    else:
        if resize not in (None, *_RESIZES):
            facts.notes.append(f"{where} says resize_type {resize}: not followed")
        reverse = {"true": "rgb", "yes": "rgb", "false": "bgr", "no": "bgr"}
        facts.say(
            where,
            resize=_RESIZES.get(resize or ""),
            colour=reverse.get(said.get("reverse_input_channels", "").lower()),
            mean=_numbers(said, "mean_values", path, where),
            scale=_numbers(said, "scale_values", path, where),
        )
        pad = _number(said, "pad_value", path, where) or 0  # Model API's default
        facts.say(where, pad=min(max(int(pad), 0), 255) if "resize" in facts.said else None)
    score, iou, threshold, pixels, spread = (
        _number(said, key, path, where)
        for key in (
            "confidence_threshold", "iou_threshold", "image_threshold", "pixel_threshold",
            "normalization_scale",
        )
    )  # fmt: skip
    labels = tuple(said.get("labels", "").split()) or None
    facts.say(where, labels=labels if decoder != "anomaly" else None, decoder=decoder)
    facts.say(where, score=score, iou=iou, threshold=threshold, pixel_threshold=pixels)
    if spread is not None:  # only the difference counts
        facts.say(where, minimum=0.0, maximum=spread)


def _number(said: dict[str, Any], key: str, path: Path, where: str) -> float | None:
    if said.get(key) in (None, ""):
        return None
    try:
        value = float(said[key])
    except (ValueError, TypeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ModelError(f"{path}: {key} in {where} is {said[key]!r}; expected a number")
    return value


def _numbers(said: dict[str, str], key: str, path: Path, where: str) -> list[float] | None:
    parts = re.findall(r"[^\s,\[\]()]+", said.get(key, ""))
    if len(parts) > 3:
        raise ModelError(f"{path}: {key} in {where} has {len(parts)} values; expected 1 or 3")
    values = [_number({key: part}, key, path, where) or 0.0 for part in parts]
    return values or None
