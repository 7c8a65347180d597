"""What restarts the board where the watchdog can't help: the hardware watchdog, and systemd's.

/dev/watchdog as in Documentation/watchdog/watchdog-api.rst; notifications as in sd_notify(3). A
plain file or FIFO may stand in for the device: then there is no time-out to set.
"""

import array
import errno
import fcntl
import os
import socket
import stat
import time

from common.errors import StorageError

SETTIMEOUT, GETTIMEOUT = 0xC0045706, 0x80045707  # _IOWR('W', 6, int), _IOR('W', 7, int)
MAGIC_CLOSE = b"V"  # closing after it stops the timer; without it the board restarts
FEEDS = 4  # in one time-out
ROUNDING_S = 1


class Hardware:
    """An open hardware watchdog: from here on it has to be fed."""

    def __init__(self, device: str, timeout_s: int) -> None:
        """Raises: StorageError: the device can't be opened, or takes no such time-out."""
        self._device = device
        self._fed_ns = 0
        self.timeout_s = timeout_s
        try:
            self._fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{device}: can't be opened: {error.strerror}") from error
        if stat.S_ISCHR(os.fstat(self._fd).st_mode):
            self._set_timeout(timeout_s)

    def _set_timeout(self, timeout_s: int) -> None:
        """*Untested*: no hardware here ran it. Drivers round, and some take only their own."""
        value = array.array("i", [timeout_s])
        try:
            fcntl.ioctl(self._fd, SETTIMEOUT, value)
            fcntl.ioctl(self._fd, GETTIMEOUT, value)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
                raise StorageError(
                    f"{self._device}: takes no time-out of {timeout_s} s: {error.strerror}"
                ) from error
            return
        self.timeout_s = value[0]

    @property
    def differs(self) -> str:
        """What to say where the driver took another time-out than it was given."""
        return f"{self._device}: has a time-out of {self.timeout_s} s, not as [watchdog] says"

    def feed(self) -> None:
        """Not more often than it needs.

        Raises:
            StorageError: it can't be fed; the board will restart.
        """
        now = time.monotonic_ns()
        if now - self._fed_ns < self.timeout_s * 1e9 / FEEDS:
            return
        try:
            os.write(self._fd, b"\0")
        except BlockingIOError:
            pass  # a FIFO as a stand-in, that nobody reads
        except OSError as error:
            raise StorageError(f"{self._device}: can't be fed: {error.strerror}") from error
        self._fed_ns = now

    def close(self, *, stop: bool) -> None:
        """`stop`: in good order, the timer with it, unless the driver was built with `nowayout`."""
        if stop:
            os.write(self._fd, MAGIC_CLOSE)
        os.close(self._fd)


class Notify:
    """systemd's notifications; does nothing where nobody asked for them."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]  # abstract
        self._period_ns = int(os.environ.get("WATCHDOG_USEC", "0")) * 1000 // 2
        self._fed_ns = 0

    def ready(self) -> None:
        self._send(b"READY=1")

    def feed(self) -> None:
        now = time.monotonic_ns()
        if self._period_ns and now - self._fed_ns >= self._period_ns:
            self._fed_ns = now
            self._send(b"WATCHDOG=1")

    def stopping(self) -> None:
        self._send(b"STOPPING=1")

    def _send(self, message: bytes) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            try:
                client.sendto(message, self._address)
            except OSError as error:
                if error.errno not in (errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN):
                    raise
