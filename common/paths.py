"""Every path under one root that tests and users can move.

`VIGIL_ROOT` holds what must survive (models, state, journals); default `var/` in the project.
`VIGIL_RUN` holds what must not (sockets, rings, locks) and has to lie in memory. Unless it is set,
it is `ROOT/run` where that is a tmpfs (a device mounts one), else a folder of /dev/shm named after
the root, short enough for the 107 bytes of a socket's address.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import StorageError

PROJECT = Path(__file__).resolve().parent.parent
_IPC_LIMIT = 100


@dataclass(frozen=True)
class Paths:
    root: Path
    run: Path

    @staticmethod
    def from_environment() -> "Paths":
        return Paths.under(Path(os.environ.get("VIGIL_ROOT", PROJECT / "var")))

    @staticmethod
    def under(root: Path) -> "Paths":
        root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow ROOT/run
        if run := os.environ.get("VIGIL_RUN"):
            return Paths(root, Path(os.path.abspath(run)))  # noqa: PTH100
        if _is_tmpfs(root / "run"):
            return Paths(root, root / "run")
        digest = f"{zlib.crc32(os.fsencode(root)):08x}"
        return Paths(root, Path(f"/dev/shm/vigil-{os.getuid()}-{digest}"))

    @property
    def rings(self) -> Path:
        return self.run / "rings"

    @property
    def accounts(self) -> Path:
        return self.run / "accounts"

    def models(self, group: str) -> Path:
        """What must survive of a group's models: the record, slots, staging, inbox."""
        return self.root / "models" / group

    @property
    def updates(self) -> Path:
        """The updater's own: trusted metadata, floors, transactions, partial downloads."""
        return self.root / "updates"

    @property
    def programs(self) -> Path:
        """supervisord programs rendered from vigil.toml."""
        return self.run / "supervisor.d"

    @property
    def logs(self) -> Path:
        return self.run / "log"

    @property
    def supervisor_socket(self) -> Path:
        return self.run / "supervisor.sock"

    def endpoint(self, process: str) -> str:
        """ZeroMQ address of the one PUB socket of `process`.

        Raises:
            StorageError: the path is too long for a Unix socket.
        """
        path = self.run / f"{process}.ipc"
        if len(os.fsencode(path)) >= _IPC_LIMIT:
            raise StorageError(
                f"{path}: {len(os.fsencode(path))} bytes are too long for a socket; "
                f"set VIGIL_RUN to a folder that leaves it under {_IPC_LIMIT}"
            )
        return f"ipc://{path}"

    def trigger(self, camera: str) -> str:
        """ZeroMQ address where capture takes triggers (PULL); any number of processes PUSH."""
        return self.endpoint(f"trigger-{camera}")

    def bell(self, process: str) -> Path:
        return self.run / f"{process}.bell"

    def lock(self, process: str) -> Path:
        return self.run / f"{process}.lock"

    def make(self) -> None:
        """Create the folders, private to user and group.

        Raises:
            StorageError: a folder can't be made, or the run folder belongs to another user.
        """
        for folder in (self.root, self.run, self.rings, self.accounts, self.programs, self.logs):
            try:
                folder.mkdir(mode=0o770, parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{folder}: can't be made: {error.strerror}") from error
        if self.run.stat().st_uid != os.getuid() and not os.access(self.run, os.W_OK):
            raise StorageError(
                f"{self.run}: belongs to another user; set VIGIL_RUN to one of yours"
            )


def _is_tmpfs(folder: Path) -> bool:
    """Whether `folder` exists and lies in a tmpfs, from /proc/self/mountinfo."""
    if not folder.is_dir():
        return False
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == number:
            return right.split()[0] == "tmpfs"
    return False
