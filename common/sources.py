"""One table: every kind of camera source. To add one: a row here, a file in services/capture."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    name: str
    factory: str  # module:class, imported only by the capture process that uses it
    place: str  # key of vigil.toml that says where it is; "": it has none
    live: bool  # goes on while the ring is full (overrun), unless at fps = "max"; others wait
    keys: tuple[str, ...] = ()  # of vigil.toml, that only such a camera knows


SOURCES = {
    kind.name: kind
    for kind in (
        SourceKind(
            "virtual",
            "services.capture.virtual:VirtualSource",
            "",
            live=True,
            keys=("seed", "prerender", "gaps"),
        ),
        SourceKind("video", "services.capture.video:VideoSource", "path", live=False),
        SourceKind("folder", "services.capture.folder:FolderSource", "path", live=False),
        SourceKind(
            "recording",
            "services.capture.recording:RecordingSource",
            "path",
            live=False,
            keys=("recorded",),
        ),
        SourceKind(
            "v4l2",
            "services.capture.v4l2:V4l2Source",
            "device",
            live=True,
            keys=("format", "controls"),
        ),
        SourceKind(
            "rtsp",
            "services.capture.stream:StreamSource",
            "url",
            live=True,
            keys=("transport",),
        ),
        SourceKind("mjpeg", "services.capture.stream:StreamSource", "url", live=True),
        SourceKind(
            "gstreamer", "services.capture.gstreamer:GstreamerSource", "pipeline", live=True
        ),
    )
}

PLACES = ("path", "device", "url", "pipeline")


_SECRETS = (
    (r"//[^/?@\s]*@", "//***@"),  # user and password
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
