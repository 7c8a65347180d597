"""When to look for signed updates, and what was found; each group goes its own `Way` from there."""

import random
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from common import durable
from common.errors import LockedError, StorageError, TransitionError
from common.service import Service
from common.states import Severity
from common.updates import REPLY, REPORT, REQUEST, Reply, Report, Request
from services.updater.candidate import RETRY_S, Candidate
from services.updater.children import Child, Outcome
from services.updater.life import Checked
from services.updater.way import LEAST_S, Way

CHECK_S = 900.0  # for one check
FIRST_S = 60.0  # after the start, the first one comes within this
MOST_S = 86_400.0  # between two, after errors


class Signed:
    """
    Args:
        child: starts a child; a benchmark runs many devices in one process.
    """

    def __init__(
        self, service: Service, candidates: dict[str, Candidate], child: type[Child] = Child
    ) -> None:
        self._service, self._child = service, child
        self._settings = service.config.updates
        folder = service.paths.updates
        self._inbox, self._partial = folder / "inbox", folder / "partial"
        for one in (folder, self._inbox, self._partial):
            with suppress(OSError):  # the disk refuses; who needs it says so
                one.mkdir(mode=0o770, parents=True, exist_ok=True)
        self.ways = {name: Way(service, one, child) for name, one in candidates.items()}
        self._seen_inbox: tuple[int, ...] = ()
        self._checked_ns = self._failures = 0
        self._next_s = time.monotonic() + random.uniform(0, min(self._settings.check_s, FIRST_S))
        self._wanted: set[str] | None = None
        self._rest_s = 0.0  # the disk refuses until then
        self._error = self._reported = ""
        self._checking = False

    def rest(self) -> None:
        """Leave the disk alone for a while: it refused."""
        self._rest_s = time.monotonic() + RETRY_S

    def next_child(self) -> Child | None:
        """Begin with what is due, the operator's wish first."""
        if (request := self._request()) is not None:
            return self._check(request.place, request)
        if self._settings.root is None:
            return None
        if time.monotonic() < self._rest_s:
            return None
        self._tidy()
        if (place := self._due()) is not None:
            return self._check(place)
        return next((child for way in self.ways.values() if (child := way.next_step())), None)

    def hinders(self, child: Child) -> bool:
        """Whether a download, which may take hours, should make way: a check is due, or its window
        has closed. It goes on where it ends."""
        if child.what != "fetch":
            return False
        asked = (self._service.paths.run / REQUEST).exists()
        return asked or self._due() is not None or any(w.overtime for w in self.ways.values())

    # -- checks ------------------------------------------------------------------------------

    def _due(self) -> str | None:
        """Where to look now: "" is the repository's URL; None: nowhere."""
        is_time, url = time.monotonic() >= self._next_s, self._settings.url
        seen = _stamp(self._inbox)
        if seen and (seen != self._seen_inbox or (is_time and not url)):
            return str(self._inbox)
        return "" if is_time and url else None

    def _request(self) -> Request | None:
        """What an operator asks; it stays until it is answered, through kills too."""
        path = self._service.paths.run / REQUEST
        try:
            request = msgspec.json.decode(durable.read(path), type=Request)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError):
            durable.remove(path)  # nobody can be told
            return None
        missing = "root" if self._settings.root is None else "url"
        if missing == "root" or not (request.place or self._settings.url):
            error = f"{self._service.config.path}: updates.{missing} is missing: nowhere to look"
            self._reply(Reply(id=request.id, error=error))
            return None
        return request

    def _check(self, place: str, request: Request | None = None) -> Child:
        self._checking = True
        if place == str(self._inbox):
            self._seen_inbox = _stamp(self._inbox)
        return self._child(
            "services.updater.check", place,
            limit_s=CHECK_S, settle=partial(self._checked, place, request),
        )  # fmt: skip

    def _checked(self, place: str, request: Request | None, outcome: Outcome, said: str) -> None:
        self._checking = False
        try:
            checked = msgspec.json.decode(said, type=Checked)
        except msgspec.MsgspecError:
            checked = Checked(error=said)
        # vigil.toml may have groups now that this process knows nothing of yet.
        known = {name: found for name, found in checked.groups.items() if name in self.ways}
        checked = msgspec.structs.replace(checked, groups=known)
        for problem in checked.problems:
            self._service.event("update.damaged", Severity.ERROR, problem)
        begin = not (request and request.dry_run)
        lines = tuple(self.ways[group].line(answer) for group, answer in checked.groups.items())
        for group, answer in checked.groups.items() if begin else ():
            try:
                self.ways[group].take(answer, at_once=request is not None)
            except (TransitionError, LockedError, StorageError, OSError) as error:
                checked = msgspec.structs.replace(checked, error=f"group {group}: {error}")
        if not (place and self._settings.url):
            self._plan(checked)
        if checked.error and checked.error != self._error:
            severity = Severity.WARNING if outcome is Outcome.LATER else Severity.ERROR
            self._service.event(
                "update.check", severity, f"no update: {checked.error}",
                step="check", outcome="failed", reason=checked.error,
            )  # fmt: skip
        self._error = checked.error
        if not checked.error:
            self._checked_ns = time.monotonic_ns()
        self.report()  # before the answer, whose reader looks there next
        if request:
            updates = {name: way.noted.update for name, way in self.ways.items()}
            begun = {name: update.slot for name, update in updates.items() if update and begin}
            self._reply(Reply(id=request.id, error=checked.error, lines=lines, begun=begun))

    def _plan(self, checked: Checked) -> None:
        """When to ask the repository again."""
        self._failures = self._failures + 1 if checked.error else 0
        wait_s = pause_s(checked, self._failures, self._settings.check_s)
        self._next_s = time.monotonic() + wait_s * random.uniform(0.5, 1.5)

    def _tidy(self) -> None:
        """Remove downloads that no update waits for any more."""
        wanted = {way.wants for way in self.ways.values()}
        if wanted == self._wanted:
            return
        self._wanted = wanted
        for left in self._partial.glob("*"):
            if left.name.removesuffix(".synced") not in wanted:
                durable.remove(left)
        with suppress(OSError):  # before a new file, of which an old note would say too much
            durable.sync_folder(self._partial)

    def _reply(self, reply: Reply) -> None:
        path = self._service.paths.run / REQUEST
        with suppress(StorageError):  # then nobody can be told
            durable.write(path.with_name(REPLY), msgspec.json.encode(reply))
        with suppress(OSError, msgspec.MsgspecError):
            if msgspec.json.decode(durable.read(path), type=Request).id == reply.id:
                path.unlink()

    # -- telling -----------------------------------------------------------------------------

    def report(self) -> None:
        """Write what there is to see, where it has changed."""
        planned = self._settings.root is not None and (self._settings.url or self._seen_inbox)
        report = Report(
            checked_ns=self._checked_ns, error=self._error, checking=self._checking,
            next_ns=round(self._next_s * 1e9) if planned else 0,
            groups={name: way.report() for name, way in self.ways.items()},
        )  # fmt: skip
        text = msgspec.json.encode(report).decode()
        if text != self._reported:
            path = self._service.paths.run / REPORT
            new = path.with_name(f".{path.name}.new")
            with suppress(OSError):  # written with the next turn, then
                new.write_text(text)
                new.rename(path)
                self._reported = text


def pause_s(checked: Checked, failures: int, check_s: float) -> float:
    """Mean time to the next check. Where the answer was no (4xx), asking sooner does not help."""
    wait_s = check_s
    if checked.error and checked.status not in range(400, 500):
        wait_s = min(check_s, LEAST_S * 2 ** min(failures - 1, 16))
    return max(wait_s, min(checked.wait_s, MOST_S))


def _stamp(repository: Path) -> tuple[int, ...]:
    """What changes with each publishing; empty where there is none."""
    try:
        found = (repository / "metadata" / "timestamp.json").stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
