"""What signed updates withstand and what they cost, on the real updater beside a real web server.

`attacks` are those that the specifications of TUF and Uptane list, `attacks_stopped` of them came
to nothing. `bytes_ratio`: body bytes that the network carried for a bundle of 20 MB over random
disconnects, to its size. `idle_bytes`: body of a check that finds nothing new. `pss_1gb_mb`: the
most that updater and child take together while a bundle of a model of 1 GB (less 10 %: a bundle
may have 1 GiB) is checked for, fetched and installed. `handover_frames_lost`: with cameras running,
`every` policy, full rate, over signed releases that all become good. `crash_states`: what a power
cut at any instant of a life of updates may leave on the disk; a bad one has no model that loads,
does not go on, or has a floor lowered.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import numpy_helper

from common.archive import pack
from common.paths import PROJECT, Paths
from scripts.bench.journal import Journal
from scripts.bench.lanes import Lanes, until
from scripts.bench.measure import report
from scripts.bench.running import running
from scripts.bench.takeover_bench import lost
from tests import onnx_files
from tests.servers.updates import Fault
from tests.updates.attacks import ATTACKS, Stage, staged
from tests.updates.device import Device
from tests.updates.test_update_power_cuts import figures as crashes

CONFIG = f"""
[cameras.belt]
source = "virtual"
fps = "max"
policy = "every"
prerender = 60
slots = 64
[groups.main]
model = "{PROJECT}/models/factory"
shadow_frames = 5
shadow_every = 2
soak_s = 1.0
[updates]
check_s = 1.0
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def attacks() -> dict[str, object]:
    stopped = 0
    for name, attack in ATTACKS.items():
        with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
            try:
                attack(stage)
                stopped += 1
                say(f"{name}: stopped")
            except AssertionError as error:
                say(f"{name}: NOT STOPPED: {error}")
    return {"attacks": len(ATTACKS), "attacks_stopped": stopped}


def offer(stage: Stage, release: int, megabytes: float) -> int:
    """Publish a model with so many bytes of weights; returns the size of its bundle."""
    source = stage.scratch / f"large-{release}"
    source.mkdir(parents=True)
    onnx_files.classifier(source / "m.onnx")
    model = onnx.load(str(source / "m.onnx"))
    weights = np.random.default_rng(release).random(round(megabytes * 125_000))  # float64
    model.graph.initializer.append(numpy_helper.from_array(weights, "unused"))
    onnx.save(model, str(source / "m.onnx"))
    del model, weights
    manifest = onnx_files.manifest("parts", f"1.{release}", release)
    (source / "manifest.toml").write_text(manifest)
    tar = source.with_suffix(".tar")
    pack(source, tar)
    stage.repository.add_bundles(tar)
    stage.repository.set_channel("stable", "main", "parts", release)
    return tar.stat().st_size


def disconnects(count: int, dice: random.Random) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        size = offer(stage, 2, 20)
        device = stage.device()
        cut = Fault(times=count, cut=lambda: dice.randrange(1, 2 * size // count))
        stage.server.faults["targets/bundles/*"] = cut
        device.check()
        while not _done(device):
            device.check()  # the operator is impatient: no pause after six failures
            time.sleep(0.5)
        sent = sum(n for path, n in stage.server.sent.items() if "bundles/" in path)
        left = cut.times
        stage.server.forget()
        assert device.check().error == ""
        idle = stage.server.body_bytes
    return {
        "disconnects": count - left,
        "bytes_ratio": round(sent / size, 4),
        "idle_bytes": idle,
    }


def _done(device: Device) -> bool:
    """Whether release 2 is installed: the device's own first check may have found release 1."""
    for one in (one for one in device.history if one.release == 2):
        if one.outcome == "failed":
            raise RuntimeError(f"{one.step}: {one.reason}")
    return any((one.step, one.release) == ("activate", 2) for one in device.history)


def memory() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        device = stage.device()
        assert device.process is not None
        process = psutil.Process(device.process.pid)
        time.sleep(5)
        idle = _pss_mb(process.pid)
        size = offer(stage, 2, 900)
        most, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                children = process.children(recursive=True)
                most.append(sum(_pss_mb(one.pid) for one in (process, *children)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            device.check()
            until(lambda: _done(device), 300, "the large bundle is installed")
        finally:
            over.set()
            watcher.join()
    return {
        "pss_idle_mb": round(idle, 1), "pss_1gb_mb": round(max(most), 1), "large_bytes": size,
    }  # fmt: skip


def _pss_mb(pid: int) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def hand_overs(count: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        try:
            anchor = Path(folder) / "root.json"
            anchor.write_bytes(stage.repository.anchor)
            with running(f'{CONFIG}root = "{anchor}"\nurl = "{stage.server.url}"\n') as paths:
                return _hand_overs(stage, paths, count)
        finally:
            stage.close()


def _hand_overs(stage: Stage, paths: Paths, count: int) -> dict[str, object]:
    lanes, journal = Lanes(paths, 2), Journal(paths, "belt")
    for release in range(2, count + 2):
        before = lanes.record.known_good
        source = stage.scratch / f"factory-{release}"
        shutil.copytree(PROJECT / "models" / "factory", source)
        manifest = source / "manifest.toml"
        text = manifest.read_text().replace('"factory"', '"parts"')
        manifest.write_text(text.replace("release = 1", f"release = {release}"))
        pack(source, source.with_suffix(".tar"))
        stage.repository.add_bundles(source.with_suffix(".tar"))
        stage.repository.set_channel("stable", "main", "parts", release)
        until(lambda: lanes.record.known_good != before, 120, "a new known-good slot")  # noqa: B023
        lanes.until_standby()
        say(f"release {release} is good")
    journal.stop()
    lanes.close()
    # What its reader was too late for was decided all the same.
    frames_lost = lost(journal.results) - len(journal.missed)
    return {"handovers": count, "handover_frames_lost": frames_lost}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/update", description=__doc__)
    parser.add_argument("--disconnects", type=int, default=50, metavar="N")
    parser.add_argument("--handovers", type=int, default=5, metavar="N")
    parser.add_argument("--every", type=int, default=10, metavar="N",
                        help="go on from each Nth crash state only")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    arguments = parser.parse_args()
    figures = attacks()
    figures |= disconnects(arguments.disconnects, random.Random(arguments.seed))
    figures |= memory()
    figures |= hand_overs(arguments.handovers)
    figures |= crashes(arguments.every)
    report(figures)
    bad = figures["attacks"] != figures["attacks_stopped"] or figures["crash_states_bad"]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
