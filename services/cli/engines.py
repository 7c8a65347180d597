"""What can run models here: each runtime with each of its devices, why one is missing, and on which
of them Vigil was never tried. Nothing is loaded: what packages and the kernel say is read."""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from common.engine.runtimes import RUNTIMES, Device, Row
from services.cli.text import MISSING, table

ROOT = Path("/")

_EPILOG = """\
examples:
  vigil engines             what a bundle's variants may name here, as `runtime` and `device`
  vigil engines --json | jq '.[] | select(.missing == "")'

untested: this code never ran on that hardware; it is written after its maker's manual
"""


@dataclass(frozen=True)
class Engine:
    runtime: str
    version: str  # "" where it is not installed
    device: str  # as a variant of a bundle names it: its `device`, or its `delegate`
    missing: str  # why it can't be used here, "" where it may
    tried: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="a list of objects")


def run(args: argparse.Namespace) -> int:
    found = engines()
    if args.json:
        print(json.dumps([asdict(engine) for engine in found], indent=2))
        return 0
    rows = [
        (
            engine.runtime,
            engine.version or MISSING,
            engine.device,
            "yes" if engine.tried else "untested",
            engine.missing or "ready",
        )
        for engine in found
    ]
    print("\n".join(table(("RUNTIME", "VERSION", "DEVICE", "ON HARDWARE", "STATE"), rows)))
    return 0


def engines() -> list[Engine]:
    """A runtime's devices in its own order."""
    return [
        Engine(name, _version(row), device, _missing(row, device, which), which.tried)
        for name, row in RUNTIMES.items()
        for device, which in (row.devices | row.delegates).items()
    ]


def _version(row: Row) -> str:
    return next((found for package in row.packages if (found := _installed(package))), "")


def _installed(package: str) -> str:
    """Its version, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _missing(row: Row, name: str, device: Device) -> str:
    reasons = []
    if not _version(row):
        reasons.append(f"not installed: it comes with the extra `{row.extra}`")
    elif device.packages and not any(map(_installed, device.packages)):
        installed = next(package for package in row.packages if _installed(package))
        reasons.append(f"{installed} has no such device: install {device.packages[0]} in its place")
    if name in row.delegates and not _known_library(name):
        reasons.append(f"the linker knows no {name}")
    places = [place for sign in device.signs for place in _matching(sign)]
    if device.signs and not places:
        reasons.append("no such device is there")
    elif device.signs and not any(os.access(place, os.R_OK) for place in places):
        reasons.append(f"no permission to use {places[0]}")
    return "; ".join(reasons)


def _matching(sign: str) -> list[Path]:
    """The files that a sign of `Device.signs` means."""
    pattern, _, start = sign.partition("=")
    return [
        path
        for path in sorted(ROOT.glob(pattern))
        if not start or path.read_text(errors="replace").startswith(start)
    ]


def _known_library(name: str) -> bool:
    try:
        return name.encode() + b"\0" in (ROOT / "etc/ld.so.cache").read_bytes()
    except OSError:
        return False
