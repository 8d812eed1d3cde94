"""One matrix for both directions (Cunningham et al. 2023, arXiv 2309.08600).

    latents = ReLU(M x + b)                     x_hat = Mᵀ latents                 rows of M of unit norm
    L = (|x − x_hat|² + w · Σ_i latents_i) / variance

A latent reads and writes the same direction, in half the memory. There is no decoder bias, so that a large mean of x
has to be reconstructed too (`whitening` removes it). M's gradient is the sum of its gradients as encoder and as
decoder. The paper averages the error over d_in: its α is w / d_in here. Nothing revives dead latents: one that is moved
onto an activation has a large value there at once, and with a hundred of them the loss explodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor

from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.architectures.relu import ReLU
from trainer.saes.gradients import THROUGH_ENCODER, Gradients
from trainer.saes.published import ALL_LATENTS
from trainer.saes.settings import CostTerms, PenalisedSettings


class TiedSettings(PenalisedSettings):
    """[[sae]] with architecture tied."""

    REVIVALS: ClassVar[frozenset[str]] = frozenset({"none"})
    HAS_TRANSCODER: ClassVar[bool] = False

    architecture: Literal["tied"] = "tied"

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.start_from is not None:
            yield "start_from is not for tied: no file says that two matrices are one; use architecture relu"

    def cost_terms(self) -> CostTerms:
        return replace(super().cost_terms(), tied=True, latent_parameters=2)


class Tied(ReLU):
    """M is the parameter `W_dec`."""

    Settings = TiedSettings

    def __init__(
        self, settings: TiedSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        del self.parameters["W_enc"], self.parameters["b_dec"]

    @property
    def W_enc(self) -> Tensor:
        return self.W_dec

    @property
    def b_dec(self) -> Tensor:
        """Zeros; what is written there is lost."""
        return self.W_dec.new_zeros(self.d_out)

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        gradients = super().gradients(x, y, dead, sparsity)
        gradients.of["W_dec"] += gradients.of.pop("W_enc")
        del gradients.of["b_dec"]
        gradients.of.pop(THROUGH_ENCODER, None)
        return gradients

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        keys, weights = super().export(latents)
        return keys, weights | {"W_enc": weights["W_dec"].clone()}
