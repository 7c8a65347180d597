"""A candidate in the shadow of the live lane: it judges frames that are decided already, and says
how often it would have decided the same, how sure it was, and how long it took."""

import time
from collections import deque

import msgspec

from common import bus
from common.config import Group
from common.engine.matching import pair
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
REST = 9  # it rests so many times as long as it has worked: a tenth of the live lane's core
DECIDED = (Validity.VALID, Validity.STALE, Validity.DEGRADED)  # the live model's own decisions


class Shadow:
    def __init__(self, service: Service, cameras: list[str], seat: Seat, group: Group) -> None:
        self._service, self._seat, self._every = service, seat, group.shadow_every
        # A slow model rests less where it could not be done in time.
        self._rest_ns = round(group.prove_s * 1e9 / 2 / max(1, group.shadow_frames))
        self._due_ns = 0
        self._zones = {name: service.config.cameras[name].zones for name in cameras}
        self._watchers = [Watcher(name, service.paths) for name in cameras]
        self.judged = self.failed = self.compared = 0
        self._agreed = self._pairs = 0
        self._shift = 0.0  # sum over pairs
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self.infer_ns: deque[int] = deque(maxlen=RECENT)

    @property
    def agreement(self) -> float:
        """Share of frames decided as the live lane did; 1 while there is nothing to compare."""
        return self._agreed / self.compared if self.compared else 1.0

    @property
    def score_shift(self) -> float:
        return self._shift / self._pairs if self._pairs else 0.0

    @property
    def latency_ratio(self) -> float:
        """Median of its inference time over the live lane's of the same frames; 0: unknown."""
        return sorted(self._ratios)[len(self._ratios) // 2] if self._ratios else 0.0

    @property
    def rest_ms(self) -> int:
        """How long it still rests."""
        return -(-max(0, self._due_ns - time.monotonic_ns()) // 1_000_000)

    def judge(self, model: Model) -> AcceleratorLostError | None:
        """The newest decided frame of a camera, every so many frames, each in its turn; the error
        where the accelerator is lost, which says nothing of the model."""
        if self.rest_ms:
            return None
        for watcher in list(self._watchers):
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
            self._watchers.remove(watcher)
            self._watchers.append(watcher)
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
            if not failure and live.validity in DECIDED:
                self._compare(items, live, inferred - prepared)
            now = time.monotonic_ns()
            self._due_ns = now + min(REST * (now - started), self._rest_ns)
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
            break
        return None

    def _compare(self, items: list[Item], live: Result, infer_ns: int) -> None:
        self.compared += 1
        agrees, shifts = compare(items, live.items)
        self._agreed += agrees
        self._shift += sum(shifts)
        self._pairs += len(shifts)
        # A live lane without its accelerator decides the same, but in another time.
        if live.validity != Validity.DEGRADED and live.stages.compute_infer:
            self._ratios.append(infer_ns / live.stages.compute_infer)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()


def compare(items: list[Item], others: tuple[Item, ...]) -> tuple[bool, list[float]]:
    """Whether two lanes decided alike, the same best class, or boxes most of which pair up; and of
    what pairs up how much the first one's score is above the other's."""
    if not items or not others:
        return len(items) == len(others), []
    if items[0].box is None or others[0].box is None:
        same = items[0].label == others[0].label
        return same, [items[0].score - others[0].score] if same else []
    pairs, _ = pair(items, others)
    agrees = 2 * len(pairs) >= AGREES * (len(items) + len(others))
    return agrees, [item.score - other.score for item, other in pairs]
