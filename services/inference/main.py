"""Inference: a lane of a group. Frames in, decisions in the journal, then announced.

The loop prepares the next frame while the worker infers this one, so that the engine never waits.
Under `latest` it prepares as late as it can, so that what waits is never an old frame.
"""

import sys
import time

import msgspec
import zmq

from common import bus
from common.bell import Bell, Ringer
from common.engine.bundle import open_bundle
from common.engine.model import Model
from common.engine.runtimes import Options
from common.errors import ConfigError, EngineError
from common.frames import RESULT_BYTES
from common.messages import Item, Result, Stages
from common.processes import capture_name, lane_name
from common.service import BEAT_S, Service, main
from common.states import ProcessState, Severity, Validity
from services.inference.feed import Feed
from services.inference.worker import Job, Worker

LOAD_LIMIT_S = 60.0
EARLY_NS = 1_000_000  # how much earlier than needed the next frame is prepared under `latest`
SELDOM = 2.0  # frames that come this many inferences apart are inferred without the worker
SMOOTHING = 0.1  # weight of the newest time in the running means


class Lane:
    def __init__(self, service: Service, group: str, model: Model) -> None:
        self._service = service
        self._model = model
        self._slot = int(model.slot, 16)
        self._worker = Worker(model)
        cameras = service.config.cameras_of(group)
        self._feeds = [Feed(name, service.config.cameras[name], service.paths) for name in cameras]
        self._bell = Bell(service.paths.bell(service.name))  # rung by capture at each frame
        captures = {name: service.paths.bell(capture_name(name)) for name in cameras}
        self._captures = {name: Ringer([bell]) for name, bell in captures.items()}
        self._jobs: list[Job] = []  # in the worker's hands, oldest first: one runs, one waits
        self._free = list(range(Model.BUFFERS))
        self._infer_ns = self._input_ns = self._interval_ns = 0.0  # running means
        self._taken_ns = time.monotonic_ns()
        self._poller = zmq.Poller()
        for readable in (self._bell.fd, self._worker.done_fd, service.wake_fd):
            self._poller.register(readable, zmq.POLLIN)

    def run(self) -> None:
        epoch = 1 + max(feed.highest_fence() for feed in self._feeds)
        for feed in self._feeds:
            feed.go_live(epoch)
        self._worker.start()
        refresh_ns = 0
        while not self._service.stopping:
            now = time.monotonic_ns()
            if now >= refresh_ns:  # files are the truth: look even where no message came
                refresh_ns = now + round(BEAT_S * 1e9)
                self._refresh()
                self._beat()
            while self._jobs and (job := self._worker.finished()):
                self._decide(job)
            wait_ns = self._prepare()
            if self._bell.heard():  # what came while preparing is looked for once more
                wait_ns = self._prepare()
            self._poller.poll(-(-wait_ns // 1_000_000))
        self._worker.stop()
        while job := self._worker.finished():
            self._decide(job)

    def _refresh(self) -> None:
        for feed in self._feeds:
            feed.refresh()

    def _beat(self) -> None:
        idle = not self._jobs
        self._service.beat(
            ProcessState.WAITING if idle else ProcessState.RUNNING,
            wait="frame" if idle else "",
            wait_s=2 * BEAT_S,
            model=self._model.name,
            version=self._model.version,
            release=str(self._model.release),
            runtime=self._model.runtime,
        )

    def _prepare(self) -> int:
        """Give the worker frames while it has room; returns how long to wait for anything, ns."""
        while self._free:
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
        return round(BEAT_S * 1e9)

    def _take(self, feed: Feed, sequence: int) -> None:
        """Pre-process a camera's frame and have it inferred, unless it is torn."""
        picture = feed.picture(sequence)
        if picture is None:
            return
        buffer = self._free[0]
        started = time.monotonic_ns()
        geometry = self._model.prepare(picture, buffer)
        input_ns = time.monotonic_ns() - started
        times = feed.take(sequence)
        if times is None:
            return
        self._free.pop(0)
        job = Job(feed, sequence, buffer, geometry, *times, input_ns)
        self._jobs.append(job)
        self._input_ns += SMOOTHING * (input_ns - self._input_ns)
        self._interval_ns += SMOOTHING * (started - self._taken_ns - self._interval_ns)
        self._taken_ns = started
        if len(self._jobs) == 1 and self._interval_ns > SELDOM * self._infer_ns:
            self._worker.infer(job)  # no frame will come meanwhile: spare two changes of thread
            self._decide(job)
        else:
            self._worker.submit(job)

    def _decide(self, job: Job) -> None:
        """Decode, commit to the journal, and only then announce, byte for byte the same."""
        self._jobs.remove(job)
        items: list[Item] = []
        if not job.failure:
            try:
                items = self._model.decode(job.outputs, job.geometry)
            except EngineError as error:
                job.failure = str(error)
        self._free.append(job.buffer)
        infer_ns = job.infer_to_ns - job.infer_from_ns
        self._infer_ns += SMOOTHING * (infer_ns - self._infer_ns)
        body = _encode(self._result(job, items))
        kind = "failed" if job.failure else "inferred"
        job.feed.decide(job.sequence, self._slot, kind, body)
        self._service.publish_bytes(f"result/{job.feed.name}", body)
        self._captures[job.feed.name].ring()
        self._service.progressed()
        if job.failure:
            text = f"{job.feed.name}: frame {job.sequence} could not be judged: {job.failure}"
            self._service.event("frame.failed", Severity.ERROR, text, camera=job.feed.name)

    def _result(self, job: Job, items: list[Item]) -> Result:
        assert job.feed.ring is not None
        now = time.monotonic_ns()
        age_ns = now - job.captured_ns
        limit_s = job.feed.camera.stale_after_s
        validity, reason = Validity.VALID, ""
        if job.failure:
            validity, reason = Validity.FAILED, job.failure
        elif age_ns > limit_s * 1e9:
            validity = Validity.STALE
            reason = f"the frame is {age_ns / 1e9:.2f} s old, more than {limit_s} s"
        stages = Stages(
            decode=job.filled_ns - job.captured_ns,
            queue=job.infer_from_ns - job.filled_ns - job.input_ns,
            compute_input=job.input_ns,
            compute_infer=job.infer_to_ns - job.infer_from_ns,
            compute_output=now - job.infer_to_ns,
            total=now - job.filled_ns,
        )
        model = self._model
        return Result(
            job.feed.name, job.feed.ring.generation, job.sequence, job.feed.epoch, validity,
            job.captured_ns, age_ns, model.name, model.version, model.release, model.slot,
            model.runtime, tuple(items), stages, reason=reason,
        )  # fmt: skip

    def close(self) -> None:
        self._bell.close()
        for capture in self._captures.values():
            capture.close()


def _encode(result: Result) -> bytes:
    """The result as it goes to the journal, with as many items as fit there."""
    body = bus.encode(result)
    while len(body) > RESULT_BYTES:
        kept = len(result.items) * RESULT_BYTES // (len(body) + 1)
        cut = len(result.items) - kept + result.items_cut
        result = msgspec.structs.replace(result, items=result.items[:kept], items_cut=cut)
        body = bus.encode(result)
    return body


def run(service: Service) -> None:
    group = sys.argv[1]
    if group not in service.config.groups:
        raise ConfigError(f"{service.config.path}: has no [groups.{group}]")
    settings = service.config.groups[group]
    service.beat(ProcessState.LOADING, wait="model load", wait_s=LOAD_LIMIT_S)
    bundle = open_bundle(service.config.resolve(settings.model), score=settings.score)
    options = Options(settings.threads, settings.spinning, settings.memory_arena)
    model = Model.load(bundle, options, settings.runtime)
    model.warm_up()
    service.event(
        "model.loaded",
        Severity.INFO,
        f"{model.name} {model.version} (release {model.release}) on {model.runtime}",
        slot=model.slot,
        fallback=model.fallback_reason,
    )
    lane = Lane(service, group, model)
    try:
        lane.run()
    finally:
        lane.close()
        model.close()


if __name__ == "__main__":
    # The worker must get the interpreter as soon as the runtime returns.
    sys.setswitchinterval(0.0005)
    main(lane_name(sys.argv[1], sys.argv[2]), run)
