"""Reads a text that somebody typed with the language model and with one SAE; one text at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch

from monitor.evaluation.latents.activations import encode_sparse
from monitor.evaluation.latents.snapshot_saes import SnapshotSae
from monitor.evaluation.latents.texts import Texts
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings

LONGEST_TEXT = 4_000
"""Characters of a text."""


@dataclass(frozen=True)
class TextActivations:
    """The activations of an SAE's latents on a text. Positions count the tokens that the SAE is shown."""

    tokens: list[str]
    position: np.ndarray
    """int64 [activations]"""
    latent: np.ndarray
    """int32 [activations]"""
    value: np.ndarray
    """float32 [activations]"""

    def along(self, latent: int) -> list[float]:
        """A latent's activation on each token."""
        fires = self.latent == latent
        dense = np.zeros(len(self.tokens), np.float32)
        dense[self.position[fires]] = self.value[fires]
        return dense.tolist()


class TextReader:
    """Reads texts with a language model. Any thread may ask."""

    def __init__(self, model: LanguageModel, texts: Texts, corpus: CorpusSettings) -> None:
        self._model = model
        self._texts = texts
        self._corpus = corpus
        self.lock = threading.Lock()
        """Held while a text is read: that takes memory for all latents of some tokens."""

    def windows(self, text: str) -> Windows:
        """The windows of a text. Raises ValueError for one that an SAE cannot be shown."""
        if not text.strip() or len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text)} characters; expected 1 to {LONGEST_TEXT:,}, not only spaces")
        windows = self._texts.windows(text, self._corpus)
        if not windows.kept.any():
            raise ValueError("this text has no token that an SAE is shown: special tokens are left out")
        return windows

    def read(self, source: SnapshotSae, text: str) -> TextActivations:
        """The activations of all latents on a text. Raises ValueError as `windows` does."""
        windows = self.windows(text)
        tokens = self._texts.pieces(windows.ids[windows.kept].tolist())
        hooks = [hook.name for hook in self._model.hooks]
        ids, is_kept, padding = map(torch.from_numpy, (windows.ids, windows.kept, windows.padded))
        with self.lock:
            outputs = dict(zip(hooks, self._model.activations(ids, padding), strict=True))
            x = torch.cat([outputs[hook].cpu()[is_kept].float() for hook in source.inference.hooks.reads], 1)
            position, latent, value = encode_sparse(source.inference, x)
        return TextActivations(tokens, position.numpy(), latent.numpy(), value.numpy())
