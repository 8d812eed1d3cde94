"""Which latents of a batch are active: pre_acts [batch, d_sae] in any float type → sparse `Entries`, or `Dense`.

Every choice is exact. Ties are broken by position, so that it also repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.dense import Dense
from trainer.kernels.sparse import Entries, occurrences

Latents = Entries | Dense
"""The active latents of a batch; both kinds have the same methods, and elementwise work on `value` is the same."""

GROUP = 16
"""Latents per group of the two-stage top-k."""
DENSE_ABOVE = 1 / 12
"""Fraction of active latents from which full matrices are faster (measured in float32 on an AVX-512 CPU: 0.08–0.1)."""


def widen(values: Tensor) -> Tensor:
    """float32 for everything narrower: sums and differences need the digits, storage does not."""
    return values if values.dtype == torch.float64 else values.float()


def largest(pre_acts: Tensor, k: int, magnitude: bool = False) -> Latents:
    """The k largest of each row with ReLU applied; with `magnitude` the k largest of |pre_acts|, signs kept."""
    batch, d_sae = pre_acts.shape
    value, column = topk(pre_acts.abs() if magnitude else pre_acts, k)
    value = widen(pre_acts.gather(1, column) if magnitude else value.relu())
    if k > DENSE_ABOVE * d_sae:
        return Dense(value.new_zeros(batch, d_sae).scatter_(1, column, value), (d_sae,))
    # Zeros stay listed, so that every row has k entries.
    start = torch.arange(0, batch * k + 1, k, device=pre_acts.device)
    return Entries(start, column.reshape(-1), value.reshape(-1), d_sae)


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(value, index) of the k largest in each row of [rows, n], in no order. Exact.

    Where n is large, the k groups with the largest maxima are found first; they hold all k largest values, because a
    value outside them is beaten by k group maxima. One cheap pass and a search among 16 k candidates replace a search
    among n.
    """
    rows, n = values.shape
    groups = n // GROUP
    if n % GROUP or k * GROUP >= n // 2:
        return torch.topk(values, k, sorted=False)
    # Group g holds the columns g, g + groups, g + 2 groups, …: the maximum then runs over contiguous memory.
    best = torch.topk(values.view(rows, GROUP, groups).amax(1), k, sorted=False).indices
    member = torch.arange(GROUP, device=values.device) * groups
    candidate = (best[:, :, None] + member).view(rows, k * GROUP)
    value, place = torch.topk(values.gather(1, candidate), k, sorted=False)
    return value, candidate.gather(1, place)


def positive(pre_acts: Tensor) -> Latents:
    """All that are above zero."""
    above = exceeds(pre_acts, 0.0)
    count = int(above.sum())
    if count > DENSE_ABOVE * pre_acts.numel():
        return Dense(widen(pre_acts) * above, (pre_acts.shape[1],))
    return _entries(pre_acts, above.view(-1).nonzero().squeeze(1))


def largest_of_batch(pre_acts: Tensor, count: int, guess: float) -> tuple[Latents, float]:
    """(the `count` largest positive values of the whole batch, the smallest of them).

    `guess`, the smallest one of an earlier batch, decides how many candidates are looked at, never what is chosen.
    """
    place = torch.empty(0)
    for floor in (0.8 * guess, 0.0):
        place = exceeds(pre_acts, floor).view(-1).nonzero().squeeze(1)
        if len(place) >= count:
            break
    if len(place) > count:
        value = pre_acts.view(-1)[place]
        smallest = value.kthvalue(len(value) - count + 1).values
        keep = value > smallest
        ties = (value == smallest).nonzero().squeeze(1)[: count - int(keep.sum())]
        keep[ties] = True
        place = place[keep]
    latents = _entries(pre_acts, place)
    smallest_kept = float(latents.value.min()) if len(place) else 0.0
    if len(place) > DENSE_ABOVE * pre_acts.numel():
        return Dense(latents.dense(), (pre_acts.shape[1],)), smallest_kept
    return latents, smallest_kept


def exceeds(values: Tensor, floor: float) -> Tensor:
    """values > floor, for floor ≥ 0."""
    if values.dtype == torch.bfloat16:
        # Positive bfloat16 numbers are ordered as their bits; CPUs compare integers three times faster.
        bound = torch.tensor(floor, dtype=torch.bfloat16)
        return values.view(torch.int16) > int(bound.view(torch.int16))
    return values > floor


def _entries(pre_acts: Tensor, place: Tensor) -> Entries:
    """The entries at `place`, ascending indices into the flattened matrix."""
    batch, d_sae = pre_acts.shape
    row = torch.div(place, d_sae, rounding_mode="floor")
    start = torch.zeros(batch + 1, dtype=torch.int64, device=pre_acts.device)
    torch.cumsum(occurrences(row, batch), 0, out=start[1:])
    return Entries(start, place - row * d_sae, widen(pre_acts.view(-1)[place]), d_sae)
