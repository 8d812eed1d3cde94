"""Repair of feature suppression: a second phase without the penalty (Wright & Sharkey 2024).

    latents = s ⊙ ReLU(x W_encᵀ + b_enc)                        x_hat = latents W_dec + b_dec
    L = |x − x_hat|² / variance

Training starts from a ReLU SAE, whose penalty has shrunk each latent by an amount that depends on its size. `train`
names the parameters that may change, in every combination of the source. While the encoder does not change, every
activation keeps exactly the active latents it had; where it does, nothing holds the number of them. Decoder rows keep
unit norm beside a scale, which does the same; without one they are free, and their norms are folded into the encoder
on export. So that the active latents stay, b_dec is not subtracted from x: at the start
it is moved into b_enc where necessary. s is kept above zero, where a latent would vanish for good, and is folded into
W_enc and b_enc on export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trainer.kernels.select import positive
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.architectures.relu import RELU
from trainer.saes.base import Sae
from trainer.saes.gradients import Gradients, add
from trainer.saes.published import ALL_LATENTS
from trainer.saes.settings import SHARED_PARAMETERS, CostTerms, SaeSettings

TRAINABLE = {
    "scale": {"scale"},
    "scale+decoder": {"scale", "W_dec", "b_dec"},
    "scale+encoder": {"scale", "W_enc", "b_enc"},
    "decoder": {"W_dec", "b_dec"},
    "encoder": {"W_enc", "b_enc"},
    "decoder+encoder": {"W_dec", "b_dec", "W_enc", "b_enc"},
    "all": {"scale", "W_dec", "b_dec", "W_enc", "b_enc"},
}
MINIMUM_SCALE = 1e-3


class RepairSettings(SaeSettings):
    """[[sae]] with architecture repair."""

    SHAPE: ClassVar[frozenset[str]] = SaeSettings.SHAPE | {"train"}
    REVIVALS: ClassVar[frozenset[str]] = frozenset({"none"})
    HAS_TRANSCODER: ClassVar[bool] = False

    architecture: Literal["repair"] = "repair"
    train: Literal["scale", "decoder", "encoder", "scale+decoder", "scale+encoder", "decoder+encoder", "all"] = (
        "scale+decoder"
    )
    """Parameters that may change. While the encoder does not, the active latents stay exactly the same."""

    @property
    def centred(self) -> bool:
        return False

    @property
    def unit_decoder(self) -> bool:
        return super().unit_decoder and (self.train == "encoder" or "scale" in TRAINABLE[self.train])

    def cost_terms(self) -> CostTerms:
        return replace(super().cost_terms(), latent_parameters=len(TRAINABLE[self.train] - set(SHARED_PARAMETERS)))

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.start_from is None:
            yield "architecture repair needs start_from, the folder of a trained relu or tied SAE"


class Repair(Sae):
    """See the module's docstring."""

    Settings = RepairSettings
    activations = (RELU,)
    settings: RepairSettings

    def __init__(
        self, settings: RepairSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        self.parameters["scale"] = torch.ones(len(self.latents))
        self.trainable = frozenset(TRAINABLE[settings.train])

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        self.parameters["scale"].fill_(1.0)

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        encoded = self.encode(x, self.aux_latents(dead), partial(positive, dense_above=self.dense_above))
        active = encoded.latents[0]
        scale = active.at(self.parameters["scale"])
        latents = active.with_value(active.value * scale)
        main = self.reconstruct(latents, x, y)
        dz = main.dlatents * scale * (active.value > 0)
        grads = self.backward(encoded.inputs, latents, dz, main.dlevels, sums={"scale": main.dlatents * active.value})
        add(grads, self.output_gradients(x, main.dy_hat))
        return Gradients(grads, {"reconstruction": main.loss}, main.y_hat, latents)

    def after_step(self) -> None:
        super().after_step()
        self.parameters["scale"].clamp_min_(MINIMUM_SCALE)

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights, scale = self.common_weights(latents), self.parameters["scale"][latents]
        weights["W_enc"] *= scale[:, None]
        weights["b_enc"] *= scale
        return {"architecture": RELU.architecture}, weights
