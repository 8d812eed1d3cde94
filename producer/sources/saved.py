"""Activations that others saved: kind `activations`. No language model runs, and nothing is tokenized.

A shard is a span of windows of a file, of about as many tokens as `shard_bytes` of text have. Rows without windows are
cut into windows of `context`, the last of them padded: position is then only a number. What was saved is streamed as it
is, but for corpus.positions and corpus.outlier_factor: which tokens are special nobody knows any more.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from producer.corpus.base import CorpusError, corpus_fingerprint, describe_shards, raise_faults
from producer.corpus.rendering.windows import Windows
from producer.corpus.sources.files import DataFile, describe_files, find_files
from producer.settings import BYTES_PER_TOKEN, ProducerSettings
from producer.sources.base import CPU_TOKENS, SourceWithoutModel
from producer.sources.saved_files import SUFFIXES, ActivationFile, open_file
from producer.wire import Hook


class SavedSource(SourceWithoutModel):
    """Shards of saved activations."""

    def __init__(self, settings: ProducerSettings) -> None:
        """Raises CorpusError with what is wrong with the files."""
        super().__init__()
        assert settings.model is not None
        corpus = settings.corpus
        names = settings.model.hooks
        files = [file for file in find_files(corpus, SUFFIXES) if not file.path.name.startswith("cache-")]
        self._files, faults = _open_all(files, names, settings)
        raise_faults(faults)
        if len({tuple(file.widths) for file in self._files}) > 1:
            raise CorpusError(f"corpus.paths = {corpus.paths}: the files hold activations of different widths")
        self.context = corpus.context
        self._streamed = np.array(corpus.streamed_positions)
        per_shard = max(1, corpus.shard_bytes // BYTES_PER_TOKEN // self.context)
        self._spans = [
            (file, first, min(first + per_shard, windows))
            for file in self._files
            for windows in [-(-file.rows // self.context)]
            for first in range(0, windows, per_shard)
        ]
        """(file, first window, end) of each shard."""
        self.shards, self.held_out = len(self._spans), corpus.held_out
        widths = self._files[0].widths
        self.hooks = [Hook(name=name, module=name, width=width) for name, width in zip(names, widths, strict=True)]
        self.batch_windows = settings.model.batch_windows or max(1, CPU_TOKENS // self.context)
        identity = [[[file.name, file.size, file.digest] for file in files], names, per_shard]
        self.facts: dict[str, JsonValue] = {
            "model": settings.model.name,
            "model_revision": settings.model.revision,
            "corpus": describe_shards(describe_files(corpus, files), self.shards, corpus.held_out),
            "corpus_fingerprint": corpus_fingerprint(corpus.kind, self.shards, identity),
            "context": self.context,
            "positions": list(corpus.positions),
            "outlier_factor": corpus.outlier_factor,
        }
        if settings.run.deterministic:
            self.facts["deterministic"] = True

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        file, first, end = self._spans[shard]
        shape = (end - first, self.context)
        padded = (np.arange(first * self.context, end * self.context) >= file.rows).reshape(shape)
        return Windows(np.zeros(shape, np.int64), ~padded & self._streamed, padded)

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        file, first, _ = self._spans[shard]
        result = []
        for hook, width in enumerate(file.widths):
            x = torch.zeros(len(indices), self.context, width)
            for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) != 1) + 1):
                start = (first + int(indices[run[0]])) * self.context
                rows = file.read(hook, start, min(start + len(run) * self.context, file.rows))
                x[run[0] : run[-1] + 1].view(-1, width)[: len(rows)] = rows
            result.append(x)
        return result


def _open_all(
    files: list[DataFile], hooks: list[str], settings: ProducerSettings
) -> tuple[list[ActivationFile], list[str]]:
    """Opens each file; returns the faults of those that cannot be opened."""
    opened, faults = [], []
    for file in files:
        try:
            opened.append(open_file(file, hooks, settings.corpus))
        except CorpusError as error:
            faults.append(str(error))
    return opened, faults
