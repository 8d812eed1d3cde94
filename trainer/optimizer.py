"""Adam for latent rows, a decoder that stays on its sphere, and schedules that count tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.saes.base import SHARED
from trainer.settings import OptimizerSettings


class RowAdam:
    """Adam over an SAE's parameters, with the decoder's gradient made tangent to its rows where these are of unit norm.

    Renormalising the rows is the SAE's `after_step`: Adam's update leaves the sphere even when the gradient does not.
    """

    def __init__(self, parameters: dict[str, Tensor], settings: OptimizerSettings, unit_decoder: bool = True) -> None:
        self.parameters = {name: torch.nn.Parameter(tensor) for name, tensor in parameters.items()}
        self.clip = settings.clip
        self._unit_decoder = unit_decoder
        self._adam = torch.optim.Adam(
            self.parameters.values(), betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, fused=True
        )

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], learning_rate: float) -> float:
        """One update in place; returns the gradient's norm before clipping.

        `grads` of parameters that do not learn are passed over. A gradient that is not finite changes nothing: the
        norm returned says so.
        """
        grads = {name: grads[name] for name in self.parameters}
        if self._unit_decoder and "W_dec" in grads:
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

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Zeroes the moments of `latents` (indices): what they began anew has no history."""
        for name, parameter in self.parameters.items():
            if name not in SHARED:
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in self._adam.state[parameter]:
                        self._adam.state[parameter][moment][latents] = 0.0

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


def warmup_factor(tokens: int, warmup_tokens: int) -> float:
    """Linear from zero to 1 over the first `warmup_tokens` rows; then 1."""
    return min(1.0, (tokens + 1) / warmup_tokens) if warmup_tokens else 1.0


@dataclass(frozen=True)
class Cooldown:
    """Linear to zero from `start` to `end`, both counted in an SAE's own rows."""

    start: int
    end: int

    def factor(self, tokens: int) -> float:
        if tokens <= self.start:
            return 1.0
        return max(0.0, (self.end - tokens) / max(1, self.end - self.start))


def default_learning_rate(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2¹⁴): the rule of dictionary_learning and sparsify, after Gao et al. 2024."""
    return 2e-4 / (d_sae / 2**14) ** 0.5
