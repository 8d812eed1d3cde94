"""The values that parameters begin with: directions of latents, and the centre of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.saes.settings import SaeSettings

DATA_SHARE, RANDOM_SHARE = 0.8, 0.2
"""Weights of an activation and of a random direction in an initial direction "data"."""

ROWS_AT_ONCE, LEAST_DRAWN = 4096, 16
"""Rows that are drawn at a time, and the fewest of the last time."""


def initial_directions(settings: SaeSettings, x: Tensor, generator: torch.Generator, latents: range) -> Tensor:
    """Unit rows [latents, d_in]: random, or with initial_directions = "data" towards random rows of the centred x.

    They are those rows of a matrix for all latents, whichever latents are asked for.
    """
    directions = random_rows(settings.d_sae, x.shape[1], generator, latents)
    normalise_rows(directions)
    if settings.initial_directions == "data":
        # Each row of x is used once before any is used again: with enough rows no two latents begin alike.
        order = torch.randperm(len(x), generator=generator)
        towards = (x - x.mean(0))[order[torch.arange(latents.start, latents.stop) % len(x)]]
        normalise_rows(towards)
        directions = DATA_SHARE * towards + RANDOM_SHARE * directions
        normalise_rows(directions)
    return directions


def random_rows(rows: int, width: int, generator: torch.Generator, held: range) -> Tensor:
    """The rows `held` of torch.randn(rows, width), of which never more are in memory than these and a chunk.

    Torch draws in groups of 16 numbers: cut at multiples of 16, with 16 or more at the end, the stream is the same.
    """
    result = torch.empty(len(held), width)
    begin = 0
    while begin < rows:
        end = begin + ROWS_AT_ONCE if begin + ROWS_AT_ONCE + LEAST_DRAWN <= rows else rows
        chunk = torch.randn(end - begin, width, generator=generator)
        first, last = max(begin, held.start), min(end, held.stop)
        if first < last:
            result[first - held.start : last - held.start] = chunk[first - begin : last - begin]
        begin = end
    return result


def normalise_rows(W: Tensor) -> None:
    """Scales each row to unit norm, in place."""
    W.div_(W.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def initial_bias(x: Tensor, kind: str) -> Tensor:
    """The centre [d] of rows x [rows, d]: their geometric_median, their mean or zero."""
    if kind == "zero":
        return torch.zeros(x.shape[1], device=x.device)
    return x.double().mean(0).float() if kind == "mean" else geometric_median(x)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [rows, d]; Weiszfeld's iteration, float64.

    Outliers move it far less than the mean. b_dec begins there in Bricken et al. 2023 and Gao et al. 2024 (arXiv
    2406.04093, appendix A).
    """
    x = x.double()
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1.0 / (x - median).norm(dim=1).clamp_min_(1e-8)
        next_median = weight @ x / weight.sum()
        change = (next_median - median).norm() / median.norm().clamp_min(1e-12)
        median = next_median
        if change < tolerance:
            break
    return median.float()
