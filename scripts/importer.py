"""Import a model: a bundle, a tar that `vigil install` takes, from a file and what it doesn't say.

Tells what the file says of itself, and where. What it doesn't say is asked for: on a terminal one
by one, elsewhere it ends with the flags that are missing, all at once.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import msgspec

from common.engine import runtimes
from common.engine.bundle import Bundle, open_bundle
from common.engine.decoders import DECODERS
from common.engine.facts import Facts, read_facts
from common.engine.model import Model
from common.engine.preprocess import Array
from common.engine.runtimes import CannotRunError, Options, Runtime
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
            with _bundle(trial) as bundle:
                Model.load(bundle).close()
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
        if "--decoder" in missing:
            with suppress(CannotRunError):  # only another variant can, here
                if kinds := ", ".join(_fitting(trial)):
                    missing["--decoder"] = f"how the outputs are read; those that can: {kinds}"
        return missing


class _Once:
    """A loaded runtime whose shapes are settled but once, which may take it seconds."""

    def __init__(self, engine: Runtime) -> None:
        self._engine = engine
        self._buffers: tuple[Array, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def allocate(self, shape: tuple[int, ...]) -> tuple[Array, ...]:
        self._buffers = self._buffers or self._engine.allocate(shape)
        return self._buffers


def _fitting(trial: argparse.Namespace) -> list[str]:
    """The decoders that take the model's outputs, each with the flags that it needs then."""
    found = []
    with _bundle(trial) as bundle:
        manifest, path, facts = bundle.manifest, bundle.files[0], bundle.facts[0]
        variant, constants = manifest.variants[0], manifest.input.constants
        options = Options(delegate=variant.delegate, device=variant.device, constants=constants)
        engine = _Once(runtimes.load(variant.runtime, path, options))
        for kind in DECODERS:
            decoder = msgspec.structs.replace(manifest.decoder, kind=kind)
            tried = msgspec.structs.replace(manifest, decoder=decoder)
            one = dataclasses.replace(bundle, manifest=tried)
            try:
                Model.assemble(one, variant, path, facts, cast(Runtime, engine))
            except UnsaidError as error:
                found.append(f"{kind} (then also {', '.join(error.missing)})")
            except ModelError:
                continue
            else:
                found.append(kind)
        engine.close()
    return found


@contextmanager
def _bundle(args: argparse.Namespace) -> Iterator[Bundle]:
    with tempfile.TemporaryDirectory(prefix="vigil-import-") as scratch:
        folder = Path(scratch) / "bundle"
        try:
            collect(args, folder)
            yield open_bundle(folder)
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
