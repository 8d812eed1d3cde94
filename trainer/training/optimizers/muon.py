"""Muon: momentum whose singular values are made equal (Jordan 2024, "Muon: An optimizer for hidden layers").

    m ← 0.95 m + 0.05 g        u = 0.95 m + 0.05 g        W ← (1 − 0.1 rate) W − rate · 0.2 √max(n, d) · orthogonal(u)

orthogonal(U Σ Vᵀ) is about U Vᵀ: five steps X ← a X + b X A + c X A², A = XᵀX, of a Newton–Schulz iteration whose
coefficients bring singular values to between 0.7 and 1.2. The factor gives elements the size of Adam's steps (Liu et
al. 2025, arXiv 2502.16982). Vectors have no singular values: Adam changes them, at the same rate. Constants are those
of sparsify, whose default rate does not depend on the number of latents.

All steps of X [n, d] multiply it by polynomials of one matrix XᵀX [d, d], which is all that ranks exchange; two
products with X are left, instead of ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.saes.initial import normalise_rows
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.training.optimizers.adam import Adam

MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
STEP_SCALE = 0.2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINY = 1e-7
"""Added to a norm that is divided by."""


class Muon(Adam):
    """See the module's docstring."""

    def has_moment(self, moment: str, W: Tensor) -> bool:
        return moment == "exp_avg" or W.dim() == 1

    def _update(self, name: str, grad: Tensor, learning_rate: float, scale: Tensor) -> None:
        W = self.parameters[name]
        if W.dim() == 1:
            super()._update(name, grad, learning_rate, scale)
            return
        grad = grad * scale.to(grad.dtype)
        mean = self._moments["exp_avg"][name].lerp_(grad, 1 - MOMENTUM)
        X = grad.lerp_(mean, MOMENTUM)
        blocks = self.blocks_of(name)
        # Rows in memory of their own: bits of a product may depend on where in memory its operands begin.
        rows_of_blocks = [X[block].clone() for block in blocks] if len(blocks) > 1 else [X]
        parts = torch.stack([rows.T @ rows for rows in rows_of_blocks])
        gram = parts[0] if name in SHARED_PARAMETERS else self._ranks.total(parts, "sums")
        n = len(W) if name in SHARED_PARAMETERS else self._d_sae or len(W)
        factor = orthogonaliser(gram) * (learning_rate * STEP_SCALE * max(n, W.shape[1]) ** 0.5)
        for block, rows in zip(blocks, rows_of_blocks, strict=True):
            W[block].mul_(1 - learning_rate * WEIGHT_DECAY).sub_(rows @ factor)
        if name in self._unit:
            normalise_rows(W)


def orthogonaliser(gram: Tensor) -> Tensor:
    """F [d, d] such that X F has the singular vectors of X and singular values of about 1; `gram` is XᵀX."""
    norm = gram.diagonal().sum().sqrt() + TINY
    gram, identity = gram / norm.square(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, (a, b, c) = identity / norm, COEFFICIENTS
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        factor = factor @ polynomial
        gram = polynomial @ gram @ polynomial
    return factor
