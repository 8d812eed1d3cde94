"""The snapshots in a run directory, cached: a look costs what has changed since the last one, not the history.

A snapshot is a real folder in the run directory, with real files in it: a link that leads out of it is not followed, so
that nothing outside can be served. Only the folder `snapshots` itself may be a link, to another disk.
"""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from pathlib import Path

from monitor.files import is_within
from trainer.snapshot import NAME, Manifest, SnapshotError, read_manifest

CLOCK_TICK_NS = 1_000_000_000
"""More than a tick of any file system's clock."""
RECHECKED_SNAPSHOTS = 50
"""The newest snapshots, in which a missing file may have been added since: they are evaluated from the newest on."""


def index_of(run_directory: Path) -> SnapshotIndex:
    """The index of a run directory, which all callers share."""
    return _index_at(Path(os.path.abspath(run_directory)))


@lru_cache(maxsize=64)
def _index_at(run_directory: Path) -> SnapshotIndex:
    return SnapshotIndex(run_directory)


class SnapshotIndex:
    """The complete snapshots of one run directory, which need not exist yet. Safe to use from several threads."""

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory / "snapshots"
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._complete: frozenset[str] = frozenset()
        self._incomplete: list[str] = []
        """Folders that have no manifest yet."""
        self._stamp: tuple[int, int] | None = None
        """Inode and time of change of the folder when it was listed; None when it is to be listed again."""
        self._newest: dict[tuple[str, str], tuple[str | None, str]] = {}
        """For each SAE and file: the newest snapshot that has it, and the newest snapshot when that was looked up."""

    def names(self) -> list[str]:
        """Oldest first; the caller must not modify the list. The folder is listed only when it has changed."""
        with self._lock:
            self._refresh()
            return self._names

    def newest_with(self, sae: str, file: str) -> str | None:
        """The newest snapshot in which this SAE has this file beside it, None without one."""
        with self._lock:
            self._refresh()
            newest, searched_to = self._newest.get((sae, file), (None, ""))
            if newest is not None and newest not in self._complete:
                newest, searched_to = None, ""  # retired: an older one may have it
            for index, name in enumerate(reversed(self._names)):
                if name == newest or (index >= RECHECKED_SNAPSHOTS and name <= searched_to):
                    break
                if self.has(name, sae, file):
                    newest = name
                    break
            self._newest[sae, file] = (newest, self._names[-1] if self._names else "")
            return newest

    def has(self, name: str, sae: str, file: str) -> bool:
        """Whether an SAE that the manifest names has a file beside it."""
        if not os.path.isfile(f"{self._folder}/{name}/{sae}/{file}"):
            return False
        folder = self._folder / name
        try:
            return sae in manifest_of(folder).saes and is_within(folder / sae / file, folder)
        except SnapshotError:
            return False  # retired a moment ago

    def _refresh(self) -> None:
        try:
            status = os.stat(self._folder)
        except OSError:
            self._names, self._complete, self._incomplete, self._stamp = [], frozenset(), [], None
            return
        stamp = (status.st_ino, status.st_mtime_ns)
        if stamp == self._stamp and not any(map(self._is_complete, self._incomplete)):
            return
        with os.scandir(self._folder) as entries:
            folders = {
                entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            }
        is_same_folder = self._stamp is None or self._stamp[0] == stamp[0]
        cached = self._complete if is_same_folder else frozenset()
        complete = {name for name in folders if name in cached or self._is_complete(name)}
        if complete != self._complete:
            self._names, self._complete = sorted(complete), frozenset(complete)
        self._incomplete = sorted(folders - complete)
        # Another change in the same tick of the clock would not show.
        self._stamp = stamp if time.time_ns() - stamp[1] >= CLOCK_TICK_NS else None

    def _is_complete(self, name: str) -> bool:
        return os.path.isfile(f"{self._folder}/{name}/manifest.json")


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a snapshot, parsed once. Raises SnapshotError when it is gone, unreadable or elsewhere."""
    try:
        return _parsed_manifest(folder, (folder / "manifest.json").stat().st_mtime_ns)
    except FileNotFoundError:
        raise SnapshotError(f"snapshot {folder.name} has just been retired") from None


@lru_cache(maxsize=1024)
def _parsed_manifest(folder: Path, written_ns: int) -> Manifest:
    if folder.is_symlink() or not is_within(folder / "manifest.json", folder):
        raise SnapshotError(f"snapshot {folder.name} is a link, or its manifest leads outside of it")
    manifest = read_manifest(folder)
    for path in (*(file.path for file in manifest.files), *manifest.saes):
        if not is_within(folder / path, folder):
            raise SnapshotError(f"{path!r} lies outside of snapshot {folder.name}")
    return manifest
