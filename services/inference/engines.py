"""The model that a lane runs: the variant that its bundle prefers, on an accelerator say, and the
next that runs while that can't be had. A lost accelerator is looked for again beside the work.

Everything but the loading itself happens on the lane's main thread, while no inference runs.
Tested with a pretend accelerator (tests/fake_delegate); a real Edge TPU has not been tried yet.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.engine.bundle import Bundle
from common.engine.model import Model
from common.engine.runtimes import AcceleratorBusyError, Options
from common.errors import EngineError, ModelError

FIRST_S, LONGEST_S = 2.0, 60.0  # between two attempts at an accelerator
STRIKES = 3  # deaths on it, each within WELL_S, after which a process pauses before it tries again
PAUSE_S = 60.0  # doubling with each strike more
STRUCK = f"{STRIKES} processes or more died on the accelerator, one after the other"
WELL_S = 60.0  # an accelerator that ran so long is looked for eagerly again when it is lost
STOPPING_S = 1.0  # what stopping waits for an attempt; a hung one is left behind

LOST, BACK, BUSY = "accelerator.lost", "accelerator.back", "accelerator.busy"
FALLBACK = "model.fallback"


@dataclass
class Backoff:
    """When to try again. Times are monotonic seconds."""

    pause_s: float = FIRST_S
    due_s: float = 0.0

    def failed(self, now_s: float) -> None:
        self.due_s = now_s + self.pause_s
        self.pause_s = min(2 * self.pause_s, LONGEST_S)

    def lost(self, now_s: float, since_s: float) -> None:
        """What worked since `since_s` no longer does."""
        if now_s - since_s >= WELL_S:
            self.pause_s = FIRST_S
        self.failed(now_s)


class Strikes:
    """How often in a row a process died on this bundle's accelerated variant: a mark is made before
    it is loaded and taken back by whatever ends in good order. In the run folder, for those after.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self._path = folder / f"accelerator-{bundle.sha256[:12]}.strikes"
        self._mine = False

    def _read(self) -> tuple[int, float]:
        try:
            count, at_s = self._path.read_text().split()
            return int(count), float(at_s)
        except (FileNotFoundError, ValueError):
            return 0, 0.0

    @property
    def pause_s(self) -> float:
        """How long to leave the accelerator alone from now on."""
        count, at_s = self._read()
        if self._mine or count < STRIKES:
            return 0.0
        return at_s + PAUSE_S * 2.0 ** (count - STRIKES) - time.monotonic()

    def mark(self) -> None:
        if not self._mine:
            self._path.write_text(f"{self._read()[0] + 1} {time.monotonic()}")
        self._mine = True

    def take_back(self) -> None:
        if self._mine:
            count, at_s = self._read()
            self._path.write_text(f"{max(0, count - 1)} {at_s}")
        self._mine = False

    def forget(self) -> None:
        """It has run well."""
        if self._mine:
            self._path.unlink(missing_ok=True)
        self._mine = False


