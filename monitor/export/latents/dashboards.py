"""A latent as SAEDashboard and Neuronpedia show one: firings by strength, histograms, tokens promoted and suppressed.

Everything is read off the activations on held-out text that the monitor has gathered (latents.safetensors). Firings are
shown in groups, as SAEDashboard does: the strongest, and some of each of a few intervals of equal width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monitor.evaluation.latents.examples import firing_window, histogram, typical_values
from monitor.evaluation.latents.logit_lens import LogitLens
from monitor.evaluation.latents.snapshot_saes import SnapshotSae
from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import Histogram

STRONGEST = 16
"""Firings of the first group."""
INTERVALS = 5
OF_INTERVAL = 4
"""Firings of each of the others."""
AROUND = (24, 24)
"""Tokens before and after a firing: as many on both sides, since SAEDashboard prints the middle one in bold."""
LOGITS = 10
"""Tokens promoted, and tokens suppressed."""
ALIGNED = 3
"""Elements of the decoder row that are named."""
BINS = 40


@dataclass(frozen=True)
class Sequence:
    """The text around one firing."""

    window: int
    """Number of the window of held-out text."""
    ids: list[int]
    tokens: list[str]
    """The text of each of `ids`; joined, they are the text."""
    values: list[float]
    """The latent's activation on each token."""
    at: int
    """Index of the firing in `ids`."""


@dataclass(frozen=True)
class SequenceGroup:
    """Firings whose activations lie in one interval; the strongest, where `share` is None."""

    low: float
    high: float
    share: float | None
    """Share of the held-out tokens whose activations lie in it, zeros included."""
    sequences: list[Sequence]


@dataclass(frozen=True)
class TokenEffect:
    """A token, and what a latent's direction adds to its logit."""

    id: int
    token: str
    effect: float


@dataclass(frozen=True)
class LogitEffects:
    """What a latent's direction adds to the logits of all tokens (`logit_lens`)."""

    promoted: list[TokenEffect]
    """The strongest first, as `suppressed`."""
    suppressed: list[TokenEffect]
    histogram: Histogram
    by_token: Tensor
    """[vocabulary]"""


@dataclass(frozen=True)
class Dashboard:
    """One latent."""

    index: int
    density: float
    """Share of held-out tokens on which it fires."""
    strongest: float
    activations: Histogram
    logits: LogitEffects | None
    """None where the latent writes to no residual stream."""
    groups: list[SequenceGroup]
    """The strongest, then intervals from high to low; empty for a silent latent."""
    aligned: list[tuple[int, float, float]]
    """(element of the decoder row, its value, its share of the row's L1 norm), the largest first."""


class Dashboards:
    """Makes the dashboards of one SAE's latents. The text of each window is decoded once, when it is first shown."""

    def __init__(self, sae: SnapshotSae, lens: LogitLens, texts: Texts) -> None:
        self._sae = sae
        self._latents = sae.latents
        self._lens = lens
        self._texts = texts
        self._hook = sae.inference.hooks.writes[-1]
        self._pieces: dict[int, list[str]] = {}
        """Texts of the tokens of windows, by number of the window."""

    def of(self, latent: int) -> Dashboard:
        """The dashboard of one latent."""
        row = self._sae.decoder_row(latent)
        values = typical_values(self._latents, latent)
        effect = self._lens.effect(self._hook, row)
        return Dashboard(
            index=latent,
            density=float(self._latents.density[latent]),
            strongest=float(values[0]) if len(values) else 0.0,
            activations=histogram(values),
            logits=None if effect is None else self._effects(effect),
            groups=self._groups(latent, values) if len(values) else [],
            aligned=_aligned(row),
        )

    def _groups(self, latent: int, values: np.ndarray) -> list[SequenceGroup]:
        rows = max(1, self._latents.rows)
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        strongest = [self._sequence(latent, firing) for firing in range(min(STRONGEST, len(values)))]
        groups = [SequenceGroup(low, high, None, strongest)]
        edges = np.linspace(low, high, INTERVALS + 1)
        for lower, upper in zip(edges[-2::-1].tolist(), edges[:0:-1].tolist(), strict=True):
            within = np.flatnonzero((values >= lower) & (values <= upper))
            zeros = rows - len(values) if lower <= 0 <= upper else 0
            ranks = np.linspace(0, len(within) - 1, min(OF_INTERVAL, len(within))).round().astype(int)
            sequences = [self._sequence(latent, int(firing)) for firing in within[ranks]]
            groups.append(SequenceGroup(lower, upper, (len(within) + zeros) / rows, sequences))
        return groups

    def _sequence(self, latent: int, firing: int) -> Sequence:
        shown = firing_window(self._latents, latent, firing, AROUND)
        ids = self._latents.ids[shown.window].tolist()
        if shown.window not in self._pieces:
            self._pieces[shown.window] = self._texts.pieces(ids)
        part = slice(shown.first, shown.last)
        return Sequence(shown.window, ids[part], self._pieces[shown.window][part], shown.values, shown.at)

    def _effects(self, effect: Tensor) -> LogitEffects:
        count = min(LOGITS, len(effect))
        counts, edges = np.histogram(effect.numpy(), BINS)
        promoted, suppressed = (
            [TokenEffect(int(token), self._texts.of(int(token)), float(effect[token])) for token in tokens]
            for tokens in (effect.topk(count).indices, effect.topk(count, largest=False).indices)
        )
        return LogitEffects(promoted, suppressed, Histogram(edges=edges.tolist(), counts=counts.tolist()), effect)


def _aligned(row: Tensor) -> list[tuple[int, float, float]]:
    sizes = row.abs()
    largest = sizes.topk(min(ALIGNED, len(sizes))).indices
    shares = sizes / sizes.sum().clamp_min(torch.finfo(sizes.dtype).tiny)
    return [(int(index), float(row[index]), float(shares[index])) for index in largest]
