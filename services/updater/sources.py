"""Where updates come from: a web server, or a folder such as a USB stick.

Nothing that comes from here is trusted. What a source promises is that it ends: no more bytes than
were asked for, no slower than `MIN_B_S`, nothing unpacked on the way.
"""

import http.client
import io
import math
import os
import re
import ssl
import stat
import time
from base64 import b64encode
from collections.abc import Generator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from socket import SO_RCVBUF, SOL_SOCKET, socket
from typing import Any, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from common.errors import ConfigError, FetchError
from common.sources import redacted

BLOCK = 1 << 16
MIN_B_S = 1024  # on average over stall_s; time that the reader takes doesn't count
REDIRECTS = 3
PORTAL = 511  # "Network Authentication Required" (RFC 6585)
_HEAD_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 18  # under way and lost, uncounted, when a read is given up
_WAIT_MAX_S = 86400.0
_PORTS = {"http": 80, "https": 443}
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "vigil"}


class NoRangesError(FetchError):
    """The server sends files only whole, from their first byte."""


class Source(Protocol):
    name: str  # for messages: shows no password

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        """The bytes start to end, exclusive, of a file below the repository's root, in blocks of at
        most `BLOCK`; fewer where the file ends before. May be closed early.

        Raises:
            FetchError: status 404 where there is no such file; `PORTAL` where a captive portal
                answered; 0 where the connection, or the medium, failed: worth another try.
            NoRangesError: only where start > 0.
        """


def open_source(place: str, ca: Path | None = None, stall_s: float = 30.0) -> Source:
    """A repository by its URL, or its folder.

    Raises:
        ConfigError: see `HttpSource`.
    """
    return HttpSource(place, ca=ca, stall_s=stall_s) if "://" in place else FolderSource(place)


