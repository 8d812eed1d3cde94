"""ReLU with a penalty on the size of its latents: the classic SAE.

    latents = ReLU(pre_acts)                                    y_hat = latents W_dec + b_dec
    L = (|y − y_hat|² + w · penalty) / variance

    penalty = Σ_i latents_i                       l1: decoder rows of unit norm (Bricken et al. 2023)
            | Σ_i latents_i |W_dec,i|             l1_norm: norms free, folded at export (Anthropic, April 2024)
            | Σ_i tanh(c · latents_i |W_dec,i|)   tanh: large latents are not held down (Anthropic, February 2024)

A crosscoder's |W_dec,i| is the sum of the norms at its hooks, so that a latent pays for each hook it writes to
(Anthropic, October 2024). The penalty shrinks every latent, by w/2 for l1 and an orthogonal decoder; `repair.py`
undoes that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.kernels.select import Latents, positive
from trainer.parallel.products import sums
from trainer.saes.architectures.auxk import add_auxk
from trainer.saes.base import Sae
from trainer.saes.folding import has_unit_rows
from trainer.saes.gradients import Gradients, add
from trainer.saes.published import ALL_LATENTS, Activation, SaeWeights, jumprelu_of, linear_state
from trainer.saes.settings import PenalisedSettings, Revival

INITIAL_NORM = 0.1
"""Norm of encoder and decoder rows at the start where it is free."""


class ReLUSettings(PenalisedSettings):
    """[[sae]] with architecture relu."""

    IS_TUNABLE: ClassVar[bool] = True
    CONDITIONS: ClassVar[dict[str, Callable[[Any], bool]]] = PenalisedSettings.CONDITIONS | {
        "tanh_scale": lambda sae: sae.sparsity == "tanh",
        "initial_norm": lambda sae: sae.sparsity != "l1",
    }

    architecture: Literal["relu"] = "relu"
    penalty: Literal["l1", "l1_norm", "tanh"] | None = None
    """What makes it sparse: l1 on unit decoder rows (Bricken 2023), l1_norm weighted by free decoder norms (default;
    Anthropic, April 2024) or tanh."""
    tanh_scale: float = Field(default=4.0, gt=0.0)
    """Penalty tanh: c in tanh(c · latent · decoder norm)."""
    initial_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm of encoder and decoder rows at the start where it is free (l1_norm or tanh; 0.1 without it)."""

    @property
    def sparsity(self) -> str:
        return self.penalty or "l1_norm"

    @property
    def variant(self) -> str:
        return f"relu with penalty {self.sparsity}"

    @property
    def default_revival(self) -> Revival:
        return "resample" if self.sparsity == "l1" else "none"

    @property
    def unit_decoder(self) -> bool:
        return super().unit_decoder and self.sparsity == "l1"

    def faults(self) -> Iterator[str]:
        if self.sparsity == "l1" and self.target is not None:
            # Latents would shrink and decoder rows grow for it.
            yield "penalty l1 needs decoder rows of unit norm, which a transcoder has not: use l1_norm or tanh"
        yield from super().faults()

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"penalty": self.sparsity}


class ReLUActivation(Activation):
    """max(z, 0)"""

    name = "relu"
    architecture = "standard"
    decided_by = "latent"

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return pre_acts.relu()

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return pre_acts.new_full((len(pre_acts),), torch.inf)

    def as_jumprelu(self, sae: SaeWeights) -> SaeWeights:
        return jumprelu_of(sae, sae.weights | {"threshold": torch.zeros_like(sae.weights["b_enc"])})

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        centred = sae.recentred(centred=True)
        if sae.cfg["apply_b_dec_to_input"] and has_unit_rows(centred["W_dec"]):
            state = linear_state(centred)
            return "AutoEncoder", {**{n: v for n, v in state.items() if n != "b_dec"}, "bias": state["b_dec"]}
        # AutoEncoder would divide by the norms of decoder rows, zero or not.
        state = linear_state(sae.recentred(centred=False))
        return "AutoEncoderNew", {**{n: v for n, v in state.items() if n != "b_dec"}, "decoder.bias": state["b_dec"]}


RELU = ReLUActivation()


class ReLU(Sae):
    """See the module's docstring."""

    Settings: ClassVar[type[PenalisedSettings]] = ReLUSettings
    activations = (RELU,)
    settings: ReLUSettings

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        super().initialise(x, y, generator)
        if not self.unit_decoder and not self.is_transcoder:
            # Small, or the penalty would silence the latents before they have learned anything.
            self.W_enc.mul_(self.settings.initial_norm or INITIAL_NORM)
            self.W_dec.mul_(self.settings.initial_norm or INITIAL_NORM)

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        encoded = self.encode(x, self.aux_latents(dead), partial(positive, dense_above=self.dense_above))
        latents = encoded.latents[0]
        main = self.reconstruct(latents, x, y)
        losses = {"reconstruction": main.loss}
        losses["sparsity"], through_value, dW_dec = self._penalty(latents, sparsity / len(x))
        dz = (main.dlatents + through_value) * (latents.value > 0)
        grads = self.backward(encoded.inputs, latents, dz, main.dlevels)
        add(grads, self.output_gradients(x, main.dy_hat))
        if dW_dec is not None:
            grads["W_dec"] += dW_dec
        add_auxk(self, grads, losses, encoded, y, main.y_hat)
        return Gradients(grads, losses, main.y_hat, latents)

    def _penalty(self, latents: Latents, sparsity: float) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """(loss, ∂L/∂latents at the entries, ∂L/∂W_dec or None) of the penalty."""
        assert self.settings.sparsity_weight is not None
        weight = sparsity * self.settings.sparsity_weight / self.variance
        if self.settings.sparsity == "l1":
            return weight * latents.value.sum(), weight, None
        norms, directions = self._decoder_norms()
        size = latents.value * latents.at(norms)
        if self.settings.sparsity == "l1_norm":
            dnorms = sums(latents, latents.value, self.blocks)
            return weight * size.sum(), weight * latents.at(norms), weight * dnorms[:, None] * directions
        c = self.settings.tanh_scale
        tanh = (c * size).tanh()
        slope = c * (1 - tanh.square())
        dnorms = sums(latents, latents.value * slope, self.blocks)
        return weight * tanh.sum(), weight * slope * latents.at(norms), weight * dnorms[:, None] * directions

    @property
    def partial_losses(self) -> tuple[str, ...]:
        return ("sparsity",)

    def _decoder_norms(self) -> tuple[Tensor, Tensor]:
        """(|W_dec,i| summed over hooks [d_sae], its derivative by W_dec [d_sae, d_out])."""
        blocks = self.W_dec.split(self.widths if not self.is_transcoder else self.d_out, 1)
        norms = [block.norm(dim=1, keepdim=True) for block in blocks]
        directions = [block / norm.clamp_min(1e-12) for block, norm in zip(blocks, norms, strict=True)]
        return torch.cat(norms, 1).sum(1), torch.cat(directions, 1)

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        return {"architecture": RELU.architecture}, self.common_weights(latents)
