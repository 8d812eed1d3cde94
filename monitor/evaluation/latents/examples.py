"""Firings of a latent in their text: the strongest, some around lower quantiles, and their number by activation.

The text is held-out text, and its activations are those that `activations` stored for the snapshot. A firing is a place
in `LatentActivations.of(latent)`: 0 is the strongest, and those on outliers come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import Histogram, LatentExample, QuantileExamples

TOKENS_AROUND = (32, 16)
"""Tokens shown before and after a firing;"""
TOKENS_AROUND_IN_TABLE = (6, 6)
"""in the table."""
TOKENS_AROUND_FOR_MODELS = (20, 8)
"""in texts that another language model is shown."""
EXAMPLES = 16
STRONGEST_FIRINGS = 32
"""Firings among which examples are chosen; weaker ones are shown by quantile,"""
SEARCHED_FIRINGS = 512
"""or, where the strongest are of few documents, for the sake of others."""
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.05)
"""Quantiles of a latent's activations around which further examples are shown."""
EXAMPLES_AT_QUANTILE = 4
BINS = 40


def strongest_example(latents: LatentActivations, texts: Texts, latent: int) -> LatentExample | None:
    """The strongest firing with little text, for the table; None for a silent latent."""
    is_silent = not len(latents.of(latent)[1])
    return None if is_silent else example_at(latents, texts, latent, 0, TOKENS_AROUND_IN_TABLE)


def distinct_examples(latents: LatentActivations, texts: Texts, latent: int) -> list[LatentExample]:
    """The strongest firings, strongest first, one from each document as far as there are so many; then an outlier.

    Repetitions of nearly the same text are not shown, and `times` counts them: two firings are in nearly the same text
    when the five tokens before and the two after them are the same.
    """
    positions, _ = latents.of(latent)
    typical = len(positions) - latents.outlier_count(latent)
    documents = latents.documents(texts.separators)
    firings: dict[tuple[int, ...], list[int]] = {}
    document_of: dict[int, int] = {}
    for firing, position in enumerate(positions[: min(typical, SEARCHED_FIRINGS)].tolist()):
        window, place = divmod(position, latents.context)
        nearby = tuple(latents.ids[window, max(0, place - 5) : place + 3].tolist())
        firings.setdefault(nearby, []).append(firing)
        document_of[firing] = int(documents[window, place])
    groups = list(firings.values())
    first_of_documents: dict[int, list[int]] = {}
    for group in groups:
        first_of_documents.setdefault(document_of[group[0]], group)
    chosen = list(first_of_documents.values())[:EXAMPLES]
    others = [group for group in groups if group[0] < STRONGEST_FIRINGS and group not in chosen]
    shown = sorted(chosen + others[: EXAMPLES - len(chosen)])
    examples = [
        example_at(latents, texts, latent, group[0], times=sum(firing < STRONGEST_FIRINGS for firing in group) or 1)
        for group in shown
    ]
    if typical < len(positions):
        examples.append(example_at(latents, texts, latent, typical))
    return examples


def typical_values(latents: LatentActivations, latent: int) -> np.ndarray:
    """A latent's activations without those on outliers; all of them where it fires on nothing else."""
    values = latents.of(latent)[1]
    typical = len(values) - latents.outlier_count(latent)
    return values[:typical] if typical else values


def spread_examples(latents: LatentActivations, texts: Texts, latent: int, count: int) -> list[LatentExample]:
    """`count` firings from the strongest to the weakest, evenly by rank; all of them where there are fewer."""
    firings = len(typical_values(latents, latent))
    ranks = np.unique(np.linspace(0, max(0, firings - 1), min(count, firings)).round().astype(int))
    return [example_at(latents, texts, latent, int(rank), TOKENS_AROUND_FOR_MODELS) for rank in ranks]


