"""Whether a candidate is good, by what was counted of it: pure, so that a verdict can be given once
more from the inputs that were recorded with it.

    models/<group>/verdicts/<first 12 digits of the slot>-<phase>.json    the newest 20
"""

import math
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from common import durable
from common.config import Gates
from common.errors import StorageError
from common.messages import LaneReport

BINS = 10  # of scores, from 0 to 1
SHADOW_SLACK = 2.0  # it shares the machine with the live lane; its self-test held it to its limit
FAILED_LEAST, FAILED_SHARE = 3, 0.02  # of what is judged in soak: more is not fit to decide
LEAST = 30  # frames, before shares of them say anything
RATE_DROP = 0.2  # of the share of frames decided before the hand-over
VALID_DROP = 0.05  # in the share of valid results
P99_LEAST = 200  # inferences; of fewer, the p99 is the one slowest
P99_RATIO_SLACK = 1.5  # a ratio of two p99 scatters more than the median that the limit is for
SCORES_LEAST = 100  # items, before their histogram says anything
PSI_MOST = 0.25  # population stability index: a major shift (see `psi`)
PSI_FLOOR = 0.001  # share of an empty bin
KEPT = 20


class _Struct(msgspec.Struct, frozen=True):
    pass


class Limits(_Struct, frozen=True):
    """What a candidate is held to; None: not."""

    agreement: float | None = None
    score_shift: float | None = None
    latency_ratio: float | None = None
    latency_p99_ms: float | None = None


class Counts(_Struct, frozen=True):
    """What a lane's process had judged, or what it has since: as in its report."""

    run: int = 0
    judged: int = 0
    failed: int = 0
    offered: int = 0
    shown: int = 0
    inferred: int = 0
    valid: int = 0
    scores: tuple[int, ...] = ()
    p99_ms: float = 0.0  # of its newest inferences; 0: none, or not by what its bundle prefers


class Proof(_Struct, frozen=True, tag="proving"):
    """A candidate in the shadow of the live lane."""

    fact: str = ""  # what is bad enough by itself: it was refused, its tries are used up
    frames: int = 0  # that it has to judge
    limits: Limits = Limits()
    judged: int = 0
    failed: int = 0
    compared: int = 0
    agreement: float = 1.0
    score_shift: float = 0.0
    latency_ratio: float = 0.0
    p99_ms: float = 0.0


class Soak(_Struct, frozen=True, tag="soak"):
    """A candidate that is live, against the model before."""

    fact: str = ""  # what is bad enough by itself: it died, it hung
    over: bool = False  # whether its time is
    frames: int = 0  # that it has to judge
    limits: Limits = Limits()
    now: Counts = Counts()  # since the hand-over
    before: Counts | None = None  # the old lane while the candidate proved itself; None: unknown
    expected: tuple[float, ...] = ()  # shares of scores by the manifest; (): not held to any
    score: float | None = None  # least that is reported here, where vigil.toml says so


Inputs = Proof | Soak


class Verdict(_Struct, frozen=True):
    group: str
    slot: str
    reason: str  # "": good
    inputs: Inputs
    wall_s: float  # a label


def judge(inputs: Inputs) -> str | None:
    """Why the candidate is bad; "" if it is good, None while it is too early to tell.

    Facts and frames that can't be judged count at once, everything else over the whole time: what
    a share says after the first few frames changes with what happens to lie before the camera.
    """
    return _proof(inputs) if isinstance(inputs, Proof) else _soak(inputs)


