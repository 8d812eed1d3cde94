"""Explanations by n-grams: latents that fire by a rule, on random text, and the n-grams that explain them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.latents.explanation import _half, explain, mean_f1

WINDOWS, CONTEXT, WORDS = 120, 16, 10
BOS = 0
Rule = Callable[[np.ndarray, int], bool]
"""Whether a latent fires at a place of a window."""

AFTER_34: Rule = lambda ids, place: place > 0 and tuple(ids[place - 1 : place + 1]) == (3, 4)  # noqa: E731
THREE_ANY_FIVE: Rule = lambda ids, place: place > 1 and ids[place - 2] == 3 and ids[place] == 5  # noqa: E731
AFTER_SEVEN: Rule = lambda ids, place: ids[place - 1] == 7  # noqa: E731
NEVER: Rule = lambda ids, place: False  # noqa: E731


def test_no_token_stands_before_a_window():
    """Neither the window's own first one again, nor the last of the window before."""
    half = _half(_latents(NEVER), 0, 0)
    at_the_second = half.tokens[half.tokens[:, 2] == -1]
    assert (at_the_second[:, 1] == BOS).all() and (at_the_second[:, 2:] == -1).all()
    assert len(at_the_second) == WINDOWS / 2


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (lambda ids, place: ids[place] == 6, (6,)),
        (AFTER_34, (3, 4)),
        (THREE_ANY_FIVE, (3, None, 5)),
        (AFTER_SEVEN, (7, None)),
    ],
    ids=["a word", "two words", "two words and a wildcard between", "any word after one"],
)
def test_a_planted_n_gram_is_found(rule: Rule, pattern: tuple[int | None, ...]):
    """Exactly, and it holds on the half that it was not chosen on."""
    explanation = explain(_latents(rule), 0)
    assert explanation.pattern == pattern
    assert (explanation.precision, explanation.recall, explanation.f1) == (1.0, 1.0, 1.0)


def test_precision_and_recall_are_those_of_the_other_half():
    """The latent fires on 6 in all windows, and in every second one, on which nothing is fitted, on 8 as well."""
    latents = _latents(lambda ids, place: ids[place] == 6, also=lambda ids, place: ids[place] == 8)
    explanation = explain(latents, 0)
    rows = latents.ids[1::2, 1:]
    sixes, eights = int((rows == 6).sum()), int((rows == 8).sum())
    recall = sixes / (sixes + eights)
    assert explanation.pattern == (6,)
    assert (explanation.precision, explanation.recall) == (1.0, pytest.approx(recall))
    assert explanation.f1 == pytest.approx(2 * recall / (1 + recall))


def test_a_latent_without_a_rule_is_explained_badly():
    """What fires by chance on a tenth of the tokens has no n-gram that holds on other text."""
    chance = np.random.default_rng(5)
    f1 = explain(_latents(lambda ids, place: bool(chance.random() < 0.1)), 0).f1
    assert f1 is not None and f1 < 0.4


def test_rows_that_the_sae_was_not_shown_do_not_count():
    """A latent cannot fire on padding or special tokens; the word there is not held against the pattern."""
    latents = _latents(lambda ids, place: ids[place] == 6)
    latents.ids[:, 0] = 6
    assert explain(latents, 0).precision == 1.0


def test_latents_that_never_fire_have_no_explanation():
    """An empty pattern and no numbers; the mean is over the others, and there may be none."""
    explanation = explain(_latents(NEVER), 0)
    assert (explanation.pattern, explanation.precision, explanation.f1) == ((), None, None)
    assert mean_f1(_latents(NEVER)) is None
    assert mean_f1(_latents(AFTER_34)) == 1.0


def _latents(rule: Rule, also: Rule = NEVER) -> LatentActivations:
    """One latent that fires by `rule`, and in every second window by `also`, too; the first token is BOS."""
    ids = np.random.default_rng(0).integers(1, WORDS, (WINDOWS, CONTEXT)).astype(np.uint32)
    ids[:, 0] = BOS
    streamed = np.ones((WINDOWS, CONTEXT), bool)
    streamed[:, 0] = False
    positions = [
        window * CONTEXT + place
        for window in range(WINDOWS)
        for place in range(1, CONTEXT)
        if rule(ids[window], place) or (window % 2 and also(ids[window], place))
    ]
    return LatentActivations(
        ids=ids,
        shown=np.ones_like(streamed),
        streamed=streamed,
        starts=np.array([0, len(positions)], np.int64),
        positions=np.array(positions, np.uint32),
        values=np.ones(len(positions), np.float32),
        born=np.zeros(1, np.int64),
        outliers=np.zeros(ids.shape, bool),
    )
