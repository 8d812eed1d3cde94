"""Selection of latents as Triton kernels; imported through `cuda.py`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from trainer.kernels.launch import launch, power_of_two

DIRECT = 4096
"""Rows of up to this many values are searched at once."""
MOST_GROUPS = 8192
CANDIDATES = 16384
"""Values that one program can hold in registers."""


# The k largest


def topk(values: Tensor, k: int, most_candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """(value, index int64) of the k largest in each row of [rows, n], by ascending index. Exact, of any float type.

    Ties go to the lowest index; NaN counts as largest. All values are read once: column c belongs to group c mod
    `groups`, and the k groups with the largest maxima hold all k largest values, since a value elsewhere is below k
    maxima. Then only the members of these groups are searched. Where these are too many for the registers (n = 2^17: k
    above 1,024), torch.topk is used, whose ties are in no fixed order.
    """
    rows, n = values.shape
    width = power_of_two(k)
    # Groups and candidates together are fewest at √(k · n) groups; candidates, read at random, cost more each.
    groups = min(MOST_GROUPS, power_of_two(2 * math.sqrt(k * n)))
    candidates = width * power_of_two(n / groups)
    is_direct = n <= max(DIRECT, groups)
    if is_direct:
        width, groups, candidates = 1, 1, power_of_two(n)
    if not 0 < k <= n or candidates > most_candidates or width > groups:
        return torch.topk(values, k, sorted=False)
    values = values.contiguous()
    bits = 8 * values.element_size()
    integer = {16: tl.int16, 32: tl.int32, 64: tl.int64}[bits]
    sizes = {"WIDTH": width, "GROUPS": groups, "PLACES": n.bit_length(), "BITS": bits, "INT": integer}
    selected = None
    if not is_direct:
        selected = torch.empty(rows, width, dtype=torch.int32, device=values.device)
        launch(_select_groups, (rows,), values, selected, n, k, **sizes, num_warps=_warps(groups))
    value, index = values.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64, device=values.device)
    launch(
        _select_values, (rows,), values, selected, value, index, n, k,
        CANDIDATES=candidates, **sizes, num_warps=_warps(candidates),
    )  # fmt: skip
    return value, index


@triton.jit
def _select_groups(
    values: tensor, selected: tensor, n: int, k: int,
    WIDTH: constexpr, GROUPS: constexpr, PLACES: constexpr, BITS: constexpr, INT: constexpr,
) -> None:  # fmt: skip
    """selected[row] = the k groups with the largest maxima, ascending; of equal ones those whose maximum comes first.

    So that ties go to the lowest index: a value equal to the k-th, in a group that is not selected, comes after one in
    each group that is.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    best = _key(tl.load(values + row * n + group), BITS, INT)
    place = group
    for first in range(GROUPS, n, GROUPS):
        at = first + group
        key = _key(tl.load(values + row * n + at, at < n, float("-inf")), BITS, INT)
        place = tl.where(key > best, at, place)
        best = tl.maximum(key, best)
    is_selected = _are_largest(best, place, k, BITS, PLACES)
    rank = tl.cumsum(is_selected.to(tl.int32), 0) - 1
    tl.store(selected + row * WIDTH + rank, group, is_selected)


@triton.jit
def _select_values(
    values: tensor, selected: tensor, value: tensor, index: tensor, n: int, k: int,
    WIDTH: constexpr, GROUPS: constexpr, CANDIDATES: constexpr, PLACES: constexpr, BITS: constexpr, INT: constexpr,
) -> None:  # fmt: skip
    """The k largest members of the selected groups, or of the whole row without groups; by ascending index."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CANDIDATES)
    present = place < n
    if selected is not None:
        present = place % WIDTH < k
        place = place // WIDTH * GROUPS + tl.load(selected + row * WIDTH + place % WIDTH, present, 0)
        present &= place < n
    x = tl.load(values + row * n + place, present, 0.0)
    key = tl.where(present, _key(x, BITS, INT), -(2 ** (BITS - 1)))
    is_selected = _are_largest(key, place, k, BITS, PLACES)
    rank = tl.cumsum(is_selected.to(tl.int32), 0) - 1
    tl.store(value + row * k + rank, x, is_selected)
    tl.store(index + row * k + rank, place.to(tl.int64), is_selected)


@triton.jit
def _are_largest(key: tensor, place: tensor, k: tensor, BITS: constexpr, PLACES: constexpr) -> tensor:
    """Which keys are the k largest; of equal ones those with the lowest `place`."""
    least = _kth_largest(key, k, BITS)
    is_selected = key >= least
    if tl.sum(is_selected.to(tl.int32)) > k:
        missing = k - tl.sum((key > least).to(tl.int32))
        last = -_kth_largest(tl.where(key == least, -place, -(2**PLACES)), missing, PLACES + 1)
        is_selected = (key > least) | ((key == least) & (place <= last))
    return is_selected


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
    """Starts [rows + 1] of each row's elements above `floor` in a list of them all; values [rows, n].

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