class FolderSource:
    """A repository in a folder. Symbolic links in it are not followed."""

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        try:
            fd = self._open(path)
            try:
                at, last = start, math.inf if end is None else end
                while block := os.pread(fd, int(min(BLOCK, last - at)), at):
                    at += len(block)
                    yield block
            finally:
                os.close(fd)
        except OSError as error:
            raise FetchError(f"{self.name}: {path}: can't be read: {error.strerror}") from error

    def _open(self, path: str) -> int:
        """A regular file: nothing else is so much as opened, since that may wait, or act."""
        try:
            fd = os.open(self.name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FetchError(f"{self.name}: there is no such folder") from None
        try:
            for part in path.split("/"):
                if part in ("", ".", ".."):
                    raise FetchError(f"{self.name}: {path!r} is no plain path", 404)
                inner = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = inner
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FetchError(f"{self.name}: {path}: is no regular file", 404)
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise FetchError(f"{self.name}: {path}: there is no such file", 404) from None
        finally:
            os.close(fd)


class HttpSource:
    """A repository on a web server, over one connection that is kept."""

    def __init__(self, url: str, *, ca: Path | None = None, stall_s: float = 30.0) -> None:
        """
        Args:
            url: http(s)://[USER:PASSWORD@]HOST[:PORT][/PATH]; a password only with https.
            ca: PEM of the authority that the server's certificate must come from; None: those of
                the system.
            stall_s: how long the server may take to answer, or say nothing.

        Raises:
            ConfigError: `url` or `ca` can't be used; the text names the key of [updates].
        """
        self.name = redacted(url)
        try:
            parts = urlsplit(url)
            self._origin = _origin(url)
        except ValueError as error:
            raise ConfigError(f"updates.url: {self.name}: is no URL: {error}") from None
        if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
            expected = "expected http(s)://[USER:PASSWORD@]HOST[:PORT][/PATH]"
            raise ConfigError(f"updates.url: {self.name}: {expected}")
        self._base = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        self._credentials: dict[str, str] = {}
        if parts.username is not None:
            if parts.scheme != "https":
                raise ConfigError(f"updates.url: {self.name}: a password must go over https")
            both = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._credentials["Authorization"] = f"Basic {b64encode(both.encode()).decode()}"
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ConfigError(f"updates.ca: {ca}: is no PEM of an authority: {error}") from error
        buffer = (SOL_SOCKET, SO_RCVBUF, _BUFFER_BYTES)
        self._manager = urllib3.PoolManager(
            timeout=stall_s,
            ssl_context=context,
            socket_options=[*HTTPConnection.default_socket_options, buffer],
        )
        self._manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        headers = {}
        if start > 0 or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            # Names of metadata come quoted, as TUF has it.
            answer = self._answer(f"{self._base}/{quote(path, '/%')}", headers)
            try:
                left = _length(answer, start, end)
                while left:
                    block = answer.read1(min(left, BLOCK), decode_content=False)
                    left -= len(block)
                    yield block
            finally:
                answer.close()  # its connection too, unless all of it was read
        except FetchError as error:
            error.args = (f"{self.name}: {path}: {error}",)
            raise
        except (HTTPError, OSError, ValueError) as error:  # ValueError: of a strange Location
            raise FetchError(f"{self.name}: {path}: {_reason(error)}") from error

    def _answer(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        """The server's answer, at the end of its redirects."""
        for _ in range(REDIRECTS + 1):
            secret = self._credentials if _origin(url) == self._origin else {}
            answer = self._manager.urlopen(
                "GET",
                url,
                headers=_HEADERS | headers | secret,
                redirect=False,
                retries=False,
                preload_content=False,
            )
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            answer.close()
            before, url = url, urljoin(url, answer.headers.get("Location", ""))
            allowed = ("https",) if before.startswith("https:") else ("https", "http")
            if urlsplit(url).scheme not in allowed:
                told = f"is redirected to {redacted(url)[:200]}; expected {' or '.join(allowed)}"
                raise FetchError(told, answer.status)
        raise FetchError(f"is redirected more than {REDIRECTS} times", answer.status)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Raises: ValueError: it is no URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _length(answer: BaseHTTPResponse, start: int, end: int | None) -> int:
    """How many bytes of an answer to read.

    Raises:
        FetchError: it is not what was asked for.
    """
    status, headers = answer.status, answer.headers
    if status in (200, 206) and headers.get("Content-Type", "").lower().startswith("text/html"):
        raise FetchError("a web page came instead of the file: a captive portal, it seems", PORTAL)
    if status == 200 and start > 0:
        raise NoRangesError("the server sends files only whole; it can't go on after a break", 200)
    if status not in (200, 206):
        wait_s = _wait_s(headers) if status in (429, 503) else 0.0
        asks = f", and asks to wait {wait_s:g} s" if wait_s else ""
        raise FetchError(f"the server answers with status {status}{asks}", status, wait_s)
    for header in ("Content-Encoding", "Transfer-Encoding"):
        if header in headers:
            raise FetchError(f"has {header} {headers[header][:60]!r}; expected none", status)
    length = headers.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise FetchError(f"has Content-Length {length[:60]!r}; expected a number", status)
    if status == 200:
        return int(length) if end is None else min(int(length), end)
    told = headers.get("Content-Range", "")
    numbers = re.fullmatch("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", told)
    if numbers:
        first, last, total = map(int, numbers.groups())
        until = total if end is None else min(total, end)
        if first == start and last + 1 == until and int(length) == until - start:
            return until - start
    asked = f"{start}-{'' if end is None else end - 1}"
    raise FetchError(
        f"has Content-Range {told[:60]!r} and Content-Length {length}; asked was {asked}", status
    )


def _wait_s(headers: Mapping[str, str]) -> float:
    """What Retry-After asks for: seconds, or a date by the server's own clock."""
    after, wait_s = headers.get("Retry-After", ""), 0.0
    with suppress(ValueError, TypeError):  # no number, no date, no zone
        if after.isdecimal():
            wait_s = float(after)
        else:
            now = parsedate_to_datetime(headers.get("Date", ""))
            wait_s = (parsedate_to_datetime(after) - now).total_seconds()
    return min(max(0.0, wait_s), _WAIT_MAX_S)


def _reason(error: BaseException) -> str:
    """What happened, without what urllib3 wraps around it."""
    inner: object = error
    while isinstance(inner, BaseException):
        error, inner = inner, inner.__cause__ or (inner.args[-1] if inner.args else None)
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"no trust in its certificate ({error.verify_message}): look at updates.ca, the clock"
        )
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# -- how fast, and how much, before a file begins --------------------------------------------------


class _Paced(io.RawIOBase):
    """What a socket receives, headers included, unless it comes too slowly."""

    def __init__(self, raw: io.RawIOBase, stall_s: float) -> None:
        self._raw, self._stall_s = raw, stall_s
        self._waited, self._came = 0.0, 0
        self.most: float = _HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = time.monotonic()
        count = self._raw.readinto(buffer) or 0
        self._waited += time.monotonic() - began
        self._came += count
        self.most -= count
        if self.most < 0:
            raise OSError(f"headers of more than {_HEAD_BYTES} bytes")
        if self._waited >= self._stall_s:
            if self._came < MIN_B_S * self._waited:
                raise TimeoutError(f"less than {MIN_B_S} bytes/s came for {self._stall_s:g} s")
            self._waited, self._came = 0.0, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._paced = _Paced(self.fp.detach(), sock.gettimeout() or 0.0)
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal():  # here, where http.client closes the connection for it
            raise http.client.HTTPException(f"has Content-Length {length[:60]!r}")
        self._paced.most = math.inf


class _Http(HTTPConnection):
    response_class = _Response


class _Https(HTTPSConnection):
    response_class = _Response


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https
