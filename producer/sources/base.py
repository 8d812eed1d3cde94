"""Source: what each source of activations offers, and the batches and threads of forward passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Protocol

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.lm.revisions import FIRST, Revision
from producer.wire import CorpusShare, Hook, held_out_shards

CPU_TOKENS, GPU_TOKENS = 4096, 32_768
"""About how many tokens one forward pass takes, unless model.batch_windows says otherwise or others are faster."""


class Source(Protocol):
    """Shards of activations, as the producer's loop reads them."""

    hooks: list[Hook]
    context: int
    shards: int
    held_out: float
    """Fraction of the shards that are never trained on."""
    corpora: list[CorpusShare]
    """Of a mixture."""
    batch_windows: int
    concurrent_passes: int
    """Number of forward passes that run side by side."""
    passes_under_way: int
    """Forward passes that are started before the first is waited for: one for each GPU that they go through."""
    facts: dict[str, JsonValue]
    """Facts that decide the activations, and names of their origin, for the stream's HELLO and the snapshots."""
    device: torch.device

    def choose_batch(self) -> None:
        """Sets `batch_windows` to what is fastest here, unless the settings say it."""
        ...

    @property
    def layers(self) -> tuple[int, int]:
        """(layers that run, layers of the whole model)"""
        ...

    @property
    def measurements(self) -> dict[str, JsonValue]:
        """Measurements of the start, for the stream's HELLO and the snapshots; they decide no activation."""
        ...

    def use_revision(self, name: str) -> None:
        """Loads a revision of a language model under training. Raises ModelError."""
        ...

    def find_newest(self) -> Revision:
        """Looks for the newest revision of a language model under training."""
        ...

    @property
    def revision_bounds(self) -> list[float] | None:
        """Norm bounds of the present revision, per hook; None where the run has one for all, or nothing is dropped."""
        ...

    def windows(self, shard: int, epoch: int = 0) -> Windows: ...

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        """Computes the activations of the windows with these indices: [len(indices), context, width] per hook."""
        ...


class SourceWithoutModel:
    """The parts of a Source that runs no language model: a pass is a copy on the CPU, and no revision follows."""

    corpora: list[CorpusShare]
    device = torch.device("cpu")
    concurrent_passes = passes_under_way = 1
    layers = (0, 0)
    measurements: ClassVar[dict[str, JsonValue]] = {}
    revision_bounds = None

    def __init__(self) -> None:
        self.corpora = []

    def choose_batch(self) -> None:
        """There is nothing to choose: a pass is a copy."""

    def use_revision(self, name: str) -> None:
        """There is no language model."""

    def find_newest(self) -> Revision:
        return FIRST


def training_shards(source: Source) -> Iterator[int]:
    """Yields the shards of a source that are trained on."""
    held_out = set(held_out_shards(source.shards, source.held_out))
    return (shard for shard in range(source.shards) if shard not in held_out)


def open_pass_threads(count: int) -> ThreadPoolExecutor:
    """Opens threads for forward passes side by side, each with its share of the cores.

    As fast as one pass after the other on all cores where nothing else runs; but those wait for their slowest core in
    each of their hundred operations, and lose a third of their speed to any other process that wakes now and then.
    """
    share = max(1, torch.get_num_threads() // count)
    return ThreadPoolExecutor(count, "pass", initializer=torch.set_num_threads, initargs=(share,))


def fingerprint(facts: dict[str, JsonValue]) -> str:
    """Hashes what decides the activations: sha256, hex. Names and descriptions depend on the place and are left out."""
    decisive = {name: value for name, value in facts.items() if name not in ("model", "corpus")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def batches(windows: Windows, wanted: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields the indices of the windows with a wanted position, `size` at a time, in order."""
    needed = np.flatnonzero(wanted.any(1))
    for start in range(0, len(needed), size):
        yield needed[start : start + size]
