"""The small HTTP server: what it refuses, and that nobody keeps the others from being served."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from services.cli import web
from services.cli.web import CONNECTIONS, Answer, Request, Server
from tests.support import until

BODY = bytes(1_000_000)


@pytest.fixture
def server() -> Iterator[Server]:
    def answer(request: Request) -> Answer:
        if request.path == "/none":
            return Answer(204)
        return Answer(200, BODY if request.path == "/large" else request.path.encode())

    with Server("127.0.0.1", 0, answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        for connection in list(server.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for served in threading.enumerate():
            if "process_request" in served.name:
                served.join(5)


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)


def said(server: Server, request: bytes) -> bytes:
    """All that is answered until the connection ends."""
    with connect(server) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"HEAD / HTTP/1.1", 405),
        (b"POST / HTTP/1.1\r\nContent-Length: 3", 405),
        (b"get / HTTP/1.1", 405),
        (b"\x16\x03\x01\x02\x00\x01", None),  # a browser that tries TLS
        (b"GET", None),
        (b"GET / HTTP/2", None),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", 414),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200, 431),
        (b"GET / HTTP/1.1\r\nContent-Length: 3", 200),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked", 200),
        (b"GET / HTTP/1.0", 200),
        (b"GET / HTTP/1.1\r\nConnection: close", 200),
    ],
)
def test_what_is_refused(server: Server, request_: bytes, status: int | None) -> None:
    """The connection ends after each of them. None: it is no HTTP that an answer could have."""
    answer = said(server, request_ + b"\r\n\r\n")
    if status is None:
        assert b"Error code: 400" in answer
        return
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nContent-Security-Policy: default-src 'self'" in answer
    assert answer.count(b"\r\n\r\n") == 1


def test_one_connection_serves_many_requests(server: Server) -> None:
    answer = said(
        server,
        b"GET /a%20b?x=1 HTTP/1.1\r\n\r\nGET /none HTTP/1.1\r\n\r\n"
        b"GET /c HTTP/1.1\r\nConnection: close\r\n\r\n",
    )
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\n/a bHTTP/1.1 204 " in answer
    assert answer.endswith(b"\r\n\r\n/c")


def test_who_stops_reading_does_not_stop_others(server: Server) -> None:
    """More of them than connections are allowed: each newer one takes the place of the oldest."""
    stalled = [connect(server) for _ in range(3 * CONNECTIONS // 2)]
    try:
        for client in stalled:
            client.sendall(b"GET /large HTTP/1.1\r\n\r\n" * 20)
        one = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        for _ in range(3):
            one.request("GET", "/large")
            assert len(one.getresponse().read()) == len(BODY)
        one.close()
        assert len(server.open) <= CONNECTIONS
    finally:
        for client in stalled:
            client.close()


def test_who_does_not_read_or_write_is_let_go(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web._Connection, "timeout", 0.1)
    for request in (b"", b"GET / HT", b"GET /large HTTP/1.1\r\n\r\n" * 20):
        with connect(server) as client:
            client.sendall(request)
            if b"large" in request:
                client.recv(1000)  # a little, then no more
                until(lambda: not server.open, 5, "the end of a connection that nobody reads")
            else:
                assert client.recv(1) == b""
