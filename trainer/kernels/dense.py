"""The methods of `sparse.Entries` on a full matrix: faster once more than a tenth of it is not zero.

JumpReLU and ReLU begin with many active latents, and dead latents are few columns with many entries; products of
matrices then beat any gather. A value of zero means that there is no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A matrix [batch, columns], its columns cut into segments that end at `ends`."""

    value: Tensor
    ends: tuple[int, ...]

    def with_value(self, value: Tensor) -> Dense:
        """Other values [batch, columns]; whoever computes them leaves zeros where no entry was."""
        return Dense(value, self.ends)

    def at(self, of_latents: Tensor) -> Tensor:
        """`of_latents` [columns], which broadcasts over the entries."""
        return of_latents

    def dense(self) -> Tensor:
        return self.value

    def firings(self) -> Tensor:
        """On how many rows each latent has a value other than zero, int64 [columns]."""
        return (self.value != 0).sum(0)

    def split(self, ends: Sequence[int]) -> Dense:
        """The columns cut into segments that end at `ends`; products then have [segments × batch] rows."""
        return Dense(self.value, tuple(ends))

    def multiply(self, W: Tensor) -> Tensor:
        """self @ W, segment below segment: W [columns, d] → [segments × batch, d]."""
        return torch.cat([self.value[:, part] @ W[part] for part in self._segments()])

    def sample(self, A: Tensor, W: Tensor) -> Tensor:
        """A @ W.T at the entries, zero elsewhere: A [segments × batch, d], W [columns, d] → [batch, columns]."""
        rows = A.view(len(self.ends), len(self.value), -1)
        products = [rows[level] @ W[part].T for level, part in enumerate(self._segments())]
        return torch.cat(products, 1).mul_(self.value != 0)

    def transpose(self) -> TransposedDense:
        return TransposedDense(self)

    def _segments(self) -> list[slice]:
        return [slice(begin, end) for begin, end in zip((0, *self.ends), self.ends, strict=False)]


@dataclass(frozen=True)
class TransposedDense:
    """The twin of `sparse.Transposed`."""

    of: Dense

    def multiply(self, value: Tensor, X: Tensor) -> Tensor:
        """value.T @ X, value [batch, columns]; X [segments × batch, d], or [batch, d] the same for all segments."""
        if len(X) == len(value):
            return value.T @ X
        rows = X.view(len(self.of.ends), len(value), -1)
        return torch.cat([value[:, part].T @ rows[level] for level, part in enumerate(self.of._segments())])

    def sums(self, value: Tensor) -> Tensor:
        """The sum of `value` over each column, [columns]."""
        return value.sum(0)
