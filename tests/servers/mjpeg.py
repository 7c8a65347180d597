"""A hostile camera that speaks MJPEG over HTTP: what it does is its path.

    python -m tests.servers.mjpeg [--port P]

It says its port, and ends with its standard input. Command there: "drop" closes all connections.
"""

import argparse
import socket
import socketserver
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import md5
from itertools import count

import cv2
import numpy as np

USER, PASSWORD = "eye", "s3cret:w@rd"
RATE = 50
OK = "HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary={}\r\n\r\n"
BASIC = f"Basic {b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"


def jpeg(place: int, width: int = 320, height: int = 240) -> bytes:
    """Orange on the left, blue on the right, and a grey square that moves."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = 0, 180, 255
    picture[:, width // 2 :] = 255, 60, 0
    x = place * 8 % (width - 16)
    picture[:16, x : x + 16] = 128
    return bytes(cv2.imencode(".jpg", picture)[1])


def part(content: bytes, boundary: str = "frame", length: bool = True, **headers: str) -> bytes:
    lines = [f"--{boundary}", "Content-Type: image/jpeg"]
    if length:
        lines.append(f"Content-Length: {len(content)}")
    lines += [f"{key}: {value}" for key, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content + b"\r\n"


class Camera(socketserver.StreamRequestHandler):
    server: "Server"

    def handle(self) -> None:
        request = self.rfile.readline().decode().split()
        headers = {}
        while line := self.rfile.readline().strip().decode():
            key, _, value = line.partition(":")
            headers[key.lower()] = value.strip()
        if len(request) < 2:
            return
        self.request_headers = headers
        self.path = request[1]
        name = self.path.partition("?")[0].strip("/")
        act: Callable[[], Iterator[bytes]] | None = getattr(self, name, None)
        self.server.connections.add(self.connection)
        try:
            if act is None:
                self.wfile.write(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            else:
                for chunk in act():
                    self.wfile.write(chunk)
        except OSError:
            pass
        finally:
            self.server.connections.discard(self.connection)

    def steady(self, last: int = sys.maxsize) -> Iterator[bytes]:
        yield OK.format("frame").encode()
        for place in range(last):
            yield part(self.server.jpeg(place))
            time.sleep(1 / RATE)

    def freezes(self) -> Iterator[bytes]:
        yield from self.steady(5)
        self.server.stop.wait()

    def drips(self) -> Iterator[bytes]:
        yield from self.steady(5)
        for byte in part(self.server.jpeg(0)):
            yield bytes([byte])
            if self.server.stop.wait(0.02):
                return

    def drips_head(self) -> Iterator[bytes]:
        for byte in OK.encode():
            yield bytes([byte])
            if self.server.stop.wait(0.2):
                return

    def silent(self) -> Iterator[bytes]:
        self.server.stop.wait()
        yield b""

    def resizes(self) -> Iterator[bytes]:
        yield from self.steady(5)
        for place in count():
            yield part(jpeg(place, 160, 120))
            time.sleep(1 / RATE)

    def ends(self) -> Iterator[bytes]:
        yield from self.steady(5)
        yield b"--frame--\r\n"

    def half(self) -> Iterator[bytes]:
        """Closes in the middle of a picture."""
        yield from self.steady(5)
        whole = part(self.server.jpeg(5))
        yield whole[: len(whole) // 2]

    def broken_ones(self) -> Iterator[bytes]:
        """Every other picture is cut short, as cheap cameras do."""
        yield OK.format("frame").encode()
        for place in count():
            whole = self.server.jpeg(place)
            yield part(whole if place % 2 == 0 else whole[: len(whole) // 2])
            time.sleep(1 / RATE)

    def noise(self) -> Iterator[bytes]:
        yield OK.format("frame").encode()
        dice = np.random.default_rng(1)
        for _ in count():
            yield part(dice.bytes(5000))
            time.sleep(1 / RATE)

    def page(self) -> Iterator[bytes]:
        head = "HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n"
        yield head.encode() + b"<html>no</html>"

    def bare(self) -> Iterator[bytes]:
        """No lengths, a quoted boundary with its dashes, and HTTP/1.1 chunks."""
        yield (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            b'Content-Type: multipart/x-mixed-replace;boundary="--frame"\r\n\r\n'
        )
        for place in count():
            whole = part(self.server.jpeg(place), length=False)
            yield f"{len(whole):x}\r\n".encode() + whole + b"\r\n"
            time.sleep(1 / RATE)

    def moved(self) -> Iterator[bytes]:
        yield b"HTTP/1.0 302 Found\r\nLocation: /steady\r\nContent-Length: 0\r\n\r\n"

    def basic(self) -> Iterator[bytes]:
        if self.request_headers.get("authorization") == BASIC:
            yield from self.steady()
        else:
            yield from self.refuse('Basic realm="eyes"')

    def digest(self) -> Iterator[bytes]:
        given = self.request_headers.get("authorization", "")
        words = dict(
            word.strip().split("=", 1) for word in given.removeprefix("Digest").split(",") if word
        )
        words = {key: value.strip('"') for key, value in words.items()}
        secret = md5(f"{USER}:eyes:{PASSWORD}".encode()).hexdigest()
        what = md5(f"GET:{self.path}".encode()).hexdigest()
        right = ":".join(
            (secret, *(words.get(k, "") for k in ("nonce", "nc", "cnonce", "qop")), what)
        )
        if words.get("response") == md5(right.encode()).hexdigest():
            yield from self.steady()
        else:
            yield from self.refuse('Digest realm="eyes", nonce="abc", qop="auth"')

    def refuse(self, how: str) -> Iterator[bytes]:
        yield (
            f"HTTP/1.0 401 Unauthorized\r\nWWW-Authenticate: {how}\r\nContent-Length: 0\r\n\r\n"
        ).encode()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Camera)
        self.connections: set[socket.socket] = set()
        self.stop = threading.Event()
        self.pictures = [jpeg(place) for place in range(32)]

    def jpeg(self, place: int) -> bytes:
        return self.pictures[place % len(self.pictures)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    server = Server(parser.parse_args().port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        if line.strip() == "drop":
            for connection in list(server.connections):
                connection.shutdown(socket.SHUT_RDWR)
        print("done", flush=True)


if __name__ == "__main__":
    main()
