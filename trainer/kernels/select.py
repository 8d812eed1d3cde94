"""Selection of active latents: pre_acts [batch, d_sae] in any float type → sparse `Entries`, or `Dense`.

Every selection is exact. Ties are broken by position, so that results repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.kernels.dense import Dense
from trainer.kernels.sparse import Entries, kernels

Latents = Entries | Dense
"""The active latents of a batch; both kinds have the same methods, and elementwise work on `value` is the same."""

DENSE_ABOVE = 1 / 12
"""Fraction of active latents from which full matrices are faster: 1/16 to 1/12, measured on a CPU in both types."""
DENSE_ABOVE_ON_GPU = 1 / 64
"""The same on a GPU, whose products are faster beside its gathers. Worked out for an H100, NOT measured."""


def widen(values: Tensor) -> Tensor:
    """float32 for everything narrower: sums and differences need the digits, storage does not."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def largest(pre_acts: Tensor, k: int, magnitude: bool = False, dense_above: float = DENSE_ABOVE) -> Latents:
    """The k largest of each row with ReLU applied; with `magnitude` the k largest of |pre_acts|, signs kept."""
    batch, d_sae = pre_acts.shape
    value, column = topk(pre_acts.abs() if magnitude else pre_acts, k)
    value = widen(pre_acts.gather(1, column) if magnitude else value.relu())
    if k > dense_above * d_sae:
        return Dense(value.new_zeros(batch, d_sae).scatter_(1, column, value), (d_sae,))
    # Zeros stay entries, so that every row has k of them.
    start = torch.arange(0, batch * k + 1, k, device=pre_acts.device)
    return Entries(start, column.reshape(-1), value.reshape(-1), d_sae)


def candidates(pre_acts: Tensor, k: int, magnitude: bool = False) -> Entries:
    """The k largest of each row by value or |value|, as they are; columns ascend within a row."""
    batch, d_sae = pre_acts.shape
    column = topk(pre_acts.abs() if magnitude else pre_acts, k)[1].sort(1).values if k else pre_acts.new_empty(batch, 0)
    column = column.to(torch.int64)
    start = torch.arange(batch + 1, device=pre_acts.device) * k
    return Entries(start, column.reshape(-1), widen(pre_acts.gather(1, column)).reshape(-1), d_sae)


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(value, index) of the k largest in each row of [rows, n], in no order. Exact."""
    return kernels(values.device).topk(values, k)


def positive(pre_acts: Tensor, dense_above: float = DENSE_ABOVE) -> Latents:
    """All latents above zero."""
    start = kernels(pre_acts.device).count_above(pre_acts, 0.0)
    if int(start[-1]) > dense_above * pre_acts.numel():
        return Dense(widen(pre_acts.relu()), (pre_acts.shape[1],))
    return exceeding(pre_acts, 0.0, start)


def exceeding(pre_acts: Tensor, floor: float, start: Tensor | None = None) -> Entries:
    """All latents above `floor`; `start` is the result of `count_above`, if the caller has it."""
    if start is None:
        start = kernels(pre_acts.device).count_above(pre_acts, floor)
    column, value = kernels(pre_acts.device).above(pre_acts, floor, start)
    return Entries(start, column, value, pre_acts.shape[1])


def largest_of(entries: Entries, count: int) -> Entries:
    """The `count` largest entries of all rows together; all of them if there are fewer."""
    surplus = len(entries.value) - count
    if surplus <= 0:
        return entries
    least = nth_smallest(entries.value, surplus + 1)
    keep = entries.value > least
    ties = (entries.value == least).nonzero().squeeze(1)[: count - int(keep.sum())]
    keep[ties] = True
    return entries.where(keep)


def nth_smallest(values: Tensor, n: int) -> Tensor:
    """The n-th smallest of values [entries], counted from 1, a scalar on their device."""
    if values.device.type == "cuda":  # one block of a GPU would look for it (pytorch#75599); all of it sorts
        return values.sort().values[n - 1]
    return values.kthvalue(n).values


def dense_if_many(entries: Entries, dense_above: float = DENSE_ABOVE) -> Latents:
    """The same latents as `Entries`, or as `Dense` where products are faster."""
    many = len(entries.value) > dense_above * entries.rows * entries.columns
    return Dense(entries.dense(), (entries.columns,)) if many else entries


def joined(parts: Sequence[Latents]) -> Latents:
    """The latents of one batch, from those of consecutive blocks of its rows."""
    if len(parts) == 1:
        return parts[0]
    entries = [part for part in parts if isinstance(part, Entries)]
    if len(entries) < len(parts):
        values = [part.dense() for part in parts]
        return Dense(torch.cat(values), (values[0].shape[1],))
    starts, before = [entries[0].start[:1]], 0
    for part in entries:
        starts.append(part.start[1:] + before)
        before += len(part.column)
    column, value = torch.cat([part.column for part in entries]), torch.cat([part.value for part in entries])
    return Entries(torch.cat(starts), column, value, entries[0].columns)
