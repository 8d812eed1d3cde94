"""Folders and files that are either whole or absent, whatever is killed and when.

A folder is written under a temporary name on the same file system. Every file and the folder itself are flushed to disk
before it is renamed into place. The parent is flushed last, so that the rename survives a power cut, and so are the
parents of folders that had to be made above it. A folder is removed by renaming it first: its name is gone on disk
before its files are.
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
    """Yields an empty folder to fill, which is renamed to `final` when the block succeeds and removed when it fails.

    Raises OSError when the disk is full, even where safetensors raises an error of its own, and when the run directory,
    the folder above `final.parent`, does not exist: one that was moved away is not made a second time.
    """
    if not final.parent.parent.is_dir():
        raise FileNotFoundError(f"{final.parent.parent} is not there any more")
    make_folder(final.parent)
    temporary = _temporary_path(final)
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
    """Makes a folder and its missing parents. Each of them survives a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def move_folder(source: Path, final: Path) -> None:
    """Renames a folder on the same file system, after flushing its contents to disk."""
    for path in sorted(source.rglob("*"), reverse=True):
        flush(path)
    flush(source)
    os.rename(source, final)
    flush(final.parent)
    if source.parent != final.parent:
        flush(source.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder atomically: readers see all of it or nothing. `sweep` removes what a kill leaves over."""
    temporary = _temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    flush(path.parent)  # or after a power cut the name could belong to a folder that is half empty
    shutil.rmtree(temporary, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces the contents of a file. Readers see the old text or the new one, never a part."""
    while True:
        try:
            with new_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            # A trainer that has just started has swept the temporary file: write it again.


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which replaces `final` when the block succeeds."""
    temporary = _temporary_path(final)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(final.parent)


def sweep(folder: Path) -> None:
    """Removes temporary files and folders of writers that were killed, at any depth of `folder`."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """A path beside `path` that is of this process alone."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def flush(path: Path) -> None:
    """Waits until the contents of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
