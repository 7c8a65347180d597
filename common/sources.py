"""One table: every kind of camera source. To add one: a row here, a file in services/capture."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError


@dataclass(frozen=True)
class SourceKind:
    name: str
    factory: str  # module:class, imported only by the capture process that uses it
    place: str  # key of vigil.toml that says where it is; "": it has none
    extra: str  # of pyproject.toml, that holds the packages it needs
    live: bool  # goes on while the ring is full (overrun), unless at fps = "max"; others wait
    keys: tuple[str, ...] = ()  # of vigil.toml, that only such a camera knows


SOURCES = {
    kind.name: kind
    for kind in (
        SourceKind(
            "virtual",
            "services.capture.virtual:VirtualSource",
            "",
            "vision",
            live=True,
            keys=("seed", "prerender", "gaps"),
        ),
        SourceKind("video", "services.capture.video:VideoSource", "path", "vision", live=False),
        SourceKind("folder", "services.capture.folder:FolderSource", "path", "vision", live=False),
        SourceKind(
            "recording",
            "services.capture.recording:RecordingSource",
            "path",
            "recording",
            live=False,
            keys=("recorded",),
        ),
        SourceKind(
            "v4l2",
            "services.capture.v4l2:V4l2Source",
            "device",
            "v4l2",
            live=True,
            keys=("format", "controls"),
        ),
        SourceKind(
            "rtsp",
            "services.capture.stream:StreamSource",
            "url",
            "network",
            live=True,
            keys=("transport",),
        ),
        SourceKind("mjpeg", "services.capture.stream:StreamSource", "url", "network", live=True),
        SourceKind(
            "gstreamer",
            "services.capture.gstreamer:GstreamerSource",
            "pipeline",
            "vision",
            live=True,
        ),
    )
}

PLACES = ("path", "device", "url", "pipeline")


def factory(source: str) -> Any:
    """The class of a kind of source, imported only here so that each process loads one kind.

    Raises:
        ConfigError: a Python package that it needs is not installed.
    """
    kind = SOURCES[source]
    module, _, name = kind.factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{source} cameras need the Python package {error.name}, which is not installed; "
            f"pip install '.[{kind.extra}]' brings it"
        ) from error


_SECRETS = (
    (r"//[^/?\s]*@", "//***@"),  # user and password
    (r"//(?!\*\*\*@)[^/\s]*\?.*", "//***"),  # of which some character was not escaped
    (r"\?[^\s\"']+", "?***"),  # query
    (r"//(?!\*\*\*@).*@", "//***@"),
    (r"-pw=\S+", "-pw=***"),  # of a GStreamer pipeline
)


def redacted(text: str) -> str:
    """A text without what urls and pipelines in it keep secret; rather too little than too much."""
    for secret, shown in _SECRETS:
        text = re.sub(secret, shown, text, flags=re.DOTALL)
    return text
