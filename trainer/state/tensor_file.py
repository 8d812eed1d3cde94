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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from producer.common.parsing import ParseError, parse_object

PAGE_BYTES = 4096
NUMBER_BYTES = 4
LENGTH_BYTES = 8
"""Of the number at the beginning: the length of the header."""
LONGEST_HEADER = 100_000_000
"""The bound of safetensors itself."""


class TensorFileError(OSError):
    """The file is no safetensors file of float32 tensors."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: its first byte in the file, and its shape."""

    offset: int
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return NUMBER_BYTES * math.prod(self.shape[1:])


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


class TensorFile(AbstractContextManager["TensorFile"]):
    """A file that `create` or safetensors has written, open for reading or for writing parts of its tensors."""

    def __init__(self, path: Path, mode: Literal["read", "write"] = "read") -> None:
        """Raises TensorFileError, or OSError."""
        self._descriptor = os.open(path, os.O_RDONLY if mode == "read" else os.O_RDWR)
        self._is_writing = mode == "write"
        try:
            self._places = self._read_header()
        except (ParseError, LookupError, TypeError, ValueError) as error:
            os.close(self._descriptor)
            raise TensorFileError(f"{path} is no safetensors file of float32 tensors: {error}") from None

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, from row `first` on."""
        place = self._places[name]
        self._write(np.ascontiguousarray(rows, np.float32), place.offset + first * place.row_bytes)

    def write_columns(self, name: str, first: int, columns: np.ndarray) -> None:
        """Writes columns of a matrix, from column `first` on; `columns` is contiguous in rows."""
        place = self._places[name]
        if columns.shape == place.shape:
            self.write_rows(name, 0, columns)
            return
        for row, numbers in enumerate(np.ascontiguousarray(columns, np.float32)):
            self._write(numbers, place.offset + row * place.row_bytes + first * NUMBER_BYTES)

    def read_rows(self, name: str, first: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `first` to `end` of a tensor, in memory of their own."""
        place = self._places[name]
        end = place.shape[0] if end is None else end
        rows = np.empty((end - first, *place.shape[1:]), np.float32)
        self._read_into(rows, place.offset + first * place.row_bytes)
        return rows

    def read_columns(self, name: str, first: int, end: int) -> np.ndarray:
        """Columns `first` to `end` of a matrix, in memory of their own."""
        place = self._places[name]
        if (first, end) == (0, place.shape[1]):
            return self.read_rows(name)
        columns = np.empty((place.shape[0], end - first), np.float32)
        for row, numbers in enumerate(columns):
            self._read_into(numbers, place.offset + row * place.row_bytes + first * NUMBER_BYTES)
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

    def _read_header(self) -> dict[str, _Place]:
        length = int.from_bytes(os.pread(self._descriptor, LENGTH_BYTES, 0), "little")
        if length > min(LONGEST_HEADER, os.fstat(self._descriptor).st_size):
            raise ValueError(f"its header would have {length} bytes")
        header = parse_object(os.pread(self._descriptor, length, LENGTH_BYTES))
        header.pop("__metadata__", None)
        if other := {entry["dtype"] for entry in header.values()} - {"F32"}:
            raise ValueError(f"it has tensors of type {', '.join(sorted(other))}")
        begin = LENGTH_BYTES + length
        return {
            name: _Place(begin + int(entry["data_offsets"][0]), tuple(entry["shape"])) for name, entry in header.items()
        }

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
