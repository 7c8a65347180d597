"""vigil.toml: what is wrong is named with file, line, key, value and what was expected."""

import re
from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError
from common.paths import PROJECT
from common.states import Policy

BELT = '[cameras.belt]\nsource = "virtual"\n'
MAIN = '[groups.main]\nmodel = "models/factory"\n'

# what is written in [cameras.belt] under `source = "virtual"` (line 3) -> the rest of the message
CAMERA = {
    "fsp = 3": "cameras.belt.fsp = 3: expected a known key: did you mean fps?",
    "stale_after_ms = 100": "cameras.belt.stale_after_ms = 100: expected a known key: "
    "did you mean stale_after_s?",
    "colour = 1": "cameras.belt.colour = 1: expected a known key: known are source, path, device, ",
    'loop = "yes"': 'cameras.belt.loop = "yes": expected bool, got str',
    "slots = true": "cameras.belt.slots = true: expected int, got bool",
    "slots = 4.5": "cameras.belt.slots = 4.5: expected int, got float",
    "slots = 1": "cameras.belt.slots = 1: expected int >= 2",
    "slots = 65": "cameras.belt.slots = 65: expected int <= 64",
    "slots = 1979-05-27": 'cameras.belt.slots = "1979-05-27": expected int, got date',
    "fps = 0": "cameras.belt.fps = 0: expected float > 0.0",
    "fps = nan": "cameras.belt.fps = NaN: expected float > 0.0",
    "fps = 1001": "cameras.belt.fps = 1001: expected float <= 1000.0",
    'fps = "30/s"': 'cameras.belt.fps = "30/s": expected a number or one of "max", "source"',
    'policy = "newest"': 'cameras.belt.policy = "newest": expected one of "latest", "every"',
    "policy = 3": "cameras.belt.policy = 3: expected str, got int",
    'size = "640x480"': 'cameras.belt.size = "640x480": expected array | null, got str',
    "size = [640]": "cameras.belt.size = [640]: expected array of length 2, got 1",
    "size = [8, 480]": "cameras.belt.size = [8, 480]: expected int >= 16",
    'stale_after_s = "100ms"': 'cameras.belt.stale_after_s = "100ms": expected float, got str',
    "stale_after_s = -1": "cameras.belt.stale_after_s = -1: expected float > 0.0",
    "seed = -1": "cameras.belt.seed = -1: expected int >= 0",
    'path = "x.mp4"': 'cameras.belt.path = "x.mp4": expected no path: a virtual camera has none',
    'group = "mian"': 'cameras.belt.group = "mian": expected one of main',
    '"slots" = 1': "cameras.belt.slots = 1: expected int >= 2",
    'url = "rtsp://x"': 'cameras.belt.url = "rtsp://x": expected no url: a virtual camera has none',
    'transport = "udp"': 'cameras.belt.transport = "udp": expected no transport: only a rtsp ',
    "rotate = 45": "cameras.belt.rotate = 45: expected one of 0, 90, 180, 270",
    "crop = [0, 0, 9]": "cameras.belt.crop = [0, 0, 9]: expected array of length 4, got 3",
    "zones = { Press = { points = [[0, 0], [1, 0], [1, 1]] } }": "cameras.belt.zones.Press = "
    '"Press": expected a name of a-z, 0-9, _ and -, at most 32',
    "zones = { press = { points = [[0, 0], [1, 0]] } }": "cameras.belt.zones.press.points = "
    "[[0, 0], [1, 0]]: expected array of length >= 3",
    "zones = { press = { point = [] } }": "cameras.belt.zones.press.point = []: expected a known "
    "key: did you mean points?",
    'trigger = { by = "hand" }': 'cameras.belt.trigger.by = "hand": expected one of "message", ',
    'trigger = { by = "motion", zone = "gate" }': "cameras.belt.trigger.zone = "
    '"gate": expected one of the zones, none: there is no [cameras.NAME.zones.NAME]',
}