def _proof(it: Proof) -> str | None:
    limits = it.limits
    if it.fact or it.failed:
        return it.fact or f"{it.failed} of {it.judged} frames could not be judged"
    if it.judged < it.frames:
        return None
    # What the live lane could not judge there is nothing to compare with: a model that comes to
    # replace one that fails has to pass by itself.
    if limits.agreement is not None and it.compared and it.agreement < limits.agreement:
        return (
            f"agreement {it.agreement:.3f} with the live model over {it.compared} frames, "
            f"wanted {limits.agreement:g}"
        )
    if limits.score_shift is not None and abs(it.score_shift) > limits.score_shift:
        return (
            f"score shift {it.score_shift:+.3f} against the live model over {it.compared} frames, "
            f"at most {limits.score_shift:g}"
        )
    if limits.latency_ratio is not None and it.latency_ratio > limits.latency_ratio:
        return (
            f"latency ratio {it.latency_ratio:.2f} to the live model over {it.compared} frames, "
            f"at most {limits.latency_ratio:g}"
        )
    if limits.latency_p99_ms is not None and it.p99_ms > SHADOW_SLACK * limits.latency_p99_ms:
        return (
            f"latency p99 {it.p99_ms:.1f} ms in the shadow, wanted {limits.latency_p99_ms:g} ms, "
            f"at most {SHADOW_SLACK:g} times that there"
        )
    return ""


def _soak(it: Soak) -> str | None:
    now = it.now
    if it.fact:
        return it.fact
    if now.failed > max(FAILED_LEAST, FAILED_SHARE * now.judged):
        return f"it could not judge {now.failed} of {now.judged} frames"
    if not it.over or now.inferred < it.frames:
        return None
    rules: tuple[Callable[[Soak], str], ...] = (_rate, _validity, _latency, _confidence)
    return next((reason for rule in rules if (reason := rule(it))), "")


def _rate(it: Soak) -> str:
    now, before = it.now, it.before
    if before is None or min(now.offered, before.offered) < LEAST:
        return ""
    share, known = now.shown / now.offered, before.shown / before.offered
    if share >= (1 - RATE_DROP) * known:
        return ""
    return f"it decided {share:.1%} of {now.offered} frames; the model before {known:.1%}"


def _validity(it: Soak) -> str:
    """Of frames that the camera could show: a blind one is not the model's fault."""
    now, before = it.now, it.before
    if before is None or min(now.inferred, before.inferred) < LEAST:
        return ""
    share, known = now.valid / now.inferred, before.valid / before.inferred
    if share >= known - VALID_DROP:
        return ""
    return f"{share:.1%} of its {now.inferred} results are valid; of the model before {known:.1%}"


def _latency(it: Soak) -> str:
    now, before, limits = it.now, it.before, it.limits
    if now.inferred < P99_LEAST:
        return ""
    if limits.latency_p99_ms is not None and now.p99_ms > limits.latency_p99_ms:
        return f"latency p99 {now.p99_ms:.1f} ms in soak, wanted {limits.latency_p99_ms:g} ms"
    if limits.latency_ratio is None or before is None or before.inferred < P99_LEAST:
        return ""
    most = P99_RATIO_SLACK * limits.latency_ratio
    if not before.p99_ms or now.p99_ms <= most * before.p99_ms:
        return ""
    return (
        f"latency p99 {now.p99_ms:.1f} ms in soak, {before.p99_ms:.1f} ms with the model before; "
        f"at most {most:g} times that"
    )


def _confidence(it: Soak) -> str:
    """Bins that vigil.toml's own least score cuts are left out on both sides."""
    if not it.expected or len(it.now.scores) != BINS:
        return ""
    first = 0 if it.score is None else math.ceil(BINS * it.score)
    expected, found = it.expected[first:], it.now.scores[first:]
    if sum(found) < SCORES_LEAST or not sum(expected):
        return ""
    index = psi(found, expected)
    if index <= PSI_MOST:
        return ""
    return (
        f"confidence has drifted: population stability index {index:.2f} over {sum(found)} items, "
        f"at most {PSI_MOST:g}"
    )


def psi(found: Sequence[float], expected: Sequence[float]) -> float:
    """Population stability index of two histograms of the same bins, in counts or shares:
    the sum over bins of (a - e) ln(a / e), shares a found and e expected. No less than PSI_FLOOR
    is taken for a share.

    Under 0.1 nothing has changed, over 0.25 much has (Siddiqi, Credit Risk Scorecards, Wiley 2006).
    Of n items that follow `expected` it is about chi-squared(bins - 1) / n: 0.09 for 100 items and
    10 bins (Yurdakul, Statistical Properties of Population Stability Index, 2018).
    """
    pairs = (
        (max(a / sum(found), PSI_FLOOR), max(e / sum(expected), PSI_FLOOR))
        for a, e in zip(found, expected, strict=True)
    )
    return sum((a - e) * math.log(a / e) for a, e in pairs)


