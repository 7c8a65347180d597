"""Just enough HTTP to show a page: GET only, bounded in connections, bytes and time.

The standard library's `http.server` would bring `email` and `ssl`, 7 MB.
"""

import math
import socket
import socketserver
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

CONNECTIONS = 32  # one more, and the one that has done nothing for the longest time is closed
HEAD_BYTES = 8192
HEAD_S = 5.0  # from the first to the last byte of a request
IDLE_S = 30.0  # between two requests
SEND_BYTES = 131_072  # kept by the kernel for who does not read
SEND_S = 15.0  # for a whole answer; who has not read it by then is let go

REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
_ALWAYS = (
    "Cache-Control: no-store",
    "Content-Security-Policy: default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy: same-origin",
    "Referrer-Policy: no-referrer",
    "X-Content-Type-Options: nosniff",
)


@dataclass(frozen=True)
class Request:
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[str, ...] = ()  # whole lines, ASCII

    def encode(self, close: bool) -> bytes:
        length = () if self.status == 204 else (f"Content-Length: {len(self.body)}",)
        lines = (
            f"HTTP/1.1 {self.status} {REASONS[self.status]}",
            f"Content-Type: {self.kind}",
            *length,
            f"Connection: {'close' if close else 'keep-alive'}",
            *_ALWAYS,
            *self.headers,
        )
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + self.body


class Server(socketserver.ThreadingTCPServer):
    """A thread a connection; `answer` is called from any of them."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4 * CONNECTIONS

    def __init__(self, address: str, port: int, answer: Callable[[Request], Answer]) -> None:
        """Raises: OSError: it can't listen there."""
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        self.answer = answer
        self.open: dict[socket.socket, float] = {}  # since when each has done nothing
        super().__init__((str(found[4][0]), port), _Connection)

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self.open[request] = time.monotonic()
        if len(self.open) > CONNECTIONS:
            oldest = min(self.open, key=self.open.__getitem__)
            del self.open[oldest]
            with suppress(OSError):  # gone meanwhile
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)


class _Connection(socketserver.BaseRequestHandler):
    request: socket.socket
    server: Server

    def setup(self) -> None:
        self._received = b""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)

    def handle(self) -> None:
        with suppress(OSError):  # whoever asked has gone, or does not read
            while self._serve():
                self._idle_since(time.monotonic())

    def _idle_since(self, when: float) -> None:
        if self.request in self.server.open:
            self.server.open[self.request] = when

    def finish(self) -> None:
        self.server.open.pop(self.request, None)

    def _serve(self) -> bool:
        """One request; whether another may follow."""
        head = self._head()
        if head is None:
            return False
        request = _parse(head)
        self._idle_since(math.inf)  # it waits for us
        answer = request if isinstance(request, Answer) else self.server.answer(request)
        self._idle_since(time.monotonic())
        close = answer.status >= 400 or b"connection: close" in head.lower()
        self.request.settimeout(SEND_S)
        self.request.sendall(answer.encode(close))
        return not close

    def _head(self) -> bytes | None:
        """The next request, without what separates it from the one after; None at the end."""
        until = time.monotonic() + (HEAD_S if self._received else IDLE_S)
        while b"\r\n\r\n" not in self._received and len(self._received) <= HEAD_BYTES:
            self.request.settimeout(max(0.001, until - time.monotonic()))
            part = self.request.recv(HEAD_BYTES)
            if not part:
                return None
            if not self._received:
                until = time.monotonic() + HEAD_S
            self._received += part
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        return head


def _parse(head: bytes) -> Request | Answer:
    """What is asked, or why it is refused."""
    if len(head) > HEAD_BYTES:
        return Answer(431, b"too long\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, version = rest.partition(" ")
    if method != "GET":
        return Answer(405, b"only GET\n", headers=("Allow: GET",))
    pairs = [line.partition(":") for line in lines]
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if version != "HTTP/1.1" or not target.startswith("/") or body:
        return Answer(400, b"expected GET /path HTTP/1.1, without a body\n")
    path, _, query = target.partition("?")
    return Request(unquote(path), dict(parse_qsl(query)), headers)
