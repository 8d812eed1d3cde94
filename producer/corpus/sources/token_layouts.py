"""Layouts of token files: a header says which numbers a file holds; without one, a sample must look like the settings.

    layout = read_layout(path, size, np.dtype("<u2"))       # Layout, or in words why the file cannot be used

Headers are believed: numpy (.npy), llm.c (GPT-2 and Llama 3), Lit-GPT's packed datasets, and Megatron, whose header is
the .idx file beside the .bin. What has none is read as corpus.token_dtype says, unless a sample of the file shows that
it cannot be so: a wrong format that still "fits" the vocabulary would be trained on as noise, silently.

    written as        read as uint16               seen by
    uint32, int64     id, 0, id, 0, …              every second number is at most HIGHEST, and the others are not
    another order     low and high byte swapped    low bytes vary less than high bytes (of many ids)
    uint16            as uint32: beyond 2^24       no vocabulary is so large

Small files and few distinct ids show neither and are taken as they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEAD_BYTES = 64 * 1024
BLOCKS, BLOCK_BYTES = 64, 4096
"""The sample of a file without a header: so many blocks, evenly spread, each of so many bytes."""
MIN_GROUPS = 32
"""Pairs of ids below which a file is not judged."""
HIGHEST = 4
"""The largest upper half (the bits above the lower 16) of a token id: vocabularies end below 5 · 65,536."""
LARGEST_ID = 2**24
MANY_IDS, MANY_DISTINCT = 16_384, 1_000
"""Ids, and distinct ones, below which the order of bytes is not judged."""
ENTROPY_MARGIN = 0.25
"""Bits of entropy by which high bytes must vary more than low ones."""

NUMPY = b"\x93NUMPY"
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LIT_GPT = b"LITPKDS"
LIT_GPT_BYTES = 24
LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Number formats by magic number and version: GPT-2, Llama 3."""
LLM_C_BYTES = 1024
WITHOUT_HEADER = {"<u2": "uint16", "<u4": "uint32", "<i8": "int64", ">u2": "", ">u4": "", ">i8": ""}
"""Formats that a file without a header may have, and what corpus.token_dtype calls those that are read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The offset and the number format of the ids in a file."""

    dtype: np.dtype
    start: int = 0
    """Bytes before the first id."""
    count: int | None = None
    """Number of ids that the header promises."""


def read_layout(path: Path, size: int, expected: np.dtype) -> Layout | str:
    """Reads the layout of a file of `size` bytes, or says in words why its ids cannot be read.

    `expected` is the format of files without a header. Raises OSError.
    """
    with path.open("rb") as stream:
        layout = _from_header(path, stream.read(HEAD_BYTES))
        if layout is None:
            return _fault(_sample(stream, size), size, expected, path) or Layout(expected)
    if isinstance(layout, str):
        return layout
    count, rest = divmod(size - layout.start, layout.dtype.itemsize)
    if rest or layout.count not in (None, count):
        promise = f"{'' if layout.count is None else f'{layout.count:,} '}ids of {layout.dtype.name}"
        return f"its header promises {promise}, and {size - layout.start:,} bytes follow; replace the file"
    return layout


# Headers


def _from_header(path: Path, head: bytes) -> Layout | str | None:
    """Returns the layout that a header gives, or what is wrong with it; None where there is no header."""
    if head.startswith(NUMPY):
        return _numpy(head)
    if head.startswith(LIT_GPT) and len(head) >= LIT_GPT_BYTES:
        return _megatron_type(head[15], LIT_GPT_BYTES)
    if head.startswith(MEGATRON):
        return "an index of Megatron, which holds no ids; name the .bin file beside it"
    if (index := _index_of(path)) is not None:
        return _megatron_type(index[17], 0)
    magic, version, count = struct.unpack("<iii", head[:12]) if len(head) >= LLM_C_BYTES else (0, 0, 0)
    if magic not in {number for number, _ in LLM_C}:
        return None
    if (dtype := LLM_C.get((magic, version))) is None:
        return f"a token file of llm.c, version {version}, which Sluice cannot read; write the ids with numpy.save"
    return Layout(np.dtype(dtype), LLM_C_BYTES, count)