class Engines:
    """`degraded`: why the lane does not run what its bundle prefers; "" where it does.

    `exclusive`: whether that accelerator is for one process at a time; `busy`: whether another uses
    it. `notices`: what happened, as pairs of an event's code and text; the lane takes them from
    here.
    """

    def __init__(
        self, bundle: Bundle, options: Options, runtime: str | None, lock_folder: Path
    ) -> None:
        self._bundle, self._options, self._runtime = bundle, options, runtime
        self._lock_folder = lock_folder
        accelerated = [
            variant
            for variant in bundle.manifest.variants
            if variant.accelerator and runtime in (None, variant.runtime)
        ]
        self._accelerated = bool(accelerated)
        self.exclusive = any(variant.exclusive for variant in accelerated)
        self.model: Model | None = None
        self.degraded = ""
        self.busy = False
        self.notices: list[tuple[str, str]] = []
        self._said = ""  # the last notice's code, unless all has been well since
        self._wanted = True
        self._kept = False  # it could not be given up
        self._attempt: _Attempt | None = None
        self._backoff = Backoff()
        self._since_s = 0.0  # when the accelerator began to work
        self._strikes = Strikes(lock_folder, bundle)

    def load(self) -> None:
        """The first load: the preferred variant that runs; only a CPU variant where an exclusive
        accelerator was given up before.

        Raises:
            ModelError: no variant runs here, or the bundle contradicts itself.
        """
        if not self._wanted:
            self.model = self._load(accelerator=False)
            self._left()
            return
        struck = self._accelerated and self._strikes.pause_s > 0
        if struck and (model := self._load_cpu()) is not None:
            self.model = model
            self._unavailable(STRUCK, False)
            return
        model = self._load()
        self.model, self.degraded, self.busy = model, model.fallback_reason, False
        self._since_s = time.monotonic()
        if self._accelerated and not model.accelerator and model.fallback_reason:
            self._unavailable(model.fallback_reason, model.accelerator_busy)
        elif model.fallback_reason:
            self._say(FALLBACK, f"on {model.runtime}: {model.fallback_reason}")

    @property
    def holds_accelerator(self) -> bool:
        """Whether an exclusive accelerator is kept from other processes, or about to be, and can
        be given up."""
        used = self.model is not None and self.model.exclusive
        return self.exclusive and not self._kept and (used or self._attempting)

    def lost(self, error: EngineError) -> bool:
        """After an AcceleratorLostError: go over to the CPU variant. False: there is none, and
        `model` is None until the accelerator is back."""
        now = time.monotonic()
        if self.model is not None:
            self.model.close()
            self.model = None
        self._backoff.lost(now, self._since_s)
        self._say(LOST, str(error))
        self.degraded, self.busy = str(error), False
        self._strikes.take_back()
        try:
            self.model = self._load(accelerator=False)
        except ModelError as failure:
            self.degraded += f"; {failure}"
        return self.model is not None

    def retry(self) -> Model | None:
        """To be called at each tick. Once the lost accelerator works again: a warm model on it, to
        be adopted as soon as no inference runs; it is returned once."""
        attempt = self._attempt
        on_it = self.model is not None and self.model.accelerator
        if on_it and time.monotonic() - self._since_s >= WELL_S:
            self._strikes.forget()
        if attempt is not None:
            if attempt.is_alive():
                return None
            self._attempt = None
            if (model := attempt.take()) is not None:
                return model
            if not attempt.abandoned:
                self._unavailable(attempt.failure, attempt.busy)
        looking = self._accelerated and not on_it and self.degraded and self._wanted
        if not looking or time.monotonic() < self._backoff.due_s:
            return None
        if self._strikes.pause_s > 0:
            self._unavailable(STRUCK, False)
        else:
            self._attempt = _Attempt(self._load_warm)
            self._attempt.start()
        return None

    def adopt(self, model: Model) -> None:
        """Go over to a model that `retry` returned."""
        if self.model is not None:
            self.model.close()
        self.model, self.degraded, self.busy = model, model.fallback_reason, False
        self._since_s = time.monotonic()
        if self._said:
            self.notices.append((BACK, f"{model.name} is on {model.accelerator} again"))
        self._said = ""

    def give_up_accelerator(self) -> None:
        """Leave an exclusive accelerator to other processes, and go on on the CPU variant, until
        `want_accelerator`. Where the CPU variant can't be loaded it is kept: never blind."""
        if not self.exclusive or not self._wanted:
            return
        if self._attempt is not None:
            self._attempt.abandon()
        if self.model is not None and self.model.exclusive:
            try:
                model = self._load(accelerator=False)
            except ModelError as error:
                self._kept = True
                self.notices.append((BUSY, f"the accelerator can't be left to others: {error}"))
                return
            self.model.close()
            self.model = model
        self._strikes.take_back()
        self._wanted = False
        self._left()

    def want_accelerator(self) -> None:
        """From now on `retry` looks for it again."""
        self._kept = False
        if not self._wanted:
            self._wanted = True
            self._backoff.due_s = 0.0

    def close(self) -> None:
        if self._attempt is not None:
            self._attempt.abandon()
            self._attempt.join(STOPPING_S)
            self._attempt = None
        if self.model is not None:
            self.model.close()
            self.model = None
        self._strikes.take_back()

    @property
    def _attempting(self) -> bool:
        return self._attempt is not None and not self._attempt.abandoned

    def _load(self, accelerator: bool | None = None) -> Model:
        if self._accelerated and accelerator is not False:
            self._strikes.mark()
        try:
            model = Model.load(
                self._bundle,
                self._options,
                self._runtime,
                accelerator=accelerator,
                lock_folder=self._lock_folder,
            )
        except ModelError:
            self._strikes.take_back()
            raise
        if not model.accelerator and accelerator is not False:
            self._strikes.take_back()
        return model

    def _load_cpu(self) -> Model | None:
        try:
            return self._load(accelerator=False)
        except ModelError:
            return None

    def _load_warm(self) -> Model:
        model = self._load(accelerator=True)
        try:
            model.warm_up()
        except EngineError:
            model.close()
            self._strikes.take_back()
            raise
        return model

    def _unavailable(self, reason: str, busy: bool) -> None:
        self.degraded, self.busy = reason, busy
        self._say(BUSY if busy else LOST, reason)
        if busy:  # looking at a lock costs nothing
            self._backoff.due_s = time.monotonic() + FIRST_S
        else:
            self._backoff.failed(time.monotonic())

    def _left(self) -> None:
        self.degraded, self.busy = "the accelerator is left to another process", False

    def _say(self, code: str, text: str) -> None:
        """Once, however often it is found to be so."""
        if code != self._said:
            self.notices.append((code, text))
        self._said = code


class _Attempt(threading.Thread):
    """Loads a model beside the one at work. LiteRT keeps the interpreter's lock while it builds
    the graph (milliseconds), but not while the library looks for its device.
    """

    def __init__(self, load: Callable[[], Model]) -> None:
        super().__init__(name="accelerator", daemon=True)
        self._load = load
        self._lock = threading.Lock()
        self._model: Model | None = None
        self.abandoned = False
        self.failure = "loading ended early"
        self.busy = False

    def run(self) -> None:
        try:
            model = self._load()
        except (EngineError, ModelError) as error:
            self.failure, self.busy = str(error), isinstance(error, AcceleratorBusyError)
            return
        with self._lock:
            if not self.abandoned:
                self._model = model
                return
        model.close()

    def take(self) -> Model | None:
        with self._lock:
            model, self._model = self._model, None
        return model

    def abandon(self) -> None:
        """Whatever becomes of it is closed, now or when it is ready."""
        with self._lock:
            self.abandoned = True
        if (model := self.take()) is not None:
            model.close()
