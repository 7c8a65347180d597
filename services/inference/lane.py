"""A lane at work: it judges the frames of its group where it is live, runs in the shadow of the
live lane while its model proves itself, and else stands by, warm.

Live, the loop prepares the next frame while the worker infers this one, so that the engine never
waits. Under `latest` it prepares as late as it can, so that what waits is never an old frame.
"""

import time
from collections import deque
from collections.abc import Callable

import zmq

from common.bell import Bell, Ringer
from common.engine.model import Model
from common.errors import AcceleratorLostError, EngineError, FencedError
from common.messages import Item, LaneReport
from common.processes import capture_name, record_bell
from common.service import BEAT_S, Service
from common.states import ProcessState, Severity
from services.inference.engines import Engines
from services.inference.feed import Feed
from services.inference.results import encode, located, result
from services.inference.seat import Seat
from services.inference.shadow import Shadow
from services.inference.tally import Tally
from services.inference.worker import Job, Worker

EARLY_NS = 1_000_000  # how much earlier than needed the next frame is prepared under `latest`
SELDOM = 2.0  # frames that come this many inferences apart are inferred without the worker
SMOOTHING = 0.1  # weight of the newest time in the running means
PENDING_NS = 2_000_000  # a fence that could not be raised is tried again so soon
WARM_S = 5.0  # a standby infers a grey picture so often, and less where that takes long
WARM_SHARE = 50
FAILED_EVENT_S = 10.0
EAGER_S, EAGER_BEAT_S = 1.0, 0.05
RECENT = 300  # inferences that the report's p99 is of


