"""Import a model: a bundle, a tar that `vigil install` takes, from a file and what it doesn't say.

Tells what the file says of itself, and where. What it doesn't say is asked for: on a terminal one
by one, elsewhere it ends with the flags that are missing, all at once.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.engine.bundle import open_bundle
from common.engine.decoders import DECODERS
from common.engine.facts import Facts, read_facts
from common.engine.model import Model
from common.engine.runtimes import CannotRunError
from common.errors import ModelError, UnsaidError, VigilError
from scripts.bundle_maker import arguments, build
from scripts.bundle_manifest import IDENTITY, collect

_EPILOG = """\
examples:
  scripts/import yolov8n.onnx --name parts --version 1 --release 1 --picture a.jpg --out parts.tar
  scripts/import model.xml --out parts.tar           asks for the rest
"""
# Answers that let the model be loaded, to see what else it needs.
_TRIAL: dict[str, Any] = {
    "--name": "trial", "--version": "0", "--release": 0, "--resize": "stretch", "--colour": "rgb",
    "--scale": 1.0, "--size": [64, 64], "--layout": "nchw",
}  # fmt: skip


def told(facts: Facts) -> list[str]:
    """What a file says of itself, a line for each place where it does."""
    places: dict[str, list[str]] = {}
    for name, where in facts.said.items():
        value = getattr(facts, name)
        if name == "labels":
            value = f"{len(value)}, {value[0]} to {value[-1]}"
        places.setdefault(where, []).append(f"{name} {value}")
    lines = [f"  {where}: {'; '.join(values)}" for where, values in places.items()]
    lines += [f"  input {tensor}" for tensor in facts.inputs]
    lines += [f"  output {tensor}" for tensor in facts.outputs]
    return [*lines, *(f"  {note}" for note in facts.notes)] or ["  nothing"]


def unsaid(args: argparse.Namespace) -> dict[str, str]:
    """Flags that are missing, each with what it says: all that can be known before any is given.

    Raises:
        ModelError: the model can't be used, whatever is given.
    """
    trial, missing = argparse.Namespace(**vars(args)), dict[str, str]()
    while True:
        try:
            _load(trial)
        except UnsaidError as error:
            new = {flag: text for flag, text in error.missing.items() if flag not in missing}
            missing |= new
            known = new.keys() & _TRIAL.keys()
            for flag in known:
                setattr(trial, flag.removeprefix("--"), _TRIAL[flag])
            if known:
                continue
        except ModelError:
            if missing.keys() <= {f"--{key}" for key in IDENTITY}:
                raise
        if "--decoder" in missing and (kinds := _fitting(trial)):
            missing["--decoder"] = f"how the outputs are read; those that can: {', '.join(kinds)}"
        return missing


def _fitting(trial: argparse.Namespace) -> list[str]:
    """The decoders that take the model's outputs, each with the flags that it needs then."""
    found = []
    for kind in DECODERS:
        trial.kind = kind
        try:
            _load(trial)
        except UnsaidError as error:
            found.append(f"{kind} (then also {', '.join(error.missing)})")
        except ModelError:
            continue
        else:
            found.append(kind)
    return found


def _load(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="vigil-import-") as scratch:
        folder = Path(scratch) / "bundle"
        try:
            collect(args, folder)
            Model.load(open_bundle(folder)).close()
        except UnsaidError:
            raise
        except ModelError as error:
            kind = CannotRunError if isinstance(error, CannotRunError) else ModelError
            raise kind(str(error).replace(f"{folder}/", "")) from error


def _ask(parser: argparse.ArgumentParser, given: list[str], missing: dict[str, str]) -> None:
    """Append an answer to `given` for each flag."""
    for flag, text in missing.items():
        while True:
            print(f"{flag}: {text}")
            answer = f"{flag}={input('> ').strip()}"
            try:
                parser.parse_args([*given, answer])
            except SystemExit:  # which has said why
                continue
            given.append(answer)
            break


def main() -> int:
    parser, given = arguments("scripts/import", __doc__, _EPILOG), sys.argv[1:]
    args, asked = parser.parse_args(given), False
    try:
        if not args.model.is_dir():
            facts = read_facts(args.model)
            print(f"{args.model} says:", *told(facts), sep="\n")
            if facts.labels is None and args.labels is None:
                print("  no names of classes: --labels FILE gives them")
        while missing := unsaid(args):
            if not sys.stdin.isatty():
                print(f"import: {args.model} doesn't say; give", file=sys.stderr)
                for flag, text in missing.items():
                    print(f"  {flag:12}{text}", file=sys.stderr)
                return 1
            asked = True
            _ask(parser, given, missing)
            args = parser.parse_args(given)
        print("\n".join(build(args)))
        if args.picture is None:
            print("not looked at: --picture FILE shows what it sees")
    except VigilError as error:
        print("import:", " ".join(str(error).split("\n")), file=sys.stderr)
        if isinstance(error, CannotRunError) and args.cpu_variant is None:
            print(
                "  --cpu-variant FILE is a model to test it by where it can't run", file=sys.stderr
            )
        return 1
    except EOFError:
        return 1
    finally:
        if asked:
            print("the same again:", shlex.join(["scripts/import", *given]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
