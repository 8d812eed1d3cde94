"""The law of one SAE's loss by the tokens that it has trained on, and whether more would help. Knows only arrays.

    L(T) = exp(α + β ln T) + exp(ζ)

At a constant learning rate: a power law with an irreducible loss, as Gao et al. 2024 (arXiv 2406.04093, sections 3.1.1
and 3.1.3) fit to compute, to which tokens are proportional for one SAE. They call an SAE converged when its loss
changes by less than some ε; here, when twice the tokens would lower it by less than CONVERGED_GAIN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.scaling.law import FitError, fit_law
from trainer.scaling.report import TokenFit

CONVERGED_GAIN = 0.02
FIRST_SHARE = 0.2
"""Of the tokens; what an SAE does before follows no power law."""
MOST_POINTS = 24
"""Means over reports, equally far apart in the logarithm of tokens: a report is of one batch."""
LEAST_POINTS = 8


def fit_tokens(tokens: Sequence[float], losses: Sequence[float]) -> TokenFit | None:
    """Fits the law to losses reported at a constant learning rate; None where there are too few of them."""
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if not len(x):
        return None
    later = x >= FIRST_SHARE * x.max()
    x, y = x[later], y[later]
    edges = np.geomspace(x[0], x[-1], MOST_POINTS + 1)
    bins = np.searchsorted(edges[1:-1], x, side="right")
    means = [(x[bins == each].mean(), y[bins == each].mean()) for each in np.unique(bins)]
    if len(means) < LEAST_POINTS:
        return None
    try:
        law = fit_law([round(tokens) for tokens, _ in means], [1] * len(means), [loss for _, loss in means])
    except FitError:
        return None
    end = round(float(x[-1]))
    exponent = next(parameter for parameter in law.best.parameters if parameter.name == "beta_n")
    gain = 1 - law.predict(2 * end, 1).loss / law.predict(end, 1).loss
    return TokenFit(exponent.value, exponent.standard_error, law.floor(1), gain, is_converged=gain < CONVERGED_GAIN)
