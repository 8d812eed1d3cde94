"""Files to which another process appends JSON objects, one a line: metrics.jsonl and evaluations.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.common.parsing import ParseError, parse_object

MAX_READ_BYTES = 64 << 20
"""Bytes read at a time; the rest is read at later looks."""


class JsonLines:
    """The JSON objects of a file that grows by lines; one that is half written waits for its end."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """`offset` is the number of bytes that were read before."""
        self._path = path
        self._offset = offset
        self._inode: int | None = None

    def is_replaced(self) -> bool:
        """Whether another run's file is in the place of the one that was read; if so, it is read from the start."""
        try:
            status = self._path.stat()
        except OSError:
            return False
        replaced = self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset)
        if replaced:
            self.rewind()
        self._inode = status.st_ino
        return replaced

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._offset

    def rewind(self) -> None:
        self._offset = 0

    def read_new(self) -> Iterator[dict[str, Any]]:
        """Objects appended since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read(MAX_READ_BYTES)
        except OSError:
            return
        end = text.rfind(b"\n") + 1
        self._offset += end
        for line in text[:end].splitlines():
            try:
                yield parse_object(line, finite=True)
            except ParseError:
                continue  # a line that a full disk cut short
