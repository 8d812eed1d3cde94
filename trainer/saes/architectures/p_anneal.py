"""ReLU with an Lp penalty whose p falls: from L1 towards a count of latents (Karvonen et al. 2024, arXiv 2408.00113).

    latents = ReLU(pre_acts)                       y_hat = latents W_dec + b_dec                  rows of unit norm
    L = (|y − y_hat|² + w · a · Σ_i ((latents_i + ε)^p − ε^p)) / variance               p falls from 1 to p_end

    a = Σ latents / Σ ((latents + ε)^p − ε^p)  of the batch, held constant

With p = 1 this is L1, which shrinks every latent alike. The smaller p is, the more of the penalty is paid by small
latents, and large ones are left as large as they reconstruct best. a keeps the penalty of a batch at that of L1, as
dictionary_learning adapts its coefficient whenever it lowers p. ε, in units of an element of x, bounds the slope at
zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.kernels.select import Latents
from trainer.parallel.blocks import by_block
from trainer.saes.annealing import linear
from trainer.saes.architectures.relu import ReLU
from trainer.saes.settings import CostTerms, PenalisedSettings, Positive, Revival

SMALLEST = 0.01
"""ε"""


class PAnnealSettings(PenalisedSettings):
    """[[sae]] with architecture p_anneal."""

    HAS_TRANSCODER: ClassVar[bool] = False

    architecture: Literal["p_anneal"] = "p_anneal"
    anneal_tokens: Positive = Field(examples=[1_000_000])
    """p falls linearly from 1 to p_end over so many of its tokens, after those of sparsity_warmup_tokens."""
    p_end: float = Field(default=0.2, gt=0.0, lt=1.0)
    """p in the end."""

    @property
    def default_revival(self) -> Revival:
        return "resample"

    def p(self, tokens: int) -> float:
        """p after `tokens` tokens of the SAE."""
        return linear(1.0, self.p_end, self.anneal_tokens, max(0, tokens - self.sparsity_warmup(0)))

    def cost_terms(self) -> CostTerms:
        return replace(super().cost_terms(), scalars=2)


class PAnneal(ReLU):
    """See the module's docstring."""

    Settings = PAnnealSettings
    settings: PAnnealSettings  # type: ignore[assignment]

    def _penalty(self, latents: Latents, sparsity: float) -> tuple[Tensor, Tensor | float, Tensor | None]:
        assert self.settings.sparsity_weight is not None
        p, value = self.settings.p(self.tokens), latents.value
        # Not with `**`, whose last digit depends on where in a tensor a number is, and so on the number of ranks.
        logarithm = (value + SMALLEST).log_()
        power = (p * logarithm).exp_() - SMALLEST**p
        # A sum for each block of latents, so that its bits do not depend on the number of ranks.
        sums = [
            torch.stack([value[at].sum(dtype=torch.float64), power[at].sum(dtype=torch.float64)])
            for _, _, at in by_block(latents, self.blocks)
        ]
        of_values, of_powers = self.ranks.total(torch.stack(sums), "scalars")
        weight = sparsity * self.settings.sparsity_weight / self.variance
        scaled = (weight * of_values / of_powers.clamp_min(1e-30)).to(value.dtype)
        return scaled * power.sum(), scaled * p * ((p - 1) * logarithm).exp_(), None
