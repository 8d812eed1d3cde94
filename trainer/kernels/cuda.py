"""Sparse products and the optimizer's step as Triton kernels: plain functions over plain tensors of one GPU.

What the methods of `sparse.Entries`, `select` and `optimizer` become on CUDA; `cpu.py` has the same functions for
processors, `cuda_select.py` holds the choice of latents. Every element of an output is written by one program that adds
in a fixed order: there are no atomics, and block sizes follow from shapes alone, never from timing. The same input
gives the same bits. The host never waits, except in `above` for the number of entries.

Indices are int64, what torch indexes with (int32 is taken too; indices are a hundredth of the bytes a product moves).
`value` is float32 or float64 and decides what sums are taken in; matrices may also be bfloat16.

A product reads rows of its operand at random. Programs are numbered such that all rows of the output see the operand's
first slice of columns, then all of them its second: a slice stays in the L2 cache, and GPU memory is read once per
element instead of once per entry. Own design from the formulas of algorithms.md §9, written above each kernel.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from trainer.kernels.cuda_select import above, count_above, launch, power_of_two, topk

__all__ = [
    "above", "adam_rows", "count_above", "multiply", "multiply_transposed", "project", "sample", "sums", "topk",
    "transpose",
]  # fmt: skip

SLICE_BYTES = 24 * 2**20
"""So much of an operand stays in the L2 cache of an H100 or H200 (50 MB in two halves)."""
CHUNK = 512
"""A column's entries are shared out among programs in chunks of this size, so that dense latents do not take long."""
PARTIAL_SUMS = 2**26
"""`sample` holds no more partial sums than this."""
FLAT = 4096
"""Elements of a program of the optimizer that need not see a whole row."""


# Products


