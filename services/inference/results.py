"""One decision as the journal and the bus carry it."""

import time
from collections.abc import Sequence

import msgspec

from common import bus
from common.engine.model import Model
from common.frames import RESULT_BYTES
from common.messages import Item, Result, Stages
from common.states import Validity
from services.inference.worker import Job


def result(
    job: Job,
    items: Sequence[Item],
    model: Model | None,
    degraded: str,
    stale_after_s: float,
    ring: int,
) -> Result:
    """
    Args:
        degraded: why the model does not run on what its bundle prefers, or why there is none.
        ring: generation of the ring that the frame is in.
    """
    now = time.monotonic_ns()
    age_ns = now - job.captured_ns
    validity, reason = Validity.VALID, ""
    if model is None:
        validity, reason = Validity.NOT_INFERRED, f"pass-through: {degraded}"
    elif job.error is not None:
        validity, reason = Validity.FAILED, str(job.error)
    elif age_ns > stale_after_s * 1e9:
        validity = Validity.STALE
        reason = f"the frame is {age_ns / 1e9:.2f} s old, more than {stale_after_s} s"
    elif degraded:
        validity, reason = Validity.DEGRADED, degraded
    inferred_from = job.infer_from_ns or now
    inferred_to = job.infer_to_ns or now
    stages = Stages(
        decode=job.filled_ns - job.captured_ns,
        queue=inferred_from - job.filled_ns - job.input_ns,
        compute_input=job.input_ns,
        compute_infer=inferred_to - inferred_from,
        compute_output=now - inferred_to,
        total=now - job.filled_ns,
    )
    return Result(
        camera=job.feed.name,
        ring=ring,
        sequence=job.sequence,
        epoch=job.feed.epoch,
        validity=validity,
        captured_ns=job.captured_ns,
        age_ns=age_ns,
        model=model.name if model else "",
        version=model.version if model else "",
        release=model.release if model else 0,
        slot=model.slot if model else "",
        runtime=model.runtime if model else "",
        items=tuple(items),
        stages=stages,
        reason=reason,
    )


def encode(result: Result) -> bytes:
    """The result as it goes to the journal, with as many items as fit there."""
    body = bus.encode(result)
    while len(body) > RESULT_BYTES:
        kept = len(result.items) * RESULT_BYTES // (len(body) + 1)
        cut = len(result.items) - kept + result.items_cut
        result = msgspec.structs.replace(result, items=result.items[:kept], items_cut=cut)
        body = bus.encode(result)
    return body
