"""What is read of the board, from a sysfs of the test's own."""

import os
from pathlib import Path

from common.paths import Paths
from common.service import lock
from services.watchdog import health
from services.watchdog.health import Sensors
from services.watchdog.stores import holder


def write(path: Path, word: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{word}\n")


def test_temperatures_by_sensor(tmp_path: Path) -> None:
    for number, (kind, value) in enumerate([("cpu-thermal", 48312), ("gpu-thermal", 47000)]):
        write(tmp_path / f"class/thermal/thermal_zone{number}/type", kind)
        write(tmp_path / f"class/thermal/thermal_zone{number}/temp", str(value))
    write(tmp_path / "class/hwmon/hwmon0/name", "coretemp")
    write(tmp_path / "class/hwmon/hwmon0/temp1_input", "51000")
    write(tmp_path / "class/hwmon/hwmon1/name", "nvme")
    write(tmp_path / "class/hwmon/hwmon1/temp1_input", "90000")  # no reason for fewer frames
    write(tmp_path / "class/apex/apex_0/temp", "55750")
    temperatures, lost = Sensors(tmp_path).read()
    assert temperatures == {
        "cpu-thermal.0": 48.312, "gpu-thermal.1": 47.0, "coretemp.temp1": 51.0, "apex_0": 55.75,
    }  # fmt: skip
    assert lost == ()


def test_a_coral_at_minus_89_is_lost_and_one_that_vanished_too(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    coral = tmp_path / "class/apex/apex_0/temp"
    write(coral, "-89700")
    assert sensors.read() == ({}, ("apex_0",))
    write(coral, "40000")
    assert sensors.read() == ({"apex_0": 40.0}, ())
    coral.unlink()
    coral.parent.rmdir()
    assert sensors.read() == ({}, ("apex_0",))


def test_a_sensor_that_is_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "class/thermal/thermal_zone0/type", "cpu")
    (tmp_path / "class/thermal/thermal_zone0/temp").mkdir()  # reading it is an error
    assert Sensors(tmp_path).read() == ({}, ())


def test_clocks(tmp_path: Path) -> None:
    write(tmp_path / "devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1500000")
    assert health.clock_mhz(tmp_path) == {"policy0": 1500.0}


def test_this_machine(paths: Paths) -> None:
    now = health.read(paths, Sensors(), 0.5, {"capture-belt": 40.0})
    assert now.memory_free_mb > 0
    assert now.disk_free_mb > 0
    assert now.tmpfs_free_mb > 0
    assert now.clock_synced in (True, False, None)
    assert (now.pace, now.processes_mb) == (0.5, {"capture-belt": 40.0})
    assert health.memory_mb("MemTotal") > now.memory_free_mb


def test_who_holds_a_lock(paths: Paths) -> None:
    assert holder(paths.lock("somebody")) is None
    held = lock(paths, "somebody")
    assert holder(paths.lock("somebody")) == os.getpid()
    os.close(held)
    assert holder(paths.lock("somebody")) is None
