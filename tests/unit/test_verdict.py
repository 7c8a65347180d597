"""Verdicts: the rules by themselves, and that what is recorded leads to the same again."""

import math
import os
import random
from pathlib import Path

import msgspec
import pytest

from common.config import Gates
from common.errors import StorageError
from common.messages import Item, LaneReport
from common.verdict import (
    KEPT,
    PSI_MOST,
    Counts,
    Inputs,
    Limits,
    Proof,
    Soak,
    Verdict,
    binned,
    expectations,
    judge,
    proof,
    psi,
    record,
    recorded,
    since,
)
from services.inference.shadow import compare

HELD = Limits(agreement=0.9, score_shift=0.1, latency_ratio=1.5, latency_p99_ms=20)
WELL = Proof("", 100, HELD, 100, 0, 90, 0.9, -0.1, 1.5, 40.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"judged": 99}, None),
        ({"agreement": 0.89}, "agreement 0.890 with the live model over 90 frames, wanted 0.9"),
        ({"agreement": 0.1, "compared": 0}, ""),  # the live lane judges nothing
        ({"score_shift": -0.11}, "score shift -0.110 against the live model over 90 frames, at mo"),
        ({"score_shift": 0.11}, "score shift +0.110"),
        ({"latency_ratio": 1.51}, "latency ratio 1.51 to the live model over 90 frames, at most 1"),
        ({"p99_ms": 40.1}, "latency p99 40.1 ms in the shadow, wanted 20 ms, at most 2 times that"),
        ({"judged": 5, "failed": 1}, "1 of 5 frames could not be judged"),
        ({"judged": 0, "fact": "its tries are used up"}, "its tries are used up"),
        ({"agreement": 0, "score_shift": 1, "latency_ratio": 9, "limits": Limits()}, ""),
    ],
)
def test_proof(changes: dict[str, object], reason: str | None) -> None:
    said = judge(msgspec.structs.replace(WELL, **changes))
    assert said == reason or (said and reason and said.startswith(reason))


def test_few_items_or_frames_say_nothing() -> None:
    """The thresholds that are stated, one short of each."""
    before = Counts(1, 30, 0, 30, 30, 30, 30, (), 10.0)
    sure = (0.0,) * 9 + (1.0,)
    scores = (99,) + (0,) * 9
    now = Counts(2, 199, 0, 199, 199, 199, 199, scores, 99.0)
    soak = Soak("", True, 1, HELD, now, before, sure)
    assert judge(soak) == ""
    more = msgspec.structs.replace(now, inferred=200, valid=200)
    assert "p99 99.0 ms in soak" in (judge(msgspec.structs.replace(soak, now=more)) or "")
    more = msgspec.structs.replace(now, scores=(100,) + (0,) * 9)
    assert "confidence has drifted" in (judge(msgspec.structs.replace(soak, now=more)) or "")
    assert judge(msgspec.structs.replace(soak, over=False, now=more)) is None
    slow = msgspec.structs.replace(now, offered=300)
    assert "decided 66.3% of 300 frames" in (judge(msgspec.structs.replace(soak, now=slow)) or "")
    few = msgspec.structs.replace(before, offered=29)
    assert judge(msgspec.structs.replace(soak, now=slow, before=few)) == ""


def test_the_index_is_the_formula_s() -> None:
    assert psi([10, 20], [0.5, 0.5]) == pytest.approx(
        (1 / 3 - 0.5) * math.log((1 / 3) / 0.5) + (2 / 3 - 0.5) * math.log((2 / 3) / 0.5)
    )
    assert psi([5, 5], [1, 1]) == 0
    assert psi([1, 0], [0, 1]) == pytest.approx(2 * 0.999 * math.log(1000))


def test_a_model_that_is_as_expected_is_seldom_called_drifted() -> None:
    """Samples of the expected distribution itself: not one in a thousand is over the threshold
    (chi-squared with 9 degrees of freedom over 25); of one shifted by a tenth, all."""
    dice = random.Random(1)
    expected = [0, 0, 0, 0, 0.05, 0.1, 0.1, 0.15, 0.25, 0.35]
    over = shifted = 0
    for _ in range(1000):
        drawn = dice.choices(range(10), expected, k=100)
        found = [drawn.count(i) for i in range(10)]
        over += psi(found, expected) > PSI_MOST
        shifted += psi([*found[1:], 0], expected) > PSI_MOST
    assert over <= 5
    assert shifted == 1000


