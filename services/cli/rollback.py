"""Go back: end the test of a new model, or leave the one that is known good for the one before.
What is left is bad from then on and does not return."""

import argparse

from common import slots
from common.paths import Paths
from common.slots import PASS, Record
from common.states import Phase
from common.store import Store
from services.cli.install import follow
from services.cli.listen import configuration
from services.cli.models import find_group, titled

REASON = "rolled back by the operator"

_EPILOG = """\
examples:
  vigil rollback             says what it goes back to
  vigil rollback --wait      until it is there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--group", metavar="NAME", help="whose model (main)")
    parser.add_argument("--wait", action="store_true", help="until it is done")


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    group = find_group(config, args.group)
    paths.make()
    store = Store(paths, group, config.groups[group].lanes)
    said = ""

    def change(record: Record) -> Record:
        nonlocal said
        after = slots.roll_back(record, REASON)
        said = _tell(record, after)
        return after

    record = store.commit(change)
    print(said, flush=True)
    if not args.wait or record.txn.phase is Phase.NONE:
        return 0
    return follow(config, paths, group, record.txn.slot)


def _tell(before: Record, after: Record) -> str:
    if before.txn.phase in (Phase.PROVING, Phase.REQUESTED):
        return (
            f"the test of {titled(before, before.txn.slot)} is over; "
            f"{titled(after, after.known_good)} stays"
        )
    if before.txn.phase is Phase.SOAK:
        return (
            f"from {titled(before, before.txn.slot)} back to {titled(after, after.known_good)}, "
            "which is known good"
        )
    target = after.txn.slot
    what = "no model at all: frames pass unjudged" if target == PASS else titled(after, target)
    return f"from {titled(before, before.known_good)} back to {what}"
