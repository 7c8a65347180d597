"""Find what is attached, or ask a stream, and print blocks for vigil.toml. All that is not a block
is a comment, so that the whole of it may be appended there."""

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import v4l2
from common.config import Camera
from common.errors import ConfigError, SourceError
from common.sources import SOURCES
from common.v4l2 import Device

_EPILOG = """\
examples:
  vigil cameras                          V4L2 devices: formats, sizes, rates, controls
  vigil cameras >>vigil.toml             then keep the ones you want
  vigil cameras rtsp://user:secret@10.0.0.7/stream1
  vigil cameras --json | jq '.[].formats'

exit status: 0; 2 no camera was found; 1 the stream can't be opened
"""
_NONE = """\
no camera: {why}
  USB: is it in lsusb, what says `dmesg | tail` when it is plugged in?
  CSI: is its overlay or device tree enabled, does dmesg name the sensor?
  in a container: is /dev/video0 handed in (--device /dev/video0)?
  on the network: vigil cameras rtsp://... or http://..."""
_SCHEMES = {"rtsp": "rtsp", "rtsps": "rtsp", "http": "mjpeg", "https": "mjpeg"}
NOT_WELL = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="a stream: rtsp:// or http:// (MJPEG)"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects")


def run(args: argparse.Namespace) -> int:
    found = [stream(args.url)] if args.url else attached()
    names: set[str] = set()
    for one in found:
        if one["camera"]:
            one["camera_name"] = _name(one["name"], names)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(line for one in found for line in _lines(one)))
    cameras = [one for one in found if one["camera"]]
    if not cameras and not args.json:
        why = f"none of {len(found)} video devices gives pictures" if found else "no video device"
        print("\n".join(f"# {line}" for line in _NONE.format(why=why).splitlines()))
    return 0 if cameras else NOT_WELL


def stream(url: str) -> dict[str, Any]:
    """What the stream at a URL gives; `camera` are the keys of a block for it.

    Raises:
        ConfigError: not a URL that Vigil takes.
        SourceError: it can't be opened.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    if scheme not in _SCHEMES or not host:
        raise ConfigError(f"not the URL of a stream; expected {', '.join(_SCHEMES)}://HOST/...")
    module, _, factory = SOURCES[_SCHEMES[scheme]].factory.partition(":")
    camera = Camera(_SCHEMES[scheme], url=url)
    source = getattr(importlib.import_module(module), factory)(camera, None)
    try:
        format = source.open()
    finally:
        source.close()
    keys = {"source": camera.source, "url": url}
    return {"name": host, "driver": camera.source, "given": str(format), "camera": keys}


def attached() -> list[dict[str, Any]]:
    """What each V4L2 device says of itself; `camera` are the keys of a block for it, empty where it
    is none that Vigil can use."""
    paths = Path("/dev").glob("video[0-9]*")
    return [device(path) for path in sorted(paths, key=lambda path: (len(path.name), path.name))]


def device(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"device": _stable(path), "path": str(path), "name": path.name}
    found |= {"formats": [], "controls": [], "camera": {}}
    opened = None
    try:
        opened = Device(str(path))
        _describe(opened, found)
    except SourceError as error:
        found["problem"] = str(error)
    finally:
        if opened is not None:
            opened.close()
    return found


def _describe(opened: Device, found: dict[str, Any]) -> None:
    can = opened.capability()
    for key in ("name", "driver", "bus"):
        found[key] = v4l2.text(getattr(can, "card" if key == "name" else key))
    if not can.device_caps & v4l2.CAP_CAPTURE or not can.device_caps & v4l2.CAP_STREAMING:
        several = can.device_caps & v4l2.CAP_CAPTURE_MPLANE
        found["problem"] = "multi-planar: needs a gstreamer camera" if several else "no camera"
        return
    for format, words in opened.formats().items():
        sizes = {}
        for some in opened.sizes(format) if format in v4l2.USABLE else ():
            rates = opened.rates(format, some.largest)
            sizes[str(some)] = [round(float(end), 3) for ends in rates for end in sorted(set(ends))]
        usable = format in v4l2.USABLE
        found["formats"].append({"format": format, "is": words, "usable": usable, "sizes": sizes})
    for control in opened.controls().values():
        found["controls"].append({"name": control.name, "is": str(control),
                                  "value": opened.value(control)})  # fmt: skip
    choice = v4l2.choose(opened, None, None, v4l2.USUAL_FPS)
    found["camera"] = {"source": "v4l2", "device": found["device"], "size": choice.size}
    found["camera"] |= {"format": choice.format}
    if choice.rate:
        found["camera"]["fps"] = round(float(choice.rate), 3)


def _stable(path: Path) -> str:
    """A link that names the same device after a reboot or on another day, else the path itself."""
    for folder in ("by-id", "by-path"):
        for link in sorted(Path("/dev/v4l").joinpath(folder).glob("*")):
            if link.resolve() == path.resolve():
                return str(link)
    return str(path)


def _name(card: str, taken: set[str]) -> str:
    """A camera's name made of a device's."""
    base = re.sub("[^a-z0-9]+", "-", card.lower()).strip("-")[:28] or "camera"
    names = (base, *(f"{base}-{count}" for count in range(2, 100)))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def _lines(one: dict[str, Any]) -> list[str]:
    at = f" at {one['path']}" if "path" in one else ""
    said = [f"{one['name']}{at}", *(one[key] for key in ("driver", "bus", "given") if key in one)]
    lines = [", ".join(said)]
    if "problem" in one:
        return [f"# {lines[0]}: {one['problem']}", ""]
    for row in one.get("formats", ()):
        if row["usable"]:
            lines += [
                f"  {row['format']}  {size:11}  {', '.join(f'{rate:g}' for rate in rates)} /s"
                for size, rates in row["sizes"].items()
            ] or [f"  {row['format']}"]
    if other := [row["format"] for row in one.get("formats", ()) if not row["usable"]]:
        lines.append(f"  not usable here: {' '.join(other)}")
    controls = one.get("controls", ())
    lines += [f"  control {row['is']}, now {row['value']}" for row in controls]
    block = [f"{key} = {json.dumps(value)}" for key, value in one["camera"].items()]
    if controls:
        values = ", ".join(f"{row['name']} = {row['value']}" for row in controls[:3])
        block.append(f"# controls = {{ {values} }}")
    return [*(f"# {line}" for line in lines), f"[cameras.{one['camera_name']}]", *block, ""]
