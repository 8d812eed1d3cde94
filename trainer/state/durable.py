"""Folders and files that are either whole or absent, whatever is killed and when.

A folder is written under a temporary name on the same file system, every file and the folder itself are flushed to
disk, and only then renamed into place; the parent is flushed last, so that the rename survives a power cut. So are the
folders above it that had to be made, and a folder that is removed has left its name on disk before its files go.
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

    Raises OSError when the disk is full, also where safetensors calls that by another name, and when the run directory,
    the folder above `final.parent`, is not there: one that was moved away is never made a second time.
    """
    if not final.parent.parent.is_dir():
        raise FileNotFoundError(f"{final.parent.parent} is not there any more")
    make_folder(final.parent)
    temporary = _aside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            # Files written by safetensors are private by default; a web server of another user must read them.
            path.chmod(0o755 if path.is_dir() else 0o644)
        move_folder(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, each of which survives a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def move_folder(source: Path, final: Path) -> None:
    """Gives a folder its final name on the same file system, once all that it holds is on disk."""
    for path in sorted(source.rglob("*"), reverse=True):
        flush(path)
    flush(source)
    os.rename(source, final)
    flush(final.parent)
    if source.parent != final.parent:
        flush(source.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder at one stroke: readers see all of it or nothing, and what a kill leaves over is swept."""
    doomed = _aside(path)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    flush(path.parent)  # or a power cut could bring the name back to a folder that is half empty
    shutil.rmtree(doomed, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces the whole file; a reader sees the old text or the new one, never a part."""
    while True:
        try:
            with new_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            # A trainer that has just started has swept the temporary file away: write it again.


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yields the path of a file to write; it takes the place of `final` when the block ends well."""
    temporary = _aside(final)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(final.parent)


def sweep(folder: Path) -> None:
    """Removes what killed writers left half done, at any depth of `folder`."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def flush(path: Path) -> None:
    """What a file holds, or which names a folder has, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
