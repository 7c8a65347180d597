"""The table of processes, held to supervisord's own reading of what is made from it."""

import importlib.util
import re
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from common import config
from common.paths import PROJECT, Paths
from common.processes import KINDS, capture_name, lane_name, processes, render

TWO_OF_EACH = """
[cameras.left]
source = "virtual"
[cameras.right-2]
source = "virtual"
group = "second"
[groups.main]
model = "m"
[groups.second]
model = "m"
[groups.unused]
model = "m"
"""


def parsed(paths: Paths, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """supervisord's options and its programs by name, as it reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources, which warns of its own end
        from supervisor.options import ServerOptions

    file = paths.root / "vigil.toml"
    file.write_text(text)
    (paths.programs / "vigil.conf").write_text(render(config.load(file), paths))
    monkeypatch.setenv("VIGIL_RUN", str(paths.run))
    monkeypatch.setattr(sys, "argv", ["supervisord"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = ServerOptions()
        options.realize(["-c", str(PROJECT / "supervisord.conf")], doc="")
    programs = {p.name: p for group in options.process_group_configs for p in group.process_configs}
    return options, programs


def test_supervisord_starts_what_the_table_says(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, programs = parsed(paths, TWO_OF_EACH, monkeypatch)
    rows = processes(config.load(paths.root / "vigil.toml"))
    names = {"capture-left", "capture-right-2"} | {
        f"inference-{group}-{lane}" for group in ("main", "second") for lane in "ab"
    }
    assert {row.name for row in rows if row.kind.per != "device"} == names
    assert set(programs) == {row.name for row in rows}
    for row in rows:
        program = programs[row.name]
        command = shlex.split(program.command)
        assert command[0] == sys.executable
        assert command[-2 - len(row.arguments) :] == ["-m", row.kind.module, *row.arguments]
        assert program.directory == str(PROJECT)
        assert program.priority == row.kind.priority
        assert program.stopwaitsecs == row.kind.stop_s
        assert program.autorestart
        assert program.autostart
        assert program.stdout_logfile == str(paths.logs / f"{row.name}.log")
        assert program.stdout_logfile_maxbytes == 1024 * 1024
    assert options.nodaemon
    assert options.pidfile == str(paths.run / "supervisord.pid")  # services look for it there
    (server,) = options.server_configs
    assert server["file"] == str(paths.supervisor_socket)
    assert server["chmod"] == 0o660


def test_paths_with_all_sorts_of_characters(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = tmp_path / "100% of it's mine"
    odd.mkdir()
    python = odd / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("common.processes.PROJECT", odd)
    _, programs = parsed(paths, TWO_OF_EACH, monkeypatch)
    program = programs["capture-left"]
    assert shlex.split(program.command)[0] == str(python)
    assert program.directory == str(odd)


def test_each_row_can_be_started_and_installed() -> None:
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    for kind in KINDS:
        assert importlib.util.find_spec(kind.module) is not None
        text = Path(PROJECT, *kind.module.split(".")).with_suffix(".py").read_text()
        assert 'if __name__ == "__main__":' in text
        # An empty role: what every process has is enough.
        assert set(filter(None, re.split(" or ", kind.role))) <= set(extras)
        assert kind.per in ("camera", "lane", "device")
        assert 0 < kind.stop_s <= 10
        assert kind.start_s > 0
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    starts = [kind.priority for kind in KINDS]
    assert starts == sorted(set(starts))


def test_names_are_those_of_the_rows() -> None:
    loaded = config.load(PROJECT / "vigil.toml")
    names = {process.name for process in processes(loaded)}
    assert {capture_name("belt"), lane_name("main", "a")} <= names
