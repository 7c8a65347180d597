"""Inference: one of the lanes of a group. It takes its seat in the record, loads that slot's model
and has it prove itself, then works as the record says until that changes (`Lane`).
"""

import sys
import time
from pathlib import Path

from common.config import Group
from common.engine.bundle import Bundle, open_bundle
from common.engine.runtimes import Options
from common.engine.samples import self_test
from common.errors import AcceleratorLostError, ConfigError, EngineError, LockedError, ModelError
from common.frames import Ring, generations
from common.messages import LaneReport
from common.processes import lane_name
from common.service import BEAT_S, Service, main
from common.slots import FACTORY, PASS
from common.states import ProcessState, Severity
from services.inference.engines import Engines
from services.inference.lane import Lane, announce
from services.inference.seat import Seat

SEAT_S = 10.0  # for the record's lock
AFTER_LIVE_S = 5.0  # a standby leaves the machine to the live lane's start for so long
REFUSED_S = 5.0  # a refused model is reported so long, for the watchdog to judge; then it exits
MEMORY_FACTOR = 3  # a loaded model takes about so many times its file, and
MEMORY_MB = 60  # a process and its runtime so much beside it


class Loader:
    """From an empty process to a model that is warm and has passed its self-test."""

    def __init__(self, service: Service, group: str, seat: Seat) -> None:
        self._service, self._group, self._seat = service, group, seat
        self._settings: Group = service.config.groups[group]
        self._broken: set[str] = set()

    def load(self) -> Engines | None:
        """None: pass-through, or the process was asked to stop.

        Raises:
            ModelError, EngineError: an unproven model was refused; that costs it a try.
        """
        self._leave_to_live_lane()
        while not self._service.stopping:
            self._beat(ProcessState.LOADING, "model load")
            slot = self._take_seat()
            if slot == PASS:
                self._service.event(
                    "model.none", Severity.CRITICAL, "no model can be loaded: frames pass unjudged"
                )
                return None
            path = self._seat.store.path(slot)
            if slot == FACTORY:
                path = self._service.config.resolve(self._settings.model)
            try:
                return self._load(path)
            except (ModelError, EngineError) as error:
                if self._seat.unproven:
                    self._report_refused(str(error))
                    raise
                self._service.event("model.broken", Severity.ERROR, f"slot {slot[:12]}: {error}")
                self._broken.add(slot)
        return None

    def _take_seat(self) -> str:
        deadline = time.monotonic() + SEAT_S
        while True:
            try:
                return self._seat.take(self._broken)
            except LockedError:
                if time.monotonic() > deadline:
                    raise

    def _load(self, path: Path) -> Engines:
        settings = self._settings
        bundle = open_bundle(path, score=settings.score)
        cache = self._service.paths.root / "engines"
        options = Options(settings.threads, settings.spinning, settings.memory_arena, cache)
        engines = Engines(bundle, options, settings.runtime, self._service.paths.run)
        if self._seat.record.live != self._seat.lane and not self._seat.candidate:
            engines.give_up_accelerator()  # an exclusive one is not for a standby
        try:
            self._load_preferred(engines)
            try:
                self._prove(engines, bundle)
            except AcceleratorLostError as error:
                if self._seat.unproven or not engines.lost(error):
                    raise
                self._prove(engines, bundle)
        except BaseException:
            engines.close()
            raise
        announce(self._service, engines)
        model = engines.model
        assert model is not None
        self._service.event(
            "model.loaded",
            Severity.INFO,
            f"{model.name} {model.version} (release {model.release}) on {model.runtime}",
            slot=model.slot,
            fallback=model.fallback_reason,
        )
        return engines

    def _load_preferred(self, engines: Engines) -> None:
        """A candidate waits for an accelerator that the live lane is about to give up."""
        deadline = time.monotonic() + self._settings.load_s
        engines.load()
        while engines.busy and self._seat.candidate and not self._service.stopping:
            if time.monotonic() > deadline:
                raise ModelError(f"the accelerator was not free in time: {engines.degraded}")
            self._service.beat(
                ProcessState.LOADING,
                wait="accelerator",
                wait_s=self._settings.load_s,
                lane=self._report(),
            )
            self._service.pause(BEAT_S / 5)
            engines.close()
            engines.load()
            self._seat.refresh()

    def _prove(self, engines: Engines, bundle: Bundle) -> None:
        """Warm up; then the self-test on the bundle's samples, on the accelerator itself."""
        model = engines.model
        assert model is not None
        model.warm_up()

        def stop() -> bool:
            self._service.progressed()
            self._beat(ProcessState.LOADING, "self-test")
            return self._service.stopping

        test = self_test(model, bundle, stop=stop)
        if test.refused and not self._service.stopping:
            raise EngineError(f"self-test: {test.refused}")

    def _report_refused(self, reason: str) -> None:
        """The watchdog judges; where it is not there, ending the process costs a try."""
        text = f"slot {self._seat.slot[:12]}: {reason}"
        self._service.event("model.refused", Severity.ERROR, text, slot=self._seat.slot)
        deadline = time.monotonic() + REFUSED_S
        while time.monotonic() < deadline and self._seat.mine and not self._service.stopping:
            self._service.beat(
                ProcessState.WAITING,
                wait="verdict",
                wait_s=REFUSED_S,
                lane=self._report(reason),
            )
            self._service.pause(BEAT_S / 5)
            self._seat.refresh()

    def _beat(self, state: ProcessState, wait: str) -> None:
        self._service.beat(state, wait=wait, wait_s=self._settings.load_s, lane=self._report())

    def _report(self, refused: str = "") -> LaneReport:
        return LaneReport(self._seat.run, self._seat.slot, False, False, refused=refused)

    def _leave_to_live_lane(self) -> None:
        """Nobody waits for a standby: it starts once the live lane decides, and there is memory."""
        started = time.monotonic()
        said = False
        while not self._service.stopping:
            self._seat.refresh()
            if self._seat.record.live == self._seat.lane:
                return
            early = time.monotonic() - started < AFTER_LIVE_S and not self._decided_by_live_lane()
            short = "" if early else self._memory_short()
            if not early and not short:
                return
            if short and not said:
                said = True
                self._service.event("lane.no_memory", Severity.WARNING, short)
            wait = short or "the live lane's start"
            self._service.beat(ProcessState.WAITING, wait=wait, wait_s=4 * BEAT_S)
            self._service.pause(BEAT_S / 5)

    def _decided_by_live_lane(self) -> bool:
        paths, epoch = self._service.paths, self._seat.record.epoch
        for camera in self._service.config.cameras_of(self._group):
            existing = generations(paths.rings, camera)
            if not existing:
                return False
            with Ring.open(paths.rings, paths.accounts, camera, existing[-1]) as ring:
                if ring.fence != epoch:
                    return False
        return True

    def _memory_short(self) -> str:
        """Why a second lane would not fit; "" where it does."""
        slot = self._seat.record.choose(self._seat.lane)
        path = self._seat.store.path(slot)
        if slot == FACTORY:
            path = self._service.config.resolve(self._settings.model)
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        largest = max((file.stat().st_size for file in files), default=0) / 1e6
        need, free = MEMORY_MB + MEMORY_FACTOR * largest, available_mb()
        if free >= need:
            return ""
        return f"no memory for a standby: {need:.0f} MB are needed, {free:.0f} MB available"


def available_mb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def run(service: Service) -> None:
    group, lane = sys.argv[1:3]
    if group not in service.config.groups:
        raise ConfigError(f"{service.config.path}: has no [groups.{group}]")
    seat = Seat(service, group, lane)
    loader = Loader(service, group, seat)
    engines = loader.load()
    if not service.stopping:
        work = Lane(service, group, seat, engines)
        try:
            work.run()
        finally:
            work.close()
    if engines is not None:
        engines.close()
    seat.leave()


if __name__ == "__main__":
    # The worker must get the interpreter as soon as the runtime returns.
    sys.setswitchinterval(0.0005)
    main(lane_name(sys.argv[1], sys.argv[2]), run)
