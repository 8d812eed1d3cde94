"""Adam (Kingma & Ba 2015, arXiv 1412.6980) for the rows of latents.

m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²        W ← W − rate · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.kernels.sparse import kernels
from trainer.settings import OptimizerSettings
from trainer.training.optimizers.base import Optimizer, rows_of


class Adam(Optimizer):
    """See the module's docstring; one pass over the memory of each parameter."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: dict[str, Tensor], settings: OptimizerSettings, *others: Any, **named: Any) -> None:
        super().__init__(parameters, settings, *others, **named)
        self._betas, self._eps = (settings.betas[0], settings.betas[1]), settings.eps

    def _update(self, name: str, grad: Tensor, learning_rate: float, scale: Tensor) -> None:
        W = self.parameters[name]
        kernels(W.device).adam_rows(
            *(rows_of(tensor) for tensor in (W, grad, *(of[name] for of in self._moments.values()))),
            self._operands.writable(W),
            learning_rate, self._betas, self._eps, self._steps, scale.to(W.dtype), name in self._unit,
        )  # fmt: skip
