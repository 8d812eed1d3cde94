"""The text that a run never trained on, cut as its producers cut it: what snapshots are measured and explained with."""

from __future__ import annotations

from typing import Any

import numpy as np

from producer.corpus import Corpus, more_shards_advice
from producer.corpus.windows import Windows, windows_of
from producer.settings import CorpusSettings

SHARDS_SHARING = 8
"""Held-out windows come from so many shards, so that one odd file does not decide the numbers."""


class EvaluationError(ValueError):
    """The run cannot be evaluated, or a snapshot not with this model and text; `str(error)` says what to do."""


def held_out_windows(corpus: Corpus, tokenizer: Any, settings: CorpusSettings, rows: int) -> Windows:
    """Windows of text never trained on, until they hold `rows` kept positions or the text ends; always the same ones.

    Equal shares come from the first few held-out shards, and what one lacks from the next.
    """
    held_out = corpus.held_out_shards
    chosen: list[Windows] = []
    missing = rows
    for index, shard in enumerate(held_out):
        share = -(-missing // max(1, min(SHARDS_SHARING, len(held_out)) - index))
        chosen.append(_beginning(windows_of(corpus.documents(shard), tokenizer, settings), share))
        missing -= int(chosen[-1].kept.sum())
        if missing <= 0:
            break
    if missing == rows:
        raise EvaluationError(_no_text(corpus, settings))
    parts = zip(*((windows.ids, windows.kept, windows.padded) for windows in chosen), strict=True)
    return Windows(*map(np.concatenate, parts))


def _no_text(corpus: Corpus, settings: CorpusSettings) -> str:
    """Why there is nothing to evaluate on, and what changes it: more held-out shards, or more shards."""
    count = len(corpus.held_out_shards)
    told = f"{count} of the corpus' {corpus.shards:,} shards {'is' if count == 1 else 'are'} held out, without any text"
    if count < corpus.shards - 1 and corpus.shards > 2:
        return f"{told}; raise corpus.held_out = {settings.held_out:g}, or check the corpus"
    return f"{told}. {more_shards_advice(settings)}"


def _beginning(windows: Windows, rows: int) -> Windows:
    """The first windows with kept positions, just enough of them for `rows`."""
    counts = windows.kept.sum(1)
    useful = np.flatnonzero(counts)
    chosen = useful[: np.searchsorted(counts[useful].cumsum(), rows) + 1]
    return Windows(windows.ids[chosen], windows.kept[chosen], windows.padded[chosen])
