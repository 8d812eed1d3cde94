"""Top-k and batch-top-k over latents that are spread over ranks: the set that one process would choose, exactly.

Each rank chooses among the latents it holds; what crosses ranks are candidates, never pre_acts. A candidate is one
int64 key: an order-preserving int32 of its float32 value in the upper half, 2³² − 1 − latent in the lower. Keys are
unique, the largest is the largest value, and of equal values the first latent is the larger: the rule of the kernels
of one process. NaN sorts above infinity: its row keeps it, and the step is skipped for a norm that is not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels.sparse import Entries
from trainer.parallel.ranks import Ranks

LOWEST = torch.iinfo(torch.int64).min
BINS = 2**16
"""Values are counted by the upper, then by the lower 16 bits of their 32."""


def ordered_bits(value: Tensor) -> Tensor:
    """float32 values as int64 in [−2³¹, 2³¹) of the same order; −0 equals 0, and NaN of either sign is the largest."""
    bits = (value.float() + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return ordered.where(~value.isnan(), 0x7FFFFFFF)


def value_of(bits: int) -> float:
    """The float32 value whose `ordered_bits`, moved to begin at zero, are `bits`; infinity for NaN."""
    ordered = bits - 2**31
    value = torch.tensor(ordered if ordered >= 0 else ordered ^ 0x7FFFFFFF).to(torch.int32).view(torch.float32)
    return math.inf if value.isnan() else float(value)


def selection_keys(value: Tensor, latent: Tensor) -> Tensor:
    """Unique int64 keys of candidates: by value, of equal ones the first latent above."""
    return (ordered_bits(value) << 32) | (0xFFFFFFFF - latent)


def largest(ranks: Ranks, candidates: Entries, k: int, latent: Tensor, magnitude: bool = False) -> Entries:
    """Of each row's candidates on all ranks the k largest; returns those that this rank holds.

    `candidates` are this rank's own k largest of each row (all of its latents, where it holds fewer than k), equally
    many in every row; `latent` [entries] numbers them among the latents of all ranks. With `magnitude` |value| decides.
    """
    if ranks.is_alone:
        return candidates
    rows = candidates.rows
    value = candidates.value.abs() if magnitude else candidates.value
    keys = selection_keys(value, latent).view(rows, -1)
    share = -(-rows // ranks.size)
    # Rows are padded to equal shares, and ranks with few latents to k candidates; no padding is ever chosen.
    padded = keys.new_full((share * ranks.size, k), LOWEST)
    padded[:rows, : keys.shape[1]] = keys
    received = ranks.exchange(padded.view(ranks.size, share, k), "candidates")
    merged = received.transpose(0, 1).flatten(1)
    last = merged.topk(k, dim=1, sorted=True).values[:, -1].contiguous()
    threshold = ranks.gather(last, "thresholds").flatten()[:rows]
    return candidates.where((keys >= threshold[:, None]).flatten())


def largest_of(ranks: Ranks, candidates: Entries, count: int, first: int) -> tuple[Entries, float]:
    """The `count` largest candidates of all rows and ranks together, and the least of them.

    Returns those that this rank holds; all candidates when there are fewer. Of equal values those of earlier rows, then
    of earlier latents are chosen. Candidates stand row by row with ascending columns; `first` is the latent that
    column 0 stands for.
    """
    bits = ordered_bits(candidates.value) + 2**31
    place = _place_of(ranks, bits, count)
    if place.surplus <= 0:
        return candidates, value_of(place.bits)
    is_tie = bits == place.bits
    is_largest = bits > place.bits
    is_largest |= is_tie & _first_ties(ranks, candidates, is_tie, count - place.above, first)
    return candidates.where(is_largest), value_of(place.bits)


def nth_largest(ranks: Ranks, value: Tensor, n: int) -> float:
    """The n-th largest of the values of all ranks, counted from 1; the least when there are fewer."""
    return value_of(_place_of(ranks, ordered_bits(value) + 2**31, n).bits)


@dataclass(frozen=True)
class Place:
    """Where the n-th largest value of all ranks is."""

    bits: int
    """Of that value, or of the least when there are fewer than n: `ordered_bits`, moved to begin at zero."""
    above: int
    """Values above it."""
    surplus: int
    """Values beyond n, of all ranks; negative when there are fewer."""


def _place_of(ranks: Ranks, bits: Tensor, n: int) -> Place:
    """Finds the n-th largest of all ranks by counting upper halves, then the lower halves of those in its bin."""
    upper = bits // BINS
    upper_counts = ranks.sum(torch.bincount(upper, minlength=BINS), "thresholds")
    total = int(upper_counts.sum())
    upper_bin, above = _bin_of(upper_counts, min(n, total))
    lower_counts = ranks.sum(torch.bincount(bits[upper == upper_bin] % BINS, minlength=BINS), "thresholds")
    lower_bin, above_in_bin = _bin_of(lower_counts, min(n, total) - above)
    return Place(upper_bin * BINS + lower_bin, above + above_in_bin, total - n)


def _bin_of(counts: Tensor, count: int) -> tuple[int, int]:
    """(the bin that holds the `count`-th largest value, how many values are in bins above it)."""
    from_above = counts.flip(0).cumsum(0).flip(0)
    index = int((from_above >= count).sum()) - 1
    return index, int(from_above[index] - counts[index])


def _first_ties(ranks: Ranks, candidates: Entries, is_tie: Tensor, quota: int, first: int) -> Tensor:
    """Which of the entries may be chosen so that `quota` ties of all ranks are: bool [entries].

    All ties of a row are chosen while the quota lasts. In the one row in which it ends, the ranks tell each other the
    latents that tie.
    """
    row = candidates.row()
    ties_per_row = ranks.sum(torch.bincount(row[is_tie], minlength=candidates.rows), "thresholds")
    through_row = ties_per_row.cumsum(0)
    complete_rows = through_row <= quota
    allowed = complete_rows[row]
    last_row = int(complete_rows.sum())
    left = quota - (int(through_row[last_row - 1]) if last_row else 0)
    if last_row < candidates.rows and left > 0:
        in_last_row = is_tie & (row == last_row)
        latents = candidates.column[in_last_row] + first
        most = int(ties_per_row[last_row])
        padded = torch.full((most,), torch.iinfo(torch.int64).max, device=latents.device)
        padded[: len(latents)] = latents
        last_latent = ranks.gather(padded, "thresholds").flatten().sort().values[left - 1]
        allowed |= in_last_row & (candidates.column + first <= last_latent)
    return allowed
