"""Gated SAE: separate paths decide which latents are active and how much (Rajamanoharan et al. 2024, arXiv 2404.16014).

    u = (x − b_dec) W_encᵀ                 π_gate = u + b_gate               π_mag = exp(r_mag) ⊙ u + b_mag
    latents = 1[π_gate > 0] ⊙ ReLU(π_mag)                                    x_hat = latents W_dec + b_dec

    L = (|x − x_hat|² + w · Σ_i ReLU(π_gate)_i + |x − x_hat_frozen(ReLU(π_gate))|²) / variance

x_hat_frozen decodes with W_dec and b_dec held constant. The gate learns from the last two terms only, the magnitude
from the first only: the penalty does not shrink the latents.

With θ = b_mag − exp(r_mag) ⊙ b_gate the same function is a JumpReLU of π_mag with threshold max(θ, 0), exactly; a
snapshot can be exported so. `b_gate` is the b_enc of the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trainer.kernels.select import positive
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.architectures.auxk import add_auxk
from trainer.saes.base import Sae
from trainer.saes.gradients import Gradients, add
from trainer.saes.published import ALL_LATENTS, Activation, SaeWeights, distance_to_threshold, jumprelu_of
from trainer.saes.settings import CostTerms, PenalisedSettings, Revival


class GatedSettings(PenalisedSettings):
    """[[sae]] with architecture gated."""

    IS_TUNABLE: ClassVar[bool] = True
    HAS_TRANSCODER: ClassVar[bool] = False

    architecture: Literal["gated"] = "gated"

    @property
    def default_revival(self) -> Revival:
        return "resample"

    def cost_terms(self) -> CostTerms:
        return replace(super().cost_terms(), decodings=2, latent_parameters=5)


class GatedActivation(Activation):
    """exp(r_mag) u + b_mag where the gate is open, 0 elsewhere; pre-activations are the gate's."""

    name = "gated"
    architecture = "gated"
    decided_by = "latent"
    has_transcoder = False
    vectors = ("b_gate", "b_mag", "r_mag")

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        magnitude = (pre_acts - weights["b_gate"]) * weights["r_mag"].exp() + weights["b_mag"]
        return magnitude.relu() * (pre_acts > 0)

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return distance_to_threshold(pre_acts, None, weights["W_enc"])

    def as_jumprelu(self, sae: SaeWeights) -> SaeWeights:
        w = dict(sae.weights)
        r = w.pop("r_mag").exp()
        w["b_enc"] = w.pop("b_mag")
        w["threshold"] = (w["b_enc"] - r * w.pop("b_gate")).clamp_min(0.0)
        w["W_enc"] = w["W_enc"] * r[:, None]
        return jumprelu_of(sae, w)

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        centred = sae.recentred(centred=True)
        return "GatedAutoEncoder", {
            "decoder_bias": centred["b_dec"],
            "encoder.weight": centred["W_enc"],
            "decoder.weight": centred["W_dec"].T,
            "gate_bias": centred["b_gate"],
            "mag_bias": centred["b_mag"],
            "r_mag": centred["r_mag"],
        }


GATED = GatedActivation()


class Gated(Sae):
    """See the module's docstring."""

    Settings = GatedSettings
    activations = (GATED,)
    settings: GatedSettings
    encoder_bias = "b_gate"

    def __init__(
        self, settings: GatedSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        self.parameters["b_gate"] = self.parameters.pop("b_enc")
        self.parameters["b_mag"] = torch.zeros(len(self.latents))
        self.parameters["r_mag"] = torch.zeros(len(self.latents))

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        assert self.settings.sparsity_weight is not None
        encoded = self.encode(x, self.aux_latents(dead), partial(positive, dense_above=self.dense_above))
        gate = encoded.latents[0]
        is_open = gate.value > 0
        r, weight = gate.at(self.parameters["r_mag"].exp()), 1.0 / (len(x) * self.variance)
        scaled = r * (gate.value - gate.at(self.b_enc))  # exp(r_mag) u
        latents = gate.with_value((scaled + gate.at(self.parameters["b_mag"])).relu() * is_open)
        main = self.reconstruct(latents, x, y)
        frozen = self.reconstruct(gate, x, y, is_auxiliary=True)
        l1 = sparsity * self.settings.sparsity_weight * weight
        losses = {"reconstruction": main.loss, "sparsity": l1 * gate.value.sum(), "gate": frozen.loss}

        dmag = main.dlatents * (latents.value > 0)
        dgate = (frozen.dlatents + l1) * is_open
        # b_gate is no part of the magnitude, so its gradient is the gate's alone.
        sums = {"b_mag": dmag, "b_gate": dgate, "r_mag": dmag * scaled}
        grads = self.backward(encoded.inputs, latents, dgate + r * dmag, main.dlevels, sums=sums)
        add(grads, self.output_gradients(x, main.dy_hat))
        # A latent whose gate never opens is dead; AuxK works on the gate's pre-activations.
        add_auxk(self, grads, losses, encoded, y, main.y_hat)
        return Gradients(grads, losses, main.y_hat, latents)

    @property
    def partial_losses(self) -> tuple[str, ...]:
        return ("sparsity",)

    def reinitialise(self, latents: Tensor, x: Tensor, y: Tensor) -> None:
        super().reinitialise(latents, x, y)
        self.parameters["b_mag"][latents] = 0.0
        self.parameters["r_mag"][latents] = 0.0

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights = self.common_weights(latents)
        weights["b_gate"] = weights.pop("b_enc")
        return {"architecture": GATED.architecture}, weights | {
            name: self.parameters[name][latents].clone() for name in ("b_mag", "r_mag")
        }
