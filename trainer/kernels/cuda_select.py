"""The choice of latents as Triton kernels; see `cuda.py`, through which it is reached."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from trainer.kernels.launch import launch, power_of_two

DIRECT = 4096
"""Rows of so many values are searched at once."""
LANES = 8192
CANDIDATES = 16384
"""What one program can hold at most, in registers."""


# The k largest


def topk(values: Tensor, k: int, most_candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """(value, index int64) of the k largest in each row of [rows, n], by ascending index. Exact, of any float type.

    Ties go to the lowest index; NaN counts as largest. Values are read once, whatever they are: column c belongs to
    lane c mod `lanes`, and the k lanes with the largest maxima hold all k largest values, since a value elsewhere is
    beaten by k maxima. Then only the members of these lanes are searched. Where these are too many to be held at once
    (n = 2^17: k above 1,024), torch.topk does it, with ties as they come.
    """
    rows, n = values.shape
    width = power_of_two(k)
    # The sum of lanes and candidates is least at √(k · n) lanes; candidates, read at random, count more.
    lanes = min(LANES, power_of_two(2 * math.sqrt(k * n)))
    candidates = width * power_of_two(n / lanes)
    is_direct = n <= max(DIRECT, lanes)
    if is_direct:
        width, lanes, candidates = 1, 1, power_of_two(n)
    if not 0 < k <= n or candidates > most_candidates or width > lanes:
        return torch.topk(values, k, sorted=False)
    values = values.contiguous()
    bits = 8 * values.element_size()
    integer = {16: tl.int16, 32: tl.int32, 64: tl.int64}[bits]
    sizes = {"WIDTH": width, "LANES": lanes, "PLACES": n.bit_length(), "BITS": bits, "INT": integer}
    chosen = None
    if not is_direct:
        chosen = torch.empty(rows, width, dtype=torch.int32, device=values.device)
        launch(_choose_lanes, (rows,), values, chosen, n, k, **sizes, num_warps=_warps(lanes))
    value, index = values.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64, device=values.device)
    launch(
        _choose_values, (rows,), values, chosen, value, index, n, k,
        CANDIDATES=candidates, **sizes, num_warps=_warps(candidates),
    )  # fmt: skip
    return value, index


@triton.jit
def _choose_lanes(
    values: tensor, chosen: tensor, n: int, k: int,
    WIDTH: constexpr, LANES: constexpr, PLACES: constexpr, BITS: constexpr, INT: constexpr,
) -> None:  # fmt: skip
    """chosen[row] = the k lanes with the largest maxima, ascending; of equal ones those whose maximum comes first.

    So lowest indices win in the end: a value equal to the k-th, in a lane left out, comes after one in each such lane
    that was taken.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    best = _key(tl.load(values + row * n + lane), BITS, INT)
    place = lane
    for first in range(LANES, n, LANES):
        at = first + lane
        key = _key(tl.load(values + row * n + at, at < n, float("-inf")), BITS, INT)
        place = tl.where(key > best, at, place)
        best = tl.maximum(key, best)
    is_chosen = _are_largest(best, place, k, BITS, PLACES)
    rank = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(chosen + row * WIDTH + rank, lane, is_chosen)


