"""JumpReLU with a straight-through kernel of any width (arXiv 2407.14435; Anthropic, January 2025).

    latents = z · H(z − θ), z = pre_acts                       y_hat = latents W_dec + b_dec
    L = |y − y_hat|² / variance + penalty + w_pre · Σ_{dead i} ReLU(θ_i − z_i)

    penalty = w_l0 · (L0 / target_l0 − 1)²            target_l0: zero at the target, so it needs no tuning
            | w · L0 / variance                       l0 (Gemma Scope)
            | w · Σ tanh(c · latents) / variance      tanh (Anthropic; decoder rows have unit norm here)

H has no useful derivative; the straight-through one spreads the jump over a bandwidth ε, K(u) = 1[|u| < ε/2]:

    ∂latents/∂z = H + (θ/ε) K(z − θ)      ∂latents/∂θ = −(θ/ε) K(z − θ)      ∂H/∂z = K/ε      ∂H/∂θ = −K/ε

With `straight_through = "encoder"` it flows into z as well as into θ: the encoder learns too which latents to leave
out. With "threshold" the terms with K reach θ only. θ itself is trained, in float32 and above zero, or with `log` t in
θ = exp(t), where ∂L/∂t = θ ∂L/∂θ. ε is in units of an element of x, whose variance is 1.

The gradient is zero but on entries with z > θ − ε/2, apart from the dead latents' pre-act loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.kernels.dense import product
from trainer.kernels.select import positive, widen
from trainer.parallel.blocks import blocks_of_subset
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.annealing import AnnealedSettings
from trainer.saes.architectures.auxk import add_auxk
from trainer.saes.base import Sae
from trainer.saes.encoder import Encoded
from trainer.saes.gradients import Gradients, add
from trainer.saes.published import ALL_LATENTS, Activation, SaeWeights, distance_to_threshold, matrix_state
from trainer.saes.settings import ASSUMED_L0, CostTerms, NestedSettings, PenalisedSettings, Revival

INITIAL_L0 = 4.0
"""L0 at the start in units of the target: enough for a gradient everywhere, small enough to be fast."""
INITIAL_L0_WITHOUT_TARGET = 128.0
"""L0 at the start without target_l0."""
MINIMUM_THRESHOLD = 1e-3
ENTRIES_PER_ACTIVE = 1.5
"""Entries within reach of the kernel per active latent; counted at the default bandwidth of 0.5."""


class JumpReLUSettings(NestedSettings, PenalisedSettings, AnnealedSettings):
    """[[sae]] with architecture jumprelu."""

    IS_TUNABLE: ClassVar[bool] = True
    SHAPE: ClassVar[frozenset[str]] = NestedSettings.SHAPE | {"threshold"}
    TARGET = "target_l0"
    REVIVALS: ClassVar[frozenset[str]] = NestedSettings.REVIVALS | {"pre_act"}
    CONDITIONS: ClassVar[dict[str, Callable[[Any], bool]]] = PenalisedSettings.CONDITIONS | {
        "target_l0": lambda sae: sae.sparsity == "target_l0",
        "l0_weight": lambda sae: sae.sparsity == "target_l0",
        "anneal_tokens": lambda sae: sae.sparsity == "target_l0",
        "anneal_from": lambda sae: sae.sparsity == "target_l0",
        "tanh_scale": lambda sae: sae.sparsity == "tanh",
        "pre_act_weight": lambda sae: sae.revival == "pre_act",
        "pre_act_on": lambda sae: sae.revival == "pre_act",
    }

    architecture: Literal["jumprelu"] = "jumprelu"
    penalty: Literal["target_l0", "l0", "tanh"] | None = None
    """What makes it sparse: target_l0 (default), l0 or tanh."""
    target_l0: float | None = Field(default=None, gt=0.0)
    """Mean number of latents per activation to aim at."""
    l0_weight: float = Field(default=1.0, ge=0.0)
    """Weight of (L0 / target_l0 − 1)²; with 1, L0 ends about 2 % above its target."""
    tanh_scale: float = Field(default=4.0, gt=0.0)
    """Penalty tanh: c in tanh(c · latent · decoder norm)."""
    bandwidth: float = Field(default=0.5, gt=0.0)
    """Width of the straight-through kernel, where an element of x has variance 1. 2 is the wide kernel (Anthropic's),
    which on ground truth finds the rarest features too; 0.5 reconstructs the demo's activations better and touches
    fewer entries."""
    initial_threshold: float = Field(default=0.25, gt=0.0)
    """Threshold at the start, in the same scale."""
    threshold: Literal["linear", "log"] = "linear"
    """Train the threshold itself or its logarithm, which moves in proportion to its size."""
    straight_through: Literal["encoder", "threshold"] = "encoder"
    """The jump's gradient reaches the encoder too (Anthropic 2025), or the threshold only (Gemma Scope)."""
    pre_act_weight: float = Field(default=3e-6, gt=0.0)
    """pre_act: weight of its loss, beside a reconstruction in units of variance."""
    pre_act_on: Literal["dead", "all"] = "dead"
    """pre_act: lift the dead latents, or all that are below their threshold (Anthropic 2025; a dense product more)."""

    @property
    def sparsity(self) -> str:
        return self.penalty or "target_l0"

    @property
    def variant(self) -> str:
        return f"jumprelu with penalty {self.sparsity}"

    @property
    def default_revival(self) -> Revival:
        return "pre_act"

    def faults(self) -> Iterator[str]:
        if self.sparsity == "target_l0" and self.target_l0 is None:
            yield "architecture jumprelu needs target_l0, such as target_l0 = 32"
        elif self.sparsity == "target_l0" and self.target_l0 is not None and self.target_l0 > self.d_sae:
            yield f"target_l0 = {self.target_l0:g} exceeds d_sae = {self.d_sae}; lower target_l0 or raise d_sae"
        if self.sparsity == "tanh" and self.target is not None:
            # Latents would shrink and decoder rows grow for it.
            yield "penalty tanh needs decoder rows of unit norm, which a transcoder has not: use target_l0 or l0"
        yield from super().faults()

    def sparsity_warmup(self, warmup_tokens: int) -> int:
        if self.sparsity_warmup_tokens is not None:
            return self.sparsity_warmup_tokens
        return 4 * warmup_tokens if self.sparsity == "target_l0" else 0

    def cost_terms(self) -> CostTerms:
        l0 = self.target_l0 or min(ASSUMED_L0, self.d_sae)
        return CostTerms(
            active=l0 * ENTRIES_PER_ACTIVE,
            latent_parameters=4,
            first_active=ENTRIES_PER_ACTIVE * self.first_active if self.target_l0 else 0.0,
            scalars=int(self.sparsity == "target_l0"),
            l0_is_assumed=self.target_l0 is None,
        )


class JumpReLUActivation(Activation):
    """z where z exceeds a threshold of the latent, 0 elsewhere."""

    name = "jumprelu"
    architecture = "jumprelu"
    decided_by = "latent"
    vectors = ("b_enc", "threshold")

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return pre_acts.relu() * (pre_acts > weights["threshold"])

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return distance_to_threshold(pre_acts, weights["threshold"], weights["W_enc"])

    def as_jumprelu(self, sae: SaeWeights) -> SaeWeights:
        return sae

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        plain = sae.recentred(centred=False)
        return "JumpReluAutoEncoder", matrix_state(plain) | {"threshold": plain["threshold"]}


JUMPRELU = JumpReLUActivation()


class JumpReLU(Sae):
    """See the module's docstring."""

    Settings = JumpReLUSettings
    activations = (JUMPRELU,)
    settings: JumpReLUSettings

    def __init__(
        self, settings: JumpReLUSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        self._log = settings.threshold == "log"
        self._parameter = "log_threshold" if self._log else "threshold"
        """Name of the parameter that stores θ."""
        self.parameters[self._parameter] = torch.zeros(len(self.latents))

    @property
    def threshold(self) -> Tensor:
        """θ of this rank's latents"""
        parameter = self.parameters[self._parameter]
        return parameter.exp() if self._log else parameter

    def _set_threshold(self, theta: Tensor) -> None:
        self.parameters[self._parameter].copy_(theta.log() if self._log else theta)

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """As the base; with equal rates, the latents together have an L0 of INITIAL_L0 × target_l0."""
        super().initialise(x, y, generator)
        self._set_threshold(torch.full((len(self.latents),), self.settings.initial_threshold))
        l0 = INITIAL_L0 * self.settings.target_l0 if self.settings.target_l0 else INITIAL_L0_WITHOUT_TARGET
        if self.settings.initial_rates == "equal":
            self.equalise_rates(x, min(0.5, l0 / self.d_sae), self.settings.initial_threshold)

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        self._set_threshold(weights["threshold"].clamp_min(MINIMUM_THRESHOLD))

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        theta, bandwidth = self.threshold, self.settings.bandwidth
        select = partial(positive, dense_above=self.dense_above)
        encoded = self.encode(x, self.aux_latents(dead), select, offset=theta - bandwidth / 2)
        near = encoded.latents[0]
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
        grads = self.backward(encoded.inputs, latents, dz, main.dlevels, sums={self._parameter: dtheta})
        add(grads, self.output_gradients(x, main.dy_hat))
        self._add_pre_act_loss(grads, losses, encoded)
        add_auxk(self, grads, losses, encoded, y, main.y_hat, theta - bandwidth / 2)
        return Gradients(grads, losses, main.y_hat, latents)

    def _penalty(
        self, latents: Tensor, on: Tensor, rows: int, sparsity: float
    ) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(loss, ∂L/∂H, ∂L/∂latents) of the penalty; all but target_l0 is that of this rank's latents."""
        settings = self.settings
        if settings.sparsity == "target_l0":
            weight, target = sparsity * settings.l0_weight, settings.active_latents(self.tokens)
            # Whole numbers: exact in any order, up to 2⁵³.
            active = self.ranks.sum(on.sum(dtype=torch.float64), "scalars").to(on.dtype)
            excess = active / (rows * target) - 1
            return weight * excess.square(), 2 * weight * excess / (rows * target), 0.0
        assert settings.sparsity_weight is not None
        weight = sparsity * settings.sparsity_weight / (rows * self.variance)
        if settings.sparsity == "l0":
            return weight * on.sum(), weight, 0.0
        c = settings.tanh_scale
        tanh = (c * latents).tanh()
        return weight * tanh.sum(), 0.0, weight * c * (1 - tanh.square())

    def aux_latents(self, dead: Tensor) -> Tensor:
        if self.settings.revival != "pre_act":
            return super().aux_latents(dead)
        return (torch.ones_like(dead) if self.settings.pre_act_on == "all" else dead).nonzero().squeeze(1)

    def _add_pre_act_loss(self, grads: dict[str, Tensor], losses: dict[str, Tensor], encoded: Encoded) -> None:
        """Adds the loss that lifts the pre_acts of dead latents, or of all, towards their threshold."""
        settings, inputs = self.settings, encoded.inputs
        if settings.revival != "pre_act" or not len(encoded.aux_latents):
            return
        indices, pre_acts = self.padded(encoded, math.inf)  # above every threshold
        weight = settings.pre_act_weight / len(inputs)
        distance = (settings.bandwidth / 2 - widen(pre_acts)).relu_()
        is_below = distance > 0
        count = weight * is_below.sum(0, dtype=distance.dtype)
        blocks = blocks_of_subset(self.blocks, indices)
        products = [product(is_below[:, block.latents].T.to(inputs.dtype), inputs) for block in blocks]
        dW_enc = (products[0] if len(products) == 1 else torch.cat(products)).mul_(-weight)
        more = {"W_enc": dW_enc, "b_enc": -count, **self.through_encoder(-count, indices)}
        more[self._parameter] = count * self.threshold[indices] if self._log else count
        add(grads, more, indices)
        losses["pre_act"] = weight * distance.sum()

    @property
    def partial_losses(self) -> tuple[str, ...]:
        return ("pre_act",) if self.settings.sparsity == "target_l0" else ("sparsity", "pre_act")

    def reinitialise(self, latents: Tensor, x: Tensor, y: Tensor) -> None:
        """As the base, with a threshold that the activation x of a latent exceeds, and most others do not.

        It is half of the pre_act for x, or two standard deviations of a projection of activations whose elements have
        variance 1, whichever is less.
        """
        super().reinitialise(latents, x, y)
        theta, W_enc = self.threshold.clone(), self.W_enc[latents]
        half, two_deviations = 0.5 * (W_enc * x).sum(1), 2.0 * W_enc.norm(dim=1)
        theta[latents] = torch.minimum(half, two_deviations).clamp_min(MINIMUM_THRESHOLD)
        self._set_threshold(theta)

    def after_step(self) -> None:
        super().after_step()
        if not self._log:
            self.parameters[self._parameter].clamp_min_(MINIMUM_THRESHOLD)

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights = self.common_weights(latents) | {"threshold": self.threshold[latents].clone()}
        return {"architecture": JUMPRELU.architecture}, weights
