"""In which words a latent fires: the n-gram with wildcards that best tells where it is active.

After Neuron to Graph (Foote et al., 2305.19911) as Gao et al. use it on latents (2406.04093, §4.3), with a difference:
they shorten a few contexts by running the model again and keep a collection of n-grams; here nothing runs, and one
n-gram is searched among all activations on held-out text (`activations`), which takes milliseconds. It tells
whether a latent fires, not how strongly.

The windows are dealt out to two halves. On one a pattern is found that F1 likes best, on the other its numbers are
taken; as every second window is in each, both have parts of long documents.

    precision  share of the pattern's places where the latent fires
    recall     share of the latent's firings that are at the pattern's places
    f1         2 · both / (places + firings): their harmonic mean

A latent may fire some tokens after what it is about: a pattern ends with as many wildcards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from monitor.evaluation.latents.activations import LatentActivations

LONGEST = 5
"""Tokens of an n-gram, wildcards included."""
WORTH = 0.01
"""F1 that another token must gain on the half where patterns are sought; less is chance."""
BEAM = 8
"""Patterns of each size that are tried with one token more."""
SAMPLED_LATENTS = 256


@dataclass(frozen=True)
class Explanation:
    """What the search found, and how good it is on the other half; None stands for a ratio without a denominator."""

    pattern: tuple[int | None, ...]
    """Token ids, None for any token, up to the position where the latent fires; empty when it never fired."""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class _Half:
    """The rows of one half's windows that the SAE was shown."""

    tokens: np.ndarray
    """int64 [rows, LONGEST]: the token `offset` positions before; −1 before the window begins."""
    fired: np.ndarray
    """bool [rows]"""


_Pattern = frozenset[tuple[int, int]]
"""(offset, token id) of each token that is no wildcard."""


def explain(latents: LatentActivations, latent: int) -> Explanation:
    """The best n-gram for one latent; a matter of milliseconds."""
    pattern = _search(_half(latents, latent, 0))
    if not pattern:
        return Explanation(())
    found = dict(pattern)
    words = tuple(found.get(offset) for offset in range(max(found), -1, -1))
    half = _half(latents, latent, 1)
    places = np.logical_and.reduce([half.tokens[:, offset] == token for offset, token in pattern])
    both, matched, fired = (int(rows.sum()) for rows in (places & half.fired, places, half.fired))
    return Explanation(
        words,
        precision=both / matched if matched else None,
        recall=both / fired if fired else None,
        f1=2 * both / (matched + fired) if matched + fired else None,
    )


def mean_f1(latents: LatentActivations, between: Callable[[], None] = lambda: None) -> float | None:
    """`explanation_f1`: mean over a fixed sample of the latents that fire in both halves; None when there is none.

    `between` is called after each latent.
    """
    found = []
    for latent in np.random.default_rng(0).permutation(np.flatnonzero(latents.firings))[:SAMPLED_LATENTS]:
        windows = latents.of(int(latent))[0] // latents.context
        if len(np.unique(windows % 2)) == 2:
            found.append(explain(latents, int(latent)).f1 or 0.0)
            between()
    return float(np.mean(found)) if found else None


def _half(latents: LatentActivations, latent: int, which: int) -> _Half:
    """Every second window, from `which` on."""
    streamed = np.zeros_like(latents.streamed)
    streamed[which::2] = latents.streamed[which::2]
    window, place = np.nonzero(streamed)
    before = place[:, None] - np.arange(LONGEST)
    tokens = latents.ids[window[:, None], before.clip(0)].astype(np.int64)
    fired = np.zeros(streamed.size, bool)
    fired[latents.of(latent)[0]] = True
    return _Half(np.where(before >= 0, tokens, -1), fired.reshape(streamed.shape)[window, place])


def _search(half: _Half) -> _Pattern:
    """Grows the best patterns by one token at a time, until none gains; of equals the one nearest to the firing."""
    best, best_f1 = _Pattern(), 0.0
    beam = [best]
    for _ in range(LONGEST):
        grown = {longer: f1 for pattern in beam for longer, f1 in _grow(half, pattern)}
        ranked = sorted(grown, key=lambda longer: (-grown[longer], sorted(longer)))
        if not ranked or grown[ranked[0]] < best_f1 + WORTH:
            break
        best, best_f1 = ranked[0], grown[ranked[0]]
        beam = ranked[:BEAM]
    return best


def _grow(half: _Half, pattern: _Pattern) -> Iterable[tuple[_Pattern, float]]:
    """The pattern with one token more, in the ways that are best at each offset, and the F1 of each."""
    at = np.ones(len(half.fired), bool)
    for offset, token in pattern:
        at &= half.tokens[:, offset] == token
    tokens, fired, firings = half.tokens[at], half.fired[at], int(half.fired.sum())
    for offset in set(range(LONGEST)) - {offset for offset, _ in pattern}:
        there = tokens[:, offset]
        known = there >= 0
        candidates, both = np.unique(there[known & fired], return_counts=True)
        if len(candidates):
            f1 = 2 * both / (np.bincount(there[known])[candidates] + firings)
            for index in np.argsort(-f1, kind="stable")[:BEAM]:
                yield pattern | {(offset, int(candidates[index]))}, float(f1[index])
