"""The files that corpus.paths names, each identified by its name, its size and a digest of its edges.

- Links are followed. A folder's files are listed once, whatever links lead to them.
- A file's name is its path below the folder or glob that led to it: two machines may mount the data in different
  places. Times identify nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path

from producer.common.formatting import format_bytes
from producer.corpus.base import raise_faults, sha256
from producer.settings import CorpusSettings

log = logging.getLogger(__name__)

PACKED = (".gz", ".zst")
"""Endings of packed files."""
EDGE_BYTES = 64 * 1024
"""Bytes at the beginning and at the end of a file that its digest covers."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of the corpus, as it was when the corpus was opened."""

    path: Path
    name: str
    """Its path below the folder or glob that led to it."""
    size: int
    """Bytes on disk."""
    digest: str
    """sha256 of its first and last 64 KiB."""

    @property
    def is_compressed(self) -> bool:
        return self.path.suffix in PACKED


def find_files(settings: CorpusSettings, suffixes: tuple[str, ...]) -> list[DataFile]:
    """Lists the files of corpus.paths, in the order of its entries and by name within each; every file once.

    In a folder, files with one of `suffixes` count; a file or glob that is named counts whatever its suffix. Raises
    CorpusError.
    """
    names: dict[str, tuple[Path, str]] = {}
    faults = []
    for entry in settings.paths:
        matches = _matches(entry, suffixes)
        if isinstance(matches, str):
            faults.append(f"corpus.paths holds {entry!r}, {matches} (relative paths start at {Path.cwd()})")
            continue
        for name, path in sorted(matches):
            names.setdefault(os.path.abspath(path), (path, name))
    raise_faults(faults)
    files: list[DataFile] = []
    for path, name in names.values():
        try:
            files.append(data_file(path, name))
        except OSError as error:
            faults.append(f"{path} of corpus.paths cannot be read: {error.strerror}; correct path or permissions")
    raise_faults(faults)
    return files


def _matches(entry: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]] | str:
    """Returns (name, path) of each file that `entry` stands for, or in words why there is none."""
    path = Path(entry)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        remedy = "name another folder, or files"
        return files_in_folder(path, suffixes) or f"a folder without files{_ending(suffixes)}; {remedy}"
    if not _is_pattern(entry):
        return "which does not exist; correct the path"
    root = Path(*itertools.takewhile(lambda part: not _is_pattern(part), path.parts))
    files = [(path.relative_to(root).as_posix(), path) for path in _expand(entry) if path.is_file()]
    return files or "which matches no file; correct the pattern"


def files_in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Lists the files at any depth whose name, without .gz or .zst, ends in one of `suffixes`, but no hidden ones."""
    return [
        (path.relative_to(folder).as_posix(), path)
        for path in _walk(folder)
        if path.name.removesuffix(".gz").removesuffix(".zst").endswith(suffixes)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, without hidden ones. Links are followed, and each folder is entered once.

    Folders come before links to them, whatever their names: a link that leads back, or to what is read anyway, adds
    nothing. What cannot be read is left out with a warning.
    """
    visits: set[tuple[int, int]] = set()
    starts = [folder]
    while starts:
        links = []
        for start in starts:
            for parent, folders, files in os.walk(start, onerror=_warn_of_folder):
                if (identity := _identity(parent)) in visits:
                    folders.clear()
                    continue
                visits.add(identity)
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
                yield from filter(_is_readable, (Path(parent, name) for name in files if not name.startswith(".")))
        starts = sorted(links)


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and inode: the same for a folder and for every link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_readable(path: Path) -> bool:
    """Tells whether `path` is a file; a link that leads nowhere is none, and a warning names it."""
    if path.is_symlink() and not path.exists():
        log.warning("%s is left out of the corpus: it is a link to %s, which does not exist", path, os.readlink(path))
    return path.is_file()


def _warn_of_folder(error: OSError) -> None:
    log.warning("%s is left out of the corpus: it cannot be read (%s)", error.filename, error.strerror)


def _expand(pattern: str) -> Iterator[Path]:
    """Yields what a glob pattern matches. `**` follows links as `glob` does, but never back to where it came from."""
    recursive = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if recursive is None:
        yield from map(Path, glob(pattern))
        return
    for start in glob(pattern[: recursive.start()] or "."):
        for folder in _folders(Path(start)):
            yield from _expand(f"{escape(str(folder))}/{pattern[recursive.end() :] or '*'}")


def _folders(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yields `folder` and the folders below it, through links; hidden ones and links to a folder above are left out."""
    if (identity := _identity(folder)) in above:
        return
    yield folder
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        _warn_of_folder(error)
        return
    for name in names:
        yield from _folders(folder / name, above | {identity})


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _ending(suffixes: tuple[str, ...]) -> str:
    return "" if "" in suffixes else " that end in " + " or ".join(suffixes)


def data_file(path: Path, name: str) -> DataFile:
    """Describes a file as it is now. Raises OSError."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(EDGE_BYTES)
        stream.seek(max(0, size - EDGE_BYTES))
        return DataFile(path, name, size, edge_digest(head, stream.read(EDGE_BYTES)))


def edge_digest(head: bytes, tail: bytes) -> str:
    """Hashes the beginning and the end of a file: sha256, hex."""
    return sha256(hashlib.sha256(head).digest() + hashlib.sha256(tail).digest())


def describe_files(settings: CorpusSettings, files: Sequence[DataFile]) -> str:
    """Counts the files, their kind and size, and names the first and the last."""
    size = format_bytes(sum(file.size for file in files))
    names = " … ".join(file.name for file in (files[:1] if len(files) == 1 else (files[0], files[-1])))
    return f"{len(files):,} {settings.kind} file{'s' * (len(files) > 1)}, {size}: {names}"
