"""Answers questions about the latents of a run: the table, one latent, and the latents that fire on a text.

Everything is read off the newest snapshot whose latents' activations are on disk, and off the SAE's own weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from monitor.evaluation.latents.activations import GONE, TOP_TOKENS, load_decoder
from monitor.evaluation.latents.coactivation import coactive_latents, scatter
from monitor.evaluation.latents.examples import (
    distinct_examples,
    histogram,
    quantile_examples,
    silent_examples,
    spread_examples,
    strongest_example,
    typical_values,
)
from monitor.evaluation.latents.explanation import explain
from monitor.evaluation.latents.intervention import Intervener, Mode
from monitor.evaluation.latents.logit_lens import LogitLens, strongest_effects
from monitor.evaluation.latents.search import DensityRange, LatentSearch
from monitor.evaluation.latents.snapshot_saes import SnapshotSae, SnapshotSaes
from monitor.evaluation.latents.text_reader import TextReader
from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import (
    CoactiveLatent,
    FiringLatent,
    Latent,
    LatentExamples,
    LatentInSnapshot,
    LatentRow,
    LatentSummary,
    LatentTable,
    NearLatent,
    NGram,
    Order,
    TextFirings,
    TriedText,
)
from monitor.run_directory import NotFoundError, snapshots_until
from monitor.snapshot_index import manifest_of
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings
from trainer.snapshot import SnapshotError, read_sparsity

SNAPSHOTS_SHOWN = 24
"""Snapshots in which a latent is shown; of more, evenly spaced ones."""
NEAREST = 12
LATENTS_SHOWN = 60
"""Latents that fire on a text."""


class Explorer:
    """Answers from any thread, with the language model that the run's SAEs were trained on."""

    def __init__(
        self, run_directory: Path, model: LanguageModel, corpus: CorpusSettings, snapshots_shown: int = SNAPSHOTS_SHOWN
    ) -> None:
        self._directory = run_directory
        self._model = model
        self._corpus = corpus
        self._snapshots_shown = snapshots_shown
        self._texts = Texts(model.tokenizer)
        self._saes = SnapshotSaes(run_directory)
        self._lens = LogitLens(model)
        self._search = LatentSearch(self._texts)
        self._reader = TextReader(model, self._texts, corpus)
        self._intervener = Intervener(model, self._texts, self._reader)

    def open(self, sae: str, snapshot: str | None = None) -> SnapshotSae:
        """Opens one SAE of the newest snapshot, or of the one named. Raises NotFoundError."""
        return self._saes.open(sae, snapshot)

    # The table

    def table(
        self, sae: str, order: Order = "strongest", descending: bool = True, search: str = "", offset: int = 0,
        limit: int = 50, snapshot: str | None = None, density: str = "", among: Collection[int] | None = None,
    ) -> LatentTable:  # fmt: skip
        """A page of the table: the latents `among` those named for which `search` and `density` hold.

        Raises NotFoundError, and SearchError for a search that cannot be understood. Silent latents come last, whatever
        the order, but by index. An `offset` beyond the end is the last page.
        """
        source = self.open(sae, snapshot)
        matching = self._search.matching(source, search.strip(), DensityRange.parse(density))
        if among is not None:
            matching = matching[np.isin(matching, list(among))]
        ranked = matching[_rank(source, matching, order, descending)]
        offset = min(offset, max(0, len(matching) - 1) // limit * limit)
        return LatentTable(
            sae=sae,
            snapshot=source.snapshot,
            d_sae=source.latents.d_sae,
            rows=source.latents.rows,
            matching=len(matching),
            silent=int((source.latents.firings == 0).sum()),
            order=order,
            descending=descending,
            search=search,
            density=density,
            offset=offset,
            limit=limit,
            latents=[self._row(source, int(latent)) for latent in ranked[offset : offset + limit]],
        )

    def _row(self, source: SnapshotSae, latent: int) -> LatentRow:
        example = strongest_example(source.latents, self._texts, latent)
        return LatentRow(**vars(self._summary(source, latent)), example=example)

    def _summary(self, source: SnapshotSae, latent: int) -> LatentSummary:
        positions, values = source.latents.of(latent)
        top_ids = source.latents.ids.ravel()[positions[:TOP_TOKENS]]
        return LatentSummary(
            index=latent,
            density=len(values) / max(1, source.latents.rows),
            firings=len(values),
            strongest=float(values[0]) if len(values) else 0.0,
            norm=float(torch.linalg.vector_norm(source.decoder_row(latent))),
            age=int(source.tokens - source.latents.born[latent]),
            top_tokens=_distinct([self._texts.of(int(token)) for token in top_ids]),
        )

    # One latent

    def latent(self, sae: str, latent: int, snapshot: str | None = None) -> Latent:
        """Everything on the page of one latent. Raises NotFoundError."""
        source, texts = self._open_latent(sae, latent, snapshot), self._texts
        hooks = source.inference.hooks
        effect = self._lens.effect(hooks.writes[-1], source.decoder_row(latent))
        promoted, suppressed = (None, None) if effect is None else strongest_effects(effect, texts)
        return Latent(
            **vars(self._summary(source, latent)),
            sae=sae,
            snapshot=source.snapshot,
            d_sae=source.latents.d_sae,
            rows=source.latents.rows,
            hook=" + ".join(hooks.reads),
            target=hooks.writes[0] if hooks.is_transcoder else None,
            architecture=source.cfg.get("architecture"),
            explanation=self._explanation(source, latent),
            contexts=distinct_examples(source.latents, texts, latent),
            lower=quantile_examples(source.latents, texts, latent),
            histogram=histogram(typical_values(source.latents, latent)),
            outliers=source.latents.outlier_count(latent),
            written_at=hooks.writes[-1],
            promoted=promoted,
            suppressed=suppressed,
            nearest=self._nearest(source, latent),
            past=self._past(source, latent),
            coactive=[
                CoactiveLatent(**vars(self._summary(source, index)), together=together, phi=phi)
                for index, together, phi in coactive_latents(source.latents, latent)
            ],
            scatter=scatter(source, latent),
            newest=source.snapshot if snapshot is None else self.open(sae).snapshot,
        )

    def examples(self, sae: str, latent: int, count: int, snapshot: str | None = None) -> LatentExamples:
        """Up to `count` texts in which a latent fires, and as many in which it does not. Raises NotFoundError."""
        source = self._open_latent(sae, latent, snapshot)
        return LatentExamples(
            sae=sae,
            snapshot=source.snapshot,
            index=latent,
            firing=spread_examples(source.latents, self._texts, latent, count),
            silent=silent_examples(source.latents, self._texts, latent, count),
        )

    def _open_latent(self, sae: str, latent: int, snapshot: str | None) -> SnapshotSae:
        """The SAE that has this latent. Raises NotFoundError."""
        source = self.open(sae, snapshot)
        if not 0 <= latent < source.latents.d_sae:
            raise NotFoundError(f"SAE {sae!r} has latents 0 to {source.latents.d_sae - 1}, not {latent}")
        return source

    def _explanation(self, source: SnapshotSae, latent: int) -> NGram | None:
        """The n-gram that predicts the latent best; None where none does at all."""
        explanation = explain(source.latents, latent)
        if not explanation.pattern:
            return None
        return NGram(
            pattern=[None if token is None else self._texts.of(token) for token in explanation.pattern],
            precision=explanation.precision,
            recall=explanation.recall,
            f1=explanation.f1,
        )

    def _nearest(self, source: SnapshotSae, latent: int) -> list[NearLatent]:
        """The latents whose decoder rows have the largest cosine with this one's."""
        W_dec = source.weights["W_dec"].float()
        norms = torch.from_numpy(source.norms).clamp_min(1e-12)
        cosines = W_dec @ W_dec[latent] / (norms * norms[latent])
        cosines[latent] = -2
        nearest = cosines.topk(min(NEAREST, len(cosines) - 1))
        return [
            NearLatent(**vars(self._summary(source, index)), cosine=cosine)
            for index, cosine in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
        ]

    def _past(self, source: SnapshotSae, latent: int) -> list[LatentInSnapshot]:
        """The latent in the run's snapshots up to this one, oldest first."""
        names = snapshots_until(self._directory, source.name, source.snapshot)
        step = max(1, -(-len(names) // self._snapshots_shown))
        past = []
        for name in reversed(names[::-1][::step]):  # the newest always
            with suppress(*GONE, SnapshotError):
                if (then := self._in_snapshot(name, source, latent)) is not None:
                    past.append(then)
        return past

    def _in_snapshot(self, name: str, source: SnapshotSae, latent: int) -> LatentInSnapshot | None:
        """The latent in an earlier snapshot; None where the SAE had another shape. Raises SnapshotError or GONE."""
        folder = self._directory / "snapshots" / name / source.name
        manifest_of(folder.parent)  # refuses links out of the snapshot
        row_then, row_now = load_decoder(folder)[latent : latent + 1].flatten(), source.decoder_row(latent)
        if row_then.shape != row_now.shape:
            return None
        then = LatentInSnapshot(
            snapshot=name,
            tokens=int(name),
            cosine=float(torch.cosine_similarity(row_then, row_now, 0)),
            training_density=10 ** float(read_sparsity(folder)[latent]),
        )
        with suppress(*GONE, SnapshotError):
            summary = self._summary(self._saes.open_folder(folder), latent)
            return replace(then, density=summary.density, strongest=summary.strongest, top_tokens=summary.top_tokens)
        return then

    # By text

    def fires(self, sae: str, text: str, at: int | None = None) -> TextFirings:
        """The latents that fire on a text, or with `at` on that one of its tokens.

        They are sorted by their activation here as a share of their strongest one on held-out text. Raises
        NotFoundError, and ValueError for a text without tokens, one that is too long, or a token that it does not have.
        """
        source = self.open(sae)
        read = self._reader.read(source, text)
        if at is not None and not 0 <= at < len(read.tokens):
            raise ValueError(f"at = {at}: the text has tokens 0 to {len(read.tokens) - 1}")
        counted = slice(None) if at is None else read.position == at
        strengths = np.zeros(source.latents.d_sae, np.float32)
        np.maximum.at(strengths, read.latent[counted], np.abs(read.value[counted]))
        firing = np.flatnonzero(strengths)
        shares = strengths[firing] / np.maximum(np.abs(source.latents.strongest[firing]), strengths[firing])
        strongest = firing[np.argsort(-shares, kind="stable")][:LATENTS_SHOWN]
        return TextFirings(
            sae=sae,
            snapshot=source.snapshot,
            text=text,
            at=at,
            tokens=read.tokens,
            active=np.bincount(read.position, minlength=len(read.tokens)).tolist(),
            firing=len(firing),
            latents=[
                FiringLatent(**vars(self._summary(source, int(index))), values=read.along(int(index)))
                for index in strongest
            ],
        )

    def try_text(
        self, sae: str, latent: int, text: str, mode: Mode | None = None, strength: float = 1.0, at: int | None = None,
        snapshot: str | None = None,
    ) -> TriedText:  # fmt: skip
        """A text on one latent; see `Intervener.try_text`. Raises NotFoundError and ValueError."""
        source = self._open_latent(sae, latent, snapshot)
        return self._intervener.try_text(source, latent, text, mode, strength, at)


def _rank(source: SnapshotSae, latents: np.ndarray, order: Order, descending: bool) -> np.ndarray:
    """The order in which a table shows `latents`, as indices of that array."""
    keys = source.sort_keys(order)[latents]
    rank = np.argsort(-keys if descending else keys, kind="stable")
    if order == "index":
        return rank
    is_silent = source.latents.firings[latents][rank] == 0
    return np.concatenate([rank[~is_silent], rank[is_silent]])


def _distinct(tokens: list[str]) -> list[str]:
    """Each token once; those that differ only in their number of spaces look the same on a page."""
    return list({re.sub(r"[^\S\n]+", " ", token): token for token in reversed(tokens)}.values())[::-1]