def test_bins_that_the_site_cuts_are_left_out() -> None:
    """vigil.toml reports from 0.6 on; the manifest was measured from 0.4 on."""
    expected = (0.0,) * 4 + (0.2, 0.2, 0.1, 0.1, 0.2, 0.2)
    now = Counts(2, scores=(0,) * 6 + (100, 100, 200, 200))
    soak = Soak("", True, 0, now=now, expected=expected, score=0.6)
    assert judge(soak) == ""
    assert "drifted" in (judge(msgspec.structs.replace(soak, score=None)) or "")


def test_bins() -> None:
    assert binned([0, 0.099, 0.1, 0.95, 1.0]) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_another_process_is_counted_from_its_beginning() -> None:
    then = Counts(1, 5, 1, 9, 8, 7, 6, (1,) * 10, 3.0)
    now = Counts(1, 15, 2, 29, 18, 17, 16, (3,) * 10, 4.0)
    assert since(now, then) == Counts(1, 10, 1, 20, 10, 10, 10, (2,) * 10, 4.0)
    assert since(now, Counts(1)) == now
    other = msgspec.structs.replace(now, run=2)
    assert since(other, then) == other


@pytest.mark.parametrize(
    ("limits", "site", "held"),
    [
        ("", Gates(), Limits()),
        ("agreement = 0.8\nlatency_ratio = 2", Gates(), Limits(0.8, None, 2)),
        ("agreement = 0.8\nlatency_ratio = 2", Gates(0.7, 0.2, 3), Limits(0.8, 0.2, 2)),
        ("agreement = 0.8\nscore_shift = 0.3", Gates(0.9, 0.2, 1.5), Limits(0.9, 0.2, 1.5)),
        ("latency_p99_ms = 9\naccuracy = 0.5", Gates(), Limits(latency_p99_ms=9)),
    ],
)
def test_the_stricter_counts(tmp_path: Path, limits: str, site: Gates, held: Limits) -> None:
    shares = [0.0] * 9 + [1.0]
    (tmp_path / "manifest.toml").write_text(f"confidence = {shares}\n[limits]\n{limits}\n")
    assert expectations(tmp_path, site) == (held, tuple(shares))


def item(label: str, score: float, x: float | None = None) -> Item:
    return Item(label, score, 0, None if x is None else (x, 0.0, x + 10, 10.0))


def test_what_two_lanes_have_in_common() -> None:
    one = [item("nut", 0.9, 0), item("bolt", 0.5, 50)]
    agrees, shifts = compare(one, (item("nut", 0.8, 1), item("bolt", 0.7, 90)))
    assert agrees
    assert shifts == [pytest.approx(0.1)]
    assert compare(one, (item("bolt", 0.8, 0),)) == (False, [])
    assert compare([], ()) == (True, [])
    assert compare(one, ()) == (False, [])
    agrees, shifts = compare([item("nut", 0.75)], (item("nut", 0.5),))
    assert (agrees, shifts) == (True, [0.25])
    assert compare([item("nut", 0.9)], (item("bolt", 0.6),)) == (False, [])


# -- what is kept ----------------------------------------------------------------------------------


def given(slot: str, inputs: Inputs) -> Verdict:
    reason = judge(inputs)
    assert reason is not None
    return Verdict("main", slot, reason, inputs, 1.0)


def test_a_verdict_can_be_given_again(tmp_path: Path) -> None:
    report = LaneReport(
        3, "c" * 64, True, False, judged=120, compared=110, agreement=0.5, infer_ms_p99=9.0
    )
    bad = Soak("", True, 100, HELD, Counts(3, 500, 0, 500, 500, 500, 500, (9,) * 10, 30.0))
    for inputs in (proof(report, 100, HELD), bad):
        record(tmp_path, given("c" * 64, inputs))
    proving, soak = recorded(tmp_path, "c" * 12)
    for verdict in (proving, soak):
        assert judge(verdict.inputs) == verdict.reason != ""
    assert isinstance(soak.inputs, Soak)
    changed = msgspec.structs.replace(soak.inputs, limits=Limits())
    assert judge(changed) != soak.reason, "another input, another verdict"
    (tmp_path / "verdicts" / f"{'c' * 12}-soak.json").write_text('{"group": "main"}')
    with pytest.raises(StorageError, match=r"c{12}-soak.json: can't be read"):
        recorded(tmp_path, "c")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Whatever the clock says: the first one was written in 2100."""
    for i in range(KEPT + 5):
        record(tmp_path, given(f"{i:012}", Proof(fact="dead")))
        if not i:
            (first,) = (tmp_path / "verdicts").iterdir()
            os.utime(first, (4102444800, 4102444800))
    kept = [verdict.slot for verdict in recorded(tmp_path, "")]
    assert kept == [f"{i:012}" for i in range(5, KEPT + 5)]
