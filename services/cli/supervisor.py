"""What the logs tell of supervisord's programs: how often each was started, its last error."""

import json
import re
from pathlib import Path

from common.paths import Paths

_TAIL_BYTES = 65536


def restarts(paths: Paths) -> dict[str, int]:
    """How often supervisord has started each program again, as far back as its log goes."""
    spawned: dict[str, int] = {}
    for name in ("supervisord.log.1", "supervisord.log"):
        try:
            text = (paths.logs / name).read_text(errors="replace")
        except FileNotFoundError:
            continue
        for line in re.finditer(r"supervisord (started) with pid|spawned: '([^']+)'", text):
            if line[1]:
                spawned.clear()
            else:
                spawned[line[2]] = spawned.get(line[2], -1) + 1
    return spawned


def last_error(log: Path) -> str:
    """The newest line of a program's log that tells of an error; empty where none does."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            if line.strip():
                return line.strip()  # written by something below: a runtime, the interpreter
            continue
        if isinstance(record, dict) and record.get("level") in ("error", "critical"):
            return str(record.get("text", ""))
    return ""
