"""A disk that can lose its power: contents of a folder afterwards, computed from the fsync calls that were made.

A file keeps what it held at its last fsync, and is empty without one; a folder's names are those of its last fsync.
What was not flushed may be on disk all the same, or be there in part, so that a power cut has several outcomes.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
Names = dict[str, int]
"""Contents of a folder: inodes by name."""
OUTCOMES: dict[str, Callable[[int, Names, Names], Names]] = {
    "only what was flushed": lambda depth, flushed, now: flushed,
    "all names": lambda depth, flushed, now: now,
    "names within folders": lambda depth, flushed, now: now if depth else flushed,
    "names of folders": lambda depth, flushed, now: flushed if depth else now,
    "names of folders, and half of those within": lambda depth, flushed, now: flushed | _half(now) if depth else now,
}
"""Which names a folder has on disk: by its depth below the one where files are published, those that were flushed and
those of this moment."""


Tree = dict[str, bytes | None]
"""Contents of files by path, None for a folder; a folder comes before its entries."""


@dataclass
class Disk:
    """A disk with `root` on it from the beginning; entries of `published_folder` below it are whole or absent."""

    root: Path
    published_folder: Path
    after_each_change: Callable[[], None] = lambda: None
    operations: list[tuple[str, str]] = field(default_factory=list)
    """(operation, path below `root`), in order, such as ("fsync", "checkpoint/complete.json")."""
    _contents: dict[int, bytes] = field(default_factory=dict)
    _names: dict[int, Names] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)
    """Descriptors that keep flushed inodes from being used again."""

    def flush(self, descriptor: int) -> None:
        self._held.append(os.dup(descriptor))
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = _names(path)
            self._contents |= {inode: b"" for inode in self._names[status.st_ino].values() if inode not in self._known}
        else:
            self._contents[status.st_ino] = path.read_bytes()

    @property
    def _known(self) -> set[int]:
        return self._contents.keys() | self._names.keys()

    def after_power_cut(self, outcome: str) -> Tree:
        """Contents that `root` may have after a power cut."""
        tree: Tree = {}
        self._restore(os.stat(self.root).st_ino, self.root, OUTCOMES[outcome], tree)
        return tree

    def _restore(self, inode: int, now: Path, names_of: Callable[[int, Names, Names], Names], tree: Tree) -> None:
        depth = len(now.relative_to(self.published_folder).parts) if now.is_relative_to(self.published_folder) else -1
        there = now.is_dir() and os.stat(now).st_ino == inode
        names = self._names.get(inode, {})
        if there and depth >= 0:
            names = names_of(depth, names, _names(now))
        for name, entry in names.items():
            path = str((now / name).relative_to(self.root))
            if entry in self._names or ((now / name).is_dir() and os.stat(now / name).st_ino == entry):
                tree[path] = None
                self._restore(entry, now / name, names_of, tree)
            else:
                tree[path] = self._contents.get(entry, b"")

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


def write(tree: Tree, to: Path) -> Path:
    """Replaces the folder `to` by one with these contents."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for path, content in tree.items():
        (to / path).mkdir() if content is None else (to / path).write_bytes(content)
    return to


def _half(names: Names) -> Names:
    return {name: names[name] for name in sorted(names)[: len(names) // 2]}


def _names(folder: Path) -> Names:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


@contextmanager
def record_changes(root: Path, published_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Records changes to `root`, whose present contents count as flushed to disk."""
    disk = Disk(root, published_folder)
    for folder, _, files in os.walk(root):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            descriptor = os.open(path, os.O_RDONLY)
            disk.flush(descriptor)
            os.close(descriptor)

    def recording(operation: str) -> Callable[..., Any]:
        change = getattr(os, operation)

        def record_and_change(path: Any, *arguments: Any, **options: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{path}") if operation == "fsync" else os.fspath(path)
            # What is to be on disk is kept here: the disk itself need not be waited for.
            result = disk.flush(path) if operation == "fsync" else change(path, *arguments, **options)
            if Path(place).is_relative_to(root) or options.get("dir_fd") is not None:
                disk.operations.append((operation, str(Path(root, place).relative_to(root))))
                with monkeypatch.context() as unwatched:
                    for name, original in originals.items():
                        unwatched.setattr(os, name, original)
                    disk.after_each_change()
            return result

        return record_and_change

    originals = {operation: getattr(os, operation) for operation in CHANGES}
    with monkeypatch.context() as patched:
        for operation in CHANGES:
            patched.setattr(os, operation, recording(operation))
        yield disk
    disk.close()
