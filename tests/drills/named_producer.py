"""The real producer, on a synthetic corpus in which each activation is its own name.

    python tests/drills/named_producer.py RUN.toml [section.key=value …]

A drill can so check each activation that was trained on. The facts are those of the synthetic source itself: a run is
streamed by such producers alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import producer.source
from producer.__main__ import main as real_main
from producer.corpus.synthetic import SyntheticActivations
from producer.settings import CorpusSettings, ProducerSettings
from producer.source import SyntheticSource


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


def main(arguments: list[str]) -> int:
    """Runs the producer with the named source in the place of the synthetic one."""
    producer.source.SyntheticSource = NamedSource  # type: ignore[misc]
    return real_main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
