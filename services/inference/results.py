"""One decision as the journal and the bus carry it."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from common import bus
from common.config import Zone
from common.engine.model import Model
from common.frames import RESULT_BYTES
from common.geometry import View, anchor, inside
from common.messages import Item, Result, Stages
from common.states import Sight, Validity
from services.inference.worker import Job

_BLIND = {Sight.FROZEN: "the camera is frozen", Sight.DARK: "the camera is dark or covered"}


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
    if job.sight is not Sight.CLEAR:
        validity, reason = Validity.NOT_INFERRED, f"blind: {_BLIND[job.sight]}"
    elif model is None:
        validity, reason = Validity.NOT_INFERRED, f"pass-through: {degraded}"
    elif job.error is not None:
        validity, reason = Validity.FAILED, str(job.error)
    elif age_ns > stale_after_s * 1e9:
        validity = Validity.STALE
        reason = f"the frame is {age_ns / 1e9:.2f} s old, more than {stale_after_s} s"
    elif degraded:
        validity, reason = Validity.DEGRADED, degraded
    if degraded and validity in (Validity.FAILED, Validity.STALE):
        reason += f"; {degraded}"
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
        trigger=job.trigger,
    )


def located(items: Sequence[Item], view: View | None, zones: Mapping[str, Zone]) -> list[Item]:
    """Items of a ring's picture as results have them: in the camera's own full picture, with the
    zones that hold them."""
    if view is None and not zones:
        return list(items)
    placed = []
    for item in items:
        box = item.box
        within: tuple[str, ...] = ()
        if box is not None:
            box = view.box_to_full(box) if view else box
            within = tuple(
                name
                for name, zone in zones.items()
                if inside(anchor(box, zone.anchor), zone.points)
            )
        placed.append(msgspec.structs.replace(item, box=box, zones=within))
    return placed


def encode(result: Result) -> bytes:
    """The result as it goes to the journal, with as many items as fit there."""
    body = bus.encode(result)
    while len(body) > RESULT_BYTES:
        kept = len(result.items) * RESULT_BYTES // (len(body) + 1)
        cut = len(result.items) - kept + result.items_cut
        result = msgspec.structs.replace(result, items=result.items[:kept], items_cut=cut)
        body = bus.encode(result)
    return body
