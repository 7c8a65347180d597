"""The name of a bundle's content: sha256 over name, size and bytes of each of its files."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(root: Path, files: Iterable[Path] | None = None) -> str:
    """64 hex digits.

    Args:
        files: those under `root` that count; all of them where left out.

    Raises:
        OSError: a file can't be read.
    """
    if files is None:
        files = (path for path in root.rglob("*") if path.is_file())
    total = sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return str(total.hexdigest())


def sha256() -> Any:
    """CPython's own SHA-256: hashlib would load OpenSSL, 4 MB in a lane, for one digest."""
    for module in ("_sha2", "_sha256", "hashlib"):  # since 3.12, before, and elsewhere
        try:
            return importlib.import_module(module).sha256()
        except ModuleNotFoundError:
            continue
    raise RuntimeError("this Python has no SHA-256")
