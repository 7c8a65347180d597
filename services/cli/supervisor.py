"""What supervisord knows: its XML-RPC over a Unix socket, its log, and its programs' logs."""

import http.client
import json
import re
import socket
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.paths import Paths

_TIMEOUT_S = 2.0
_TAIL_BYTES = 65536


@dataclass(frozen=True)
class Program:
    name: str
    state: str  # supervisord's word: RUNNING, STARTING, BACKOFF, FATAL, EXITED, STOPPED...
    pid: int  # 0 where there is none
    log: Path
    error: str  # why it could not be spawned


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        return _Connection(self._path)


def programs(paths: Paths) -> dict[str, Program] | None:
    """Every program that supervisord has; None where it does not answer."""
    transport = _Transport(paths.supervisor_socket)
    try:
        with xmlrpc.client.ServerProxy("http://localhost", transport) as server:
            answer = cast(list[dict[str, Any]], server.supervisor.getAllProcessInfo())
    except (OSError, http.client.HTTPException, xmlrpc.client.Error):
        return None
    return {
        row["name"]: Program(
            row["name"], row["statename"], row["pid"], Path(row["stdout_logfile"]), row["spawnerr"]
        )
        for row in answer
    }


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
