"""A candidate in the shadow of the live lane: it judges frames that are decided already, and says
how often it would have decided the same."""

import time
from collections import deque

import msgspec

from common import bus
from common.engine.matching import match
from common.engine.model import Model
from common.errors import AcceleratorLostError, EngineError
from common.messages import Item, Result, Stages
from common.service import Service
from common.states import Sight, Validity
from services.inference.feed import Watcher, view
from services.inference.results import encode, located
from services.inference.seat import Seat

RECENT = 300
AGREES = 0.5  # of what both lanes report together, matched in pairs


class Shadow:
    def __init__(self, service: Service, cameras: list[str], seat: Seat, every: int) -> None:
        self._service, self._seat, self._every = service, seat, every
        self._zones = {name: service.config.cameras[name].zones for name in cameras}
        self._watchers = [Watcher(name, service.paths) for name in cameras]
        self.judged = self.failed = 0
        self._compared = self._agreed = 0
        self.infer_ns: deque[int] = deque(maxlen=RECENT)

    @property
    def agreement(self) -> float:
        """Share of frames decided as the live lane did; 1 while there is nothing to compare."""
        return self._agreed / self._compared if self._compared else 1.0

    def judge(self, model: Model) -> AcceleratorLostError | None:
        """The newest decided frame of each camera, every so many frames; stops where the
        accelerator is lost, which says nothing of the model."""
        for watcher in self._watchers:
            found = watcher.newest(self._every)
            if found is None:
                continue
            ring, sequence = found
            entry, picture = ring.entry(sequence), view(ring, sequence)
            if entry is None or picture is None or ring.marks(sequence)[0] is not Sight.CLEAR:
                continue
            live = bus.decode(f"result/{watcher.name}", entry.result)
            assert isinstance(live, Result)
            started = time.monotonic_ns()
            geometry = model.prepare(picture, 0)
            if not ring.intact(sequence):
                continue
            prepared = time.monotonic_ns()
            items: list[Item] = []
            failure = ""
            try:
                outputs = model.infer(0)
                inferred = time.monotonic_ns()
                self.infer_ns.append(inferred - prepared)
                items = located(
                    model.decode(outputs, geometry), ring.shape.view, self._zones[watcher.name]
                )
            except AcceleratorLostError as error:
                return error
            except EngineError as error:
                inferred = time.monotonic_ns()
                failure = str(error)
                self.failed += 1
            self.judged += 1
            self._service.progressed()
            if not failure and live.validity in (Validity.VALID, Validity.STALE):
                self._compared += 1
                self._agreed += agree(items, live.items)
            now = time.monotonic_ns()
            shadow = msgspec.structs.replace(
                live,
                validity=Validity.FAILED if failure else Validity.VALID,
                reason=failure,
                age_ns=now - live.captured_ns,
                model=model.name,
                version=model.version,
                release=model.release,
                slot=model.slot,
                runtime=model.runtime,
                items=tuple(items),
                items_cut=0,
                stages=Stages(0, 0, prepared - started, inferred - prepared, now - inferred, 0),
            )
            self._service.publish_bytes(f"shadow/{watcher.name}", encode(shadow))
        return None

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()


def agree(items: list[Item], others: tuple[Item, ...]) -> bool:
    """Whether two lanes decided alike: the same best class, or boxes most of which pair up."""
    if not items or not others:
        return len(items) == len(others)
    if items[0].box is None or others[0].box is None:
        return items[0].label == others[0].label
    pairs, _ = match(items, others)
    return 2 * pairs >= AGREES * (len(items) + len(others))
