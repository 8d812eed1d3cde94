"""The real producer, but each activation is its own name: of a synthetic corpus, or of a text that is really read.

    python tests/drills/named_producer.py RUN.toml [section.key=value …]

A drill can so check each activation that was trained on. The facts are those of the synthetic source itself: a run is
streamed by such producers alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import producer.sources.opening
from producer.__main__ import main as real_main
from producer.corpus.rendering.windows import Windows
from producer.corpus.synthetic import SyntheticActivations
from producer.settings import CorpusSettings, ProducerSettings
from producer.sources.language_model import LanguageModelSource
from producer.sources.synthetic import SyntheticSource


class NamedActivations(SyntheticActivations):
    """An activation is (shard, window, position, 1), then zeros.

    bfloat16 holds whole numbers exactly up to 256, float32 up to 2**24: a drill on a bfloat16 stream keeps all three
    counts at 256 or less.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        super().__init__(settings)
        assert self.d_in >= 4, "a name has four numbers"

    def activations(self, shard: int) -> np.ndarray:
        assert 0 <= shard < self.shards
        activations = np.zeros((self.windows, self.context, self.d_in), dtype=np.float32)
        activations[..., 0] = shard
        activations[..., 1] = np.arange(self.windows)[:, None]
        activations[..., 2] = np.arange(self.context)
        activations[..., 3] = 1
        return activations.reshape(-1, self.d_in)


class NamedSource(SyntheticSource):
    """Streams named activations."""

    def __init__(self, settings: ProducerSettings) -> None:
        super().__init__(settings)
        self.data = NamedActivations(settings.corpus)


class NamedTextSource(LanguageModelSource):
    """Reads, renders and cuts a text as a real one does, and streams the name of each position."""

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        super().activations(shard, windows, indices)  # what the language model would refuse fails here too
        named = torch.zeros(len(indices), self.context, self.hooks[0].width)
        named[..., 0] = shard
        named[..., 1] = torch.from_numpy(indices)[:, None]
        named[..., 2] = torch.arange(self.context)
        named[..., 3] = 1
        return [named]


def main(arguments: list[str]) -> int:
    """Runs the producer with the named sources in the place of the real ones."""
    producer.sources.opening.SyntheticSource = NamedSource  # type: ignore[misc]
    producer.sources.opening.LanguageModelSource = NamedTextSource  # type: ignore[misc]
    return real_main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
