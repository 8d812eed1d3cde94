"""The text of a run: one corpus, or a mixture of several, as the numbered shards of the stream.

    text = open_text(settings.corpus)
    windows = text.windows(shard, epoch, tokenizer)

Alone, a corpus keeps its numbers, and the stream holds out what the corpus holds out. In a mixture the numbers are
those of one epoch, corpus after corpus, and what a corpus holds out has none:

    weights 3 : 1, 6 shards of `web` and 1 of `chat` to train on, alike in size

    number             0    1    2    3    4    5    6    7
    in epoch 0        w0   w1   w2   w3   w4   w5   c0   c0
    in epoch 1        w0   w1   w2   w3   w4   w5   c0   c0

An epoch lasts until each corpus was read once, at these weights; those that come to their end earlier are read again,
and go on in the next epoch where they were. So over any number of epochs, how often a shard is trained on is
arithmetic: a corpus of S shards that has n numbers in an epoch is read E·n / S times in E epochs, and no shard of it
more than once more often than another. Weights are shares of text: a corpus of small shards has more of them. The
order within an epoch is the trainer's, which keeps the shares in each part of it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from producer.common.formatting import format_bytes
from producer.corpus.base import Corpus, CorpusError, corpus_fingerprint
from producer.corpus.registry import open_corpus
from producer.corpus.rendering.windows import Windows, check_packing, tokens_fingerprint, windows_of
from producer.settings import CorpusSettings
from producer.wire import CorpusShare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MAX_SHARDS = 2**24
"""Numbers that the stream has for the shards of an epoch."""
ORDER_SEED = 20240131
"""Of the order in which a corpus of a mixture is read, which decides what comes once more than the rest."""


@dataclass(frozen=True)
class Part:
    """One corpus of a text, with the settings by which its documents become windows."""

    settings: CorpusSettings
    corpus: Corpus
    share: float = 1.0
    """Its share of the text, as the weights have it."""

    @property
    def name(self) -> str:
        return self.settings.label

    @property
    def mean_shard_bytes(self) -> float:
        """Mean text of a training shard, in bytes; where nobody knows, corpus.shard_bytes says it."""
        sizes = self.corpus.text_bytes
        if sizes is None:
            return float(self.settings.shard_bytes)
        return max(1.0, float(np.mean([sizes[shard] for shard in self.corpus.training_shards])))

    def windows(self, shard: int, tokenizer: PreTrainedTokenizerBase) -> Windows:
        return windows_of(self.corpus.documents(shard), tokenizer, self.settings)


class Text(ABC):
    """The shards of a stream, as windows."""

    parts: list[Part]
    shards: int
    held_out: float
    """Fraction of `shards` that the stream holds out."""
    description: str
    fingerprint: str
    """sha256, hex, over everything that decides the documents of every shard."""
    shares: list[CorpusShare]
    """Numbers of each corpus in an epoch; empty for one corpus alone."""

    @abstractmethod
    def find(self, shard: int, epoch: int) -> tuple[Part, int]:
        """Returns the corpus that a number of the stream stands for in an epoch, and the shard of it."""

    def windows(self, shard: int, epoch: int, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Reads the windows of a shard. Raises CorpusError, and IndexError for a shard that does not exist."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        part, number = self.find(shard, epoch)
        try:
            return part.windows(number, tokenizer)
        except CorpusError as error:
            if len(self.parts) == 1:
                raise
            raise CorpusError(f"[[corpus]] {part.name}: {error}") from None

    def check_packing(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Raises CorpusError when packing would put an id into windows that a model of `vocabulary` ids lacks."""
        for part in self.parts:
            check_packing(tokenizer, part.settings, vocabulary)

    @abstractmethod
    def tokens_fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Hashes what decides how documents become windows: sha256, hex."""

    @property
    def has_shared_windows(self) -> bool:
        """Whether documents share windows without seeing each other."""
        return any(part.settings.packing == "separate_masked" for part in self.parts)

    def common(self, setting: str) -> bool | None:
        """Returns a setting of all corpora; None where they differ."""
        values = {getattr(part.settings, setting) for part in self.parts}
        return values.pop() if len(values) == 1 else None


class OneCorpus(Text):
    """A corpus alone."""

    def __init__(self, settings: CorpusSettings) -> None:
        corpus = open_corpus(settings)
        self.parts = [Part(settings, corpus)]
        self.shards, self.held_out = corpus.shards, settings.held_out
        self.description, self.fingerprint = corpus.description, corpus.fingerprint
        self.shares = []

    def find(self, shard: int, epoch: int) -> tuple[Part, int]:
        return self.parts[0], shard

    def tokens_fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return tokens_fingerprint(tokenizer, self.parts[0].settings)


class Mixture(Text):
    """Several corpora by weight. See the module's docstring."""

    held_out = 0.0

    def __init__(self, settings: CorpusSettings) -> None:
        parts = [Part(part, _open(part)) for part in settings.texts]
        weights = np.array([part.settings.weight or 1.0 for part in parts])
        self.parts = [
            Part(part.settings, part.corpus, share) for part, share in zip(parts, weights / weights.sum(), strict=True)
        ]
        counts = shards_in_epoch(
            [len(part.corpus.training_shards) for part in parts],
            [share.share / share.mean_shard_bytes for share in self.parts],
        )
        self.shards = sum(counts)
        if self.shards > MAX_SHARDS:
            raise CorpusError(
                f"an epoch of the mixture has {self.shards:,} shards, and at most {MAX_SHARDS:,} can be numbered; "
                "raise corpus.shard_bytes, or the weight of the corpus that is read least often"
            )
        self.shares = [
            CorpusShare(name=part.name, shards=count) for part, count in zip(self.parts, counts, strict=True)
        ]
        self._firsts = np.cumsum([0, *counts])
        self._orders = [
            np.random.default_rng(ORDER_SEED).permutation(part.corpus.training_shards) for part in self.parts
        ]
        names = "; ".join(f"{part.name}: {part.corpus.description}" for part in self.parts)
        self.description = f"mixture of {len(parts)} corpora, {self.shards:,} shards in an epoch: {names}"
        identity = [
            [part.corpus.fingerprint, count, part.corpus.held_out_shards]
            for part, count in zip(self.parts, counts, strict=True)
        ]
        self.fingerprint = corpus_fingerprint("mixture", self.shards, identity)
        self._log_shares()

    def find(self, shard: int, epoch: int) -> tuple[Part, int]:
        index = int(np.searchsorted(self._firsts, shard, side="right")) - 1
        order = self._orders[index]
        count = self.shares[index].shards
        return self.parts[index], int(order[(epoch * count + shard - int(self._firsts[index])) % len(order)])

    def tokens_fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        prints = [tokens_fingerprint(tokenizer, part.settings) for part in self.parts]
        return corpus_fingerprint("mixture", self.shards, prints)

    def _log_shares(self) -> None:
        text = [share.shards * part.mean_shard_bytes for part, share in zip(self.parts, self.shares, strict=True)]
        for part, share, size in zip(self.parts, self.shares, text, strict=True):
            known = "" if part.corpus.text_bytes is not None else ", by corpus.shard_bytes"
            log.info(
                "[[corpus]] %s: %s of the shards of an epoch, %.1f%% of the text (%s%s); read %.4g times",
                part.name, f"{share.shards:,}", 100 * size / sum(text), format_bytes(int(size)), known,
                share.shards / len(part.corpus.training_shards),
            )  # fmt: skip


def _open(settings: CorpusSettings) -> Corpus:
    try:
        return open_corpus(settings)
    except CorpusError as error:
        faults = str(error).split("\n")
        raise CorpusError("\n".join(f"[[corpus]] {settings.label}: {fault}" for fault in faults)) from None


def shards_in_epoch(shards: list[int], rates: list[float]) -> list[int]:
    """Returns how many shards of each corpus an epoch has: in the ratio of `rates`, and of none fewer than it has."""
    longest = max(count / rate for count, rate in zip(shards, rates, strict=True))
    return [max(count, round(longest * rate)) for count, rate in zip(shards, rates, strict=True)]


def open_text(settings: CorpusSettings) -> Text:
    """Opens the text of [corpus], or of the tables [[corpus]], and checks it.

    Raises CorpusError with up to ten faults, one per line.
    """
    opener: Callable[[CorpusSettings], Text] = OneCorpus if settings.mixture is None else Mixture
    return opener(settings)
