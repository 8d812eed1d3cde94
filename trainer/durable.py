"""Folders and files that are either whole or absent, whatever is killed and when.

A folder is written under a temporary name on the same file system, every file and the folder itself are flushed to
disk, and only then renamed into place; the parent is flushed last, so that the rename survives a power cut.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TEMPORARY = ".tmp-"


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it appears as `final` when the block ends well, and vanishes when it fails.

    Raises OSError when the disk is full, also where safetensors calls that by another name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _aside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            # Files written by safetensors are private by default; a web server of another user must read them.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _flush(path)
        _flush(temporary)
        os.rename(temporary, final)
        _flush(final.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise


def remove_folder(path: Path) -> None:
    """Removes a folder at one stroke: readers see all of it or nothing, and what a kill leaves over is swept."""
    doomed = _aside(path)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces the whole file; a reader sees the old text or the new one, never a part."""
    temporary = _aside(path)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush(path.parent)


def sweep(folder: Path) -> None:
    """Removes what a killed writer left half done in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
