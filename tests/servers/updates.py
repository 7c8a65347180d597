"""A repository on a real web server (HTTP/1.1, ranges, TLS), and what can go wrong with one.

`Server(folder)` serves a folder; `server.faults["targets/*.tar"] = Fault(cut=1000, times=3)` makes
it misbehave for paths of a pattern (fnmatch). It notes each request, and the body bytes that the
network carried for each path.
"""

import datetime
import email.utils
import fcntl
import ipaddress
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_BLOCK = 1 << 14
_SIOCOUTQNSD = 0x894B  # bytes written that TCP has not sent


@dataclass
class Fault:
    """What the server does in place of the right thing; several go together."""

    times: int = -1  # so many requests, then it behaves; -1: always
    status: int = 0
    headers: Mapping[str, str | None] = field(
        default_factory=dict
    )  # added, replaced; None: left out
    body: bytes | None = None  # in place of what was asked for
    ranges: bool = True  # False: the whole file, whatever was asked for
    cut: int | Callable[[], int] | None = None  # body bytes, then the connection is reset
    endless: bool = False  # after its end the body begins anew
    pause_s: float = 0.0  # before each byte, of headers too
    silent: bool = False  # takes the request and never answers


PORTAL = Fault(body=b"<html>Welcome to the Grand Hotel! Log in</html>",
               headers={"Content-Type": "text/html; charset=utf-8"})  # fmt: skip


@dataclass
class Request:
    path: str
    range: str
    authorization: str
    status: int
    at_s: float = field(default_factory=time.monotonic)


class Server:
    """
    Args:
        tls: a folder for a certificate made on the spot; `ca` is what a client has to trust.
    """

    def __init__(self, folder: Path, tls: Path | None = None) -> None:
        self.folder = folder
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()  # path -> body bytes
        self.connections = 0
        self.ca = tls / "server.pem" if tls else None
        self._http = _Http(self)
        if self.ca:
            self.ca.parent.mkdir(exist_ok=True)
            _make_certificate(self.ca)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.ca)
            self._http.tls = context
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def body_bytes(self) -> int:
        return self.sent.total()

    def forget(self) -> None:
        """Count anew."""
        self.requests.clear()
        self.sent.clear()

    def close(self) -> None:
        self._http.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them
    request_queue_size = 128
    tls: ssl.SSLContext | None = None

    def __init__(self, owner: Server) -> None:
        self.owner = owner
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        if self.tls:  # whose handshake comes with the first read, in a thread of its own
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self.open.add(connection)
        self.owner.connections += 1
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):  # closed meanwhile
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # else a client that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        self._path = unquote(self.path).lstrip("/")
        fault = self._fault()
        file = owner.folder / self._path
        asked = self.headers.get("Range", "")
        status, headers, blocks = self._right(file, asked if fault.ranges else "")
        if fault.status or fault.body is not None:
            status, body = fault.status or 200, fault.body or b""
            headers, blocks = {"Content-Length": str(len(body))}, iter([body])
        authorization = self.headers.get("Authorization", "")
        owner.requests.append(Request(self._path, asked, authorization, status))
        if fault.silent:
            self.server.closing.wait()
            self.close_connection = True
            return
        headers |= {"Date": email.utils.formatdate(usegmt=True)}
        lines = {
            key: value
            for key, value in (headers | dict(fault.headers)).items()
            if value is not None
        }
        head = f"HTTP/1.1 {status} Word\r\n"
        head += "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        self._send(f"{head}\r\n".encode(), fault, body=False)
        self._send_body(blocks, fault)
        self.close_connection |= lines.get("Connection") == "close"

    def _fault(self) -> Fault:
        with self.server.lock:
            for pattern, fault in self.server.owner.faults.items():
                if fnmatch(self._path, pattern) and fault.times:
                    fault.times -= 1
                    return fault
        return Fault()

    def _right(self, file: Path, asked: str) -> tuple[int, dict[str, str | None], Iterator[bytes]]:
        if ".." in file.parts or not file.is_file():
            return 404, {"Content-Length": "0"}, iter(())
        size = file.stat().st_size
        headers: dict[str, str | None] = {"Content-Type": "application/octet-stream"}
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            return 200, headers | {"Content-Length": str(size)}, _blocks(file, 0, size)
        start, end = int(match[1]), min(int(match[2] or size) + 1, size)
        if start >= end:
            return 416, {"Content-Length": "0", "Content-Range": f"bytes */{size}"}, iter(())
        headers |= {"Content-Length": str(end - start),
                    "Content-Range": f"bytes {start}-{end - 1}/{size}"}  # fmt: skip
        return 206, headers, _blocks(file, start, end)

    def _send_body(self, blocks: Iterator[bytes], fault: Fault) -> None:
        left = fault.cut() if callable(fault.cut) else fault.cut
        for block in blocks:
            self._send(block if left is None else block[:left], fault)
            if left is not None:
                left -= len(block)
                if left <= 0:
                    self._reset()
                    return
            while fault.endless and not self.server.closing.is_set():
                self._send(block, fault)

    def _send(self, content: bytes, fault: Fault, body: bool = True) -> None:
        step = 1 if fault.pause_s else _BLOCK
        for at in range(0, len(content), step):
            if fault.pause_s and self.server.closing.wait(fault.pause_s):
                raise ConnectionAbortedError
            part = content[at : at + step]
            if body:
                self._count(len(part))
            self.connection.sendall(part)

    def _count(self, count: int) -> None:
        with self.server.lock:
            self.server.owner.sent[self._path] += count

    def _reset(self) -> None:
        """Break off, as a network does; what was not sent by then was not carried."""
        unsent = struct.unpack("i", fcntl.ioctl(self.connection, _SIOCOUTQNSD, bytes(4)))[0]
        self._count(-unsent)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _blocks(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as content:
        content.seek(start)
        while start < end and (block := content.read(min(_BLOCK, end - start))):
            start += len(block)
            yield block


def _make_certificate(path: Path) -> None:
    """A key, and a certificate for 127.0.0.1 that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()  # and a name that no other server has
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(serial))])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(
        certificate.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    )
