"""Activations of known ground truth, without text or a language model: sparse sums of random unit directions.

Feature i is active with probability p_i, proportional to decay**i and scaled to a mean of `active` features in an
activation (then clipped at 1), with a coefficient uniform on [0, 1); an activation without any is zero (Sharkey et al.
2022; no noise).

With `correlated`, every activation has probabilities of its own, proportional to Φ(z_i) decay**i, where z is normal
with unit variances and a random correlation matrix; they are scaled to the same mean in each activation.
"""

from __future__ import annotations

import math

import numpy as np

from producer.corpus.base import CorpusError, corpus_fingerprint, describe_shards
from producer.settings import CorpusSettings, SyntheticSettings
from producer.wire import held_out_shards

SEED = 20221213
CORRELATION_RANK = 8
"""Rank of the random correlation matrix of features: correlations have a standard deviation of 0.35."""
NORMAL_STEPS, NORMAL_REACH = 512, 4
"""The normal distribution function is read from a table with this many steps per unit, up to ± this many units."""
NORMAL_DISTRIBUTION = np.array(
    [(1 + math.erf((i / NORMAL_STEPS - NORMAL_REACH) / 2**0.5)) / 2 for i in range(2 * NORMAL_REACH * NORMAL_STEPS)],
    dtype=np.float32,
)


class SyntheticActivations:
    """Numbered shards of synthetic activations. The same settings give the same bits anywhere.

    A shard is `shard_windows` windows of `context` activations.
    """

    directions: np.ndarray
    """The truth: unit rows, float32 [features, d_in]."""

    def __init__(self, settings: CorpusSettings) -> None:
        """Draws the truth of [corpus.synthetic]. Raises CorpusError for settings that contradict each other."""
        truth = settings.synthetic
        assert truth is not None, "CorpusSettings demands [corpus.synthetic] for this kind"
        if truth.active > truth.features:
            raise CorpusError(
                f"corpus.synthetic.active = {truth.active:g} exceeds features = {truth.features}; lower active"
            )
        self.d_in, self.context, self.windows = truth.d_in, settings.context, truth.shard_windows
        self.shards = truth.shards
        self.held_out_shards = held_out_shards(truth.shards, settings.held_out)
        self.description = describe_shards(_contents(truth), truth.shards, settings.held_out)
        self.fingerprint = corpus_fingerprint(settings.kind, truth.shards, _identity(settings.context, truth))
        generator = np.random.default_rng((SEED, 1))
        directions = generator.standard_normal((truth.features, truth.d_in), dtype=np.float32)
        self.directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        frequency = truth.decay ** np.arange(truth.features)
        self.probabilities = np.minimum(frequency * (truth.active / frequency.sum()), 1.0).astype(np.float32)
        """Probability that each feature is active, float32 [features]; the means, with `correlated`."""
        self.loadings = _random_loadings(truth.features) if truth.correlated else None
        """z = normal [CORRELATION_RANK] @ loadings, with unit columns: the correlation matrix is loadingsᵀ loadings."""

    def activations(self, shard: int) -> np.ndarray:
        """Computes the shard's activations in order, window by window, float32 [shard_windows * context, d_in]."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        generator = np.random.default_rng((SEED, 2, shard))
        return np.concatenate([self._window(generator) for _ in range(self.windows)])

    def _window(self, generator: np.random.Generator) -> np.ndarray:
        """Draws the next window, float32 [context, d_in]."""
        # One uniform number serves twice: below p the feature is active, and number / p is then uniform on [0, 1).
        probabilities = np.broadcast_to(self._probabilities(generator), (self.context, len(self.probabilities)))
        uniform = generator.random(probabilities.shape, dtype=np.float32)
        position, feature = np.nonzero(uniform < probabilities)
        coefficients = uniform[position, feature] / probabilities[position, feature]
        nonzero, starts = np.unique(position, return_index=True)
        window = np.zeros((self.context, self.d_in), dtype=np.float32)
        if len(nonzero):  # reduceat and not a matrix product: cheaper, and the same bits whatever the BLAS
            window[nonzero] = np.add.reduceat(coefficients[:, None] * self.directions[feature], starts, axis=0)
        return window

    def _probabilities(self, generator: np.random.Generator) -> np.ndarray:
        """Returns the features' probabilities in the next window: [features] for all, or [context, features]."""
        if self.loadings is None:
            return self.probabilities
        factors = generator.standard_normal((self.context, len(self.loadings)), dtype=np.float32)
        z = np.zeros((self.context, len(self.probabilities)), dtype=np.float32)
        for factor, loading in zip(factors.T, self.loadings, strict=True):  # the same bits whatever the BLAS, as above
            z += factor[:, None] * loading
        step = ((z + NORMAL_REACH) * NORMAL_STEPS).astype(np.int32)
        weights = NORMAL_DISTRIBUTION[np.clip(step, 0, len(NORMAL_DISTRIBUTION) - 1)] * self.probabilities
        scale = self.probabilities.sum(dtype=np.float64) / weights.sum(1, keepdims=True, dtype=np.float64)
        return np.minimum(weights * scale.astype(np.float32), 1.0, dtype=np.float32)


def _random_loadings(features: int) -> np.ndarray:
    """Draws factor loadings with unit columns, float32 [CORRELATION_RANK, features]."""
    generator = np.random.default_rng((SEED, 3))
    loadings = generator.standard_normal((CORRELATION_RANK, features), dtype=np.float32)
    return loadings / np.linalg.norm(loadings, axis=0)


def _contents(truth: SyntheticSettings) -> str:
    correlated = "correlated " if truth.correlated else ""
    features = f"{truth.features:,} {correlated}true features"
    return f"synthetic activations of width {truth.d_in}, {features}, {truth.active:g} active"


def _identity(context: int, truth: SyntheticSettings) -> list[object]:
    """Returns what decides the activations, in the form that the checkpoints of every version hold.

    Earlier versions lacked `correlated`, so it is left out where it is off; and they had `naming`, which was off.
    """
    decisive = truth.model_dump(mode="json", exclude=None if truth.correlated else {"correlated"})
    return [SEED, context, decisive | {"naming": False}]