class Lane:
    """`engines` None: pass-through. Frames are decided, none is judged."""

    def __init__(self, service: Service, group: str, seat: Seat, engines: Engines | None) -> None:
        self._service, self._seat, self._engines = service, seat, engines
        self._hang_s = service.config.groups[group].hang_s
        self._worker = Worker(self._model)
        cameras = service.config.cameras_of(group)
        self._feeds = [
            Feed(name, service.config.cameras[name], service.paths, seat.raise_fence)
            for name in cameras
        ]
        self._shadow = Shadow(service, cameras, seat, service.config.groups[group])
        self._tally = Tally()
        self._bell = Bell(service.paths.bell(service.name))  # rung by capture at each frame
        self._record_bell = Bell(service.paths.bell(record_bell(group, seat.lane)))
        captures = {name: service.paths.bell(capture_name(name)) for name in cameras}
        self._captures = {name: Ringer([bell]) for name, bell in captures.items()}
        self._jobs: list[Job] = []  # in the worker's hands, oldest first: one runs, one waits
        self._free = list(range(Model.BUFFERS))
        self._infer_ns = self._input_ns = self._interval_ns = 0.0  # running means
        self._recent_ns: deque[int] = deque(maxlen=RECENT)
        self._judged = self._failed = 0
        self._judged_said = False  # worth telling at once: it does judge
        self._tick_s = BEAT_S
        self._failed_said_ns = 0
        self._taken_ns = self._warmed_ns = time.monotonic_ns()
        self._change: Callable[[], object] | None = None  # of the model, once no job runs
        self._standing_by = zmq.Poller()  # not woken by each frame
        self._working = zmq.Poller()
        for fd in (self._record_bell.fd, self._worker.done_fd, service.wake_fd):
            self._standing_by.register(fd, zmq.POLLIN)
            self._working.register(fd, zmq.POLLIN)
        self._working.register(self._bell.fd, zmq.POLLIN)

    @property
    def _model(self) -> Model | None:
        return self._engines.model if self._engines else None

    def run(self) -> None:
        """Until the process is asked to stop, or the record has another slot or run here."""
        self._worker.start()
        due_ns, ready_ns = 0, time.monotonic_ns()
        while not self._service.stopping:
            now = time.monotonic_ns()
            if self._record_bell.heard() or now >= due_ns:  # files are the truth: look anyway
                # Who does not hear a new process yet learns soon that it is ready.
                self._tick_s = EAGER_BEAT_S if now - ready_ns < EAGER_S * 1e9 else BEAT_S
                due_ns = now + round(self._tick_s * 1e9)
                self._seat.refresh()
                if not self._seat.mine:
                    break
                self._follow()
                self._beat()
            elif self._judged and not self._judged_said:
                self._beat()
            while self._jobs and (job := self._worker.finished()):
                self._finish(job)
            if self._change is not None and not self._jobs:
                self._change_model()
            if self._live or self._deciding:
                self._working.poll(self._judge())
            elif self._seat.candidate and self._model is not None:
                if (lost := self._shadow.judge(self._model)) is not None:
                    self._lost(lost)
                rest_ms = min(self._shadow.rest_ms, round(self._tick_s * 1000))
                if rest_ms:
                    self._standing_by.poll(rest_ms)
                else:
                    self._working.poll(round(self._tick_s * 1000))
                self._heard()
            else:
                self._keep_warm()
                self._standing_by.poll(round(self._tick_s * 1000))
        self._worker.stop()
        while job := self._worker.finished():
            self._finish(job)

    def _judge(self) -> int:
        """Keep the worker busy; returns how long to wait for anything, ms."""
        wait_ns = self._prepare()
        if self._heard():  # what came while preparing is looked for once more
            wait_ns = self._prepare()
        return -(-wait_ns // 1_000_000)

    def _heard(self) -> bool:
        """Whether capture has rung; if so, rings that are new are looked for too."""
        heard = self._bell.heard()
        if heard and self._live and any(feed.ring is None for feed in self._feeds):
            self._follow_cameras()
        return heard

    # -- the record and the model ------------------------------------------------------------

    @property
    def _live(self) -> bool:
        return self._seat.live

    @property
    def _deciding(self) -> bool:
        """Whether this lane still holds the fence of a ring: until the live one raises it."""
        return any(feed.ring is not None for feed in self._feeds)

    def _follow(self) -> None:
        """What the record says now, for cameras and model."""
        self._follow_cameras()
        if self._engines is None or self._change is not None:
            return
        engines = self._engines
        entitled = self._live or self._seat.candidate
        if engines.exclusive and (not entitled or self._seat.wanted_by_candidate):
            if engines.holds_accelerator:
                self._change = engines.give_up_accelerator
        else:
            engines.want_accelerator()
            if (model := engines.retry()) is not None:
                self._change = lambda: engines.adopt(model)
        announce(self._service, engines)

    def _follow_cameras(self) -> None:
        for feed in self._feeds:
            if self._live:
                feed.refresh(self._seat.record.epoch)
            elif feed.ring is not None and feed.ring.fence != feed.epoch:
                feed.release()

    def _change_model(self) -> None:
        """Nothing runs now: lose the accelerator, give it up, or take it again."""
        assert self._change is not None
        assert self._engines is not None
        self._service.beat(
            ProcessState.LOADING, wait="model load", wait_s=self._seat.load_s, lane=self._report()
        )
        self._change()
        self._change = None
        self._worker.model = self._model
        self._free = list(range(Model.BUFFERS))
        announce(self._service, self._engines)

    def _keep_warm(self) -> None:
        """Caches and memory of a standby stay hot, for at most a fiftieth of a core."""
        if self._model is None:
            return
        pause_ns = max(WARM_S * 1e9, WARM_SHARE * self._infer_ns)
        started = time.monotonic_ns()
        if started - self._warmed_ns < pause_ns:
            return
        try:
            self._model.warm_up(1)
        except EngineError as error:
            self._lost(error)
        self._warmed_ns = time.monotonic_ns()
        self._infer_ns = self._warmed_ns - started
        self._service.progressed()

    def _lost(self, error: EngineError) -> None:
        """An accelerator does not answer; any other error of the engine is the model's own."""
        engines = self._engines
        if isinstance(error, AcceleratorLostError) and engines and self._change is None:
            self._change = lambda: engines.lost(error)

    # -- frames ------------------------------------------------------------------------------

    def _prepare(self) -> int:
        """Give the worker frames while it has room; returns how long to wait for anything, ns."""
        while self._free and self._change is None:
            for feed in self._feeds:
                if (sequence := feed.next_sequence) is not None:
                    break
            else:
                break
            if self._jobs and not feed.every:
                lead = 2 * self._input_ns + EARLY_NS
                running = self._jobs[0].infer_from_ns or time.monotonic_ns()
                wait_ns = round(running + self._infer_ns - lead - time.monotonic_ns())
                if wait_ns > 0:
                    return wait_ns
            # Whoever was served goes to the end of the line.
            self._feeds.remove(feed)
            self._feeds.append(feed)
            self._take(feed, sequence)
        if self._live and any(feed.pending for feed in self._feeds):
            self._follow_cameras()
            return PENDING_NS
        return round(self._tick_s * 1e9)

    def _take(self, feed: Feed, sequence: int) -> None:
        """Pre-process a camera's frame and have it inferred, unless it is torn."""
        if self._model is None or feed.blind(sequence):
            if (known := feed.take(sequence)) is not None:
                self._pass_on(Job(feed, feed.hold, sequence, 0, None, *known, 0))
            return
        picture = feed.picture(sequence)
        if picture is None:
            return
        buffer = self._free[0]
        started = time.monotonic_ns()
        geometry = self._model.prepare(picture, buffer)
        input_ns = time.monotonic_ns() - started
        known = feed.take(sequence)
        if known is None:
            return
        self._free.pop(0)
        job = Job(feed, feed.hold, sequence, buffer, geometry, *known, input_ns)
        self._jobs.append(job)
        self._input_ns += SMOOTHING * (input_ns - self._input_ns)
        self._interval_ns += SMOOTHING * (started - self._taken_ns - self._interval_ns)
        self._taken_ns = started
        if len(self._jobs) == 1 and self._interval_ns > SELDOM * self._infer_ns:
            self._worker.infer(job)  # no frame will come meanwhile: spare two changes of thread
            self._finish(job)
        else:
            self._worker.submit(job)

    def _pass_on(self, job: Job) -> None:
        """A frame that is not inferred; its turn is after those before it."""
        if self._jobs:
            self._jobs.append(job)
            self._worker.submit(job)
        else:
            self._decide(job)

    def _finish(self, job: Job) -> None:
        self._jobs.remove(job)
        if job.geometry is None:
            self._decide(job)
            return
        if isinstance(job.error, AcceleratorLostError):
            self._lost(job.error)
            job.feed.put_back(job.sequence, job.hold)  # judged once more, by what is left
            return
        infer_ns = job.infer_to_ns - job.infer_from_ns
        self._infer_ns += SMOOTHING * (infer_ns - self._infer_ns)
        self._recent_ns.append(infer_ns)
        self._decide(job)

    def _decide(self, job: Job) -> None:
        """Decode, commit to the journal, and only then announce, byte for byte the same."""
        items: list[Item] = []
        kind = "not_inferred"
        if job.geometry is not None:
            assert self._model is not None
            if job.error is None:
                try:
                    items = self._model.decode(job.outputs, job.geometry)
                except EngineError as error:
                    job.error = error
            self._free.append(job.buffer)
            kind = "failed" if job.error else "inferred"
        feed, ring = job.feed, job.feed.ring
        if ring is None or job.hold != feed.hold or job.sequence > feed.taken:
            feed.put_back(job.sequence, job.hold)
            return  # another lane decides there now, or one before it was put back
        degraded = self._engines.degraded if self._engines else "no model could be loaded"
        limit_s = feed.camera.stale_after_s
        items = located(items, ring.shape.view, feed.camera.zones)
        decision = result(job, items, self._model, degraded, limit_s, ring.generation)
        body = encode(decision)
        slot = int(self._model.slot, 16) if self._model else 0
        try:
            feed.decide(job.sequence, job.hold, self._seat.run, slot, kind, body)
        except FencedError:
            self._seat.refresh()
            return
        self._service.publish_bytes(f"result/{feed.name}", body)
        self._captures[feed.name].ring()
        self._service.progressed()
        self._judged += 1
        self._tally.add(decision, job.hold, job.sight, items)
        if job.error is not None:
            self._failed += 1
            self._say_failed(job)

    def _say_failed(self, job: Job) -> None:
        now = time.monotonic_ns()
        if now - self._failed_said_ns < FAILED_EVENT_S * 1e9 and self._failed > 1:
            return
        self._failed_said_ns = now
        text = f"{job.feed.name}: frame {job.sequence} could not be judged: {job.error}"
        self._service.event("frame.failed", Severity.ERROR, text, camera=job.feed.name)

    # -- beats -------------------------------------------------------------------------------

    def _beat(self) -> None:
        state, wait = ProcessState.RUNNING, ""
        if not self._jobs:
            state = ProcessState.WAITING
            wait = "frame" if self._live or self._seat.candidate else "a turn: it stands by"
        self._judged_said = self._judged > 0
        model = self._model
        self._service.beat(
            state,
            at_once=True,
            wait=wait,
            wait_s=self._hang_s,
            lane=self._report(),
            model=model.name if model else "",
            version=model.version if model else "",
            release=str(model.release) if model else "",
            runtime=model.runtime if model else "",
        )

    def _report(self) -> LaneReport:
        shadow, tally = self._shadow, self._tally
        recent = sorted(self._recent_ns or shadow.infer_ns)
        return LaneReport(
            run=self._seat.run,
            slot=self._seat.slot,
            ready=self._engines is None or self._model is not None,
            live=self._live and not any(feed.pending for feed in self._feeds),
            degraded=self._engines.degraded if self._engines else "no model could be loaded",
            judged=self._judged + shadow.judged,
            failed=self._failed + shadow.failed,
            agreement=shadow.agreement,
            infer_ms_p99=recent[len(recent) * 99 // 100] / 1e6 if recent else 0.0,
            compared=shadow.compared,
            score_shift=shadow.score_shift,
            latency_ratio=shadow.latency_ratio,
            offered=tally.offered,
            shown=tally.shown,
            inferred=tally.inferred,
            valid=tally.valid,
            scores=tally.scores,
            shown_ns=tally.shown_ns,
        )

    def close(self) -> None:
        for bell in (self._bell, self._record_bell):
            bell.close()
        for capture in self._captures.values():
            capture.close()
        self._shadow.close()


def announce(service: Service, engines: Engines) -> None:
    """What happened to the accelerator."""
    while engines.notices:
        code, text = engines.notices.pop(0)
        severity = Severity.INFO if code == "accelerator.back" else Severity.ERROR
        service.event(code, severity, text)
