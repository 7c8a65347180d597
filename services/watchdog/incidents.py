"""What went wrong lately, and how long it took until frames were judged validly again:
run/incidents.json, read by `vigil status`. It survives the watchdog."""

import time
from pathlib import Path

import msgspec

from common import durable
from common.config import Config
from services.watchdog.facts import Incident, Seen, Settings
from services.watchdog.rings import Rings

KEPT = 32
FOLLOWED = 4  # at a time
OPEN_S = 3600.0  # what has not recovered by then is not looked for any more


class Row(msgspec.Struct):
    at_ns: int  # CLOCK_MONOTONIC: when it failed
    wall_s: float
    process: str
    what: str
    outcome: str = ""
    recovery_ms: float | None = None
    run: int = 0  # of the lane that failed


class Incidents:
    def __init__(
        self, path: Path, settings: Settings, config: Config, rings: dict[str, Rings]
    ) -> None:
        self._path, self._settings, self._config, self._rings = path, settings, config, rings
        self._changed = False
        try:
            self._rows = msgspec.json.decode(path.read_bytes(), type=list[Row])
        except (FileNotFoundError, msgspec.MsgspecError):
            self._rows = []

    def add(self, incident: Incident) -> None:
        at_ns = incident.at_ns
        camera = incident.process.removeprefix("capture-")
        if camera in self._rings:  # it worked at least until its newest frame
            at_ns = max(at_ns, self._rings[camera].captured_ns)
        wall_s = time.time() - (time.monotonic_ns() - at_ns) / 1e9
        row = Row(at_ns, wall_s, incident.process, incident.what, run=incident.run)
        self._rows = [*self._rows[1 - KEPT :], row]
        self._changed = True

    def conclude(self, lanes: list[str], outcome: str, live: str, reason: str) -> None:
        """What was done about the newest incident of a group; it may be the first that tells of it,
        of the lane that was live."""
        ours = [row for row in self._rows if row.process in lanes and row.recovery_ms is None]
        if not ours:
            self.add(Incident(live, reason, time.monotonic_ns()))
            ours = self._rows
        ours[-1].outcome = ours[-1].outcome or outcome
        self._changed = True

    def follow(self, processes: dict[str, Seen]) -> list[Row]:
        """Those that are over now."""
        since = time.monotonic_ns() - OPEN_S * 1e9
        ours = [row for row in self._rows if row.recovery_ms is None and row.at_ns > since]
        over = [row for row in ours[-FOLLOWED:] if self._is_over(row, processes.get(row.process))]
        self._changed |= bool(over)
        return over

    def _is_over(self, row: Row, process: Seen | None) -> bool:
        limits = self._settings.processes.get(row.process)
        camera = row.process.removeprefix("capture-")
        if limits and limits.group:
            cameras = self._config.cameras_of(limits.group)
            found = [self._rings[c].first_valid(row.at_ns, row.run) for c in cameras]
        elif camera in self._rings:
            found = [self._rings[camera].first_valid(row.at_ns, captured=True)]
        elif process and process.sent_ns and process.spawned_ns > row.at_ns:
            found = [(row.at_ns, process.sent_ns)]
        else:
            return False
        failed_ns = max(failed for failed, _ in found)
        valid = [first for _, first in found if first >= failed_ns]
        if not valid:
            return False
        row.at_ns = failed_ns
        row.recovery_ms = round((min(valid) - failed_ns) / 1e6, 1)
        row.outcome = row.outcome or "restarted"
        return True

    def save(self) -> None:
        """Raises: StorageError: the run folder is full."""
        if self._changed:
            durable.write(self._path, msgspec.json.encode(self._rows))
            self._changed = False
