"""A bundle's folder as it begins: the model's files, its labels, and its manifest from what was
given.
"""

import argparse
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

from common.engine.bundle import MANIFEST, Input
from common.engine.facts import EDGETPU_OPERATOR, read_facts
from common.engine.runtimes import RUNTIMES
from common.errors import ModelError, UnsaidError
from services.cli.flags import overrides

MEASURED = "-"
IDENTITY = {
    "name": "of the model, the same for all its versions",
    "version": "for people",
    "release": "a counter that grows",
}


def collect(args: argparse.Namespace, folder: Path) -> None:
    """Bring model, labels and manifest together.

    Raises:
        UnsaidError: the bundle's name, version or release was not given.
    """
    content: dict[str, Any] = {}
    if args.model.is_dir():
        shutil.copytree(args.model, folder)
        content = read_toml(folder / MANIFEST)
    else:
        folder.mkdir()
        content = {"variants": _variants(args.model, folder)}
    before = json.dumps(content)
    if args.manifest:
        for key, value in read_toml(args.manifest).items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    if args.cpu_variant:
        content["variants"] = [*content["variants"], *_variants(args.cpu_variant, folder)]
    if args.labels:
        shutil.copy(args.labels, folder / "labels.txt")
        content.setdefault("decoder", {})["labels"] = "labels.txt"
    for name, value in overrides(args).items():
        table = "input" if name in Input.__struct_fields__ else "decoder"
        content.setdefault(table, {})[name] = value
        if name == "anchors" and "file" in value:
            shutil.copy(value["file"], folder)
            content[table][name] = value | {"file": Path(value["file"]).name}
    for key in ("name", "version", "release", "profile"):
        if getattr(args, key) is not None:
            content[key] = getattr(args, key)
    missing = {f"--{key}": text for key, text in IDENTITY.items() if key not in content}
    if missing:
        raise UnsaidError(
            f"{args.model}: the bundle has no name, version or release yet: give "
            f"{', '.join(missing)}, or the same in the file of --manifest",
            missing,
        )
    for key in ("accuracy", "latency_p99_ms", "agreement", "score_shift", "latency_ratio"):
        if getattr(args, key) is not None:
            content.setdefault("limits", {})[key] = getattr(args, key)
    if args.confidence not in (None, MEASURED):
        content["confidence"] = shares(Path(args.confidence))
    if json.dumps(content) != before:
        (folder / MANIFEST).write_text(render(content))


def _variants(model: Path, folder: Path) -> list[dict[str, Any]]:
    """Copy a file, and those that belong to it; returns its entries of the manifest."""
    facts = read_facts(model)
    for name in (model.name, *facts.beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model.parent / name, folder / name)
    runtimes = (name for name, row in RUNTIMES.items() if model.suffix[1:] in row.formats)
    variant: dict[str, Any] = {"runtime": next(runtimes), "file": model.name}
    if EDGETPU_OPERATOR in facts.custom_operators:
        variant |= {"delegate": "libedgetpu.so.1", "exclusive": True}
    return [variant]


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is no TOML: {error}") from error


def render(content: dict[str, Any]) -> str:
    """A manifest as TOML, whose strings, numbers and arrays are written as JSON's are."""
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    plain = {key: value for key, value in content.items() if key not in (*tables, "variants")}
    parts = [_lines(plain)]
    parts += [f"\n[[variants]]\n{_lines(variant)}" for variant in content["variants"]]
    parts += [f"\n[{name}]\n{_lines(table)}" for name, table in tables.items()]
    return "".join(parts)


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {_value(entry)}" for key, entry in value.items())
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value, ensure_ascii=False)


def shares(path: Path) -> Any:
    """A histogram as a JSON list, or the one of a manifest."""
    if path.suffix == ".toml":
        content = read_toml(path)
        if "confidence" not in content:
            raise ModelError(f"{path}: has no confidence; expected ten shares")
        return content["confidence"]
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is no JSON list of ten shares: {error}") from error
