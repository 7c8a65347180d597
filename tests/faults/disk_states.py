"""Every state a disk may be in after a power cut, derived from the system calls of a program.

The rules are the strictest that POSIX allows. A file's bytes are durable after its fsync; until
then any part of them may be there, or none; only adding to them touches none that are durable. A
name is durable after its folder's fsync; until then each change of a name may have happened or not,
whatever became of the others. A rename from one folder to another is two changes. What a process
saw, or another one, says nothing about the disk.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from common.paths import PROJECT

TRACED = (
    "openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "unlink",
    "unlinkat", "mkdir", "rmdir",
)  # fmt: skip
# None of these may occur: the model does not know them.
FOREIGN = (
    "creat", "writev", "renameat", "renameat2", "mkdirat", "truncate", "link", "linkat",
    "symlink", "symlinkat", "fallocate", "copy_file_range", "sendfile", "sync", "syncfs",
)  # fmt: skip
MOST = 4096  # states of one instant; with more, those near all and none of what is not synced

Tree = dict[str, bytes | None]  # path -> content, None for a folder
Choice = TypeVar("Choice")


@dataclass
class File:
    durable: bytes | None = None  # None: nothing of it was ever synced
    content: bytes = b""
    dirty: bool = True
    kept: int = 0  # bytes at its beginning that are durable, and not written since

    def possible(self) -> list[bytes]:
        """What may be read from it after a power cut, once it has a name."""
        if not self.dirty:
            return [self.content]
        kept, length = self.kept, len(self.content)
        lengths = {kept, kept + 1, (kept + length) // 2, length - 1, length}
        found = [self.content[:n] for n in sorted(lengths) if kept <= n <= length]
        # The length is there, the bytes are not.
        found.append(self.content[:kept] + bytes(length - kept))
        if self.durable is not None:
            found.append(self.durable)
        return list(dict.fromkeys(found))


@dataclass
class Folder:
    durable: dict[str, "Node"] = field(default_factory=dict)
    names: dict[str, "Node"] = field(default_factory=dict)
    changes: list[tuple[tuple[str, "Node | None"], ...]] = field(default_factory=list)  # not synced


Node = File | Folder


class Disk:
    """A folder as its programs see it, and what of it is durable."""

    def __init__(self) -> None:
        self.root = Folder()

    def at(self, path: str) -> Node:
        node: Node = self.root
        for name in path.split("/") if path else []:
            assert isinstance(node, Folder), path
            node = node.names[name]
        return node

    def name(self, parent: str, *change: tuple[str, Node | None]) -> None:
        """Give names in a folder, and take them away (None): all of them at once."""
        folder = self.at(parent)
        assert isinstance(folder, Folder)
        folder.changes.append(change)
        _change(folder.names, change)

    def exists(self, path: str) -> bool:
        try:
            self.at(path)
        except KeyError:
            return False
        return True

    def sync(self, path: str) -> None:
        node = self.at(path)
        if isinstance(node, File):
            node.durable, node.dirty, node.kept = node.content, False, len(node.content)
        else:
            node.durable, node.changes = dict(node.names), []

    def states(
        self, most: int = MOST, unread: tuple[str, ...] = ()
    ) -> Iterator[tuple[Tree, frozenset[str]]]:
        """Every tree that may be found after a power cut just now, and those of its folders that
        stand there under two names: who removes the one empties the other. See `cuts`."""
        folders = list(_folders(self.root))
        choices: list[list[tuple[bool, ...]]] = []
        for folder in folders:
            n = len(folder.changes)
            if n <= 6:
                choices.append(list(itertools.product((False, True), repeat=n)))
            else:  # all up to some point, all but one, none but one
                some = [tuple(i < k for i in range(n)) for k in range(n + 1)]
                some += [tuple(i != k for i in range(n)) for k in range(n)]
                some += [tuple(i == k for i in range(n)) for k in range(n)]
                choices.append(list(dict.fromkeys(some)))
        for chosen in _bounded(choices, most):
            names = {}
            for folder, took in zip(folders, chosen, strict=True):
                now = dict(folder.durable)
                for change, happened in zip(folder.changes, took, strict=True):
                    if happened:
                        _change(now, change)
                names[id(folder)] = now
            nodes = dict(_walk(self.root, names))
            files = {path: node for path, node in nodes.items() if isinstance(node, File)}
            places: dict[int, list[str]] = {}
            for path, node in nodes.items():
                if isinstance(node, Folder):
                    places.setdefault(id(node), []).append(path)
            twice = frozenset(p for paths in places.values() if len(paths) > 1 for p in paths)
            dirty = {
                id(node): [b""] if path.endswith(unread) else node.possible()
                for path, node in files.items()
            }
            for contents in _bounded(list(dirty.values()), most):
                holds = dict(zip(dirty, contents, strict=True))
                yield {path: holds.get(id(node)) for path, node in nodes.items()}, twice


def _change(names: dict[str, Node], change: Iterable[tuple[str, Node | None]]) -> None:
    for name, node in change:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _folders(folder: Folder) -> Iterator[Folder]:
    """Each folder that has, may have or had a name, once."""
    seen: dict[int, Folder] = {}
    left = [folder]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        named = [
            *one.durable.values(),
            *one.names.values(),
            *(n for c in one.changes for _, n in c),
        ]
        left += [node for node in named if isinstance(node, Folder)]
    yield from seen.values()


def _walk(
    folder: Folder, names: dict[int, dict[str, Node]], at: str = ""
) -> Iterator[tuple[str, Node]]:
    for name, node in sorted(names[id(folder)].items()):
        yield f"{at}{name}", node
        if isinstance(node, Folder):
            yield from _walk(node, names, f"{at}{name}/")


def _bounded(choices: list[list[Choice]], most: int) -> Iterable[tuple[Choice, ...]]:
    total = 1
    for options in choices:
        total *= len(options)
    if total <= most:
        return itertools.product(*choices)
    found = []
    for base in (0, -1):
        plain = [options[base] for options in choices]
        found.append(tuple(plain))
        for at, options in enumerate(choices):
            found += [(*plain[:at], option, *plain[at + 1 :]) for option in options]
    return found


# -- tracing -------------------------------------------------------------------------------------

_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (\d+)")
_TEXT = re.compile(r'["<]((?:\\x[0-9a-f]{2})*)[">]')


STRACE = ["strace", "-f", "-y", "-xx", "-s", "1000000", "-e", "trace=" + ",".join(TRACED + FOREIGN)]


def trace(command: list[str], to: Path) -> int:
    """Run a program and note its system calls; returns its exit status."""
    strace = [*STRACE, "--seccomp-bpf", "-o", str(to)]
    return subprocess.run([*strace, *command], cwd=PROJECT).returncode


@dataclass(frozen=True)
class Cut:
    """What one instant may leave behind."""

    tree: Tree
    twice: frozenset[str]
    mark: int  # the newest that was noted before

    @property
    def key(self) -> tuple[frozenset[tuple[str, bytes | None]], frozenset[str]]:
        """What tells states apart."""
        return frozenset(self.tree.items()), self.twice


def cuts(
    log: Path, root: Path, marks: Path, most: int = MOST, unread: tuple[str, ...] = ()
) -> Iterator[Cut]:
    """The states that a power cut at any instant of a traced program may leave; each comes once
    for each mark that was the newest while it could be left.

    Args:
        root: the folder that matters, empty at first, its own name durable.
        marks: a file of numbers, a line each; whatever is written there was promised.
        most: states of one instant, as `MOST`.
        unread: how the names of files end whose content nobody reads, so that it is all the same.
    """
    disk, mark = Disk(), 0
    found: set[int] = set()

    def news() -> Iterator[Cut]:
        for tree, twice in disk.states(most, unread):
            cut = Cut(tree, twice, mark)
            key = hash((cut.key, mark))
            if key not in found:
                found.add(key)
                yield cut

    yield from news()
    for line in log.read_text().splitlines():
        assert "unfinished" not in line, line
        match = _CALL.match(line)
        if match is None:
            continue
        _, call, arguments, _ = match.groups()
        texts = [bytes.fromhex(t.replace("\\x", "")) for t in _TEXT.findall(arguments)]
        if call == "write" and texts[0] == os.fsencode(marks):
            mark = max(mark, int(texts[1]))
            yield from news()
        elif _apply(disk, os.fsencode(root) + b"/", call, arguments, texts):
            yield from news()
    seen = {str(path.relative_to(root)) for path in root.rglob("*")}
    visible = {id(folder): folder.names for folder in _folders(disk.root)}
    assert {path for path, _ in _walk(disk.root, visible)} == seen  # the model lost nothing


def _apply(disk: Disk, root: bytes, call: str, arguments: str, texts: list[bytes]) -> bool:
    """Do what a call did; whether that was something."""
    if call in ("openat", "unlinkat"):
        texts = [texts[1] if texts[1].startswith(b"/") else texts[0] + b"/" + texts[1]]
    paths = texts[:2] if call == "rename" else texts[:1]
    if not any(path.startswith(root) or path + b"/" == root for path in paths):
        return False
    first, *second = (os.fsdecode(path[len(root) :]) for path in paths)
    assert call in TRACED, f"{call}: the model of the disk does not know it"
    parent, _, name = first.rpartition("/")
    if call == "openat":
        if "O_CREAT" in arguments and not disk.exists(first):
            disk.name(parent, (name, File()))
        elif "O_TRUNC" in arguments:
            file = disk.at(first)
            assert isinstance(file, File)
            file.content, file.dirty, file.kept = b"", True, 0
        else:
            return False
    elif call == "ftruncate":
        file, length = disk.at(first), int(arguments.rpartition(",")[2])
        assert isinstance(file, File)
        assert length <= len(file.content), f"{first}: made longer"
        if length == len(file.content):
            return False
        file.content, file.dirty = file.content[:length], True
        file.kept = min(file.kept, length)
    elif call == "write":
        file = disk.at(first)
        assert isinstance(file, File)
        file.content, file.dirty = file.content + texts[1], True
    elif call == "mkdir":
        disk.name(parent, (name, Folder()))
    elif call == "rename":
        to, _, new = second[0].rpartition("/")
        node = disk.at(first)
        if to == parent:
            disk.name(parent, (new, node), (name, None))
        else:
            disk.name(to, (new, node))
            disk.name(parent, (name, None))
    elif call in ("unlink", "unlinkat", "rmdir"):
        disk.name(parent, (name, None))
    else:
        assert call in ("fsync", "fdatasync"), f"{first}: written in its middle"
        disk.sync(first)
    return True
