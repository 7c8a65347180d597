"""What each process may do, from vigil.toml and the machine."""

from common.config import Config
from common.processes import processes
from services.watchdog.facts import Limits, Settings
from services.watchdog.health import memory_mb

HANG_S = 2.0
SLOW_HANG_S = {"updater": 10.0}  # it waits for disks, and nobody waits for it
LANE_SHARE, SHARE = 0.5, 0.25  # of the machine's memory that a process may have


def settings(config: Config) -> Settings:
    total = memory_mb("MemTotal")
    limits = {}
    for process in processes(config):
        kind, mb = process.kind, None
        if kind.name == "inference":
            group, lane = process.arguments
            its = config.groups[group]
            mb = its.memory_mb or LANE_SHARE * total
            limits[process.name] = Limits(its.hang_s, its.load_s, round(mb * 1e6), group, lane)
        elif kind.name != "watchdog":
            if kind.name == "capture":
                mb = config.cameras[process.arguments[0]].memory_mb
            mb = mb or SHARE * total
            hang_s = SLOW_HANG_S.get(kind.name, HANG_S)
            limits[process.name] = Limits(hang_s, kind.start_s, round(mb * 1e6))
    return Settings(config.watchdog, config.groups, limits)
