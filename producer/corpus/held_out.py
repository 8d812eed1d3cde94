"""The text that a run never trained on, cut as its producers cut it: snapshots are evaluated on it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from producer.corpus.base import Corpus, CorpusError
from producer.corpus.mixture import Text
from producer.corpus.registry import more_shards_advice
from producer.corpus.rendering.windows import Windows, join_windows, select_windows, separated, windows_of
from producer.settings import CorpusSettings

log = logging.getLogger(__name__)

GOLDEN_RATIO = (5**0.5 - 1) / 2
SHARDS_SHARING = 8
"""Shards that held-out windows come from, so that one odd file does not decide the numbers."""


class NoHeldOutText(CorpusError):
    """Nothing was held out; `str(error)` says what to change."""


@dataclass(frozen=True)
class HeldOutText:
    """Windows of text never trained on."""

    windows: Windows
    corpora: dict[str, slice]
    """Windows of each corpus of a mixture, one behind the other; empty for one corpus alone."""
    share: float = 1.0
    """Share of the text that was asked for, where an evaluation had no time for more."""

    def beginning(self, share: float) -> HeldOutText:
        """The windows that an evaluation reads first, a share of each corpus."""
        numbers: list[np.ndarray] = []
        corpora: dict[str, slice] = {}
        first = 0
        for corpus, part in (self.corpora or {"": slice(None)}).items():
            all_numbers = np.arange(len(self.windows))[part]
            count = max(1, round(share * len(all_numbers)))
            numbers.append(np.sort(all_numbers[spread_order(len(all_numbers))[:count]]))
            corpora[corpus] = slice(first, first + count)
            first += count
        chosen, windows = np.concatenate(numbers), self.windows
        some = select_windows(windows, chosen)
        return HeldOutText(some, corpora if self.corpora else {}, self.share * len(some) / len(windows))


def spread_order(count: int) -> np.ndarray:
    """The numbers 0 to count − 1 in an order whose every beginning is spread evenly over them (the golden ratio)."""
    return np.argsort(np.arange(count) * GOLDEN_RATIO % 1, kind="stable").argsort(kind="stable")


def held_out_text(text: Text, tokenizer: Any, tokens: int) -> HeldOutText:
    """Gathers `tokens` kept positions of text never trained on, of each corpus of a mixture its share.

    Raises NoHeldOutText where there is no text.
    """
    if not text.shares:
        part = text.parts[0]
        return HeldOutText(held_out_windows(part.corpus, tokenizer, part.settings, tokens), {})
    windows: list[Windows] = []
    corpora: dict[str, slice] = {}
    first = 0
    for part in text.parts:
        if not part.settings.held_out:
            continue
        try:
            gathered = held_out_windows(part.corpus, tokenizer, part.settings, max(1, round(tokens * part.share)))
        except NoHeldOutText as error:
            log.warning("[[corpus]] %s is not evaluated on: %s", part.name, error)
            continue
        windows.append(gathered)
        corpora[part.name] = slice(first, first + len(gathered))
        first += len(gathered)
    if not windows:
        raise NoHeldOutText("no corpus of the mixture holds out any text; raise held_out in a [[corpus]]")
    return HeldOutText(join_windows(windows), corpora)


def held_out_windows(corpus: Corpus, tokenizer: Any, settings: CorpusSettings, tokens: int) -> Windows:
    """Windows of text never trained on, until they hold `tokens` kept positions or the text ends; always the same ones.

    Equal shares come from the first few held-out shards, and what one lacks from the next. Raises NoHeldOutText where
    there is no text.
    """
    shards = corpus.held_out_shards
    parts: list[Windows] = []
    missing = tokens
    for index, shard in enumerate(shards):
        share = -(-missing // max(1, min(SHARDS_SHARING, len(shards)) - index))
        parts.append(_beginning(windows_of(corpus.documents(shard), tokenizer, separated(settings)), share))
        missing -= int(parts[-1].kept.sum())
        if missing <= 0:
            break
    if missing == tokens:
        raise NoHeldOutText(_no_text(corpus, settings))
    return join_windows(parts)


def _no_text(corpus: Corpus, settings: CorpusSettings) -> str:
    """Why there is nothing to evaluate on, and what changes it: more held-out shards, or more shards."""
    count = len(corpus.held_out_shards)
    fact = f"{count} of the corpus' {corpus.shards:,} shards {'is' if count == 1 else 'are'} held out, without any text"
    if count < corpus.shards - 1 and corpus.shards > 2:
        return f"{fact}; raise corpus.held_out = {settings.held_out:g}, or check the corpus"
    return f"{fact}. {more_shards_advice(settings)}"


def _beginning(windows: Windows, tokens: int) -> Windows:
    """The first windows with kept positions, just enough of them for `tokens`."""
    counts = windows.kept.sum(1)
    useful = np.flatnonzero(counts)
    first = useful[: np.searchsorted(counts[useful].cumsum(), tokens) + 1]
    return select_windows(windows, first)
