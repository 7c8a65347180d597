"""Power cuts and kills in a life of a device's models: four updates, a roll-back, a failed soak.

The program's system calls are noted by strace. From them every state that the disk may be in after
a power cut at any instant is derived, by the strictest rules (tests/faults/disk_states.py); from
each the record is loaded, each slot verified, and the life lived to its end. Then the program is
killed before each of its system calls, and has to come to the same end. At last every fsync is
left out, one after the other, and orders are swapped: the first part has to notice each of them.

Figures: `crash_states` different states, `crash_states_bad` of them; `mutants`, `mutants_killed`;
`kill_points`, `kill_points_bad`.
"""

import argparse
import sys

from scripts.bench.measure import report
from tests.faults.power_cut_programs import FSYNCS, ORDERS
from tests.faults.test_power_cuts import faults, kill_points, killed, left_behind, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="sweep only each Nth kill point"
    )
    arguments = parser.parse_args()
    found = states()
    say(f"{len(found)} states")
    bad = faults(found, go_on=True)
    for why in bad:
        say(why)
    mutants, alive = [*FSYNCS, *ORDERS], []
    for mutant in mutants:
        noticed = faults(left_behind(mutant), first=True)
        say(f"{mutant}: {noticed[0] if noticed else 'NOT NOTICED'}")
        alive += [] if noticed else [mutant]
    points = kill_points()[:: arguments.every]
    say(f"{len(points)} kill points")
    stuck = [why for point in points if (why := killed(*point))]
    for why in stuck:
        say(why)
    report(
        {
            "crash_states": len(found),
            "crash_states_bad": len(bad),
            "mutants": len(mutants),
            "mutants_killed": len(mutants) - len(alive),
            "kill_points": len(points),
            "kill_points_bad": len(stuck),
        }
    )
    sys.exit(bool(bad or alive or stuck))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
