"""Write the supervisord programs that vigil.toml asks for into the run folder.

scripts/run and the image do this before supervisord starts.
"""

import argparse

from common import config, durable
from common.paths import Paths
from common.processes import processes, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  vigil --root /var/lib/vigil render"


def run(args: argparse.Namespace) -> int:
    configuration = config.from_environment()
    paths = Paths.from_environment()
    paths.make()
    target = paths.programs / "vigil.conf"
    for stale in paths.programs.iterdir():
        if stale != target:
            stale.unlink()
    durable.write(target, render(configuration, paths).encode())
    print(f"{target}: {', '.join(process.name for process in processes(configuration))}")
    return 0
