"""Finds latents by the held-out text in which they fire most strongly, by number, and by density.

A search is one term, or several with commas between them, all of which must hold:

    import os      text, upper and lower case alike; it may span tokens
    " os"          the same, blanks and digits included
    /^ *import/    a regular expression
    12             latent 12

A latent has a text when one of its TOP_TOKENS strongest firings is at a token of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.latents.snapshot_saes import SnapshotSae
from monitor.evaluation.latents.texts import Texts

LONGEST_SEARCH = 200
"""Characters."""
SECONDS = 2.0
"""Time for all regular expressions of one search: some take time exponential in the length of the text."""
TERM = re.compile(r'\s*(?:"(?P<quoted>[^"]+)"|/(?P<regex>(?:\\.|[^/\\])+)/|(?P<plain>[^,]+?))\s*(?:,|$)')
CACHED_TEXTS = 4


class SearchError(ValueError):
    """A search that cannot be understood, or that takes too long."""


@dataclass(frozen=True)
class DensityRange:
    """Densities from `low` to `high`, both included."""

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DensityRange:
        """`LOW:HIGH`, shares of tokens; empty for any. Raises SearchError."""
        if not text:
            return cls()
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low <= high <= 1:
            raise SearchError(f"density = {text[:40]!r}: expected LOW:HIGH, shares of tokens such as 1e-4:0.01")
        return cls(low, high)


@dataclass(frozen=True)
class _WindowText:
    """The text of one window."""

    text: str
    ends: np.ndarray
    """End of each token in `text`, int64 [context]; a position without text is empty."""

    def tokens(self, start: int, end: int) -> slice:
        """The tokens that characters `start` to `end` touch."""
        first = int(np.searchsorted(self.ends, start, "right"))
        return slice(first, int(np.searchsorted(self.ends, end, "left")) + 1)


class LatentSearch:
    """Searches the latents of a run's SAEs; keeps the text of the last few SAEs. Any thread may ask."""

    def __init__(self, texts: Texts, seconds: float = SECONDS) -> None:
        self._texts = texts
        self._seconds = seconds
        self._cache: dict[Path, tuple[LatentActivations, list[_WindowText]]] = {}
        """By folder of an SAE, the text that its latents were read on."""

    def matching(self, source: SnapshotSae, search: str, density: DensityRange) -> np.ndarray:
        """The latents for which a search and a density hold, in ascending order. Raises SearchError."""
        latents = source.latents
        matches = (latents.density >= density.low) & (latents.density <= density.high)
        deadline = time.monotonic() + self._seconds
        for term in _terms(search):
            matches &= self._matches(source, term, deadline)
        return np.flatnonzero(matches)

    def _matches(self, source: SnapshotSae, term: int | str, deadline: float) -> np.ndarray:
        latents = source.latents
        if isinstance(term, int):
            return np.arange(latents.d_sae) == term
        try:
            pattern = regex.compile(term, regex.IGNORECASE | regex.MULTILINE)
        except regex.error as error:
            raise SearchError(f"/{term}/ is no regular expression: {error}") from None
        is_in_text = np.zeros((len(latents.ids), latents.context), bool)
        try:
            for window, part in enumerate(self._window_texts(source)):
                seconds = max(0.001, deadline - time.monotonic())
                for match in pattern.finditer(part.text, timeout=seconds):
                    if match.end() > match.start():
                        is_in_text[window, part.tokens(*match.span())] = True
        except TimeoutError:
            raise SearchError(f"/{term}/ takes more than {self._seconds:g} s on the held-out text") from None
        top = latents.top_positions
        return (is_in_text.ravel()[top] & (top >= 0)).any(1)

    def _window_texts(self, source: SnapshotSae) -> list[_WindowText]:
        latents, texts = self._cache.get(source.folder, (None, None))
        if texts is None or latents is not source.latents:
            texts = list(self._read(source.latents))
            self._cache = dict([*self._cache.items()][1 - CACHED_TEXTS :]) | {source.folder: (source.latents, texts)}
        return texts

    def _read(self, latents: LatentActivations) -> Iterator[_WindowText]:
        for ids, is_shown in zip(latents.ids.tolist(), latents.shown.tolist(), strict=True):
            pieces = [self._texts.of(token) if shown else "" for token, shown in zip(ids, is_shown, strict=True)]
            yield _WindowText("".join(pieces), np.cumsum([len(piece) for piece in pieces]))


def _terms(search: str) -> list[int | str]:
    """Latents by number, and patterns of regular expressions. Raises SearchError."""
    if len(search) > LONGEST_SEARCH and not search.isdecimal():
        raise SearchError(f"a search of {len(search):,} characters; expected {LONGEST_SEARCH} at most")
    terms: list[int | str] = []
    place = 0
    while place < len(search):
        match = TERM.match(search, place)
        if match is None:  # commas alone: they are meant themselves
            return [regex.escape(search)]
        if match["plain"] and match["plain"].isdecimal():
            terms.append(int(match["plain"][:20]))
        else:
            terms.append(match["regex"] or regex.escape(match["quoted"] or match["plain"]))
        place = match.end()
    return terms
