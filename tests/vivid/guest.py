"""A machine in software (QEMU, without KVM) with Debian's own kernel and its modules: drivers that
the kernel of a container or a build server lacks.

It sees this machine's files read-only, at the same places, and has /dev, /tmp and /run of its own.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.paths import PROJECT

TOOLS = ("qemu-system-x86_64", "busybox", "depmod", "apt-get", "dpkg")
CACHE = Path.home() / ".cache" / "vigil" / "guest"
BOOT_S = 600
_DONE = "guest: exit "

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /host
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in virtio_pci 9pnet_virtio 9p {modules}; do modprobe $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host
for of in dev:devtmpfs proc:proc sys:sysfs tmp:tmpfs run:tmpfs; do
    mount -t ${{of#*:}} none /host/${{of%:*}}
done
mkdir /host/dev/shm; mount -t tmpfs shm /host/dev/shm
ip link set lo up
chroot /host /bin/sh -c 'cd {folder}; export HOME=/tmp; {command}'
echo "{done}$?"
poweroff -f
"""


def missing() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def run(modules: Sequence[str], command: str, cpus: int = 2, memory_mb: int = 1536) -> int:
    """Boot with these kernel modules, run a shell command in the project's folder, and print what
    it says as it comes; returns its exit status."""
    kernel, root = _kernel()
    folder = Path(tempfile.mkdtemp(prefix="guest-"))
    initrd = folder / "initrd.gz"
    init = _INIT.format(modules=" ".join(modules), folder=PROJECT, command=command, done=_DONE)
    needed = [*modules, "virtio_pci", "9pnet_virtio", "9p"]
    initrd.write_bytes(_initrd(folder / "root", root, init, needed))
    qemu = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus),
        "-m", str(memory_mb), "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio",
        "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet panic=-1",
        "-virtfs",
        "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
    ]  # fmt: skip
    status = 1
    with subprocess.Popen(
        ["timeout", str(BOOT_S), *qemu],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        errors="replace",
    ) as machine:
        assert machine.stdout is not None
        for line in machine.stdout:
            if line.startswith(_DONE):
                status = int(line.removeprefix(_DONE))
            else:
                print(line, end="", flush=True)
    shutil.rmtree(folder)
    return status


def _kernel() -> tuple[Path, Path]:
    """Debian's newest kernel and the folder that holds its modules, unpacked once into CACHE."""
    depends = ["apt-cache", "depends", "--important", "linux-image-amd64"]
    said = subprocess.run(depends, check=True, capture_output=True, text=True).stdout
    package = next(word for word in said.split() if word.startswith("linux-image-6"))
    root, release = CACHE / package, package.removeprefix("linux-image-")
    if not root.is_dir():
        temporary = CACHE / f"{package}.{os.getpid()}"
        temporary.mkdir(parents=True)
        subprocess.run(["apt-get", "-qq", "download", package], cwd=temporary, check=True)
        (archive,) = temporary.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, temporary], check=True)
        archive.unlink()
        subprocess.run(["depmod", "-b", temporary, release], check=True)
        temporary.rename(root)
    return root / "boot" / f"vmlinuz-{release}", root


def _initrd(folder: Path, root: Path, init: str, modules: Sequence[str]) -> bytes:
    """A first file system: busybox, the modules with all that they need, and `init`."""
    (folder / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", folder / "bin/busybox")
    (folder / "init").write_text(init)
    (folder / "init").chmod(0o755)
    (lib,) = (root / "lib/modules").iterdir()
    needs = {}
    for line in (lib / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).stem.replace("-", "_")] = [path, *others.split()]
    for path in {path for module in modules for path in needs.get(module.replace("-", "_"), [])}:
        target = folder / lib.relative_to(root) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lib / path, target)
    for table in lib.glob("modules.*"):
        shutil.copy(table, folder / lib.relative_to(root))
    names = "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*"))
    packed = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"],
        cwd=folder, input=names.encode(), check=True, stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    return gzip.compress(packed, 1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1].split(","), sys.argv[2]))
