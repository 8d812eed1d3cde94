"""Passes over full matrices as Triton kernels: the optimizer's, and the statistics'; see `cuda.py`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from trainer.kernels.launch import launch, power_of_two

FLAT = 4096
"""Elements for a program that need not see a whole row."""
PIECE = 64
"""Rows that `moments` adds up in one program."""


def project(grad: Tensor, W: Tensor | None) -> Tensor:
    """Removes from each row of `grad` [rows, d], in place, its component along the unit row of W, when W is given.

    Returns the squared norm of each row afterwards, [rows].
    """
    rows, d = grad.shape
    # Without W a long row, such as a vector, can be split among programs.
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

    `step` counts this step too. `scale` is a 0-d tensor on the device, so that the host does not wait for the norm it
    is computed from; one that is not finite changes nothing. With `unit`, rows of W [rows, d] are renormalised. `half`,
    bfloat16, receives W rounded.
    """
    assert all(x.dtype == torch.float32 and x.shape == W.shape for x in (W, grad, m, v))
    # Only `unit` needs whole rows; a vector would otherwise be the work of one program.
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
            # Reads what other threads of this program have stored, from a cache.
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


def moments(x: Tensor, y: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ x, Σ y, [Σ |x|², Σ |y|², Σ x · y, Σ |x − y|²]) over rows x, y [rows, d] less `centre` [d], in float64."""
    rows, d = x.shape
    pieces, slices = triton.cdiv(rows, PIECE), triton.cdiv(d, 128)
    sums = torch.empty(2, pieces, d, dtype=torch.float64, device=x.device)
    squares = torch.empty(4, pieces, slices, dtype=torch.float64, device=x.device)
    operands = x.contiguous(), y.contiguous(), centre.contiguous(), sums, squares
    launch(_moments, (pieces, slices), *operands, rows, d, PIECE=PIECE, ROWS=4, BLOCK=128, num_warps=1)
    return *sums.sum(1), squares.sum((1, 2))


@triton.jit
def _moments(
    x: tensor, y: tensor, centre: tensor, sums: tensor, squares: tensor, rows: int, d: int,
    PIECE: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """sums[:, piece] = Σ x, Σ y;  squares[:, piece, slice] = Σ x², Σ y², Σ x y, Σ (x − y)², over PIECE rows."""
    piece, pieces = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    less = tl.load(centre + at, at < d, 0.0)[None, :]
    sum_x = tl.zeros((BLOCK,), tl.float64)
    sum_y, xx, yy, xy, ee = sum_x, sum_x, sum_x, sum_x, sum_x
    for first in range(0, PIECE, ROWS):
        row = piece * PIECE + first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (at < d)[None, :]
        one = tl.where(inside, tl.load(x + row * d + at[None, :], inside, 0.0) - less, 0.0).to(tl.float64)
        other = tl.where(inside, tl.load(y + row * d + at[None, :], inside, 0.0) - less, 0.0).to(tl.float64)
        sum_x += tl.sum(one, 0)
        sum_y += tl.sum(other, 0)
        xx += tl.sum(one * one, 0)
        yy += tl.sum(other * other, 0)
        xy += tl.sum(one * other, 0)
        ee += tl.sum((one - other) * (one - other), 0)
    tl.store(sums + piece * d + at, sum_x, at < d)
    tl.store(sums + (pieces + piece) * d + at, sum_y, at < d)
    place = squares + piece * tl.num_programs(1) + tl.program_id(1)
    size = pieces * tl.num_programs(1)
    tl.store(place, tl.sum(xx, 0))
    tl.store(place + size, tl.sum(yy, 0))
    tl.store(place + 2 * size, tl.sum(xy, 0))
    tl.store(place + 3 * size, tl.sum(ee, 0))
