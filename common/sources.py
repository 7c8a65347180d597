"""One table: every kind of camera source. To add one: a row here, a file in services/capture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    name: str
    factory: str  # module:class, imported only by the capture process that uses it
    needs_path: bool
    live: bool  # goes on while the ring is full (overrun), unless at fps = "max"; others wait


SOURCES = {
    kind.name: kind
    for kind in (
        SourceKind("virtual", "services.capture.virtual:VirtualSource", False, True),
        SourceKind("video", "services.capture.video:VideoSource", True, False),
        SourceKind("folder", "services.capture.folder:FolderSource", True, False),
    )
}
