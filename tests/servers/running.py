"""A server of these as a process that a test starts, freezes and ends."""

import os
import signal
import subprocess
import sys

from common.paths import PROJECT

MJPEG = (sys.executable, "-m", "tests.servers.mjpeg")
RTSP = ("/usr/bin/python3", "tests/servers/rtsp.py")
USER, PASSWORD = "eye", "s3cret:w@rd"
IN_URL = "eye:s3cret%3Aw%40rd@"


class Server:
    def __init__(self, *command: str, port: int = 0) -> None:
        self._command = command
        self.start(port)

    def start(self, port: int) -> None:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            self.close()
            raise RuntimeError(f"{' '.join(self._command)} does not start")
        self.port = int(said)

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        self._process.stdout.readline()

    def freeze(self) -> None:
        """It says nothing any more, and its connections stay."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
