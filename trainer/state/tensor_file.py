"""One safetensors file of float32 tensors that several processes write at once, each at the offsets of what it holds.

The header is written first, with all names, shapes and offsets, and padded with spaces so that the data begin at a
multiple of PAGE_BYTES; the file gets its full size. Then each process writes its rows, or its columns, of each tensor.
Tensors whose rows are pages, whole or many, come before others: no two processes write to one page of them, which a
network file system with a cache of pages would lose. Readers see an ordinary safetensors file. Light: numpy, no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from producer.common.parsing import ParseError
from producer.common.safetensors_header import LENGTH_BYTES, TensorEntry, read_header

PAGE_BYTES = 4096
NUMBER_BYTES = 4


class TensorFileError(OSError):
    """The file is no safetensors file of float32 tensors."""


def create(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Makes a file of float32 tensors of these shapes, in this order, full of zeros."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + NUMBER_BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % PAGE_BYTES)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        file.truncate(LENGTH_BYTES + len(text) + end)


def _row_bytes(entry: TensorEntry) -> int:
    return NUMBER_BYTES * math.prod(entry.shape[1:])


class TensorFile(AbstractContextManager["TensorFile"]):
    """A file that `create` or safetensors has written, open for reading or for writing parts of its tensors."""

    def __init__(self, path: Path, mode: Literal["read", "write"] = "read") -> None:
        """Raises TensorFileError, or OSError."""
        self._descriptor = os.open(path, os.O_RDONLY if mode == "read" else os.O_RDWR)
        self._is_writing = mode == "write"
        try:
            self._entries = self._read_entries()
        except ParseError as error:
            os.close(self._descriptor)
            raise TensorFileError(f"{path} is no safetensors file of float32 tensors: {error}") from None

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from row `first` on."""
        entry = self._entries[name]
        self._write(np.ascontiguousarray(rows, np.float32), entry.begin + first * _row_bytes(entry))

    def write_columns(self, name: str, first: int, columns: np.ndarray) -> None:
        """Writes columns of a matrix, from column `first` on; `columns` is contiguous in rows."""
        entry = self._entries[name]
        if columns.shape == entry.shape:
            self.write_rows(name, 0, columns)
            return
        for row, numbers in enumerate(np.ascontiguousarray(columns, np.float32)):
            self._write(numbers, entry.begin + row * _row_bytes(entry) + first * NUMBER_BYTES)

    def read_rows(self, name: str, first: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `first` to `end` of a tensor, in memory of their own."""
        entry = self._entries[name]
        end = entry.shape[0] if end is None else end
        rows = np.empty((end - first, *entry.shape[1:]), np.float32)
        self._read_into(rows, entry.begin + first * _row_bytes(entry))
        return rows

    def read_columns(self, name: str, first: int, end: int) -> np.ndarray:
        """Columns `first` to `end` of a matrix, in memory of their own."""
        entry = self._entries[name]
        if (first, end) == (0, entry.shape[1]):
            return self.read_rows(name)
        columns = np.empty((entry.shape[0], end - first), np.float32)
        for row, numbers in enumerate(columns):
            self._read_into(numbers, entry.begin + row * _row_bytes(entry) + first * NUMBER_BYTES)
        return columns

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Closes the file; what was written is on disk then."""
        try:
            if self._is_writing:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _read_entries(self) -> dict[str, TensorEntry]:
        entries = read_header(self._descriptor)
        if other := {entry.dtype for entry in entries.values()} - {"F32"}:
            raise ParseError(f"it has tensors of type {', '.join(sorted(other))}")
        return entries

    def _write(self, numbers: np.ndarray, offset: int) -> None:
        left = numbers.reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self._descriptor, left, offset)
            left, offset = left[count:], offset + count

    def _read_into(self, numbers: np.ndarray, offset: int) -> None:
        left = numbers.reshape(-1).view(np.uint8).data
        while left:
            count = os.preadv(self._descriptor, [left], offset)
            if not count:
                raise OSError("a file of weights ends early")
            left, offset = left[count:], offset + count
