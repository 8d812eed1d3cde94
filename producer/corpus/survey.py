"""A look at the shards of a text before the run: whether they can be read, and whether the buffer will mix them.

A shard is held as token ids while it is read, and the stream has names for MAX_POSITIONS of its positions. Shards that
are larger are refused now and not after hours.

A buffer mixes what it holds. Where a shard is larger than the buffer, batches are of one or two shards at a time; that
matters where shards are unlike, such as one language, author or site each. How unlike they are is measured by their
words, on snippets spread over a few shards: the share of words that two shards have in common, beside the share that
two halves of one shard have in common.

    unlikeness = 1 − overlap between shards / overlap within shards          0 for shards of one and the same text
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from producer.common.formatting import format_bytes
from producer.common.memory import free_memory
from producer.corpus.base import Conversation, CorpusError, Document
from producer.corpus.mixture import Part, Text
from producer.settings import BYTES_PER_TOKEN
from producer.wire import MAX_MASK_BYTES

MAX_POSITIONS = 8 * MAX_MASK_BYTES
"""Positions of the largest shard: what a lease can name."""
MEMORY_PER_TOKEN = 64
"""Bytes that the windows of a shard take, with those of the one that is read ahead."""
SAMPLED_SHARDS, SNIPPETS, SNIPPET_WORDS = 4, 64, 64
SAMPLED_BYTES = 8_000_000
"""Larger shards are not read for the sample."""


@dataclass(frozen=True)
class ShardSurvey:
    """What the shards of a text are like."""

    tokens: int | None
    """Mean tokens of a shard, estimated from bytes; None where nobody knows."""
    unlikeness: float | None
    """From 0, alike, to 1, no word in common; None where it was not measured."""


def survey_shards(text: Text, free_bytes: float | None = None, max_positions: int = MAX_POSITIONS) -> ShardSurvey:
    """Measures the shards of a text. Raises CorpusError for shards that no producer can read.

    `free_bytes` of memory are those of this machine, unless they are given.
    """
    for part in text.parts:
        _check_largest(part, len(text.parts) > 1, free_memory() if free_bytes is None else free_bytes, max_positions)
    counts = [share.shards for share in text.shares] or [text.shards]
    if any(part.corpus.text_bytes is None for part in text.parts):
        return ShardSurvey(None, None)
    mean = float(np.average([part.mean_shard_bytes for part in text.parts], weights=counts))
    return ShardSurvey(round(mean / BYTES_PER_TOKEN), _unlikeness(text))


def _check_largest(part: Part, is_named: bool, free: float, max_positions: int) -> None:
    sizes = part.corpus.text_bytes
    if not sizes:
        return
    shard = int(np.argmax(sizes))
    tokens = sizes[shard] // BYTES_PER_TOKEN
    needed = MEMORY_PER_TOKEN * tokens
    if tokens <= max_positions and needed <= free:
        return
    limit = (
        f"a shard may have {max_positions:,}"
        if tokens > max_positions
        else f"reading it takes about {format_bytes(needed)} of memory, of which {format_bytes(int(free))} are free"
    )
    name = f"[[corpus]] {part.name}: " if is_named else ""
    raise CorpusError(
        f"{name}shard {shard} holds about {format_bytes(sizes[shard])} of text, {tokens:,} tokens, and {limit}. "
        f"{part.corpus.more_shards_advice(part.settings)} A packed file is one shard: unpack or split it"
    )


def _unlikeness(text: Text) -> float | None:
    """Compares the words of some shards with each other, and with themselves; None for fewer than two shards."""
    numbers = np.unique(np.linspace(0, text.shards - 1, SAMPLED_SHARDS).astype(int))
    halves = []
    for number in numbers.tolist():
        part, shard = text.find(number, 0)
        assert part.corpus.text_bytes is not None
        if part.corpus.text_bytes[shard] > SAMPLED_BYTES:
            return None
        try:
            words = _words(part.corpus.documents(shard))
        except (CorpusError, OSError):
            return None  # the shard fails when it is leased, and says why
        if len(words) >= 2 * SNIPPET_WORDS:
            halves.append(_halves(words))
    if len(halves) < 2:
        return None
    within = np.mean([_overlap(first, second) for first, second in halves])
    between = np.mean([_overlap(one[0], other[1]) for one, other in itertools.permutations(halves, 2)])
    return max(0.0, float(1 - between / within)) if within else None


def _words(documents: Iterable[Document]) -> Sequence[str | int]:
    words: list[str | int] = []
    for document in documents:
        if isinstance(document, np.ndarray):
            words += document.tolist()
        elif isinstance(document, Conversation):
            words += [word for message in document.messages for word in re.findall(r"\w+", message["content"])]
        else:
            words += re.findall(r"\w+", document)
    return words


def _halves(words: Sequence[str | int]) -> tuple[Counter[str | int], Counter[str | int]]:
    """Counts the words of snippets that are spread over a shard, in two parts that take turns."""
    halves: tuple[Counter[str | int], Counter[str | int]] = Counter(), Counter()
    count = min(SNIPPETS, len(words) // SNIPPET_WORDS) // 2 * 2
    for index, start in enumerate(np.linspace(0, len(words) - SNIPPET_WORDS, count).astype(int).tolist()):
        halves[index % 2].update(words[start : start + SNIPPET_WORDS])
    return halves


def _overlap(one: Counter[str | int], other: Counter[str | int]) -> float:
    """The share of words that two samples have in common."""
    return (one & other).total() / max(1, min(one.total(), other.total()))