# a whole file -> the message after its path
WHOLE = {
    '[cameras.belt]\nsource = "vidoe"\n' + MAIN: ", line 2: cameras.belt.source = "
    '"vidoe": expected one of virtual, video, folder',
    '[cameras.belt]\nsource = "video"\n' + MAIN: ", line 2: cameras.belt.source = "
    '"video": expected a path beside it',
    "[cameras.belt]\nfps = 3\n" + MAIN: ", line 1: cameras.belt: expected a key source",
    BELT + "[groups.main]\n": ", line 3: groups.main: expected a key model",
    BELT + MAIN + "[groups.main.gates]\nagreement = 90": ", line 6: groups.main.gates.agreement = "
    "90: expected float <= 1.0",
    BELT + MAIN + "gates = { latency = 2 }": ", line 5: groups.main.gates.latency = 2: expected a "
    "known key: did you mean latency_ratio?",
    BELT + MAIN + "threads = 0": ", line 5: groups.main.threads = 0: expected int >= 1",
    BELT + MAIN + "score = 1.5": ", line 5: groups.main.score = 1.5: expected float <= 1.0",
    BELT + MAIN + "modle = 1": ", line 5: groups.main.modle = 1: expected a known key: "
    "did you mean model?",
    BELT + MAIN + '[updates]\nurl = "http://x"': ', line 6: updates.url = "http://x": expected a '
    "root beside it: whom to trust",
    BELT + MAIN + '[updates]\nchannel = "../x"': ', line 6: updates.channel = "../x": expected a '
    "name of a-z",
    BELT + MAIN + '[updates]\nactivate = ["6-7"]': ', line 6: updates.activate = "6-7": expected '
    'times of day such as "22:00-05:30"',
    "": ": has no [cameras.NAME] table; at least one is needed",
    MAIN: ": has no [cameras.NAME] table; at least one is needed",
    BELT: ": has no [groups.NAME] table; at least one is needed",
    "threads = 1\n" + BELT + MAIN: ", line 1: threads = 1: expected one of the tables [cameras.",
    "cameras = 1\n" + MAIN: ", line 1: cameras = 1: expected one of the tables [cameras.NAME], ",
    "[camera.belt]\n" + BELT + MAIN: ", line 1: camera = "
    '{"belt": {}}: expected one of the tables [cameras.NAME], [groups.NAME], [watchdog], [updates]',
    '[cameras]\nbelt = "virtual"\n' + MAIN: ', line 2: cameras.belt = "virtual": expected a table '
    "[cameras.belt]",
    "[cameras]\nbelt = { source = 'virtual', fsp = 3 }\n" + MAIN: ", line 2: cameras.belt.fsp = 3: "
    "expected a known key: did you mean fps?",
    '[[cameras.belt]]\nsource = "virtual"\n' + MAIN: ", line 1: cameras.belt = [{",
    '[cameras."Belt 1"]\nsource = "virtual"\n' + MAIN: ', line 1: cameras.Belt 1 = "Belt 1": '
    "expected a name of a-z, 0-9, _ and -, at most 32",
    f'[cameras.{"b" * 33}]\nsource = "virtual"\n' + MAIN: f", line 1: cameras.{'b' * 33} = ",
    BELT + BELT + MAIN: ": is not TOML: Cannot declare ('cameras', 'belt') twice (at line 3, ",
    BELT + 'source = "folder"\n': ": is not TOML: Cannot overwrite a value (at line 3, ",
    "<html>": ": is not TOML: ",
    "[cameras.belt\n": ": is not TOML: Expected ']' at the end of a table declaration (at line 1,",
}


def message(folder: Path, content: str | bytes) -> str:
    """What `load` says of a file, after the file's own name."""
    path = folder / "vigil.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    return said.removeprefix(str(path))


@pytest.mark.parametrize("line", CAMERA)
def test_a_bad_line_of_a_camera(tmp_path: Path, line: str) -> None:
    said = message(tmp_path, f"{BELT}{line}\n{MAIN}")
    assert said.startswith(f", line 3: {CAMERA[line]}")


@pytest.mark.parametrize("content", WHOLE)
def test_a_bad_file(tmp_path: Path, content: str) -> None:
    assert message(tmp_path, content).startswith(WHOLE[content])


def test_files_that_are_no_text(tmp_path: Path) -> None:
    assert message(tmp_path, b"\xff\xfe[\0c\0").startswith(": is not UTF-8 text: ")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none.toml: can't be read: No such file"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=rf"{tmp_path}: can't be read: Is a directory"):
        config.load(tmp_path)


def test_the_shipped_file_loads_and_says_the_defaults() -> None:
    shipped = config.load(PROJECT / "vigil.toml")
    assert list(shipped.cameras) == ["belt"]
    assert shipped.cameras_of("main") == ["belt"]
    assert shipped.resolve(shipped.groups["main"].model) == PROJECT / "models/factory"


def test_what_the_shipped_file_shows_in_comments_loads_too(tmp_path: Path) -> None:
    text = (PROJECT / "vigil.toml").read_text()
    shown = re.sub(r"^# (\[|\w+ = )", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "vigil.toml").write_text(shown)
    belt = config.load(tmp_path / "vigil.toml").cameras["belt"]
    assert belt.trigger
    assert belt.trigger.zone in belt.zones
    assert belt.masks
    assert belt.crop


def test_values_arrive_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "vigil.toml"
    path.write_text(
        '[cameras.a]\nsource = "video"\npath = "a.mp4"\nfps = 30\npolicy = "every"\n'
        '[cameras.b]\nsource = "virtual"\nsize = [320, 240]\nfps = "max"\ngroup = "other"\n'
        '[groups.main]\nmodel = "m.onnx"\n[groups.other]\nmodel = "/m"\nscore = 0.5\n'
    )
    loaded = config.load(path)
    a, b = loaded.cameras["a"], loaded.cameras["b"]
    assert (a.fps, a.policy, a.loop, a.slots, a.group) == (30.0, Policy.EVERY, True, 4, "main")
    assert isinstance(a.fps, float)
    assert (b.fps, b.policy, b.size, b.group) == ("max", Policy.LATEST, (320, 240), "other")
    assert (loaded.cameras_of("main"), loaded.cameras_of("other")) == (["a"], ["b"])
    assert loaded.groups["other"].score == 0.5
    assert loaded.resolve(a.path or "") == tmp_path / "a.mp4"
    assert loaded.resolve(loaded.groups["other"].model) == Path("/m")
