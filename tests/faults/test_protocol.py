"""PROTOCOL's properties hold of the real transitions, grants, fences and journal, through every
interleaving within the bounds of each scenario; and what is broken on purpose is found."""

from collections.abc import Callable

import msgspec
import pytest

from common import frames, slots
from common.frames import Ring
from common.paths import Paths
from common.slots import Record
from common.states import Policy, SlotState
from common.store import Store
from services.inference.seat import Seat
from tests.faults.explorer import Budget, Explored, Scenario, explore

EVERY, LATEST = Policy.EVERY, Policy.LATEST
SMALL = {
    "crash": Scenario(frames=(3,), budget=Budget(kill=2)),
    "latest": Scenario(frames=(3,), policy=LATEST, budget=Budget(kill=1, suspect=1)),
}


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of a few short entries, no padding: the states are their bytes."""
    monkeypatch.setattr(frames, "JOURNAL", 4)
    monkeypatch.setattr(frames, "ENTRY_BYTES", 64)
    monkeypatch.setattr(frames, "RESULT_BYTES", 24)
    monkeypatch.setattr(frames, "_PAGE", 8)


@pytest.mark.parametrize("name", SMALL)
def test_holds(paths: Paths, name: str) -> None:
    found = explore(paths, SMALL[name])
    assert found.why == "", found
    print(f"{name}: {found.states} states, {found.edges} edges, {found.settled} settled")
