"""A small fleet through the rollout that scripts/bench/fleet does with 500 devices."""

from pathlib import Path

from scripts.bench.fleet_bench import measure


def test_a_bad_release_reaches_only_canaries(tmp_path: Path) -> None:
    """Nobody is ahead of the rollout or its time; all end on the fixed release."""
    figures = measure(tmp_path, devices=12, rollout=[15, 50, 100])
    assert figures["canaries"] == 2
    assert 1 <= figures["ran_bad"] <= 2
    assert figures["good"] == 12
    assert figures["misplaced"] == 0
    assert (figures["checks"], figures["failed_checks"]) == (7 * 12, 0)
    assert figures["idle_bytes"] <= 1000
