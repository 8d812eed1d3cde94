"""Files that other processes write, read with care: what is missing, damaged or elsewhere is None, never an error.

A link that leads out of its folder is not followed: what lies there is not this run's, and not for all to see.
"""

from __future__ import annotations

import json
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from producer.common.parsing import ParseError, parse_object, parse_toml

LINE_BYTES = 1 << 16
"""Bytes read at first from the end of a file, in search of its last line."""

log = logging.getLogger("sluice.monitor")


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, all links followed, leads to something in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())


def read_json(path: Path, folder: Path) -> dict[str, Any] | None:
    """The object in a file of `folder`; None when there is none, or a link leads to it from outside of the folder."""
    try:
        _refuse_link(path, folder)
        return _parse(path.read_bytes())
    except OSError:
        return None


def read_toml(path: Path, folder: Path) -> dict[str, Any] | None:
    """The table in a file of `folder` as JSON has it: without infinities, dates as text."""
    try:
        _refuse_link(path, folder)
        return parse_object(json.dumps(parse_toml(path.read_bytes()), default=str), finite=True)
    except (OSError, ParseError):
        return None


def read_last_line(path: Path, folder: Path) -> dict[str, Any] | None:
    """The object in the last whole line of a file; the line that is being written at this moment does not count."""
    try:
        _refuse_link(path, folder)
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            length = LINE_BYTES
            while True:
                file.seek(max(0, size - length))
                lines = file.read(min(size, length)).split(b"\n")
                if len(lines) > 2 or length >= size:
                    break
                length *= 4
    except OSError:
        return None
    return _parse(lines[-2]) if len(lines) > 1 else None


def written_ns(path: Path) -> int:
    """When a file was written; 0 while there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _parse(text: bytes) -> dict[str, Any] | None:
    """An object, in which NaN and infinities, which JSON does not have, become null; None when it is no object."""
    try:
        return parse_object(text, finite=True)
    except ParseError:
        return None


def _refuse_link(path: Path, folder: Path) -> None:
    """Raises OSError when a path leads out of its folder."""
    if not is_within(path, folder):
        _warn_once(path)
        raise PermissionError(path)


@lru_cache
def _warn_once(path: Path) -> None:
    log.warning("%s is a link out of its folder, and is not read", path)