def multiply(start: Tensor, column: Tensor, value: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """For each row the weighted sum of the rows of W that its entries name, written to `out` if given.

    W [columns, d] → [rows, d].
    """
    rows, d = len(start) - 1, W.shape[1]
    tile = _tile(W)
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


def sample(start: Tensor, column: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """A @ W.T, computed only at the entries: A [rows, d], W [columns, d] → float32 (of float64: float64) [entries]."""
    rows, entries, d = len(start) - 1, len(column), W.shape[1]
    tile = _tile(W)
    blocks = triton.cdiv(d, tile["BLOCK"])
    width = tile["BLOCK"] * min(blocks, max(1, triton.cdiv(blocks * entries, PARTIAL_SUMS)))
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


# Products with the transpose


def transpose(start: Tensor, column: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries by column: (start [columns + 1], row [entries], order [entries]: where each entry stood before).

    A stable sort, so rows ascend within a column. CUB's radix sort is a counting sort for each digit of 8 bits; a
    kernel of our own would be as many launches.
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
    """For each column the weighted sum of the rows of X that its entries name, written to `out` if given.

    X [rows, d] → [columns, d]; `start` and `row` as from `transpose`, `value` in that order.
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
    """out[column, slice] = Σ_j value_j · X[row_j, slice] over the entries j of the column, whole chunks from before."""
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
    """out[column] = Σ_j value_j over the entries j of each of COLUMNS columns, whole chunks from before."""
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
    for done in range(0, tl.max(end - begin), ENTRIES):
        entry = begin[:, None] + done + tl.arange(0, ENTRIES)[None, :]
        total += tl.load(value + entry, entry < end[:, None], 0.0)
    return total


def _tile(X: Tensor) -> dict[str, int]:
    """How many entries × columns of X [rows, d] a program loads at once.

    At most 512 columns; fewer where X has many rows, or d fits badly. A thread has 16 bytes of a row, of 8 entries in
    float32, so that sums over entries stay in its registers.
    """
    (rows, d), size = X.shape, X.element_size()
    block = min(512, max(64, power_of_two(d)))
    while block > 64 and (rows * block * size > SLICE_BYTES or -d % block > d // 8):
        block //= 2
    return {"ENTRIES": 2 * size, "BLOCK": block, "num_warps": max(1, block * size // 512)}


# The optimizer


def project(grad: Tensor, W: Tensor | None) -> Tensor:
    """Removes from each row of `grad` [rows, d], in place, its component along the unit row of W, when W is given.

    Returns the squared norm of each row afterwards, [rows].
    """
    rows, d = grad.shape
    # Without W a long row, which a vector is, can be shared out.
    width = d if W is not None else min(d, FLAT)
    pieces = triton.cdiv(d, width)
    square = grad.new_empty(rows, pieces)
    launch(_project, (rows, pieces), grad, W, square, d, width, **_row(width))
    return square[:, 0] if pieces == 1 else square.sum(1)


@triton.jit
def _project(grad: tensor, W: tensor, square: tensor, d: int, width: int, BLOCK: constexpr) -> None:
    """grad[row] −= (grad[row] · W[row]) W[row];  square[row, piece] = |grad[row, piece]|², pieces `width` wide."""
    row = tl.program_id(0).to(tl.int64) * d
    first = tl.program_id(1) * width
    along = tl.zeros((BLOCK,), grad.dtype.element_ty)
    if W is not None:
        for block in range(0, width, BLOCK):
            at = first + block + tl.arange(0, BLOCK)
            g = tl.load(grad + row + at, at < d, 0.0)
            along += g * tl.load(W + row + at, at < d, 0.0)
    component = tl.sum(along, 0)
    total = tl.zeros((BLOCK,), grad.dtype.element_ty)
    for block in range(0, width, BLOCK):
        at = first + block + tl.arange(0, BLOCK)
        g = tl.load(grad + row + at, at < d, 0.0)
        if W is not None:
            g -= component * tl.load(W + row + at, at < d, 0.0)
            tl.store(grad + row + at, g, at < d)
        total += g * g
    tl.store(square + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


def adam_rows(
    W: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    half: Tensor | None,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    scale: Tensor,
    unit: bool,
) -> None:
    """One step of Adam on W with the gradient grad · scale, in place; all float32, of one shape.

    `step` counts this step too. `scale` is a 0-d tensor on the device, so that nobody waits for the norm it comes from;
    one that is not finite changes nothing. With `unit`, rows of W [rows, d] are renormalised. `half`, bfloat16,
    receives W rounded.
    """
    assert all(x.dtype == torch.float32 and x.shape == W.shape for x in (W, grad, m, v))
    # Only `unit` knows rows; a vector would otherwise be the work of one program.
    width = W.shape[1] if unit else FLAT
    launch(
        _adam, (triton.cdiv(W.numel(), width),), W, grad, m, v, half, scale, W.numel(), width,
        rate / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), betas[0], 1 - betas[0], betas[1], 1 - betas[1],
        eps, UNIT=unit, **_row(width),
    )  # fmt: skip


@triton.jit
def _adam(
    W: tensor, grad: tensor, m: tensor, v: tensor, half: tensor, scale: tensor, size: tensor, width: int,
    rate: float, root: float, beta1: float, rest1: float, beta2: float, rest2: float, eps: float,
    UNIT: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  W ← W − rate · m / (√v / root + ε),  W ← W / |W| when UNIT.

    rate = learning rate / (1 − β₁ᵗ), root = √(1 − β₂ᵗ), as torch.optim.Adam.
    """
    begin = tl.program_id(0).to(tl.int64) * width
    factor = tl.load(scale)
    square = tl.zeros((BLOCK,), tl.float32)
    if tl.abs(factor) < float("inf"):
        for block in range(0, width, BLOCK):
            at = block + tl.arange(0, BLOCK)
            inside = (at < width) & (begin + at < size)
            at = begin + at
            g = tl.load(grad + at, inside, 0.0) * factor
            first = beta1 * tl.load(m + at, inside, 0.0) + rest1 * g
            second = beta2 * tl.load(v + at, inside, 0.0) + rest2 * g * g
            w = tl.load(W + at, inside, 0.0)
            w -= tl.div_rn(rate * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
            tl.store(m + at, first, inside)
            tl.store(v + at, second, inside)
            tl.store(W + at, w, inside)
            if UNIT:
                square += w * w
            elif half is not None:
                tl.store(half + at, w, inside)
        if UNIT:
            # What other threads of this program have stored is read again, from a cache.
            tl.debug_barrier()
            norm = tl.maximum(tl.sqrt_rn(tl.sum(square, 0)), 1e-12)
            for block in range(0, width, BLOCK):
                at = block + tl.arange(0, BLOCK)
                inside = at < width
                w = tl.div_rn(tl.load(W + begin + at, inside, 0.0), norm)
                tl.store(W + begin + at, w, inside)
                if half is not None:
                    tl.store(half + begin + at, w, inside)


def _row(d: int) -> dict[str, int]:
    """Elements of a row of d that an optimizer's program works on at a time, and its warps.

    Four for each thread, 16 bytes: with more, Triton would shuffle them before every store because of `half`.
    """
    block = min(1024, max(128, power_of_two(d)))
    return {"BLOCK": block, "num_warps": block // 128}