def _numpy(head: bytes) -> Layout | str:
    """Returns the layout of a .npy file."""
    stream = BytesIO(head)
    readers: dict[tuple[int, int], Callable[[BinaryIO], tuple[tuple[int, ...], bool, np.dtype]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, is_column_order, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # numpy evaluates the header, and errors of Python's own parser come out
        return f"a .npy file with a header that cannot be read ({error}); write it again with numpy.save"
    if dtype.kind not in "iu":
        return f"a .npy file of {dtype.name}; expected whole numbers, such as uint16 or int64"
    if is_column_order and len(shape) > 1:
        return "a .npy file in column order; write numpy.ascontiguousarray(ids) with numpy.save"
    return Layout(dtype, stream.tell(), math.prod(shape))


def _index_of(path: Path) -> bytes | None:
    """Reads the head of the .idx file that Megatron writes beside a .bin file; None without one."""
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return None
    with index.open("rb") as stream:
        head = stream.read(34)
    return head if head.startswith(MEGATRON) and len(head) == 34 else None


def _megatron_type(code: int, start: int) -> Layout | str:
    """Returns the layout of ids in a number format that Megatron and Lit-GPT give as a code."""
    if code not in MEGATRON_TYPES:
        return f"its header names number format {code}, which is no whole number; expected token ids"
    return Layout(np.dtype(MEGATRON_TYPES[code]), start)


# Without a header


def _sample(stream: BinaryIO, size: int) -> bytes:
    """Reads blocks from the whole of a file; each begins and ends at a multiple of eight bytes."""
    if size <= BLOCKS * BLOCK_BYTES:
        starts, length = [0], size
    else:
        starts, length = [(size - BLOCK_BYTES) * block // (BLOCKS - 1) // 8 * 8 for block in range(BLOCKS)], BLOCK_BYTES
    blocks = []
    for start in starts:
        stream.seek(start)
        blocks.append(stream.read(length))
    sample = b"".join(blocks)
    return sample[: len(sample) // 8 * 8] if size >= 8 else sample


def _fault(sample: bytes, size: int, expected: np.dtype, path: Path) -> str | None:
    """Says why a file without a header cannot hold what the settings say, what else it can hold, and what to do."""
    if len(sample) >= 2 * MIN_GROUPS and _is_plain_text(sample):
        return 'plain text, no token ids; set corpus.kind = "text" or "jsonl"'
    if (reason := _implausible(sample, size, expected)) is None:
        return None
    others = [dtype for dtype in WITHOUT_HEADER if _implausible(sample, size, np.dtype(dtype)) is None]
    # The usual order of bytes is meant wherever both are possible.
    others = [dtype for dtype in others if dtype[0] == "<" or dtype.replace(">", "<") not in others]
    reasons = [reason] + [
        f"as {np.dtype(dtype).name}{_order(dtype)} {_show_ids(sample, np.dtype(dtype))}" for dtype in others
    ]
    remedies = [
        f'set corpus.token_dtype = "{WITHOUT_HEADER[dtype]}"'
        if WITHOUT_HEADER[dtype]
        else _conversion(path, np.dtype(dtype))
        for dtype in others
    ]
    return f"{'; '.join(reasons)}; {', or '.join(remedies) or 'correct corpus.token_dtype'}"


def _is_plain_text(sample: bytes) -> bool:
    return not sample.translate(None, bytes(range(32, 127)) + b"\t\r\n")


def _implausible(sample: bytes, size: int, dtype: np.dtype) -> str | None:
    """Says why a file of `size` bytes with this sample cannot hold ids of this format; None when it can."""
    if size % dtype.itemsize:
        return f"{size:,} bytes are no whole number of {dtype.name}"
    ids = np.frombuffer(sample, dtype)
    oddity = None
    if dtype.itemsize > 2 and (ids.min() < 0 or ids.max() >= LARGEST_ID):
        oddity = "which no vocabulary has"
    elif (highest := _high_parts(ids, 2)) is not None:
        oddity = f"where every second one is at most {highest}, as the high halves of wider numbers are"
    elif (highest := _high_parts(ids, 4)) is not None:
        oddity = f"where three of four are at most {highest}, as the high parts of wider numbers are"
    elif dtype.itemsize == 2 and len(ids) >= MANY_IDS and _is_swapped(ids):
        oddity = "where low bytes vary less than high bytes, as in the other order of bytes"
    if oddity is None:
        return None
    remedy = "if it is right, write it with numpy.save: headers decide"
    return f"as {dtype.name} {_show_ids(sample, dtype)}, {oddity} ({remedy})"


def _high_parts(ids: np.ndarray, parts: int) -> int | None:
    """Returns the largest high part if one id in `parts` is the low part of a wider number; None otherwise.

    Both orders of bytes are tried.
    """
    if ids.itemsize * parts > 8:
        return None
    limit = HIGHEST if ids.itemsize == 2 else 0
    unsigned = ids.view(f"{ids.dtype.byteorder}u{ids.itemsize}")
    for numbers in (unsigned, unsigned.byteswap()):
        groups = numbers[: len(ids) // parts * parts].reshape(-1, parts)
        groups = groups[groups.any(1)]  # padding with zeros decides nothing
        for low, high in ((groups[:, 0], groups[:, 1:]), (groups[:, -1], groups[:, :-1])):
            if len(groups) >= MIN_GROUPS and high.max() <= limit and (low > limit).mean() > 0.5:
                return int(high.max())
    return None


def _is_swapped(ids: np.ndarray) -> bool:
    return len(np.unique(ids)) >= MANY_DISTINCT and _entropy(ids & 0xFF) < _entropy(ids >> 8) - ENTROPY_MARGIN


def _entropy(numbers: np.ndarray) -> float:
    """Returns the entropy of numbers below 256, in bits."""
    shares = np.bincount(numbers, minlength=256) / len(numbers)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def _show_ids(sample: bytes, dtype: np.dtype) -> str:
    ids = np.frombuffer(sample, dtype)
    return f"the ids are {', '.join(map(str, ids[:4]))}, … up to {ids.max():,}"


def _order(dtype: str) -> str:
    return " with the high byte first" if dtype.startswith(">") else ""


def _conversion(path: Path, dtype: np.dtype) -> str:
    little = dtype.newbyteorder("<").str
    code = f"numpy.fromfile({str(path)!r}, {dtype.str!r}).astype({little!r}).tofile('NEW.bin')"
    return f'convert the file: python -c "import numpy; {code}"'
