"""What the language model predicts next when a latent is ablated or steered with.

On a text of one window, at its hooks and in the language model itself:

    ablate  takes away what the latent writes where it is active: x − value · W_dec[latent]; all else stays, the SAE's
            error included. As `monitor.evaluation.ablation` does (Gao et al., 2406.04093, §4.5).
    steer   adds the latent's direction at every token that the SAE is shown: x + strength · strongest · W_dec[latent],
            where `strongest` is the latent's largest activation on held-out text (activation addition: Turner et al.,
            2308.10248; with the directions of latents: Templeton et al., 2024, "Scaling monosemanticity").

Next-token distributions before and after are compared by KL(before ‖ after), in nats. Two passes of at most LONGEST
tokens, one question at a time: a reader costs little more than a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from monitor.evaluation.latents.snapshot_saes import SnapshotSae
from monitor.evaluation.latents.text_reader import TextReader
from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import NextTokenEffect, TokenProbability, TriedText
from producer.lm.model import LanguageModel
from producer.lm.passes import Replacement

Mode = Literal["ablate", "steer"]

LONGEST = 256
"""Tokens of a text; of a longer one, the first so many are read."""
LARGEST_STRENGTH = 100.0
TOKENS_SHOWN = 10
"""Tokens with the largest changes of probability, up and down, and the likeliest before."""


class Intervener:
    """Tries texts on latents, with one language model. Any thread may ask."""

    def __init__(self, model: LanguageModel, texts: Texts, reader: TextReader) -> None:
        self._model = model
        self._texts = texts
        self._reader = reader

    def try_text(
        self, source: SnapshotSae, latent: int, text: str, mode: Mode | None = None, strength: float = 1.0,
        at: int | None = None,
    ) -> TriedText:  # fmt: skip
        """The latent on a text and, with a `mode`, the effect on the token after token `at`, by default the last.

        Raises ValueError for a text, strength or token that cannot be used, and for a model that predicts no tokens.
        """
        windows = self._reader.windows(text)
        text_length = int((~windows.padded[0]).sum())
        length = min(LONGEST, text_length)
        ids = torch.from_numpy(windows.ids[:1, :length])
        is_kept = torch.from_numpy(windows.kept[0, :length])
        with self._reader.lock:
            values = self._values(source, latent, ids, is_kept)
            effect = None if mode is None else self._effect(source, latent, ids, is_kept, values, mode, strength, at)
        return TriedText(
            sae=source.name,
            snapshot=source.snapshot,
            index=latent,
            text=text,
            is_cut=len(windows) > 1 or length < text_length,
            tokens=self._texts.pieces(ids[0][is_kept].tolist()),
            values=values[is_kept].tolist(),
            strongest=float(source.latents.strongest[latent]),
            effect=effect,
        )

    def _effect(
        self, source: SnapshotSae, latent: int, ids: Tensor, is_kept: Tensor, values: Tensor, mode: Mode,
        strength: float, at: int | None,
    ) -> NextTokenEffect:  # fmt: skip
        if not self._model.predicts:
            raise ValueError(f"{self._model.settings.name} does not predict the next token: there is no effect to show")
        if not abs(strength) <= LARGEST_STRENGTH:
            raise ValueError(f"strength = {strength:g}: expected {-LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}")
        places = is_kept.nonzero().flatten().tolist()
        at = len(places) - 1 if at is None else at
        if not 0 <= at < len(places):
            raise ValueError(f"at = {at}: the text has tokens 0 to {len(places) - 1}")
        unit = float(source.latents.strongest[latent]) or 1.0
        scale = -values if mode == "ablate" else strength * unit * is_kept.float()
        before = self._logits(ids, {})
        after = self._logits(ids, self._adding(source, scale[:, None] * source.decoder_row(latent)))
        divergence = (before.exp() * (before - after)).sum(1)
        return NextTokenEffect(
            mode=mode,
            strength=strength if mode == "steer" else None,
            at=at,
            kl=divergence[is_kept].clamp_min(0).tolist(),
            next_tokens=self._changes(before[places[at]], after[places[at]]),
        )

    def _values(self, source: SnapshotSae, latent: int, ids: Tensor, is_kept: Tensor) -> Tensor:
        """The latent's activation at each position, float32 [context]; 0 where the SAE is shown nothing."""
        hooks = [hook.name for hook in self._model.hooks]
        outputs = dict(zip(hooks, self._model.activations(ids), strict=True))
        x = torch.cat([outputs[hook][0].cpu()[is_kept].float() for hook in source.inference.hooks.reads], 1)
        values = torch.zeros(ids.shape[1])
        values[is_kept] = source.inference.encode(x)[:, latent].float()
        return values

    def _logits(self, ids: Tensor, replacements: Mapping[str, Replacement]) -> Tensor:
        """Log probabilities of the next token at each position, float32 [context, vocabulary]."""
        return self._model.logits(ids, replacements)[0].float().log_softmax(-1).cpu()

    def _adding(self, source: SnapshotSae, change: Tensor) -> dict[str, Replacement]:
        """Adds `change` [context, d_out] at the hooks that the SAE writes."""
        widths = {hook.name: hook.width for hook in self._model.hooks}
        writes = source.inference.hooks.writes
        parts = change.split([widths[hook] for hook in writes], 1)

        def add(part: Tensor, activations: Tensor) -> Tensor:
            return activations + part.to(activations)[None]

        return {hook: partial(add, part) for hook, part in zip(writes, parts, strict=True)}

    def _changes(self, before: Tensor, after: Tensor) -> list[TokenProbability]:
        """The tokens that the change concerns most, by the probability that they have afterwards."""
        before, after = before.exp(), after.exp()
        change, count = after - before, min(TOKENS_SHOWN, len(before))
        ranked = [before.topk(count), change.topk(count), change.topk(count, largest=False)]
        tokens = sorted({int(token) for top in ranked for token in top.indices}, key=lambda token: -float(after[token]))
        return [
            TokenProbability(token=self._texts.of(token), before=float(before[token]), after=float(after[token]))
            for token in tokens
        ]


def parse_mode(text: str) -> Mode | None:
    """None for the empty text. Raises ValueError for anything else but `ablate` and `steer`."""
    if not text:
        return None
    if text not in ("ablate", "steer"):
        raise ValueError(f"mode = {text[:20]!r}: expected ablate or steer")
    return cast(Mode, text)
