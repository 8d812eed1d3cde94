"""The methods of `sparse.Entries` on a full matrix: faster once enough of it is not zero.

JumpReLU and ReLU begin with many active latents, and dead latents are few columns with many entries; dense products are
then faster than any gather. A value of zero is no entry. Products are computed in the type of the matrix W or X that
latents are multiplied with, and are float32 afterwards.
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
        """Other values [batch, columns], zero where no entry is."""
        return Dense(value, self.ends)

    def at(self, of_latents: Tensor) -> Tensor:
        """`of_latents` [columns], which broadcasts over the entries."""
        return of_latents

    def dense(self) -> Tensor:
        return self.value

    def firings(self) -> Tensor:
        """The number of rows where each latent is not zero, int64 [columns]."""
        return (self.value != 0).sum(0)

    def split(self, ends: Sequence[int]) -> Dense:
        """The columns cut into segments that end at `ends`; products then have [segments × batch] rows."""
        return Dense(self.value, tuple(ends))

    def multiply(self, W: Tensor) -> Tensor:
        """self @ W, segment below segment: W [columns, d] → [segments × batch, d]."""
        return _below([product(self.value[:, part], W[part]) for part in self.segments()])

    def sample(self, A: Tensor, W: Tensor) -> Tensor:
        """A @ W.T, also where no entry is: A [segments × batch, d], W [columns, d] → [batch, columns]."""
        rows = A.view(len(self.ends), len(self.value), -1)
        products = [product(rows[level], W[part].T) for level, part in enumerate(self.segments())]
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def decode(self, W: Tensor, b: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y_hat = self @ W + b, g = ∂/∂y_hat of weight · |y − y_hat|², |y − y_hat|² [batch], g @ W.T)."""
        y_hat = self.multiply(W) + b
        error = y_hat - y
        g = 2 * weight * error
        return y_hat, g, error.square().sum(1), self.sample(g, W)

    def transpose(self) -> TransposedDense:
        return TransposedDense(self)

    def segments(self) -> list[slice]:
        """The columns of each segment."""
        return [slice(begin, end) for begin, end in zip((0, *self.ends), self.ends, strict=False)]


@dataclass(frozen=True)
class TransposedDense:
    """The methods of `sparse.Transposed` on a full matrix."""

    of: Dense

    def multiply(self, value: Tensor, X: Tensor, out: Tensor | None = None) -> Tensor:
        """value.T @ X, written to `out` if given; value [batch, columns].

        X is [segments × batch, d], or [batch, d] the same for all segments.
        """
        if len(X) == len(value):
            result = product(value.T, X)
        else:
            rows = X.view(len(self.of.ends), len(value), -1)
            result = _below([product(value[:, part].T, rows[level]) for level, part in enumerate(self.of.segments())])
        return result if out is None else out.copy_(result)

    def sums(self, value: Tensor) -> Tensor:
        """The sum of `value` over each column, [columns]."""
        return value.sum(0)


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in the narrower of their types, as float32 at least."""
    dtype = A.dtype if A.element_size() < B.element_size() else B.dtype
    return (A.to(dtype) @ B.to(dtype)).to(torch.promote_types(dtype, torch.float32))


def _below(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
