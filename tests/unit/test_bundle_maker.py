"""scripts/bundle: from a model to a tar that a device takes."""

import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.archive import unpack
from common.engine.bundle import open_bundle
from common.engine.samples import load_samples
from common.paths import PROJECT
from scripts import bundle_maker
from tests import onnx_files

SHORT = """\
version = "0.9"
task = "classification"
[input]
resize = "stretch"
colour = "rgb"
scale = 255
[decoder]
kind = "classification"
"""
NAMED = ("--name", "colours", "--release", "4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A classifier, what its file does not say, and pictures."""
    onnx_files.classifier(tmp_path / "m.onnx")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "short.toml").write_text(SHORT)
    (tmp_path / "pictures").mkdir()
    for name, value in (("a.png", 255), ("b.jpg", 0)):
        cv2.imwrite(str(tmp_path / "pictures" / name), np.full((24, 32, 3), value, np.uint8))
    (tmp_path / "pictures/notes.txt").write_text("not for the bundle")
    return tmp_path / "m.onnx"


def bundle(monkeypatch: pytest.MonkeyPatch, model: Path, *options: object) -> int:
    where = model.parent
    monkeypatch.chdir(where)
    argv = ["bundle", str(model), "--out", str(where / "b.tar"), *map(str, options)]
    monkeypatch.setattr("sys.argv", argv)
    return bundle_maker.main()


FULL = ("--manifest", "short.toml", "--labels", "labels.txt", "--samples", "pictures", *NAMED)


def test_from_a_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--accuracy", 0.9, "--latency-p99-ms", 50, "--agreement", 0.8, "--version", "1.0")
    assert bundle(monkeypatch, model, *FULL, *limits) == 0
    out = capsys.readouterr().out
    assert "colours 1.0 (release 4)" in out
    assert "answers recorded from colours itself on onnxruntime" in out
    assert "m.onnx on onnxruntime: accuracy 1.000 on 2 samples" in out
    into = model.parent / "out"
    digest = unpack(model.parent / "b.tar", into)
    assert digest in out
    opened = open_bundle(into)
    assert opened.sha256 == digest
    manifest = opened.manifest
    assert (manifest.name, manifest.version, manifest.release) == ("colours", "1.0", 4)
    assert manifest.limits.latency_p99_ms == 50
    assert opened.labels == ("red", "green", "blue")
    assert [sample.path.name for sample in load_samples(opened)] == ["a.png", "b.jpg"]
    assert load_samples(opened)[0].items[0].label == "blue"
    assert not (into / "samples/notes.txt").exists()


def test_the_same_bundle_twice(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for _ in range(2):
        assert bundle(monkeypatch, model, *FULL) == 0
        made.append((model.parent / "b.tar").read_bytes())
    assert made[0] == made[1]


def test_answers_that_were_given(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"file": "a.png", "items": [{"label": "red"}]}]
    (model.parent / "pictures/samples.json").write_text(json.dumps(answers))
    assert bundle(monkeypatch, model, *FULL) == 0
    assert "accuracy 0.000 on 1 samples" in capsys.readouterr().out
    (model.parent / "b.tar").unlink()
    assert bundle(monkeypatch, model, *FULL, "--accuracy", 0.5) == 1
    assert "m.onnx on onnxruntime: accuracy 0.000 on 1 samples, wanted 0.5" in (
        capsys.readouterr().err
    )
    assert not (model.parent / "b.tar").exists()


def test_from_a_bundle_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = ("--samples", model.parent / "pictures")
    assert bundle(monkeypatch, model) == 1
    monkeypatch.setattr(
        "sys.argv",
        ["bundle", str(PROJECT / "models/factory"), "--out", "f.tar", *map(str, pictures)],
    )
    assert bundle_maker.main() == 0
    with tarfile.open("f.tar") as tar:
        manifest = tar.extractfile("manifest.toml")
        assert manifest is not None
        assert manifest.read() == (PROJECT / "models/factory/manifest.toml").read_bytes()


def test_a_cpu_variant(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_files.classifier(model.parent / "cpu.onnx", weight=2)
    assert bundle(monkeypatch, model, *FULL, "--cpu-variant", "cpu.onnx") == 0
    unpack(model.parent / "b.tar", model.parent / "out")
    variants = open_bundle(model.parent / "out").manifest.variants
    assert [variant.file for variant in variants] == ["m.onnx", "cpu.onnx"]


def test_expected_confidence(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured on enough things, or given: it reaches the manifest as shares."""
    assert bundle(monkeypatch, model, *FULL, "--confidence") == 1
    assert "finds 6 things on its samples; at least 50 are needed" in capsys.readouterr().err
    for value in range(20):
        picture = np.full((24, 32, 3), (value * 12, 99, 0), np.uint8)
        cv2.imwrite(str(model.parent / f"pictures/{value}.png"), picture)
    where = model.parent
    limits = ("--score-shift", 0.1, "--latency-ratio", 1.5, "--profile", "pi5")
    assert bundle(monkeypatch, model, *FULL, *limits, "--confidence") == 0
    assert "confidence measured on 66 items, on onnxruntime" in capsys.readouterr().out
    unpack(where / "b.tar", where / "measured")
    manifest = open_bundle(where / "measured").manifest
    assert (manifest.limits.score_shift, manifest.limits.latency_ratio) == (0.1, 1.5)
    assert manifest.profile == "pi5"
    assert manifest.confidence is not None
    answers = load_samples(open_bundle(where / "measured"))
    scores = [item.score or 0 for sample in answers for item in sample.items]
    high = sum(score >= 0.5 for score in scores) / len(scores)
    assert sum(manifest.confidence[5:]) == pytest.approx(high, abs=0.001)
    # Of another release's manifest, or a list.
    (where / "list.json").write_text(json.dumps(manifest.confidence))
    for file in ("measured/manifest.toml", "list.json"):
        assert bundle(monkeypatch, model, *FULL, "--confidence", file) == 0
        unpack(where / "b.tar", where / f"from-{Path(file).stem}")
        assert open_bundle(where / f"from-{Path(file).stem}").manifest.confidence == (
            manifest.confidence
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (NAMED, "no name, version or release yet: give --version, or the same in the file"),
        (("--version", 1, *NAMED), "m.onnx: the file doesn't say"),
        (("--manifest", "absent.toml", *NAMED), "absent.toml: can't be read"),
        (("--manifest", "labels.txt", *NAMED), "labels.txt: is no TOML"),
        (("--manifest", "short.toml", *NAMED, "--accuracy", 0.9), "give --samples DIR"),
        ((*FULL, "--accuracy", 2), "limits.accuracy = 2.0"),
        ((*FULL, "--labels", "absent.txt"), "absent.txt: No such file"),
        ((*FULL, "--samples", "absent"), "absent: No such file"),
        ((*FULL, "--samples", "."), "has no pictures"),
        ((*FULL, "--cpu-variant", "labels.txt"), "labels.txt: expected a file named .onnx"),
        ((*FULL, "--labels", "short.toml"), "labels"),
        ((*FULL, "--confidence", "short.toml"), "short.toml: has no confidence"),
        ((*FULL, "--confidence", "labels.txt"), "labels.txt: is no JSON list of ten shares"),
        ((*FULL, "--out", "/proc/b.tar"), "/proc/b.tar"),
    ],
)
def test_what_is_missing_is_said(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    words: str,
) -> None:
    assert bundle(monkeypatch, model, *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (model.parent / "b.tar").exists()
