"""Which snapshots a run directory holds, remembered from look to look: a look costs what has changed, not the history.

A snapshot is a folder of its own in the run directory, and so are the files in it: a link that leads out of it is not
followed, wherever it stands. Only the folder `snapshots` itself may be a link, to another disk. What belongs to nobody
on the outside is not read, so none of it can be served.
"""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from monitor.files import is_within
from trainer.snapshot import NAME, SnapshotError, read_manifest

CLOCK_TICK_NS = 1_000_000_000
"""Safely more than that of any file system's clock."""
LOOKED_BACK = 50
"""Snapshots in which a file that was not there may have come later: what evaluates them begins with the newest."""


def index_of(run_directory: Path) -> SnapshotIndex:
    """The index of one run directory, the same one for all who ask."""
    return _index_at(Path(os.path.abspath(run_directory)))


@lru_cache(maxsize=64)
def _index_at(run_directory: Path) -> SnapshotIndex:
    return SnapshotIndex(run_directory)


class SnapshotIndex:
    """The complete snapshots of one run directory, which need not exist yet. Any thread may ask."""

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory / "snapshots"
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._complete: frozenset[str] = frozenset()
        self._incomplete: list[str] = []
        """Folders without a manifest, which may come."""
        self._stamp: tuple[int, int] | None = None
        """Inode and time of change of the folder when it was listed; None when it is to be listed again."""
        self._newest: dict[tuple[str, str], tuple[str | None, str]] = {}
        """By SAE and file: the newest snapshot that has it, and the newest snapshot of that look."""

    def names(self) -> list[str]:
        """Oldest first; not to be changed. The folder is listed only when something has come or gone."""
        with self._lock:
            self._refresh()
            return self._names

    def newest_with(self, sae: str, file: str) -> str | None:
        """The newest snapshot in which this SAE has this file beside it, None without one."""
        with self._lock:
            self._refresh()
            known, looked_at = self._newest.get((sae, file), (None, ""))
            if known is not None and known not in self._complete:
                known, looked_at = None, ""  # retired: an older one may have it
            found = known
            for place, name in enumerate(reversed(self._names)):
                if name == known or (place >= LOOKED_BACK and name <= looked_at):
                    break
                if self.has(name, sae, file):
                    found = name
                    break
            self._newest[sae, file] = (found, self._names[-1] if self._names else "")
            return found

    def has(self, name: str, sae: str, file: str) -> bool:
        """Whether an SAE of a snapshot has a file beside it. What no manifest names is no SAE, wherever it leads."""
        if not os.path.isfile(f"{self._folder}/{name}/{sae}/{file}"):
            return False
        folder = self._folder / name
        try:
            return sae in manifest_of(folder)["saes"] and is_within(folder / sae / file, folder)
        except SnapshotError:
            return False  # retired a moment ago

    def _refresh(self) -> None:
        try:
            found = os.stat(self._folder)
        except OSError:
            self._names, self._complete, self._incomplete, self._stamp = [], frozenset(), [], None
            return
        stamp = (found.st_ino, found.st_mtime_ns)
        if stamp == self._stamp and not any(map(self._is_complete, self._incomplete)):
            return
        with os.scandir(self._folder) as entries:
            folders = {one.name for one in entries if NAME.fullmatch(one.name) and one.is_dir(follow_symlinks=False)}
        same_folder = self._stamp is not None and self._stamp[0] == stamp[0]
        known = self._complete if same_folder or self._stamp is None else frozenset()
        complete = {name for name in folders if name in known or self._is_complete(name)}
        if complete != self._complete:
            self._names, self._complete = sorted(complete), frozenset(complete)
        self._incomplete = sorted(folders - complete)
        # Another change in the same tick of the clock would not show.
        self._stamp = stamp if time.time_ns() - stamp[1] >= CLOCK_TICK_NS else None

    def _is_complete(self, name: str) -> bool:
        return os.path.isfile(f"{self._folder}/{name}/manifest.json")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot, parsed once. Raises SnapshotError when it is gone, cannot be read, or leads out."""
    try:
        return _parsed_manifest(folder, (folder / "manifest.json").stat().st_mtime_ns)
    except FileNotFoundError:
        raise SnapshotError(f"snapshot {folder.name} has just been retired") from None


@lru_cache(maxsize=1024)
def _parsed_manifest(folder: Path, written_ns: int) -> dict[str, Any]:
    if folder.is_symlink() or not is_within(folder / "manifest.json", folder):
        raise SnapshotError(f"snapshot {folder.name} is a link, or its manifest leads outside of it")
    manifest = read_manifest(folder)
    for path in (*(str(entry["path"]) for entry in manifest["files"]), *manifest["saes"]):
        if not is_within(folder / path, folder):
            raise SnapshotError(f"{path!r} lies outside of snapshot {folder.name}")
    return manifest
