"""The header of a safetensors file: which tensors it holds and where, without reading their numbers.

8 bytes of length, so many bytes of JSON, then the numbers of all tensors.

Light: the standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from producer.common.parsing import ParseError, parse_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""Names of a model's weights in a checkpoint: one file, or the index of several."""
LENGTH_BYTES = 8
"""Of the number at the beginning: the length of the header."""
LONGEST_HEADER = 100_000_000
"""Bytes; the bound of safetensors itself."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str
    """As safetensors names it, such as F32."""
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""
    end: int
    """The byte after its last one."""


def read_header(descriptor: int) -> dict[str, TensorEntry]:
    """Reads the tensors of an open file, by name. Raises ParseError, and OSError where the file cannot be read."""
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    if length > min(LONGEST_HEADER, os.fstat(descriptor).st_size):
        raise ParseError(f"its header would have {length} bytes")
    header = parse_object(os.pread(descriptor, length, LENGTH_BYTES))
    header.pop("__metadata__", None)
    return {name: _entry(name, entry, LENGTH_BYTES + length) for name, entry in header.items()}


def _entry(name: str, entry: Any, first_byte: int) -> TensorEntry:
    try:
        begin, end = (first_byte + int(offset) for offset in entry["data_offsets"])
        return TensorEntry(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), begin, end)
    except (LookupError, TypeError, ValueError):
        raise ParseError(f"no dtype, shape and data_offsets of tensor {name!r}") from None
