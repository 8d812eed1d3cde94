"""Sums over held-out activations that arrive in parts, in float64, from which the measures of an SAE are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.report import DENSITY_EDGES
from trainer.saes.inference import InferenceSae

DENSE_RATE = 0.1
"""A latent is dense that fires on more than this share of the activations."""


class Mean:
    """A mean of values that arrive in parts; NaN while there are none."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.sum += float(values.double().sum())
        self.count += values.numel()

    def include(self, other: Mean) -> None:
        """Adds the values of another mean."""
        self.sum, self.count = self.sum + other.sum, self.count + other.count

    @property
    def value(self) -> float:
        return self.sum / self.count if self.count else float("nan")


class Fit:
    """How well y_hat fits y [n, width] at one hook; `mean` is y's over all parts."""

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean
        self.error = self.variance = self.spread = self.covariance = 0.0
        """Sums of ‖y − y_hat‖², and about the mean of ‖y‖², ‖y_hat‖² and y·y_hat"""
        self.cosine, self.norm_ratio = Mean(), Mean()
        self.square = 0.0
        """Sum of ‖y‖²."""

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        y, y_hat = y.double(), y_hat.double()
        self.error += float((y - y_hat).square().sum())
        self.cosine.add(torch.cosine_similarity(y, y_hat, dim=1))
        self.norm_ratio.add(y_hat.norm(dim=1) / y.norm(dim=1))
        self.square += float(y.square().sum())
        y, y_hat = y - self._mean, y_hat - self._mean
        self.variance += float(y.square().sum())
        self.spread += float(y_hat.square().sum())
        self.covariance += float((y * y_hat).sum())

    def include(self, other: Fit) -> None:
        """Adds the activations of another fit about the same mean."""
        for name in ("error", "variance", "spread", "covariance", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cosine.include(other.cosine)
        self.norm_ratio.include(other.norm_ratio)

    @property
    def fvu(self) -> float | None:
        return self.error / self.variance if self.variance > 0 else None

    @property
    def weight(self) -> float:
        """1 over the mean square of an element of y, up to a factor that all hooks share."""
        return len(self._mean) / self.square if self.square else 0.0


class Tally:
    """The sums of one SAE."""

    def __init__(self, sae: InferenceSae, means: Mapping[str, Tensor]) -> None:
        """`means` [width] are those of all activations, by hook."""
        self.ce, self.kl = Mean(), Mean()
        self.activations = 0
        self.firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        """Number of firings of each latent."""
        self.fits = {hook: Fit(means[hook]) for hook in sae.hooks.writes}
        """Sums for each hook that the SAE writes."""

    def include(self, other: Tally) -> None:
        """Adds the activations of another tally of the same SAE."""
        self.ce.include(other.ce)
        self.kl.include(other.kl)
        self.activations += other.activations
        self.firings += other.firings
        for hook, fit in self.fits.items():
            fit.include(other.fits[hook])

    def fit(self) -> dict[str, float | None]:
        """Measures of the reconstruction over all hooks.

        Sums of squares are in the scale in which an element of a hook's activations has a mean square of 1.
        """
        fits = self.fits.values()
        error, variance, spread, covariance = (
            sum(getattr(fit, name) * fit.weight for fit in fits)
            for name in ("error", "variance", "spread", "covariance")
        )
        return {
            "fvu": error / variance if variance > 0 else None,
            "cosine": sum(fit.cosine.value for fit in fits) / len(fits),
            "norm_ratio": sum(fit.norm_ratio.value for fit in fits) / len(fits),
            "shrinkage": spread / covariance if covariance > 0 else None,
        }

    @property
    def l0(self) -> float | None:
        return int(self.firings.sum()) / self.activations if self.activations else None

    @property
    def dense_latents(self) -> int:
        return int((self.firings > DENSE_RATE * self.activations).sum())

    @property
    def dead_latents(self) -> int:
        return int((self.firings == 0).sum())

    def density(self) -> list[int]:
        """Latents per bin of DENSITY_EDGES by log10 of the share of activations on which they fire, then the silent."""
        fires = self.firings > 0
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64, device=fires.device)
        bins = torch.bucketize((self.firings[fires].double() / max(1, self.activations)).log10(), edges)
        return [*torch.bincount(bins, minlength=len(DENSITY_EDGES)).tolist(), int((~fires).sum())]