@triton.jit
def _choose_values(
    values: tensor, chosen: tensor, value: tensor, index: tensor, n: int, k: int,
    WIDTH: constexpr, LANES: constexpr, CANDIDATES: constexpr, PLACES: constexpr, BITS: constexpr, INT: constexpr,
) -> None:  # fmt: skip
    """The k largest of the members of the chosen lanes, or of the whole row when there are none; by ascending index."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CANDIDATES)
    present = place < n
    if chosen is not None:
        present = place % WIDTH < k
        place = place // WIDTH * LANES + tl.load(chosen + row * WIDTH + place % WIDTH, present, 0)
        present &= place < n
    x = tl.load(values + row * n + place, present, 0.0)
    key = tl.where(present, _key(x, BITS, INT), -(2 ** (BITS - 1)))
    is_chosen = _are_largest(key, place, k, BITS, PLACES)
    rank = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(value + row * k + rank, x, is_chosen)
    tl.store(index + row * k + rank, place.to(tl.int64), is_chosen)


@triton.jit
def _are_largest(key: tensor, place: tensor, k: tensor, BITS: constexpr, PLACES: constexpr) -> tensor:
    """Which keys are the k largest; of equal ones those with the lowest `place`."""
    least = _kth_largest(key, k, BITS)
    is_chosen = key >= least
    if tl.sum(is_chosen.to(tl.int32)) > k:
        missing = k - tl.sum((key > least).to(tl.int32))
        last = -_kth_largest(tl.where(key == least, -place, -(2**PLACES)), missing, PLACES + 1)
        is_chosen = (key > least) | ((key == least) & (place <= last))
    return is_chosen


@triton.jit
def _kth_largest(key: tensor, k: tensor, BITS: constexpr) -> tensor:
    """The largest number that at least k of the keys reach, found bit by bit; keys are signed integers of BITS bits."""
    least = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -(2 ** (BITS - 1))).to(key.dtype)
    bit = tl.full((), 2 ** (BITS - 2), key.dtype)
    for _ in range(BITS - 1):
        trial = least + bit
        least = tl.where(tl.sum((key >= trial).to(tl.int32)) >= k, trial, least)
        bit = bit >> 1
    return least


@triton.jit
def _key(x: tensor, BITS: constexpr, INT: constexpr) -> tensor:
    """A signed integer, of 32 bits or 64, of the same order as x: equal for equal bits, NaN above all, −0 below 0.

    Negative floats grow with their magnitude's bits, so these are flipped. −2^(BITS − 1) is no number's key.
    """
    bits = x.to(INT, bitcast=True)
    if BITS == 16:
        bits = bits.to(tl.int32)
        x = x.to(tl.float32)
    key = tl.where(bits < 0, bits ^ (2 ** (BITS - 1) - 1), bits)
    return tl.where(x == x, key, 2 ** (BITS - 1) - 1)


def _warps(elements: int) -> int:
    """16 elements for each thread, all of them in registers."""
    return min(16, max(1, elements // 512))


# All above a floor


def count_above(values: Tensor, floor: float) -> Tensor:
    """Where the elements of each row of [rows, n] above `floor` begin, if listed row by row: [rows + 1].

    `floor` is rounded to the type of `values`. What is not a number is above: nobody shall overlook it.
    """
    rows, n = values.shape
    start = torch.zeros(rows + 1, dtype=torch.int64, device=values.device)
    launch(_count_above, (rows,), values.contiguous(), _bound(values, floor), start, n, BLOCK=2048)
    return start.cumsum_(0)


def above(values: Tensor, floor: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """(column, value) of the elements above `floor`, where `count_above` says; narrow types become float32."""
    (rows, n), bound = values.shape, _bound(values, floor)
    column = torch.empty(int(start[-1]), dtype=torch.int64, device=values.device)
    value = bound.new_empty(len(column))
    launch(_write_above, (rows,), values.contiguous(), bound, start, column, value, n, BLOCK=1024)
    return column, value


def _bound(values: Tensor, floor: float) -> Tensor:
    """The floor on the device, without the host waiting for it to arrive there."""
    bound = torch.full((), floor, dtype=values.dtype, device=values.device)
    return bound.to(torch.promote_types(values.dtype, torch.float32))


@triton.jit
def _count_above(values: tensor, bound: tensor, count: tensor, n: int, BLOCK: constexpr) -> None:
    """count[row + 1] = how many values of the row exceed the bound."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        total += _exceed(values + row * n, bound, first + tl.arange(0, BLOCK), n)[1].to(tl.int32)
    tl.store(count + row + 1, tl.sum(total, 0).to(tl.int64))


@triton.jit
def _write_above(
    values: tensor, bound: tensor, start: tensor, column: tensor, value: tensor, n: int, BLOCK: constexpr
) -> None:
    """column and value of what exceeds the bound, from start[row] on."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(start + row)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x, exceeds = _exceed(values + row * n, bound, at, n)
        rank = tl.cumsum(exceeds.to(tl.int32), 0)
        tl.store(column + begin + rank - 1, at.to(tl.int64), exceeds)
        tl.store(value + begin + rank - 1, x, exceeds)
        begin += tl.max(rank, 0)


@triton.jit
def _exceed(values: tensor, bound: tensor, at: tensor, n: int) -> tensor:
    """The values at `at`, in the type of the bound, and which of them exceed it."""
    x = tl.load(values + at, at < n, 0.0).to(bound.dtype.element_ty)
    return x, (at < n) & ~(x <= tl.load(bound))
