"""The n-gram with wildcards that best predicts where a latent fires.

After Neuron to Graph (Foote et al., 2305.19911), as Gao et al. apply it to latents (2406.04093, §4.3), with a
difference: they shorten a few contexts by running the model again, and keep a collection of n-grams. Here nothing runs,
and one n-gram is searched for among all activations on held-out text (`activations`), which takes milliseconds. It
predicts whether a latent fires, not how strongly.

The windows are dealt to two halves, every second one to each, so that both have parts of long documents. The pattern
with the best F1 is chosen on one half, and its scores are measured on the other:

    precision  share of the pattern's places where the latent fires
    recall     share of the latent's firings that are at the pattern's places
    f1         2 · both / (places + firings): their harmonic mean

A latent may fire some tokens after what it stands for: then the pattern ends with that number of wildcards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from monitor.evaluation.latents.activations import LatentActivations

LONGEST = 5
"""Tokens of an n-gram, wildcards included."""
LEAST_GAIN = 0.01
"""F1 that another token must gain on the half where patterns are chosen; less is chance."""
BEAM = 8
"""Patterns of each length that are extended by one token."""
SAMPLED_LATENTS = 256
"""Latents whose F1 is averaged."""


@dataclass(frozen=True)
class Explanation:
    """The pattern, with its scores on the other half; None for a ratio without a denominator."""

    pattern: tuple[int | None, ...]
    """Token ids, None for any token, up to the position where the latent fires; empty when it never fired."""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class _Half:
    """The positions of one half's windows that the SAE reads."""

    tokens: np.ndarray
    """int64 [positions, LONGEST]: the token `offset` positions before; −1 before the window begins."""
    fires: np.ndarray
    """bool [positions]"""


_Pattern = frozenset[tuple[int, int]]
"""(offset, token id) of each token that is no wildcard; offset 0 is where the latent fires."""


def explain(latents: LatentActivations, latent: int) -> Explanation:
    """The best n-gram for one latent; takes milliseconds."""
    pattern = _search(_half(latents, latent, 0))
    if not pattern:
        return Explanation(())
    tokens = dict(pattern)
    half = _half(latents, latent, 1)
    matches = _matches(half, pattern)
    both, places, firings = (int(mask.sum()) for mask in (matches & half.fires, matches, half.fires))
    return Explanation(
        tuple(tokens.get(offset) for offset in range(max(tokens), -1, -1)),
        precision=both / places if places else None,
        recall=both / firings if firings else None,
        f1=2 * both / (places + firings) if places + firings else None,
    )


def mean_f1(latents: LatentActivations, after_latent: Callable[[], None] = lambda: None) -> float | None:
    """`explanation_f1`: mean over a fixed sample of the latents that fire in both halves; None where there is none."""
    scores = []
    for latent in np.random.default_rng(0).permutation(np.flatnonzero(latents.firings))[:SAMPLED_LATENTS]:
        windows = latents.of(int(latent))[0] // latents.context
        if len(np.unique(windows % 2)) == 2:
            scores.append(explain(latents, int(latent)).f1 or 0.0)
            after_latent()
    return float(np.mean(scores)) if scores else None


def _half(latents: LatentActivations, latent: int, which: int) -> _Half:
    """Every second window, from `which` on."""
    streamed = np.zeros_like(latents.streamed)
    streamed[which::2] = latents.streamed[which::2]
    window, place = np.nonzero(streamed)
    before = place[:, None] - np.arange(LONGEST)
    tokens = latents.ids[window[:, None], before.clip(0)].astype(np.int64)
    fires = np.zeros(streamed.size, bool)
    fires[latents.of(latent)[0]] = True
    return _Half(np.where(before >= 0, tokens, -1), fires.reshape(streamed.shape)[window, place])


def _matches(half: _Half, pattern: _Pattern) -> np.ndarray:
    """Positions at which the pattern ends, bool [positions]."""
    matches = np.ones(len(half.fires), bool)
    for offset, token in pattern:
        matches &= half.tokens[:, offset] == token
    return matches


def _search(half: _Half) -> _Pattern:
    """Beam search: extends the best patterns by one token at a time, until none gains.

    Of patterns with the same F1, the one nearest to the firing is better.
    """
    best, best_f1 = _Pattern(), 0.0
    beam = [best]
    for _ in range(LONGEST):
        scores = {longer: f1 for pattern in beam for longer, f1 in _extensions(half, pattern)}
        ranking = sorted(scores, key=lambda longer: (-scores[longer], sorted(longer)))
        if not ranking or scores[ranking[0]] < best_f1 + LEAST_GAIN:
            break
        best, best_f1 = ranking[0], scores[ranking[0]]
        beam = ranking[:BEAM]
    return best


def _extensions(half: _Half, pattern: _Pattern) -> Iterable[tuple[_Pattern, float]]:
    """(pattern, F1) with one token more: the best BEAM at each offset."""
    matches = _matches(half, pattern)
    tokens, fires, firings = half.tokens[matches], half.fires[matches], int(half.fires.sum())
    for offset in set(range(LONGEST)) - {offset for offset, _ in pattern}:
        column = tokens[:, offset]
        exists = column >= 0
        candidates, both = np.unique(column[exists & fires], return_counts=True)
        if len(candidates):
            f1 = 2 * both / (np.bincount(column[exists])[candidates] + firings)
            for index in np.argsort(-f1, kind="stable")[:BEAM]:
                yield pattern | {(offset, int(candidates[index]))}, float(f1[index])
