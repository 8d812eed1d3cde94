"""Activations of known ground truth: sparse sums of known directions."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.corpus.synthetic import SyntheticActivations
from producer.settings import ProducerSettings
from producer.sources.base import CPU_TOKENS, SourceWithoutModel
from producer.wire import Hook


class SyntheticSource(SourceWithoutModel):
    """Sparse sums of known directions; no language model, no text."""

    def __init__(self, settings: ProducerSettings) -> None:
        super().__init__()
        self.data = SyntheticActivations(settings.corpus)
        self._shards: dict[int, np.ndarray] = {}
        """Activations of the shard that is worked on and of the one that is read ahead."""
        self.context = settings.corpus.context
        self._streamed = settings.corpus.streamed_positions
        self.shards, self.held_out = self.data.shards, settings.corpus.held_out
        self.hooks = [Hook(name="synthetic", module="synthetic", width=self.data.d_in)]
        self.batch_windows = max(1, CPU_TOKENS // self.context)
        self.facts: dict[str, JsonValue] = {
            "corpus": self.data.description,
            "corpus_fingerprint": self.data.fingerprint,
            "context": self.context,
            "outlier_factor": settings.corpus.outlier_factor,
        }
        if settings.corpus.positions:
            self.facts["positions"] = list(settings.corpus.positions)
        if settings.run.deterministic:
            self.facts["deterministic"] = True

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        count = len(self._shard(shard)) // self.context
        shape = (count, self.context)
        kept = np.broadcast_to(np.array(self._streamed), shape).copy()
        return Windows(np.zeros(shape, np.int64), kept, np.zeros(shape, bool))

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        activations = self._shard(shard)
        return [torch.from_numpy(activations.reshape(-1, self.context, activations.shape[1])[indices])]

    def _shard(self, shard: int) -> np.ndarray:
        """Returns the shard's activations, [shard_windows * context, d_in], computed once while it is needed."""
        if (activations := self._shards.get(shard)) is None:
            activations = self.data.activations(shard)
            self._shards = dict([*self._shards.items()][-1:]) | {shard: activations}
        return activations
