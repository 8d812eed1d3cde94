"""Signs of gradients (Bernstein et al. 2018, arXiv 1802.04434), schedule-free (Defazio et al. 2024, arXiv 2405.15682).

    z ← z − rate · sign(g(y))        x ← (1 − c) x + c z, the mean of all z        y = 0.95 x + 0.05 z

sparsify's default, under the same name. y are the weights of the SAE: gradients are taken there, and it is published. A
mean needs no falling rate, so a snapshot in the middle of a run is about as good as one at an end. A step counts in the
mean by the square of the largest rate so far: those of the warm-up count little. Where a latent has no gradient it does
not move.
"""

from __future__ import annotations

from torch import Tensor

from trainer.saes.initial import normalise_rows
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.training.optimizers.base import Optimizer

INTERPOLATION = 0.95
"""Share of the mean in the weights at which gradients are taken."""


class Signum(Optimizer):
    """See the module's docstring. x is not kept: it follows from y and z."""

    MOMENTS = ("z",)
    SCALARS = ("weight_sum", "largest_rate")

    def _begin_step(self, learning_rate: float) -> None:
        if self._steps == 1:
            for name, z in self._moments["z"].items():
                z.copy_(self.parameters[name])
        largest = max(learning_rate, self._scalars["largest_rate"])
        self._scalars["largest_rate"] = largest
        self._scalars["weight_sum"] += largest**2

    def _update(self, name: str, grad: Tensor, learning_rate: float, scale: Tensor) -> None:
        y, z, weight_sum = self.parameters[name], self._moments["z"][name], self._scalars["weight_sum"]
        x = y.lerp_(z, 1 - 1 / INTERPOLATION)
        z.add_(grad.sign(), alpha=-learning_rate)
        x.lerp_(z, self._scalars["largest_rate"] ** 2 / weight_sum if weight_sum else 1.0)
        x.lerp_(z, 1 - INTERPOLATION)
        if name in self._unit:
            normalise_rows(y)

    def reset_latents(self, latents: Tensor) -> None:
        for name, z in self._moments["z"].items():
            if name not in SHARED_PARAMETERS:
                z[latents] = self.parameters[name][latents]
