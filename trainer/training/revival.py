"""New weights for dead latents, where no loss revives them.

Both ways point latents at activations that the SAE reconstructs badly. Resampling (Bricken et al. 2023) replaces all
dead latents every so many tokens. `reinitialise_tokens` replaces latents that have been silent for that long and whose
pre_acts are nowhere positive, so that no gradient reaches them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.saes.base import Sae
from trainer.training.averaging import AverageWeights
from trainer.training.optimizers.base import Optimizer
from trainer.training.statistics import Statistics


@dataclass(frozen=True)
class Revival:
    """Replaces dead latents of one SAE, with their moments, their statistics and their average."""

    sae: Sae
    optimizer: Optimizer
    statistics: Statistics
    average: AverageWeights | None
    seed: int
    silent_tokens: int
    """Tokens of silence after which a latent is to be revived."""

    def replace(self, before: int, tokens: int, x: Tensor, y: Tensor, y_hat: Tensor) -> None:
        """Replaces the latents for which it is due, from a batch x [batch, d_in], y, y_hat [batch, d_out].

        `before` and `tokens` are the SAE's tokens before and after this batch.
        """
        settings, interval = self.sae.settings, 2 * self.silent_tokens
        if settings.revival == "resample" and before // interval < tokens // interval:
            latents = self.statistics.silent_for(self.silent_tokens).nonzero().squeeze(1)
            # A transcoder has no bias at its input; about zero, a large mean would make all these latents alike.
            centre = self.sae.b_dec if self.sae.centred else x.mean(0)
            self._redraw(latents, tokens, y - y_hat, x - centre, y - self.sae.b_dec)
        if limit := settings.reinitialise_tokens:
            latents = self.statistics.silent_for(limit).nonzero().squeeze(1)
            if self.sae.ranks.count(len(latents)):
                pre_acts = self.sae.pre_acts(x, latents)
                unreachable = latents[(pre_acts.abs() if self.sae.by_magnitude else pre_acts).amax(0) <= 0]
                error = y - y_hat
                directions = x - x.mean(0) if self.sae.is_transcoder else error
                self._redraw(unreachable, tokens, error, directions, error)

    def _redraw(self, latents: Tensor, tokens: int, error: Tensor, W_enc_rows: Tensor, W_dec_rows: Tensor) -> None:
        """Points `latents` at activations drawn with a probability that grows as the square of their loss.

        `error` [batch, d_out] is y − y_hat. Encoder and decoder rows are taken from those of W_enc_rows [batch, d_in]
        and W_dec_rows [batch, d_out]. The latents of all ranks share one draw, in which each rank's have a place of
        their own.
        """
        counts = self.sae.ranks.counts(len(latents))
        total = min(sum(counts), len(error))
        if not total:
            return
        first = min(sum(counts[: self.sae.ranks.rank]), total)
        latents = latents[: total - first]
        loss = error.double().square().sum(1).cpu()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + tokens) % 2**63)
        rows = torch.multinomial(loss.square() + 1e-30, total, generator=generator).to(error.device)
        rows = rows[first : first + len(latents)]
        self.sae.reinitialise(latents, W_enc_rows[rows], W_dec_rows[rows])
        self.optimizer.reset_latents(latents)
        self.statistics.tokens_since_fired[latents] = 0
        if self.average is not None:
            self.average.replace_latents(self.sae.parameters, latents)
