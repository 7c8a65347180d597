"""supervisord's XML-RPC over its Unix socket, by hand: `xmlrpc.client` would bring `email` and
`ssl`, a fifth of what the watchdog may take in memory, for three calls."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from common.errors import NotRunningError
from common.paths import Paths

TIMEOUT_S = 1.0
_TAIL_BYTES = 4096
_CALL = "<?xml version='1.0'?><methodCall><methodName>supervisor.{}</methodName><params>{}</params>"
_FIELD = re.compile(
    r"<name>(\w+)</name>\s*<value>(?:<(?:string|int|i4)>([^<]*)</|<string/>|<string />)"
)
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))  # the last one last


@dataclass(frozen=True)
class Program:
    name: str
    state: str  # supervisord's word: RUNNING, STARTING, BACKOFF, FATAL, EXITED, STOPPED...
    pid: int  # 0 where there is none
    log: Path
    error: str  # why it could not be spawned


class FaultError(NotRunningError):
    """supervisord answers, but will not do it; the message is its own word (NOT_RUNNING...)."""


def programs(paths: Paths) -> dict[str, Program] | None:
    """Every program that supervisord has; None where it does not answer.

    Each call also wakes it, so that it reaps its dead children and starts them again.
    """
    try:
        answer = call(paths, "getAllProcessInfo")
    except NotRunningError:
        return None
    found = {}
    for struct in answer.split("<struct>")[1:]:
        row = {name: _plain(value) for name, value in _FIELD.findall(struct)}
        found[row["name"]] = Program(
            row["name"],
            row["statename"],
            int(row["pid"]),
            Path(row["stdout_logfile"]),
            row["spawnerr"],
        )
    return found


def shuts_down(paths: Paths) -> bool:
    """Whether supervisord ends itself and all of its children, or is gone already."""
    try:
        return "SHUTDOWN" in call(paths, "getState")
    except NotRunningError:
        return True


def how_it_ended(paths: Paths, name: str, pid: int) -> str:
    """How a process ended that supervisord has reaped, by its log: "exit status 0", "terminated by
    SIGKILL"; empty where the log does not say, or not yet."""
    try:
        with (paths.logs / "supervisord.log").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    since = text.rpartition(f"spawned: '{name}' with pid {pid}\n")[2]
    found = re.search(rf"(?:exited|stopped): {re.escape(name)} \(([^;)]*)", since)
    return found[1] if found else ""


def start(paths: Paths, name: str) -> None:
    """Start a program, whatever supervisord holds of it, without waiting until it runs.

    Raises:
        NotRunningError: supervisord does not answer, or will not (`FaultError`).
    """
    call(paths, "startProcess", name, False)


def stop(paths: Paths, name: str) -> None:
    """Stop a program, or give up supervisord's own waiting to start it, without waiting.

    Raises:
        NotRunningError: supervisord does not answer, or will not (`FaultError`).
    """
    call(paths, "stopProcess", name, False)


def call(paths: Paths, method: str, *arguments: str | bool) -> str:
    """The body of supervisord's answer.

    Raises:
        NotRunningError: no answer within TIMEOUT_S.
        FaultError: it refuses.
    """
    values = "".join(
        f"<param><value><boolean>{argument:d}</boolean></value></param>"
        if isinstance(argument, bool)
        else f"<param><value><string>{argument}</string></value></param>"
        for argument in arguments
    )
    body = f"{_CALL.format(method, values)}</methodCall>".encode()
    head = f"POST /RPC2 HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(paths.supervisor_socket))
            client.sendall(head.encode() + body)
            while part := client.recv(65536):
                received += part
    except OSError as error:
        raise NotRunningError(f"supervisord at {paths.supervisor_socket}: {error}") from error
    status, _, answer = received.decode(errors="replace").partition("\r\n\r\n")
    if " 200 " not in status.partition("\r\n")[0]:
        raise NotRunningError(f"supervisord at {paths.supervisor_socket}: {status[:80]!r}")
    if "<fault>" in answer:
        said = dict(_FIELD.findall(answer))
        raise FaultError(f"supervisord: {method} {arguments[:1]}: {said.get('faultString')}")
    return answer


def _plain(text: str) -> str:
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text
