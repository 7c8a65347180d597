"""Where updates come from: a web server, or a folder such as a USB stick.

Nothing that comes from here is trusted. What a source promises is that it ends: no more bytes than
were asked for, no slower than `MIN_B_S`, nothing unpacked on the way.
"""

import email.utils
import http.client
import io
import math
import os
import ssl
import stat
import time
from base64 import b64encode
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from socket import SO_RCVBUF, SOL_SOCKET, socket
from typing import Any, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, SSLError
from urllib3.exceptions import TimeoutError as HTTPTimeoutError
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
            stall_s: how long it may take to connect, or to say nothing.

        Raises:
            ConfigError: `url` or `ca` can't be used; the text names the key of [updates].
        """
        self.name = redacted(url)
        raise NotImplementedError

    def read(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Generator[bytes, None, None]:
        raise NotImplementedError
        yield b""
