"""The updater's client as tuf-conformance calls it: init, refresh, download.

    --metadata-dir D init ROOT
    --metadata-dir D --metadata-url U refresh
    --metadata-dir D --metadata-url U --target-name T --target-base-url B --target-dir D2 download

Its floors and the anchor are kept in D/vigil, its metadata in D itself.
"""

import argparse
import hashlib
import sys
from collections.abc import Generator
from pathlib import Path
from urllib.parse import quote

from common import durable
from common.errors import UntrustedError, VigilError
from services.updater.download import download, tidy
from services.updater.sources import Source, open_source
from services.updater.trust import Target, Trust


class Places:
    """Metadata from one place, targets from another."""

    def __init__(self, places: dict[str, str | None]) -> None:
        self._sources: dict[str, Source] = {
            folder: open_source(place) for folder, place in places.items() if place
        }
        self.name = self._sources["metadata"].name

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        folder, _, rest = path.partition("/")
        return self._sources[folder].read(rest, start, end)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/tuf_client", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path, default=Path())
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    needed = {"refresh": ["metadata_url"], "download": ["metadata_url", "target_base_url"]}
    for command in needed:
        commands.add_parser(command)
    args = parser.parse_args()
    if missing := [one for one in needed.get(args.command, ()) if getattr(args, one) is None]:
        parser.error(f"{args.command} needs {', '.join(missing)}")
    return args


def run(args: argparse.Namespace) -> None:
    folder = args.metadata_dir / "vigil"
    anchor = folder / "anchor"
    if args.command == "init":
        folder.mkdir()
        (folder / "metadata").symlink_to("..")
        durable.write(anchor, args.root.read_bytes())
        durable.write(args.metadata_dir / "root.json", args.root.read_bytes())
        return
    source = Places({"metadata": args.metadata_url, "targets": args.target_base_url})
    # The suite has recorded repositories that are older than this code.
    with Trust(folder, anchor.read_bytes(), source, built_s=0) as trust:
        try:
            trust.refresh()
        finally:
            roots = args.metadata_dir.glob("root_history/*.root.json")
            newest = max(roots, key=lambda root: int(root.name.split(".")[0]), default=anchor)
            durable.write(args.metadata_dir / "root.json", newest.read_bytes())
        for name in args.target_name if args.command == "download" else ():
            target = trust.target(name)
            if target is None:
                raise UntrustedError(f"{name}: nothing of that name is signed")
            fetch(source, target, folder / "partial", args.target_dir / quote(name, ""))


def fetch(source: Source, target: Target, partial: Path, to: Path) -> None:
    # Vigil's own targets have a sha256; the suite has some with another only.
    kind = "sha256" if "sha256" in target.hashes else "sha512"
    digest = target.hashes.get(kind, "")
    if to.exists() and hashlib.new(kind, to.read_bytes()).hexdigest() == digest:
        return
    whole = download(
        source, target.place, target.length, digest, partial, None, pause=lambda _: False
    )
    assert whole is not None
    whole.rename(to)
    tidy(partial, ())


def main() -> int:
    try:
        run(arguments())
    except VigilError as error:
        print(f"tuf_client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
