"""The thread that runs the engine and nothing else; two buffers, so that input is ready."""

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue

from common.engine.model import Model, Outputs
from common.engine.preprocess import Geometry
from common.errors import EngineError
from common.states import Sight
from services.inference.feed import Feed


@dataclass
class Job:
    """A frame on its way through the engine. Times are CLOCK_MONOTONIC nanoseconds."""

    feed: Feed
    hold: int  # the feed's when it was taken
    sequence: int
    buffer: int
    geometry: Geometry | None  # None: not to be inferred
    captured_ns: int
    filled_ns: int
    sight: Sight
    trigger: int
    input_ns: int  # what pre-processing took
    infer_from_ns: int = 0
    infer_to_ns: int = 0
    outputs: Outputs = field(default_factory=list)
    error: EngineError | None = None


class Worker(threading.Thread):
    """Infers jobs in order. `done_fd` becomes readable when one is finished."""

    def __init__(self, model: Model | None) -> None:
        super().__init__(name="engine", daemon=True)
        self.done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.model = model  # changed only while no job is here
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def finished(self) -> Job | None:
        """The oldest finished job that was not taken yet."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.done_fd)
        return self._done.popleft() if self._done else None

    def stop(self) -> None:
        self._jobs.put(None)
        self.join()

    def run(self) -> None:
        while job := self._jobs.get():
            self.infer(job)
            self._done.append(job)
            os.eventfd_write(self.done_fd, 1)

    def infer(self, job: Job) -> None:
        """Run the engine on a job; only while this thread has none."""
        if job.geometry is None:
            return
        job.infer_from_ns = time.monotonic_ns()
        assert self.model is not None
        if job.feed.attempt(job.sequence, job.hold):
            try:
                job.outputs = self.model.infer(job.buffer)
            except EngineError as error:
                job.error = error
        else:
            job.error = EngineError("this frame killed the process twice; it is not tried again")
        job.infer_to_ns = time.monotonic_ns()
