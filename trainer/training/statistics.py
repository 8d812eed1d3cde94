"""Streaming statistics of one SAE: L0, MSE, FVU, shrinkage, density, dead latents.

Ratios are ratios of sums over an exponential window of recent tokens, kept in float64, never means of ratios. Sums of
squares are taken about a fixed reference close to the mean, so that ‖mean‖² ≫ variance costs no digits. Dead latents
are counted in tokens, independently of the batch. Everything here is part of the checkpoint; reading it changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels.select import Latents
from trainer.kernels.sparse import kernels
from trainer.parallel.ranks import ALONE, Ranks
from trainer.report import DENSITY_EDGES
from trainer.state.format import StatisticsState

HALF_LIFE_TOKENS = 100_000
"""An activation this old counts half, once the SAE has trained on RUN_SHARE times as many;"""
SHORTEST_HALF_LIFE_TOKENS = 20_000
"""and one this old at first."""
RUN_SHARE = 20
"""In between, the half-life is this part of the tokens trained, so that the numbers of a short run are not its past."""


def half_life_tokens(tokens: int) -> float:
    """After how many tokens an activation counts half, when the SAE has trained on `tokens`."""
    return min(HALF_LIFE_TOKENS, max(SHORTEST_HALF_LIFE_TOKENS, tokens / RUN_SHARE))


@dataclass(frozen=True)
class Summary:
    """Numbers of the window. `mse` is in the units of the activations given to `update`."""

    l0: float
    mse: float
    fvu: float
    shrinkage: float


class Statistics:
    """Statistics of x [batch, d] and its reconstruction x_hat (a transcoder's y and y_hat).

    `reference` [d] is near the mean of x: that of the first activations. When `ranks` share the latents, each has the
    counters of its own; all else is equal on all ranks.
    """

    def __init__(self, latents: int, reference: Tensor, ranks: Ranks = ALONE) -> None:
        device = reference.device
        self._ranks = ranks
        self.tokens = 0
        self.reference = reference.clone()
        self.tokens_since_fired = torch.zeros(latents, dtype=torch.int64, device=device)
        self.firings = torch.zeros(latents, dtype=torch.float64, device=device)
        self.x_sum = torch.zeros(len(reference), dtype=torch.float64, device=device)
        self.x_hat_sum = torch.zeros_like(self.x_sum)
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        """tokens, active latents, |x−r|², |x_hat−r|², (x−r)·(x_hat−r), |x−x_hat|², each over the window"""

    def update(self, x: Tensor, x_hat: Tensor, fired: Latents) -> None:
        """Adds one batch: x and x_hat [batch, d]; a value of `fired` other than zero counts as a firing. Collective."""
        tokens = len(x)
        counts = fired.firings()
        self.tokens += tokens
        decay = 0.5 ** (tokens / half_life_tokens(self.tokens))
        self.tokens_since_fired.add_(tokens).masked_fill_(counts > 0, 0)
        self.firings.mul_(decay).add_(counts)
        sum_x, sum_x_hat, squares = kernels(x.device).moments(x, x_hat, self.reference)
        self.x_sum.mul_(decay).add_(sum_x)
        self.x_hat_sum.mul_(decay).add_(sum_x_hat)
        active = self._ranks.sum(counts.sum().double()[None], "scalars")
        self.sums.mul_(decay).add_(torch.cat([squares.new_tensor([tokens]), active, squares]))

    def silent_for(self, tokens: int) -> Tensor:
        """bool [latents]: this rank's that have not fired for `tokens` tokens; none until there were that many."""
        return self.tokens_since_fired >= tokens

    def count_dead(self, tokens: int) -> int | None:
        """Number of latents that have not fired for `tokens` tokens; None until there were that many. Collective."""
        return self._ranks.count(int(self.silent_for(tokens).sum())) if self.tokens >= tokens else None

    def summary(self) -> Summary:
        """The window's numbers; NaN before the first batch."""
        tokens, active, xx, hh, xh, error = self.sums.tolist()
        if not tokens:
            return Summary(*[float("nan")] * 4)
        # About the mean of x, μ = r + x_sum / tokens.
        variance = xx - float(self.x_sum @ self.x_sum) / tokens
        covariance = xh - float(self.x_sum @ self.x_hat_sum) / tokens
        spread = hh - 2 * float(self.x_hat_sum @ self.x_sum) / tokens + float(self.x_sum @ self.x_sum) / tokens
        return Summary(
            l0=active / tokens,
            mse=error / (tokens * len(self.x_sum)),
            fvu=error / variance if variance > 0 else float("nan"),
            shrinkage=spread / covariance if covariance > 0 else float("nan"),
        )

    def firing_rate(self) -> Tensor:
        """Fraction of the window's tokens on which each latent fired, float64 [latents of this rank]."""
        return self.firings / self.sums[0].clamp_min(1.0)

    def active_latents(self) -> float:
        """Mean number of this rank's latents active on an activation of the window."""
        return float(self.firing_rate().sum())

    def density(self) -> tuple[int, ...]:
        """Latents per bin of DENSITY_EDGES by log10 firing rate, then those that did not fire in the window.

        Collective.
        """
        rate = self.firing_rate()
        # After many half-lives a silent latent keeps a remainder of its old count, which is no firing.
        fired = self.firings > 1e-3
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64, device=rate.device)
        bins = torch.bucketize(rate[fired].log10().clamp_max(DENSITY_EDGES[-1]), edges)
        counts = torch.cat([torch.bincount(bins, minlength=len(DENSITY_EDGES)), (~fired).sum()[None]])
        return tuple(self._ranks.sum(counts, "scalars").tolist())

    def state(self) -> StatisticsState:
        """The sums and counters themselves, which the next batch changes."""
        return StatisticsState(
            tokens=self.tokens,
            reference=self.reference,
            tokens_since_fired=self.tokens_since_fired,
            firings=self.firings,
            x_sum=self.x_sum,
            x_hat_sum=self.x_hat_sum,
            sums=self.sums,
        )

    def restore(self, state: StatisticsState) -> None:
        """Copies what `state` returned."""
        self.tokens = state.tokens
        self.reference.copy_(state.reference)
        self.tokens_since_fired.copy_(state.tokens_since_fired)
        self.firings.copy_(state.firings)
        self.x_sum.copy_(state.x_sum)
        self.x_hat_sum.copy_(state.x_hat_sum)
        self.sums.copy_(state.sums)
