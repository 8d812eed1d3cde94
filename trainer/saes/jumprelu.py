"""JumpReLU with a wide kernel, trained towards a target L0 (arXiv 2407.14435; Anthropic, January 2025).

    latents = z · H(z − θ), z = pre_acts                       x_hat = latents W_dec + b_dec
    L = |x − x_hat|² / variance + w_l0 · (L0 / target_l0 − 1)² + w_pre · Σ_{dead i} ReLU(θ_i − z_i)

H has no useful derivative; the straight-through one spreads the jump over a bandwidth ε, K(u) = 1[|u| < ε/2]:

    ∂latents/∂z = H + (θ/ε) K(z − θ)      ∂latents/∂θ = −(θ/ε) K(z − θ)      ∂H/∂z = K/ε      ∂H/∂θ = −K/ε

It flows into z as well as into θ: the encoder learns what to leave out. θ is kept itself, not its logarithm, in
float32 and above zero. Rows of x have a mean square of 1 per element, which is the scale ε is measured in.

The gradient lives on the entries with z > θ − ε/2 and nowhere else, apart from the dead latents' pre-act loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.sparse import positive_entries, sample, transpose, widen
from trainer.saes.base import Gradients, Sae
from trainer.settings import SaeSettings

INITIAL_L0 = 4.0
"""The first batches have this many times the target's L0: enough for a gradient everywhere, few enough to be fast."""
MINIMUM_THRESHOLD = 1e-3


class JumpReLU(Sae):
    """See the module's docstring."""

    def __init__(self, settings: SaeSettings, d_in: int) -> None:
        super().__init__(settings, d_in)
        self.parameters["threshold"] = torch.zeros(self.d_sae)

    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """As the base, with b_enc such that every latent fires equally often: INITIAL_L0 × target_l0 together."""
        super().initialise(x, generator)
        self.parameters["threshold"].fill_(self.settings.initial_threshold)
        z = (x[:8192].to(self.parameters["W_enc"].device) - self.parameters["b_dec"]) @ self.parameters["W_enc"].T
        rate = min(0.5, INITIAL_L0 * self._target_l0 / self.d_sae)
        rank = max(1, round((1 - rate) * len(z)))
        self.parameters["b_enc"].copy_(self.settings.initial_threshold - z.kthvalue(rank, dim=0).values)

    def gradients(self, x: Tensor, dead: Tensor) -> Gradients:
        W_dec, threshold, bandwidth = self.parameters["W_dec"], self.parameters["threshold"], self.settings.bandwidth
        floor = threshold - bandwidth / 2
        above_floor = self.pre_acts(x, less=floor)
        near = positive_entries(above_floor)
        theta = threshold[near.column]
        z = near.value + (theta - bandwidth / 2)
        on = (z > theta).to(z.dtype)
        kernel = ((z - theta).abs() < bandwidth / 2).to(z.dtype) / bandwidth
        latents = near.with_value(z * on)
        x_hat = self.decode(latents)
        error = x - x_hat
        dx_hat = error * (-2.0 / (len(x) * self.variance))
        losses = {"reconstruction": error.square().sum() / (len(x) * self.variance)}

        excess = on.sum() / (len(x) * self._target_l0) - 1
        losses["sparsity"] = self.settings.l0_weight * excess.square()
        dstep = 2 * self.settings.l0_weight * excess / (len(x) * self._target_l0)
        dlatents = sample(near, dx_hat, W_dec)
        through_kernel = (theta * dlatents + dstep) * kernel
        by_latent = transpose(near)
        grads = self.encoder_gradients(by_latent, dlatents * on + through_kernel, x)
        grads["W_dec"] = by_latent.multiply(latents.value, dx_hat)
        grads["b_dec"] += dx_hat.sum(0)
        grads["threshold"] = -by_latent.sums(through_kernel)
        indices = dead.nonzero().squeeze(1)
        if len(indices) and self.settings.pre_act_weight:
            losses["pre_act"] = self._pull_up(grads, above_floor, x, indices)
        return Gradients(grads, losses, x_hat, latents)

    def _pull_up(self, grads: dict[str, Tensor], above_floor: Tensor, x: Tensor, dead: Tensor) -> Tensor:
        """Adds the gradient of the pre-act loss, which lifts dead latents towards their threshold; returns the loss."""
        weight = self.settings.pre_act_weight / len(x)
        below = (self.settings.bandwidth / 2 - widen(above_floor[:, dead])).relu_()
        under = (below > 0).to(x.dtype) * weight
        count = under.sum(0)
        grads["W_enc"][dead] -= under.T @ (x - self.parameters["b_dec"])
        grads["b_enc"][dead] -= count
        grads["threshold"][dead] += count
        grads["b_dec"] += count @ self.parameters["W_enc"][dead]
        return weight * below.sum()

    def after_step(self) -> None:
        super().after_step()
        self.parameters["threshold"].clamp_min_(MINIMUM_THRESHOLD)

    @property
    def _target_l0(self) -> float:
        assert self.settings.target_l0 is not None
        return self.settings.target_l0

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        return {"architecture": "jumprelu"}, {"threshold": self.parameters["threshold"]}
