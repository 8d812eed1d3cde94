"""Sparse products as Triton kernels, plain functions over tensors of one GPU; and the module that has all its kernels.

The methods of `sparse.Entries`, `select`, the optimizer and the statistics call these functions on CUDA:
`cuda_select.py` selects latents, `cuda_rows.py` passes over full matrices; `cpu.py` has the same functions. Every
element of an output is written by one program that adds in a fixed order: there are no atomics, and block sizes follow
from shapes alone, never from timing. The same input gives the same bits. The host waits in `above` only, for the number
of entries.

Indices are int64 as torch's (int32 works too; indices are a hundredth of the bytes that a product moves). `value` is
float32 or float64, and so are its sums; matrices may also be bfloat16.

A product reads rows of its operand at random. Programs are numbered such that all rows of the output see the operand's
first slice of columns, then all of them its second: a slice stays in the L2 cache, and GPU memory is read once per
element instead of once per entry. The formula stands above each kernel; the sparse products of an SAE's step are those
of Gao et al. 2024 (arXiv 2406.04093, appendix D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from trainer.kernels.cuda_rows import adam_rows, moments, project
from trainer.kernels.cuda_select import above, count_above, topk
from trainer.kernels.launch import launch, power_of_two
from trainer.kernels.portable import centred

__all__ = [
    "above", "adam_rows", "centred", "count_above", "decode", "moments", "multiply", "multiply_transposed", "project",
    "sample", "sums", "topk", "transpose",
]  # fmt: skip

SLICE_BYTES = 24 * 2**20
"""The part of an operand that stays in the L2 cache of an H100 or H200 (50 MB in two halves)."""
CHUNK = 512
"""A column's entries are split among programs in chunks of this size, so that dense latents do not take long."""
PARTIAL_SUMS = 2**26
"""`sample` holds no more partial sums than this."""


# Products


