"""Products with a sparse [batch, d_sae] matrix: everything a step does after its one dense encoder product.

`Entries` is compressed by row: the latents of row b are `column[start[b] : start[b + 1]]`. All products cost what the
entries cost, not batch × d_sae, and each output row is summed by one worker in a fixed order, so results repeat bit
for bit. Formulas and their dense autograd twins: `reference.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
torch.sparse.check_sparse_tensor_invariants.disable()

GROUP = 16
"""Latents per group of the two-stage top-k."""


@dataclass(frozen=True)
class Entries:
    """A sparse matrix [rows, columns], compressed by row."""

    start: Tensor
    """int64 [rows + 1]"""
    column: Tensor
    """int64 [entries]"""
    value: Tensor
    """float32 [entries]"""
    columns: int

    @property
    def rows(self) -> int:
        return len(self.start) - 1

    def row(self) -> Tensor:
        """The row of each entry, int64 [entries]."""
        return torch.repeat_interleave(self.start.diff(), output_size=len(self.column))

    def with_value(self, value: Tensor) -> Entries:
        return Entries(self.start, self.column, value, self.columns)

    def dense(self) -> Tensor:
        return self.value.new_zeros(self.rows, self.columns).index_put_((self.row(), self.column), self.value)


def widen(values: Tensor) -> Tensor:
    """float32 for everything narrower: sums and differences need the digits, storage does not."""
    return values if values.dtype == torch.float64 else values.float()


def topk_entries(pre_acts: Tensor, k: int) -> Entries:
    """The k largest of each row with ReLU applied: zeros stay listed, so that every row has k entries.

    pre_acts [batch, d_sae] in any float type; the choice is exact, ties are broken arbitrarily.
    """
    batch, d_sae = pre_acts.shape
    value, column = topk(pre_acts, k)
    start = torch.arange(0, batch * k + 1, k, device=pre_acts.device)
    return Entries(start, column.reshape(-1), widen(value).relu().reshape(-1), d_sae)


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


def positive_entries(values: Tensor) -> Entries:
    """All entries of [batch, d_sae] that are above zero."""
    batch, d_sae = values.shape
    place = _is_positive(values).view(-1).nonzero().squeeze(1)
    row = torch.div(place, d_sae, rounding_mode="floor")
    start = torch.zeros(batch + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(occurrences(row, batch), 0, out=start[1:])
    return Entries(start, place - row * d_sae, widen(values.view(-1)[place]), d_sae)


def _is_positive(values: Tensor) -> Tensor:
    # A bfloat16 above zero is, read as an integer, above zero too; CPUs compare integers three times faster.
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values) > 0


def occurrences(index: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """How often each of 0 … size − 1 stands in `index` (where `counted` is True), int64 [size].

    A bincount that does not look at the values first, for which the host would have to wait for the GPU.
    """
    ones = index.new_ones(()).expand_as(index) if counted is None else counted.to(index.dtype)
    return index.new_zeros(size).scatter_add_(0, index, ones)


def multiply(entries: Entries, W: Tensor) -> Tensor:
    """entries @ W: for each row the weighted sum of the rows of W it names. W [columns, d] → [rows, d]."""
    return embedding_bag(
        entries.column, W, entries.start, per_sample_weights=entries.value, mode="sum", include_last_offset=True
    )


def sample(entries: Entries, A: Tensor, W: Tensor) -> Tensor:
    """A @ W.T, computed only at the entries: A [rows, d], W [columns, d] → float32 [entries]."""
    if not len(entries.column):
        return entries.value  # cuSPARSE is not asked for nothing at all
    pattern = torch.sparse_csr_tensor(
        entries.start, entries.column, torch.zeros_like(entries.value), (entries.rows, entries.columns)
    )
    return torch.sparse.sampled_addmm(pattern, A, W.T, beta=0.0).values()


@dataclass(frozen=True)
class Transposed:
    """The same entries compressed by column, for gradients of latent rows."""

    start: Tensor
    """int64 [columns + 1]"""
    row: Tensor
    """int64 [entries], ascending within a column"""
    order: Tensor
    """int64 [entries]: where each entry stood in the row-compressed form"""

    def multiply(self, value: Tensor, X: Tensor) -> Tensor:
        """entries.T @ X with other values: X [rows, d], value [entries] in row order → [columns, d]."""
        return embedding_bag(
            self.row, X, self.start, per_sample_weights=value[self.order], mode="sum", include_last_offset=True
        )

    def sums(self, value: Tensor) -> Tensor:
        """The sum of `value` over each column, [columns]."""
        return torch.segment_reduce(value[self.order], "sum", offsets=self.start, initial=0.0)


def transpose(entries: Entries) -> Transposed:
    """A stable sort by column: rows stay ascending, so that every sum has a fixed order."""
    # A narrow key is sorted by radix, several times faster.
    key = entries.column.to(torch.int16 if entries.columns <= 2**15 else torch.int32)
    order = torch.argsort(key, stable=True)
    start = torch.zeros(entries.columns + 1, dtype=torch.int64, device=order.device)
    torch.cumsum(occurrences(entries.column, entries.columns), 0, out=start[1:])
    return Transposed(start, entries.row()[order], order)
