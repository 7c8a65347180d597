"""The rendered conveyor: the same for the same arguments, its truth where the pixels are."""

from itertools import combinations

import numpy as np
import pytest

from services.capture.scene import DOMAINS, LABELS, VISIBLE, Scene
from services.capture.scenery import Domain


def families(domain: Domain) -> dict[str, set[object]]:
    return {
        "surfaces": set(domain.surfaces),
        "belts": set(domain.belts),
        "lamps": set(domain.lamps),
        **{kind: set(getattr(domain, kind)) for kind in LABELS[1:]},
    }


@pytest.mark.parametrize(("one", "other"), list(combinations(DOMAINS, 2)))
def test_no_family_of_looks_is_in_two_domains(one: str, other: str) -> None:
    mine, theirs = families(DOMAINS[one]), families(DOMAINS[other])
    for kind, members in mine.items():
        assert members, f"{one} has no {kind}"
        assert not members & theirs[kind], kind
    for low, high in DOMAINS[one].kelvin:
        assert all(high <= a or b <= low for a, b in DOMAINS[other].kelvin), "colour temperature"


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_frame_depends_on_its_index_alone(domain: str) -> None:
    walked = Scene(seed=3, domain=domain)
    for index in (500, 7, 41):
        walked.render(index)
    picture, truth = walked.render(42)
    into = np.empty((480, 640, 3), np.uint8)
    again, same = Scene(seed=3, domain=domain).render(42, into)
    assert again is into
    np.testing.assert_array_equal(picture, again)
    assert truth == same
    assert not np.array_equal(picture, Scene(seed=4, domain=domain).render(42)[0])
    assert not np.array_equal(picture, walked.render(43)[0])


@pytest.mark.parametrize("size", [(640, 480), (1280, 720), (320, 240), (480, 640)])
def test_without_gaps_a_whole_part_is_always_in_view(size: tuple[int, int]) -> None:
    scene = Scene(*size, seed=11, gaps=0.0)
    for index in range(0, 3000, 13):
        things = scene.things(index)
        assert any(t.label == "part" and t.visible == pytest.approx(1) for t in things), index


@pytest.mark.parametrize("domain", DOMAINS)
def test_truth_is_where_the_pixels_differ_from_the_empty_belt(domain: str) -> None:
    for seed in range(6):
        scene = Scene(seed=seed, domain=domain, defects=2.0)
        picture, truth = scene.render(100)
        empty, nothing = Scene(seed=seed, domain=domain, gaps=1.0).render(100)
        assert nothing == ()
        changed = (picture != empty).any(2)
        outside = changed.copy()
        outside[:, :22] = outside[:, -22:] = False  # shadows of parts that are not in view yet
        for thing in scene.things(100):
            if thing.label == "part":
                x1, y1, x2, y2 = (round(side) for side in thing.box)
                assert changed[max(0, y1) : y2, max(0, x1) : x2].mean() > 0.4
                # A shadow reaches some 20 pixels beyond its part.
                outside[max(0, y1 - 22) : y2 + 22, max(0, x1 - 22) : x2 + 22] = False
        assert not outside.any()
        assert {thing.label for thing in truth} <= set(LABELS)
        for item in truth:
            assert 0 <= item.box[0] < item.box[2] <= 640
            assert 0 <= item.box[1] < item.box[3] <= 480


def test_defects_of_all_kinds_come_and_can_be_left_out() -> None:
    whole = Scene(seed=5, defects=0.0)
    labels = {thing.label for index in range(0, 900, 90) for thing in whole.render(index)[1]}
    assert labels == {"part"}
    spoilt = Scene(seed=5, defects=2.0)
    labels = {thing.label for index in range(0, 900, 90) for thing in spoilt.render(index)[1]}
    assert labels == set(LABELS)


def test_what_is_hardly_in_the_picture_is_no_truth() -> None:
    scene = Scene(seed=2, defects=1.5)
    hidden = 0
    for index in range(0, 1200, 20):
        things = scene.things(index)
        truth = scene.render(index)[1]
        assert len(truth) == sum(thing.visible >= VISIBLE for thing in things)
        hidden += len(things) - len(truth)
    assert hidden > 0


def test_parts_scale_with_the_picture() -> None:
    small, large = (
        [thing.box for thing in Scene(*size, seed=9).things(60)
         if thing.label == "part" and thing.visible > 0.1]
        for size in ((640, 480), (1280, 960))
    )  # fmt: skip
    assert len(small) > 2
    np.testing.assert_allclose(np.array(small) * 2, large, atol=4)


def test_a_hole_is_missing_only_from_a_part_one_sees_whole() -> None:
    cut = 0
    for seed in range(12):
        scene = Scene(seed=seed, defects=3.0, gaps=0.0)
        for index in range(0, 400, 40):
            things = scene.things(index)
            parts = [thing for thing in things if thing.label == "part"]
            for hole in (thing for thing in things if thing.label == "missing_hole"):
                x, y = (hole.box[0] + hole.box[2]) / 2, (hole.box[1] + hole.box[3]) / 2
                on = next(p for p in parts if p.box[0] < x < p.box[2] and p.box[1] < y < p.box[3])
                assert (hole.visible == 0) == (on.visible < 0.9)
                cut += hole.visible == 0
    assert cut > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"domain": "mars"}, "expected one of train, held_out, demo"),
        ({"width": 32}, "expected 64x48 or more"),
        ({"speed": 0.0}, "expected 64x48 or more"),
    ],
)
def test_what_can_not_be_rendered_is_refused(arguments: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Scene(**arguments)  # type: ignore[arg-type]
