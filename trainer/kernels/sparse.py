"""Products with a sparse [batch, d_sae] matrix: the work of a step after its one dense encoder product.

`Entries` is compressed by row: the latents of row b are `column[start[b] : start[b + 1]]`. The cost of products grows
with the entries, not with batch × d_sae, and results repeat bit for bit. Their kernels depend on the device: `cpu.py`,
`cuda.py`, or `portable.py` for all others. Where too many latents are active for this to be fast, `dense.py` has the
same methods on a full matrix; `select.py` decides between them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trainer.kernels.portable import occurrences

log = logging.getLogger("sluice.trainer")


def kernels(device: torch.device) -> ModuleType:
    """The module of kernels for a device; all such modules have the same functions."""
    return _kernels_of(device.type)


@cache
def _kernels_of(device_type: str) -> ModuleType:
    if device_type == "cpu":
        return importlib.import_module("trainer.kernels.cpu")
    if device_type == "cuda":
        try:
            module = importlib.import_module("trainer.kernels.cuda")
            module.sums(torch.tensor([0, 1], device=device_type), torch.ones(1, device=device_type))
            return module
        except Exception as error:  # of many types, where Triton or the C compiler that it calls is missing
            log.warning("the kernels for CUDA cannot be built, slower ones are used: %s", error)
    return importlib.import_module("trainer.kernels.portable")


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
        """The same entries with other values [entries]."""
        return Entries(self.start, self.column, value, self.columns)

    def at(self, of_latents: Tensor) -> Tensor:
        """`of_latents` [columns] at the latent of each entry: [entries]."""
        return of_latents[self.column]

    def dense(self) -> Tensor:
        return self.value.new_zeros(self.rows, self.columns).index_put_((self.row(), self.column), self.value)

    def firings(self) -> Tensor:
        """The number of rows where each latent is not zero, int64 [columns]."""
        return occurrences(self.column, self.columns, self.value != 0)

    def where(self, mask: Tensor) -> Entries:
        """The entries where `mask` [entries] is True."""
        before = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask, 0, out=before[1:])
        return Entries(before[self.start], self.column[mask], self.value[mask], self.columns)

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
        """self @ W, the weighted sum of rows of W for each row: W [columns, d] → [rows, d].

        W, like the matrices of the other products, may be bfloat16; sums are in float32 at least.
        """
        return kernels(W.device).multiply(self.start, self.column, self.value, W)

    def sample(self, A: Tensor, W: Tensor) -> Tensor:
        """A @ W.T, computed only at the entries: A [rows, d], W [columns, d] → [entries]."""
        return kernels(W.device).sample(self.start, self.column, A, W)

    def decode(self, W: Tensor, b: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y_hat = self @ W + b, g = ∂/∂y_hat of weight · |y − y_hat|², |y − y_hat|² [rows], g @ W.T at entries)."""
        return kernels(W.device).decode(self.start, self.column, self.value, W, b, y, weight)

    def transpose(self) -> Transposed:
        """A stable sort by column: rows stay ascending, so that every sum has a fixed order."""
        start, row, order = kernels(self.column.device).transpose(self.start, self.column, self.columns)
        return Transposed(start, row, order, self.rows)


@dataclass(frozen=True)
class Transposed:
    """The same entries compressed by column, for gradients of latent rows."""

    start: Tensor
    """int64 [columns + 1]"""
    row: Tensor
    """int64 [entries], ascending within a column"""
    order: Tensor
    """int64 [entries]: position of each entry in the row-compressed form"""
    rows: int

    def multiply(self, value: Tensor, X: Tensor, out: Tensor | None = None) -> Tensor:
        """entries.T @ X with other values, value [entries] in row order: [columns, d], written to `out` if given.

        X is [rows, d], or [batch, d] for entries in segments, which all read the same rows.
        """
        row = self.row if self.rows == len(X) else self.row % len(X)
        return kernels(X.device).multiply_transposed(self.start, row, value[self.order], X, out)

    def sums(self, value: Tensor) -> Tensor:
        """The sum of `value` over each column, [columns]."""
        return kernels(value.device).sums(self.start, value[self.order])
