"""JumpReLU, with a straight-through kernel as wide as one likes (arXiv 2407.14435; Anthropic, January 2025).

    latents = z · H(z − θ), z = pre_acts                       y_hat = latents W_dec + b_dec
    L = |y − y_hat|² / variance + penalty + w_pre · Σ_{dead i} ReLU(θ_i − z_i)

    penalty = w_l0 · (L0 / target_l0 − 1)²            target_l0: zero at the target, so it needs no tuning
            | w · L0 / variance                       l0 (Gemma Scope)
            | w · Σ tanh(c · latents) / variance      tanh (Anthropic; decoder rows have unit norm here)

H has no useful derivative; the straight-through one spreads the jump over a bandwidth ε, K(u) = 1[|u| < ε/2]:

    ∂latents/∂z = H + (θ/ε) K(z − θ)      ∂latents/∂θ = −(θ/ε) K(z − θ)      ∂H/∂z = K/ε      ∂H/∂θ = −K/ε

With `straight_through = "encoder"` it flows into z as well as into θ: the encoder learns what to leave out. With
"threshold" the terms with K reach θ only. θ is trained itself, in float32 and above zero, or as exp(t) with `log`,
where ∂L/∂t = θ ∂L/∂θ. Elements of x have variance 1, which is the scale ε is measured in.

The gradient lives on the entries with z > θ − ε/2 and nowhere else, apart from the dead latents' pre-act loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.kernels.dense import product
from trainer.kernels.select import positive, widen
from trainer.saes.base import Encoded, Gradients, Sae, add
from trainer.settings import SaeSettings

INITIAL_L0 = 4.0
"""The first batches have this many times the target's L0: enough for a gradient everywhere, few enough to be fast."""
INITIAL_L0_WITHOUT_TARGET = 128.0
MINIMUM_THRESHOLD = 1e-3


class JumpReLU(Sae):
    """See the module's docstring."""

    def __init__(self, settings: SaeSettings, widths: tuple[int, ...], d_out: int | None = None) -> None:
        super().__init__(settings, widths, d_out)
        self._log = settings.threshold == "log"
        self._parameter = "log_threshold" if self._log else "threshold"
        """Name of the one that θ is kept in."""
        self.parameters[self._parameter] = torch.zeros(self.d_sae)

    @property
    def threshold(self) -> Tensor:
        """θ [d_sae]"""
        kept = self.parameters[self._parameter]
        return kept.exp() if self._log else kept

    def _set_threshold(self, theta: Tensor) -> None:
        self.parameters[self._parameter].copy_(theta.log() if self._log else theta)

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """As the base; latents that fire equally often give INITIAL_L0 × target_l0 together."""
        super().initialise(x, y, generator)
        self._set_threshold(torch.full((self.d_sae,), self.settings.initial_threshold))
        wanted = INITIAL_L0 * self.settings.target_l0 if self.settings.target_l0 else INITIAL_L0_WITHOUT_TARGET
        if self.settings.initial_rates == "equal":
            self.equalise(x, min(0.5, wanted / self.d_sae), self.settings.initial_threshold)

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        self._set_threshold(weights["threshold"].clamp_min(MINIMUM_THRESHOLD))

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        theta, bandwidth = self.threshold, self.settings.bandwidth
        encoded = self.encode(x, self.revived(dead), positive, less=theta - bandwidth / 2)
        near = encoded.latents[0].split(self.ends)
        above = near.value - bandwidth / 2  # z − θ
        on = (above > 0).to(above.dtype)
        kernel = ((near.value > 0) & (near.value < bandwidth)).to(above.dtype) / bandwidth
        theta_here = near.at(theta)
        latents = near.with_value((above + theta_here) * on)
        main = self.reconstruct(latents, x, y)
        losses = {"reconstruction": main.loss}

        losses["sparsity"], dstep, through_value = self._penalty(latents.value, on, len(x), sparsity)
        dlatents = main.dlatents + through_value
        through_kernel = (theta_here * dlatents + dstep) * kernel
        dz = dlatents * on
        if self.settings.straight_through == "encoder":
            dz = dz + through_kernel
        dtheta = -through_kernel * theta_here if self._log else -through_kernel
        grads = self.backward(encoded.read, latents, dz, main.rows, sums={self._parameter: dtheta})
        add(grads, self.output_gradients(x, main.total))
        self._pull_up(grads, losses, encoded)
        self.auxiliary(grads, losses, encoded, y, main.y_hat, theta - bandwidth / 2)
        return Gradients(grads, losses, main.y_hat, latents)

    def _penalty(
        self, latents: Tensor, on: Tensor, rows: int, sparsity: float
    ) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(loss, ∂L/∂H, ∂L/∂latents) of what makes it sparse."""
        settings = self.settings
        if settings.sparsity == "target_l0":
            assert settings.target_l0 is not None
            weight = sparsity * settings.l0_weight
            excess = on.sum() / (rows * settings.target_l0) - 1
            return weight * excess.square(), 2 * weight * excess / (rows * settings.target_l0), 0.0
        assert settings.sparsity_weight is not None
        weight = sparsity * settings.sparsity_weight / (rows * self.variance)
        if settings.sparsity == "l0":
            return weight * on.sum(), weight, 0.0
        c = settings.tanh_scale
        tanh = (c * latents).tanh()
        return weight * tanh.sum(), 0.0, weight * c * (1 - tanh.square())

    def revived(self, dead: Tensor) -> Tensor:
        if self.settings.reviving != "pre_act":
            return super().revived(dead)
        return (torch.ones_like(dead) if self.settings.pre_act_on == "all" else dead).nonzero().squeeze(1)

    def _pull_up(self, grads: dict[str, Tensor], losses: dict[str, Tensor], encoded: Encoded) -> None:
        """Adds the pre-act loss, which lifts latents towards their threshold: the dead ones, or all."""
        settings, read = self.settings, encoded.read
        if settings.reviving != "pre_act" or not len(encoded.kept):
            return
        indices, pre_acts = encoded.padded(math.inf)  # above every threshold
        weight = settings.pre_act_weight / len(read)
        below = (settings.bandwidth / 2 - widen(pre_acts)).relu_()
        under = below > 0
        count = weight * under.sum(0, dtype=below.dtype)
        more = {"W_enc": product(under.T.to(read.dtype), read).mul_(-weight), "b_enc": -count}
        if self.centred:
            more["b_dec"] = count @ self.W_enc[indices]
        more[self._parameter] = count * self.threshold[indices] if self._log else count
        add(grads, more, indices)
        losses["pre_act"] = weight * below.sum()

    def reinitialise(self, latents: Tensor, x: Tensor, y: Tensor) -> None:
        """As the base, with a threshold that the row a latent is pointed at exceeds, and most others do not.

        Halfway to what x gives, or two standard deviations of a projection of rows whose elements have variance 1.
        """
        super().reinitialise(latents, x, y)
        theta, W_enc = self.threshold.clone(), self.W_enc[latents]
        halfway, usual = 0.5 * (W_enc * x).sum(1), 2.0 * W_enc.norm(dim=1)
        theta[latents] = torch.minimum(halfway, usual).clamp_min(MINIMUM_THRESHOLD)
        self._set_threshold(theta)

    def after_step(self) -> None:
        super().after_step()
        if not self._log:
            self.parameters[self._parameter].clamp_min_(MINIMUM_THRESHOLD)

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        return {"architecture": "jumprelu"}, self.common_weights() | {"threshold": self.threshold.clone()}
