"""What each process may do, from vigil.toml and the machine."""

from common.config import Config
from common.processes import processes
from services.watchdog.facts import Limits, Settings
from services.watchdog.health import memory_mb

HANG_S = {"capture": 2.0, "updater": 10.0}  # the updater waits for disks; nobody waits for it
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
            limits[process.name] = Limits(HANG_S[kind.name], kind.start_s, round(mb * 1e6))
    return Settings(config.watchdog, config.groups, limits)
