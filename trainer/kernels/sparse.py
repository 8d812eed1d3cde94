"""Products with a sparse [batch, d_sae] matrix: everything a step does after its one dense encoder product.

`Entries` is compressed by row: the latents of row b are `column[start[b] : start[b + 1]]`. All products cost what the
entries cost, not batch × d_sae, and each output row is summed by one worker in a fixed order, so results repeat bit
for bit. Formulas and their dense autograd twins: `reference.py`. Where too many latents are active for this to pay,
`dense.py` has the same methods on a full matrix, and `select.py` chooses.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
torch.sparse.check_sparse_tensor_invariants.disable()


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
        """The same places with other values [entries]."""
        return Entries(self.start, self.column, value, self.columns)

    def at(self, of_latents: Tensor) -> Tensor:
        """What each entry's latent has in `of_latents` [columns]: [entries]."""
        return of_latents[self.column]

    def dense(self) -> Tensor:
        return self.value.new_zeros(self.rows, self.columns).index_put_((self.row(), self.column), self.value)

    def firings(self) -> Tensor:
        """On how many rows each latent has a value other than zero, int64 [columns]."""
        return occurrences(self.column, self.columns, self.value != 0)

    def split(self, ends: Sequence[int]) -> Entries:
        """The columns cut into segments that end at `ends`, below each other: [segments × rows, columns]."""
        if len(ends) == 1:
            return self
        ends_here = torch.tensor(ends, device=self.column.device)
        row = torch.bucketize(self.column, ends_here, right=True) * self.rows + self.row()
        order = torch.argsort(row.to(torch.int32), stable=True)
        start = torch.zeros(len(ends) * self.rows + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(occurrences(row, len(start) - 1), 0, out=start[1:])
        return Entries(start, self.column[order], self.value[order], self.columns)

    def multiply(self, W: Tensor) -> Tensor:
        """self @ W: for each row the weighted sum of the rows of W it names. W [columns, d] → [rows, d]."""
        return embedding_bag(
            self.column, W, self.start, per_sample_weights=self.value, mode="sum", include_last_offset=True
        )

    def sample(self, A: Tensor, W: Tensor) -> Tensor:
        """A @ W.T, computed only at the entries: A [rows, d], W [columns, d] → float32 [entries]."""
        if not len(self.column):
            return self.value  # cuSPARSE is not asked for nothing at all
        pattern = torch.sparse_csr_tensor(
            self.start, self.column, torch.zeros_like(self.value), (self.rows, self.columns)
        )
        return torch.sparse.sampled_addmm(pattern, A, W.T, beta=0.0).values()

    def transpose(self) -> Transposed:
        """A stable sort by column: rows stay ascending, so that every sum has a fixed order."""
        # A narrow key is sorted by radix, several times faster.
        key = self.column.to(torch.int16 if self.columns <= 2**15 else torch.int32)
        order = torch.argsort(key, stable=True)
        start = torch.zeros(self.columns + 1, dtype=torch.int64, device=order.device)
        torch.cumsum(occurrences(self.column, self.columns), 0, out=start[1:])
        return Transposed(start, self.row()[order], order)


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
        """entries.T @ X with other values, value [entries] in row order: [columns, d].

        X is [rows, d], or [batch, d] for entries that were split into segments: these all see the same rows.
        """
        return embedding_bag(
            self.row % len(X),
            X,
            self.start,
            per_sample_weights=value[self.order],
            mode="sum",
            include_last_offset=True,
        )

    def sums(self, value: Tensor) -> Tensor:
        """The sum of `value` over each column, [columns]."""
        return torch.segment_reduce(value[self.order], "sum", offsets=self.start, initial=0.0)


def occurrences(index: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """How often each of 0 … size − 1 stands in `index` (where `counted` is True), int64 [size].

    A bincount that does not look at the values first, for which the host would have to wait for the GPU.
    """
    ones = index.new_ones(()).expand_as(index) if counted is None else counted.to(index.dtype)
    return index.new_zeros(size).scatter_add_(0, index, ones)
