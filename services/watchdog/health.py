"""How the board is: temperatures, clocks, memory, disk, time. Read every few seconds from sysfs and
procfs; what is not there is left out."""

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.messages import Health
from common.paths import Paths

COLDEST_C, HOTTEST_C = -40.0, 150.0  # beyond: no temperature, but a device that does not answer
CPU_SENSORS = {"coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal"}  # of hwmon
_THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"  # Raspberry Pi
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class Sensors:
    """Temperatures; a device that was seen and is gone is lost, too."""

    def __init__(self, sys: Path = Path("/sys")) -> None:
        self._sys = sys
        self._devices: set[str] = set()  # accelerators seen

    def read(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Degrees Celsius by sensor, and the devices that are lost."""
        temperatures, lost = {}, []
        for name, celsius in self._all():
            if COLDEST_C <= celsius <= HOTTEST_C:
                temperatures[name] = celsius
            else:
                lost.append(name)
        lost += sorted(self._devices - temperatures.keys() - set(lost))
        return temperatures, tuple(lost)

    def _all(self) -> Iterator[tuple[str, float]]:
        for zone in sorted(self._sys.glob("class/thermal/thermal_zone*")):
            number = zone.name.removeprefix("thermal_zone")  # several may be of one type
            yield from _celsius(f"{_word(zone / 'type') or 'zone'}.{number}", zone / "temp")
        for sensor in sorted(self._sys.glob("class/hwmon/hwmon*")):
            if (kind := _word(sensor / "name")) in CPU_SENSORS:
                for file in sorted(sensor.glob("temp*_input")):
                    yield from _celsius(f"{kind}.{file.name.removesuffix('_input')}", file)
        for device in sorted(self._sys.glob("class/apex/apex_*")):  # Coral
            self._devices.add(device.name)
            yield from _celsius(device.name, device / "temp")


def clock_mhz(sys: Path = Path("/sys")) -> dict[str, float]:
    """By cpufreq policy."""
    found = {}
    for policy in sorted(sys.glob("devices/system/cpu/cpufreq/policy*")):
        if (word := _word(policy / "scaling_cur_freq")).isdigit():
            found[policy.name] = int(word) / 1000
    return found


def clock_synced() -> bool | None:
    """Whether the kernel's clock is synchronised; None where nobody can tell."""
    timex = ctypes.create_string_buffer(512)  # struct timex, all zero: only asks
    state = ctypes.CDLL(None).adjtimex(timex)
    return None if state < 0 else state != _TIME_ERROR


def memory_mb(field: str, proc: Path = Path("/proc")) -> float:
    """A field of /proc/meminfo; 0 where it has none."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def read(paths: Paths, sensors: Sensors, pace: float, processes_mb: dict[str, float]) -> Health:
    temperatures, lost = sensors.read()
    return Health(
        at_ns=time.monotonic_ns(),
        temperatures_c=temperatures,
        lost=lost,
        clock_mhz=clock_mhz(),
        throttled=_word(Path("/sys", _THROTTLED)),
        memory_free_mb=round(memory_mb("MemAvailable"), 1),
        disk_free_mb=_free_mb(paths.root),
        tmpfs_free_mb=_free_mb(paths.run),
        load=os.getloadavg()[0],
        clock_synced=clock_synced(),
        pace=pace,
        processes_mb=processes_mb,
    )


def _free_mb(folder: Path) -> float:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0.0  # the disk does not answer: nothing can be written there
    return round(found.f_bavail * found.f_frsize / 1e6, 1)


def _celsius(name: str, file: Path) -> Iterator[tuple[str, float]]:
    """sysfs gives thousandths of a degree; a sensor that is off gives an error."""
    word = _word(file)
    if word.lstrip("-").isdigit():
        yield name, int(word) / 1000


def _word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