def silent_examples(latents: LatentActivations, texts: Texts, latent: int, count: int) -> list[LatentExample]:
    """Up to `count` pieces of text, as long as the others, in which the latent does not fire; always the same ones."""
    before, after = TOKENS_AROUND_FOR_MODELS
    fires = np.zeros((len(latents.ids), latents.context), bool)
    fires.ravel()[latents.of(latent)[0]] = True
    examples: list[LatentExample] = []
    for position in np.random.default_rng(latent).permutation(np.flatnonzero(latents.streamed)):
        if len(examples) == count:
            break
        window, place = divmod(int(position), latents.context)
        text = np.flatnonzero(latents.streamed[window, max(0, place - before) : place + after + 1]) + max(
            0, place - before
        )
        if not fires[window, text].any():
            tokens = texts.pieces(latents.ids[window, text].tolist())
            examples.append(
                LatentExample(
                    value=0.0, times=1, at=int((text < place).sum()), cut_before=True, cut_after=True, tokens=tokens,
                    values=[0.0] * len(tokens),
                )
            )  # fmt: skip
    return examples


def quantile_examples(latents: LatentActivations, texts: Texts, latent: int) -> list[QuantileExamples]:
    """Firings around each of QUANTILES that lies below the strongest firings."""
    return [
        QuantileExamples(
            quantile=quantile, contexts=[example_at(latents, texts, latent, firing) for firing in firings]
        )
        for quantile in QUANTILES
        if (firings := _firings_at(quantile, len(typical_values(latents, latent))))
    ]  # fmt: skip


def _firings_at(quantile: float, count: int) -> range:
    """EXAMPLES_AT_QUANTILE of `count` firings; empty where they would be among the strongest or beyond the weakest."""
    middle = round((1 - quantile) * (count - 1))
    first = middle - EXAMPLES_AT_QUANTILE // 2
    if first < STRONGEST_FIRINGS or first + EXAMPLES_AT_QUANTILE > count:
        return range(0)
    return range(first, first + EXAMPLES_AT_QUANTILE)


def example_at(
    latents: LatentActivations, texts: Texts, latent: int, firing: int,
    around: tuple[int, int] = TOKENS_AROUND, times: int = 1,
) -> LatentExample:  # fmt: skip
    """The text of one firing, `around` tokens before and after it, with the latent's activation on each token."""
    text = firing_window(latents, latent, firing, around)
    return LatentExample(
        value=float(latents.of(latent)[1][firing]),
        times=times,
        at=text.at,
        cut_before=text.cut_before,
        cut_after=text.cut_after,
        tokens=texts.pieces(latents.ids[text.window, text.first : text.last].tolist()),
        values=text.values,
        is_outlier=bool(latents.outliers.ravel()[latents.of(latent)[0][firing]]),
    )


@dataclass(frozen=True)
class FiringWindow:
    """The tokens around one firing."""

    window: int
    first: int
    last: int
    """In the window, first:last are shown."""
    at: int
    """Index of the firing among them."""
    cut_before: bool
    """Whether the text goes on before them."""
    cut_after: bool
    values: list[float]
    """The latent's activation on each of them."""


def firing_window(
    latents: LatentActivations, latent: int, firing: int, around: tuple[int, int] = TOKENS_AROUND
) -> FiringWindow:
    """The tokens of one firing, `around` of them before and after it."""
    positions, values = latents.of(latent)
    window, place = divmod(int(positions[firing]), latents.context)
    window_start = window * latents.context
    real = np.flatnonzero(latents.shown[window])
    # A BOS is no text. Without one, the stream has the first position too.
    text = int(real[0]) + (not latents.streamed[window, real[0]]), int(real[-1]) + 1
    first, last = max(text[0], place - around[0]), min(text[1], place + around[1] + 1)
    is_near = (positions >= window_start + first) & (positions < window_start + last)
    activations = dict(zip((positions[is_near] - window_start).tolist(), values[is_near].tolist(), strict=True))
    return FiringWindow(
        window=window,
        first=first,
        last=last,
        at=place - first,
        cut_before=first > text[0],
        cut_after=last < text[1],
        values=[activations.get(place, 0.0) for place in range(first, last)],
    )


def histogram(values: np.ndarray) -> Histogram:
    """Number of firings by activation, from 0 or the most negative one to the largest."""
    if not len(values):
        return Histogram(edges=[], counts=[])
    low = min(0.0, float(values.min()))
    counts, edges = np.histogram(values, BINS, (low, max(float(values.max()), low + 1e-9)))
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
