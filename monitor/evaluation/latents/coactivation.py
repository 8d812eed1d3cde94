"""Latents that fire where another one does, and where a latent stands among all others.

Co-activation is measured by the phi coefficient: the correlation of "fires" and "fires" over held-out tokens. It is 1
for two latents that always fire together and about 0 for independent ones, however often either fires; the share of
tokens alone would name the densest latents everywhere.
"""

from __future__ import annotations

import numpy as np

from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.latents.snapshot_saes import SnapshotSae
from monitor.evaluation.latents.views import Scatter

LEAST_TOGETHER = 3
"""Tokens on which both fire; fewer are chance."""
LEAST_PHI = 0.05
COACTIVE = 12
SCATTERED = 600
"""Latents that are drawn beside the one."""


def coactive_latents(latents: LatentActivations, latent: int) -> list[tuple[int, int, float]]:
    """(index, tokens on which both fire, phi) of the latents that fire most where this one does; milliseconds."""
    fires = np.zeros(latents.streamed.size, bool)
    fires[latents.of(latent)[0]] = True
    together = np.zeros(len(latents.positions) + 1, np.int64)
    np.cumsum(fires[latents.positions], out=together[1:])
    both = together[latents.starts[1:]] - together[latents.starts[:-1]]
    n, a, b = latents.rows, int(latents.firings[latent]), latents.firings.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        phi = (n * both - a * b) / np.sqrt(a * (n - a) * b * (n - b))
    phi[(both < LEAST_TOGETHER) | ~np.isfinite(phi)] = 0.0
    phi[latent] = 0.0
    ranking = np.argsort(-phi, kind="stable")[:COACTIVE]
    return [(int(index), int(both[index]), float(phi[index])) for index in ranking if phi[index] >= LEAST_PHI]


def scatter(source: SnapshotSae, latent: int) -> Scatter:
    """This latent and an even sample of those that fire, by density and norm.

    Where all norms are the same to a hundredth, they place nothing: the strongest activations stand in for them.
    """
    norms = source.norms
    is_norm = bool(norms.max() > 1.01 * norms.min())
    heights = norms if is_norm else np.abs(source.latents.strongest)
    live = np.flatnonzero(source.latents.firings)
    sample = live[:: max(1, -(-len(live) // SCATTERED))]
    return Scatter(
        by="norm" if is_norm else "strongest",
        density=source.latents.density[sample].tolist(),
        value=heights[sample].tolist(),
        own_density=float(source.latents.density[latent]),
        own_value=float(heights[latent]),
    )
