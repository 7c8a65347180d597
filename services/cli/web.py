"""The standard library's HTTP server, for a page: GET only, bounded in connections and time."""

import socket
import socketserver
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote

CONNECTIONS = 32  # one more, and the one that asked nothing for the longest time is closed
TIMEOUT_S = 15.0  # without a byte of a request; for a whole answer to be taken

_ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Headers = tuple[tuple[str, str], ...]


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
    headers: Headers = ()


class Server(ThreadingHTTPServer):
    """A thread a connection; `answer` is called from any of them."""

    request_queue_size = CONNECTIONS

    def __init__(self, address: str, port: int, answer: Callable[[Request], Answer]) -> None:
        """Raises: OSError: it can't listen there."""
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        self.answer = answer
        self.open: dict[socket.socket, float] = {}  # when each has asked something last
        super().__init__((str(found[4][0]), port), _Connection)

    def server_bind(self) -> None:
        # HTTPServer's own asks for the name of the address, and waits where there is no network.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self.open[request] = time.monotonic()
        if len(self.open) > CONNECTIONS:
            oldest = min(self.open, key=self.open.__getitem__)
            del self.open[oldest]
            with suppress(OSError):  # gone meanwhile
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    server: Server
    connection: socket.socket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = TIMEOUT_S

    def handle(self) -> None:
        with suppress(OSError):  # whoever asked has gone, or does not read
            super().handle()

    def finish(self) -> None:
        self.server.open.pop(self.connection, None)
        with suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        if self.connection in self.server.open:
            self.server.open[self.connection] = time.monotonic()
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            self.close_connection = True  # what nobody reads is not the next request
        answer = self.server.answer(Request(unquote(path), dict(parse_qsl(query)), headers))
        self.send_response(answer.status)
        if answer.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def end_headers(self) -> None:
        for name, value in _ALWAYS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, "only GET"
        super().send_error(code, message, explain)

    def version_string(self) -> str:
        return "Vigil"

    def log_message(self, format: str, *args: object) -> None:
        """Who looks is nobody's business; what is wrong is in the answer."""
