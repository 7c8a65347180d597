"""What benchmarks share: interleaved rounds, medians, and the last line as JSON."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping

Figures = dict[str, float]


def interleaved(cases: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, Figures]:
    """Run every case once a round, so that what disturbs the machine disturbs all of them.

    Returns, for each case, the median of each of its figures. Cases start one further each round.
    """
    names = list(cases)
    seen: dict[str, list[Figures]] = {name: [] for name in names}
    for round in range(rounds):
        for name in names[round % len(names) :] + names[: round % len(names)]:
            print(f"round {round + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
            seen[name].append(cases[name]())
    return {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in seen.items()
    }


def report(figures: Mapping[str, object]) -> None:
    """Print the last line: the figures, with what they were taken on."""
    load = os.getloadavg()[0]
    print(json.dumps({**figures, "cores": os.cpu_count(), "load": round(load, 2)}), flush=True)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` % of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 10) // 1000) - 1)]
