"""Sums over held-out activations that arrive in parts, in float64, from which the measures of an SAE are computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from producer.settings import HEAVY_NORM
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


NORM_BANDS = (1.0, 2.0, 3.0, 10.0)
"""Borders of the bands of norms in which activations are told apart, as multiples of the median norm."""
BAND_NAMES = (
    f"up to {NORM_BANDS[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(NORM_BANDS)),
    f"over {NORM_BANDS[-1]:g}",
)


class Band:
    """The activations y of some band of norms: sums about the mean of all activations."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.error = self.variance = 0.0
        """Sums of ‖y − y_hat‖² and, about that mean, of ‖y‖²."""
        self.deviation = torch.zeros(width, dtype=torch.float64, device=device)
        """Sum of y about that mean."""

    def add(self, centred: Tensor, errors: Tensor) -> None:
        """Adds activations about the mean [n, width], and their ‖y − y_hat‖² [n]."""
        self.count += len(centred)
        self.error += float(errors.sum())
        self.variance += float(centred.square().sum())
        self.deviation += centred.sum(0)

    def include(self, other: Band) -> None:
        self.count, self.error = self.count + other.count, self.error + other.error
        self.variance += other.variance
        self.deviation += other.deviation

    @property
    def own_variance(self) -> float:
        """Sum of ‖y‖² about the mean of this band."""
        return self.variance - float(self.deviation.square().sum()) / self.count if self.count else 0.0


class Fit:
    """How well y_hat fits y [n, width] at one hook; `mean` is y's over all parts, `median_norm` that of ‖y‖."""

    def __init__(self, mean: Tensor, median_norm: float) -> None:
        self._mean = mean
        self._borders = torch.tensor(NORM_BANDS, dtype=torch.float64, device=mean.device) * median_norm
        self.bands = [Band(len(mean), mean.device) for _ in BAND_NAMES]
        self.ratios = Mean()
        """‖y − y_hat‖² / ‖y − mean‖² of each activation."""
        self.error = self.variance = self.spread = self.covariance = 0.0
        """Sums of ‖y − y_hat‖², and about the mean of ‖y‖², ‖y_hat‖² and y·y_hat"""
        self.cosine, self.norm_ratio = Mean(), Mean()
        self.square = 0.0
        """Sum of ‖y‖²."""

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        y, y_hat = y.double(), y_hat.double()
        errors = (y - y_hat).square().sum(1)
        band_of = torch.bucketize(y.norm(dim=1), self._borders)
        self.error += float(errors.sum())
        self.cosine.add(torch.cosine_similarity(y, y_hat, dim=1))
        self.norm_ratio.add(y_hat.norm(dim=1) / y.norm(dim=1))
        self.square += float(y.square().sum())
        y, y_hat = y - self._mean, y_hat - self._mean
        self.variance += float(y.square().sum())
        self.spread += float(y_hat.square().sum())
        self.covariance += float((y * y_hat).sum())
        self.ratios.add(errors / y.square().sum(1))
        for index, band in enumerate(self.bands):
            selected = band_of == index
            band.add(y[selected], errors[selected])

    def include(self, other: Fit) -> None:
        """Adds the activations of another fit about the same mean."""
        for name in ("error", "variance", "spread", "covariance", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cosine.include(other.cosine)
        self.norm_ratio.include(other.norm_ratio)
        self.ratios.include(other.ratios)
        for band, others in zip(self.bands, other.bands, strict=True):
            band.include(others)

    @property
    def fvu(self) -> float | None:
        return self.error / self.variance if self.variance > 0 else None

    @property
    def typical(self) -> Band:
        """All activations whose norm is at most HEAVY_NORM times the median."""
        together = Band(len(self._mean), self._mean.device)
        for band, border in zip(self.bands, NORM_BANDS, strict=False):
            if border <= HEAVY_NORM:
                together.include(band)
        return together

    @property
    def weight(self) -> float:
        """1 over the mean square of an element of y, up to a factor that all hooks share."""
        return len(self._mean) / self.square if self.square else 0.0


class Tally:
    """The sums of one SAE."""

    def __init__(self, sae: InferenceSae, means: Mapping[str, Tensor], median_norms: Mapping[str, float]) -> None:
        """`means` [width] and `median_norms` are those of all activations, by hook."""
        self.ce, self.kl = Mean(), Mean()
        self.activations = 0
        self.firings = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
        """Number of firings of each latent."""
        self.fits = {hook: Fit(means[hook], median_norms[hook]) for hook in sae.hooks.writes}
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
        fits = list(self.fits.values())
        error, variance, spread, covariance = (
            sum(getattr(fit, name) * fit.weight for fit in fits)
            for name in ("error", "variance", "spread", "covariance")
        )
        return {
            "fvu": error / variance if variance > 0 else None,
            "cosine": sum(fit.cosine.value for fit in fits) / len(fits),
            "norm_ratio": sum(fit.norm_ratio.value for fit in fits) / len(fits),
            "shrinkage": spread / covariance if covariance > 0 else None,
            "fvu_per_activation": sum(fit.ratios.value for fit in fits) / len(fits),
            "fvu_typical": _weighted_ratio(fits, [(fit.typical.error, fit.typical.own_variance) for fit in fits]),
        }

    def by_norm(self) -> dict[str, dict[str, float | None]]:
        """For each band of norms: its FVU, its share of the activations, and of the variance, over all hooks."""
        fits = list(self.fits.values())
        fvu: dict[str, float | None] = {}
        activations: dict[str, float | None] = {}
        variance: dict[str, float | None] = {}
        for index, name in enumerate(BAND_NAMES):
            bands = [fit.bands[index] for fit in fits]
            if not (count := sum(band.count for band in bands)):
                continue
            fvu[name] = _weighted_ratio(fits, [(band.error, band.variance) for band in bands])
            activations[name] = count / (len(fits) * self.activations)
            shares = [(band.variance, fit.variance) for band, fit in zip(bands, fits, strict=True)]
            variance[name] = _weighted_ratio(fits, shares)
        return {"fvu_by_norm": fvu, "activations_by_norm": activations, "variance_by_norm": variance}

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


def _weighted_ratio(fits: Sequence[Fit], sums: Sequence[tuple[float, float]]) -> float | None:
    """A ratio of sums over the hooks, each weighed by its mean square; None where the denominator is 0."""
    numerator = sum(fit.weight * above for fit, (above, _) in zip(fits, sums, strict=True))
    denominator = sum(fit.weight * below for fit, (_, below) in zip(fits, sums, strict=True))
    return numerator / denominator if denominator > 0 else None