def binned(scores: Iterable[float]) -> list[int]:
    """How many of these lie in each bin; the last one includes 1."""
    counts = [0] * BINS
    for score in scores:
        counts[min(BINS - 1, int(score * BINS))] += 1
    return counts


# -- inputs ----------------------------------------------------------------------------------------


def proof(report: LaneReport | None, frames: int, limits: Limits, fact: str = "") -> Proof:
    """Of a candidate's report; None where it says nothing."""
    if report is None:
        return Proof(fact, frames, limits)
    return Proof(
        fact, frames, limits, report.judged, report.failed, report.compared, report.agreement,
        report.score_shift, report.latency_ratio, report.infer_ms_p99,
    )  # fmt: skip


def counts(report: LaneReport) -> Counts:
    return Counts(
        report.run, report.judged, report.failed, report.offered, report.shown, report.inferred,
        report.valid, report.scores, 0.0 if report.degraded else report.infer_ms_p99,
    )  # fmt: skip


def since(now: Counts, then: Counts) -> Counts:
    """What was counted between the two; all of it, where another process counts now."""
    if now.run != then.run:
        return now
    old = then.scores or (0,) * BINS
    return Counts(
        now.run, now.judged - then.judged, now.failed - then.failed, now.offered - then.offered,
        now.shown - then.shown, now.inferred - then.inferred, now.valid - then.valid,
        tuple(a - b for a, b in zip(now.scores, old, strict=False)), now.p99_ms,
    )  # fmt: skip


def expectations(slot: Path, site: Gates) -> tuple[Limits, tuple[float, ...]]:
    """What an installed slot is held to here, the stricter of its manifest and the site's gates,
    and the shares of scores it is expected to have. The manifest was checked at its installation.

    Raises:
        OSError, ValueError: it can't be read any more.
    """
    content = tomllib.loads((slot / "manifest.toml").read_text())
    own = msgspec.convert(content.get("limits", {}), Limits)
    limits = Limits(
        max((v for v in (own.agreement, site.agreement) if v is not None), default=None),
        min((v for v in (own.score_shift, site.score_shift) if v is not None), default=None),
        min((v for v in (own.latency_ratio, site.latency_ratio) if v is not None), default=None),
        own.latency_p99_ms,
    )
    return limits, tuple(content.get("confidence", ()))


# -- verdicts that were given ----------------------------------------------------------------------


def record(folder: Path, verdict: Verdict) -> None:
    """Keep a verdict with its inputs in a group's folder; the oldest go.

    Raises:
        StorageError: the file system refuses.
    """
    folder /= "verdicts"
    phase = verdict.inputs.__struct_config__.tag
    try:
        folder.mkdir(mode=0o770, exist_ok=True)
        content = msgspec.json.format(msgspec.json.encode(verdict)) + b"\n"
        path = folder / f"{verdict.slot[:12]}-{phase}.json"
        durable.write(path, content)
        # Times of change are only an order here: the clock may be anywhere.
        times = {old: old.stat().st_mtime_ns for old in folder.glob("*.json") if old != path}
        newest = max(times.values(), default=0) + 1
        os.utime(path, ns=(newest, newest))
        for old in sorted(times, key=lambda old: times[old])[: -(KEPT - 1)]:
            old.unlink()
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from error


def recorded(folder: Path, slot: str) -> list[Verdict]:
    """The verdicts of slots whose name begins so, in the order of their names.

    Raises:
        StorageError: one can't be read.
    """
    found = []
    for path in sorted((folder / "verdicts").glob(f"{slot[:12]}*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Verdict))
        except (OSError, msgspec.MsgspecError) as error:
            raise StorageError(f"{path}: can't be read: {error}") from error
    return found