def multiply(
    start: Tensor,
    column: Tensor,
    value: Tensor,
    W: Tensor,
    out: Tensor | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> Tensor:
    """Σ value · W[column] over the entries of each row: W [columns, d] → [rows, d], in `out` if there is one."""
    rows, d = len(start) - 1, W.shape[1]
    tile = _tile(W, slice_bytes)
    out = value.new_empty(rows, d) if out is None else out
    grid = rows, triton.cdiv(d, tile["BLOCK"])
    launch(_multiply, grid, start, column, value.contiguous(), W.contiguous(), out, d, **tile)
    return out


@triton.jit
def _multiply(
    start: tensor, column: tensor, value: tensor, W: tensor, out: tensor, d: int, ENTRIES: constexpr, BLOCK: constexpr
) -> None:  # fmt: skip
    """out[row, slice] = Σ_j value_j · W[column_j, slice] over the entries j of the row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ENTRIES, BLOCK), out.dtype.element_ty)
    total = _gather(total, tl.load(start + row), tl.load(start + row + 1), column, value, W, at, d, ENTRIES)
    tl.store(out + row * d + at, tl.sum(total, 0), at < d)


@triton.jit
def _gather(
    total: tensor, begin: tensor, end: tensor, index: tensor, value: tensor, X: tensor, at: tensor, d: int,
    ENTRIES: constexpr,
) -> tensor:  # fmt: skip
    """total + Σ_j value_j · X[index_j, at] over begin ≤ j < end, in ENTRIES sums side by side: [ENTRIES, BLOCK]."""
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        present = entry < end
        row = tl.load(index + entry, present, 0).to(tl.int64)
        x = tl.load(X + row[:, None] * d + at[None, :], present[:, None] & (at < d)[None, :], 0.0)
        total += tl.load(value + entry, present, 0.0)[:, None] * x.to(total.dtype)
    return total


def sample(
    start: Tensor,
    column: Tensor,
    A: Tensor,
    W: Tensor,
    partial_sums: int = PARTIAL_SUMS,
    slice_bytes: int = SLICE_BYTES,
) -> Tensor:
    """A @ W.T, computed only at the entries: A [rows, d], W [columns, d] → float32 (of float64: float64) [entries]."""
    rows, entries, d = len(start) - 1, len(column), W.shape[1]
    tile = _tile(W, slice_bytes)
    blocks = triton.cdiv(d, tile["BLOCK"])
    width = tile["BLOCK"] * min(blocks, max(1, triton.cdiv(blocks * entries, partial_sums)))
    slices = triton.cdiv(d, width) if entries else 0
    out = W.new_empty(slices, entries, dtype=torch.promote_types(torch.promote_types(A.dtype, W.dtype), torch.float32))
    operands = start, column, A.contiguous(), W.contiguous(), out
    launch(_sample, (rows, slices), *operands, entries, d, width, **tile)
    return out[0] if slices == 1 else out.sum(0)


@triton.jit(do_not_specialize=["entries"])
def _sample(
    start: tensor, column: tensor, A: tensor, W: tensor, out: tensor, entries: tensor, d: int, width: int,
    ENTRIES: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """out[slice, j] = A[row, slice] · W[column_j, slice] for the entries j of the row; slices are `width` wide."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        present = entry < end
        which = tl.load(column + entry, present, 0).to(tl.int64)[:, None]
        product = tl.zeros((ENTRIES, BLOCK), out.dtype.element_ty)
        for block in range(0, width, BLOCK):
            at = tl.program_id(1) * width + block + tl.arange(0, BLOCK)
            a = tl.load(A + row * d + at, at < d, 0.0).to(product.dtype)
            w = tl.load(W + which * d + at[None, :], present[:, None] & (at < d)[None, :], 0.0)
            product += a[None, :] * w.to(product.dtype)
        tl.store(out + tl.program_id(1).to(tl.int64) * entries + entry, tl.sum(product, 1), present)


def decode(
    start: Tensor,
    column: Tensor,
    value: Tensor,
    W: Tensor,
    b: Tensor,
    y: Tensor,
    weight: float,
    partial_sums: int = PARTIAL_SUMS,
    slice_bytes: int = SLICE_BYTES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y_hat, g, |y − y_hat|², sampled): the reconstruction of y, and the gradient of weight · |y − y_hat|².

    y_hat = entries @ W + b and g = 2 weight (y_hat − y) are [rows, d], the squares [rows], sampled = g[row] · W[column]
    is [entries]. `multiply` and `sample` in one pass, while rows of W are in a cache.
    """
    (rows, d), entries = y.shape, len(column)
    tile = _tile(W, slice_bytes)
    slices = triton.cdiv(d, tile["BLOCK"])
    if slices * entries > partial_sums:
        y_hat = multiply(start, column, value, W, slice_bytes=slice_bytes) + b
        error = y_hat - y
        g = 2 * weight * error
        return y_hat, g, error.square().sum(1), sample(start, column, g, W, partial_sums, slice_bytes)
    y_hat, g = y.new_empty(rows, d), y.new_empty(rows, d)
    square, sampled = y.new_empty(slices, rows), y.new_empty(slices, entries)
    operands = start, column, value.contiguous(), W.contiguous(), b.contiguous(), y.contiguous()
    results = y_hat, g, square, sampled
    launch(_decode, (rows, slices), *operands, y.new_full((), 2 * weight), *results, entries, d, **tile)
    return y_hat, g, square.sum(0), sampled.sum(0)


@triton.jit(do_not_specialize=["entries"])
def _decode(
    start: tensor, column: tensor, value: tensor, W: tensor, b: tensor, y: tensor, factor: tensor,
    y_hat: tensor, g: tensor, square: tensor, sampled: tensor, entries: tensor, d: int,
    ENTRIES: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """y_hat = Σ_j value_j · W[column_j] + b,  g = factor · (y_hat − y),  sampled_j = g · W[column_j], for one slice."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    total = tl.zeros((ENTRIES, BLOCK), y.dtype.element_ty)
    total = _gather(total, begin, end, column, value, W, at, d, ENTRIES)
    output = tl.sum(total, 0) + tl.load(b + at, at < d, 0.0)
    error = output - tl.load(y + row * d + at, at < d, 0.0)
    grad = error * tl.load(factor)
    tl.store(y_hat + row * d + at, output, at < d)
    tl.store(g + row * d + at, grad, at < d)
    tl.store(square + part * tl.num_programs(0) + row, tl.sum(error * error, 0))
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        present = entry < end
        which = tl.load(column + entry, present, 0).to(tl.int64)[:, None]
        w = tl.load(W + which * d + at[None, :], present[:, None] & (at < d)[None, :], 0.0).to(grad.dtype)
        tl.store(sampled + part * entries + entry, tl.sum(grad[None, :] * w, 1), present)


# Products with the transpose


def transpose(start: Tensor, column: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries by column: (start [columns + 1], row [entries], order [entries]: position of each entry by row).

    A stable sort, so rows ascend within a column. CUB's radix sort is a counting sort for each digit of 8 bits; an own
    kernel would need as many launches.
    """
    # Keys of 16 bits have half the digits.
    least, kind = (-(2**15), torch.int16) if columns <= 2**16 else (0, torch.int32)
    key, order = torch.sort((column + least).to(kind), stable=True)
    starts = torch.full((columns + 1,), len(key), dtype=torch.int64, device=key.device)
    starts[:-1] = torch.searchsorted(key, (torch.arange(columns, device=key.device) + least).to(kind))
    return starts, torch.searchsorted(start, order, right=True) - 1, order


def multiply_transposed(
    start: Tensor, row: Tensor, value: Tensor, X: Tensor, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Σ value · X[row] over the entries of each column: X [rows, d] → [columns, d], in `out` if there is one.

    `start` and `row` as from `transpose`, `value` in that order.
    """
    columns, d = len(start) - 1, X.shape[1]
    tile = _tile(X)
    slices, chunks = triton.cdiv(d, tile["BLOCK"]), len(row) // CHUNK
    of_chunks = value.new_empty(chunks, d)
    out = value.new_empty(columns, d) if out is None else out
    operands = start, row, value.contiguous(), X.contiguous(), of_chunks
    launch(_multiply_chunk, (chunks, slices), *operands, columns, d, CHUNK=CHUNK, **tile)
    launch(_multiply_column, (columns, slices), *operands, out, d, CHUNK=CHUNK, **tile)
    return out


@triton.jit
def _multiply_chunk(
    start: tensor, row: tensor, value: tensor, X: tensor, of_chunks: tensor, columns: int, d: int,
    CHUNK: constexpr, ENTRIES: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """of_chunks[chunk, slice] = Σ_j value_j · X[row_j, slice] over a chunk all of whose entries are of one column."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    # The column of the first entry: start[column] ≤ begin < start[column + 1].
    column, beyond = tl.program_id(0) * 0, tl.program_id(0) * 0 + columns
    while beyond - column > 1:
        middle = (column + beyond) // 2
        is_after = tl.load(start + middle) > begin
        column = tl.where(is_after, column, middle)
        beyond = tl.where(is_after, middle, beyond)
    if tl.load(start + column + 1) >= begin + CHUNK:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((ENTRIES, BLOCK), of_chunks.dtype.element_ty)
        total = _gather(total, begin, begin + CHUNK, row, value, X, at, d, ENTRIES)
        tl.store(of_chunks + tl.program_id(0).to(tl.int64) * d + at, tl.sum(total, 0), at < d)


@triton.jit
def _multiply_column(
    start: tensor, row: tensor, value: tensor, X: tensor, of_chunks: tensor, out: tensor, d: int,
    CHUNK: constexpr, ENTRIES: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """out[column, slice] = Σ_j value_j · X[row_j, slice] over the entries j of the column, given whole chunks' sums."""
    column = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(start + column), tl.load(start + column + 1)
    first, last = _whole_chunks(begin, end, CHUNK)
    total = tl.zeros((ENTRIES, BLOCK), out.dtype.element_ty)
    total = _gather(total, begin, first, row, value, X, at, d, ENTRIES)
    for some in range(first // CHUNK, last // CHUNK, ENTRIES):
        chunk = some + tl.arange(0, ENTRIES)
        present = (chunk < last // CHUNK)[:, None] & (at < d)[None, :]
        total += tl.load(of_chunks + chunk[:, None] * d + at[None, :], present, 0.0)
    total = _gather(total, last, end, row, value, X, at, d, ENTRIES)
    tl.store(out + column * d + at, tl.sum(total, 0), at < d)


@triton.jit
def _whole_chunks(begin: tensor, end: tensor, CHUNK: constexpr) -> tensor:
    """Multiples of CHUNK between which [begin, end) has only whole chunks; both `end` when it has none."""
    first = tl.minimum((begin + CHUNK - 1) // CHUNK * CHUNK, end)
    return first, tl.maximum(end // CHUNK * CHUNK, first)


def sums(start: Tensor, value: Tensor) -> Tensor:
    """The sum of `value` over each column, [columns]; `value` in the order of columns."""
    columns, chunks, value = len(start) - 1, len(value) // CHUNK, value.contiguous()
    of_chunks, out = value.new_empty(chunks), value.new_empty(columns)
    launch(_sum_chunk, (chunks,), value, of_chunks, CHUNK=CHUNK)
    launch(
        _sum_columns, (triton.cdiv(columns, 32),), start, value, of_chunks, out, columns,
        CHUNK=CHUNK, COLUMNS=32, ENTRIES=16,
    )  # fmt: skip
    return out


@triton.jit
def _sum_chunk(value: tensor, of_chunks: tensor, CHUNK: constexpr) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    tl.store(of_chunks + chunk, tl.sum(tl.load(value + chunk * CHUNK + tl.arange(0, CHUNK))))


@triton.jit
def _sum_columns(
    start: tensor, value: tensor, of_chunks: tensor, out: tensor, columns: int,
    CHUNK: constexpr, COLUMNS: constexpr, ENTRIES: constexpr,
) -> None:  # fmt: skip
    """out[column] = Σ_j value_j over the entries j of COLUMNS columns, given sums of whole chunks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(start + column, column < columns, 0)
    end = tl.load(start + column + 1, column < columns, 0)
    first, last = _whole_chunks(begin, end, CHUNK)
    total = tl.zeros((COLUMNS, ENTRIES), out.dtype.element_ty)
    total = _add_runs(total, begin, first, value, ENTRIES)
    total = _add_runs(total, first // CHUNK, last // CHUNK, of_chunks, ENTRIES)
    total = _add_runs(total, last, end, value, ENTRIES)
    tl.store(out + column, tl.sum(total, 1), column < columns)


@triton.jit
def _add_runs(total: tensor, begin: tensor, end: tensor, value: tensor, ENTRIES: constexpr) -> tensor:
    """total + Σ_j value_j over begin ≤ j < end, for a run in each row, in ENTRIES sums side by side."""
    for offset in range(0, tl.max(end - begin), ENTRIES):
        entry = begin[:, None] + offset + tl.arange(0, ENTRIES)[None, :]
        total += tl.load(value + entry, entry < end[:, None], 0.0)
    return total


def _tile(X: Tensor, slice_bytes: int = SLICE_BYTES) -> dict[str, int]:
    """Entries and columns of X [rows, d] that a program loads at once.

    At most 512 columns; fewer where X has many rows, or much of the last block would be empty. A thread has 16 bytes of
    a row, of 8 entries in float32, so that sums over entries stay in its registers.
    """
    (rows, d), size = X.shape, X.element_size()
    block = min(512, max(64, power_of_two(d)))
    while block > 64 and (rows * block * size > slice_bytes or -d % block > d // 8):
        block //= 2
    return {"ENTRIES": 2 * size, "BLOCK": block, "num_warps": max(1, block * size // 512)}
