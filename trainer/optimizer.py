"""Adam for latent rows, a decoder that stays on its sphere, and schedules that count tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.settings import OptimizerSettings


class RowAdam:
    """Adam over an SAE's parameters, with the decoder's gradient made tangent to its unit rows first.

    Renormalising the rows is the SAE's `after_step`: Adam's update leaves the sphere even when the gradient does not.
    """

    def __init__(self, parameters: dict[str, Tensor], settings: OptimizerSettings) -> None:
        self.parameters = {name: torch.nn.Parameter(tensor) for name, tensor in parameters.items()}
        self.clip = settings.clip
        self._adam = torch.optim.Adam(
            self.parameters.values(), betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, fused=True
        )

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], learning_rate: float) -> float:
        """One update in place; returns the gradient's norm before clipping.

        A gradient that is not finite changes nothing: the norm returned says so.
        """
        make_tangent(grads["W_dec"], self.parameters["W_dec"])
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()]))
        length = float(norm)  # looked at once: on a GPU each look waits for all that is under way
        if not math.isfinite(length):
            return length
        if self.clip and length > self.clip:
            for grad in grads.values():
                grad.mul_(self.clip / norm)
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name]
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        return length

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, named by parameter."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._adam.state[parameter].items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            parameter = self.parameters[name]
            # The count of steps too: the fused kernel reads it where the parameter is.
            self._adam.state[parameter][moment] = value.to(parameter.device)


def make_tangent(grad: Tensor, W: Tensor) -> None:
    """Removes from each row of `grad`, in place, its component along the unit row of W."""
    grad.addcmul_(W, (grad * W).sum(1, keepdim=True), value=-1.0)


def learning_rate_factor(tokens: int, target_tokens: int | None, warmup_tokens: int, cooldown: float) -> float:
    """Warm-up → constant → linear to zero over the last `cooldown` of the run; 1 is the full rate.

    Without a target the run is endless and never cools down.
    """
    factor = min(1.0, (tokens + 1) / warmup_tokens) if warmup_tokens else 1.0
    if target_tokens is not None and cooldown > 0:
        factor = min(factor, max(0.0, (target_tokens - tokens) / (cooldown * target_tokens)))
    return factor


def default_learning_rate(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2¹⁴): the rule of dictionary_learning and sparsify, after Gao et al. 2024."""
    return 2e-4 / (d_sae / 2**14) ** 0.5
