"""A pretend accelerator for tests (delegate.c says what it can do), and a bundle that wants it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from common.paths import PROJECT

SOURCE = Path(__file__).with_name("delegate.c")
FACTORY = PROJECT / "models" / "factory"
MODEL = "model.int8.tflite"

MANIFEST = """\
name = "accelerated"
version = "1.0.0"
release = 2
task = "detection"

[[variants]]
runtime = "litert"
file = "{model}"
delegate = "{library}"
exclusive = {exclusive}
{cpu}
[input]
resize = "letterbox"
colour = "rgb"
scale = 1

[decoder]
kind = "yolox"
labels = "labels.txt"
score = 0.4
iou = 0.45
"""
CPU = """
[[variants]]
runtime = "litert"
file = "{model}"
"""


def build(folder: Path) -> Path:
    """The library, compiled into `folder`; the test is skipped where there is no gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, to compile tests/fake_delegate/delegate.c")
    library = folder / "libfakedelegate.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE], check=True)
    return library


def bundle(folder: Path, library: Path | str, *, exclusive: bool = False, cpu: bool = True) -> Path:
    """A bundle of the factory model: on the accelerator first, then (if `cpu`) on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, "labels.txt"):
        shutil.copy(FACTORY / name, folder)
    text = MANIFEST.format(
        model=MODEL,
        library=library,
        exclusive=str(exclusive).lower(),
        cpu=CPU.format(model=MODEL) if cpu else "",
    )
    (folder / "manifest.toml").write_text(text)
    return folder
