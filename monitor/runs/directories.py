"""Run directories, by name: those that are named, and those in folders that are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MARKS = ("settings.toml", "metrics.jsonl")
"""Files that only a run directory has."""
MOST_RUNS = 200


class NoRunsError(ValueError):
    """A path that leads to no run; `str(error)` says what to name instead."""


def is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def check_paths(paths: Sequence[Path]) -> None:
    """Raises NoRunsError for a path that is no folder; a folder may be empty, for runs may still come."""
    for path in paths:
        if not path.is_dir():
            fault = "is a file" if path.exists() else "does not exist"
            raise NoRunsError(f"{path} {fault}; name run directories, or a folder that holds some")


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """The runs of `paths` by name, in the order of the paths and, in a folder, of the alphabet; MOST_RUNS at most.

    A run is called as its folder; where two would be called the same, the folder above is part of the name.
    """
    folders: list[Path] = []
    for path in paths:
        folders += [path] if is_run(path) else sorted(child for child in path.glob("*/") if is_run(child))
    folders = [folder.resolve() for folder in folders]
    folders = list(dict.fromkeys(folders))[:MOST_RUNS]
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}": folder
        for folder in folders
    }
