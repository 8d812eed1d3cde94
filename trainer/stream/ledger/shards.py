"""Shards: the states that each one goes through, and the queue that they are leased from, epoch after epoch.

FREE ──lease──▶ LEASED ──SHARD_END──▶ RECEIVED ──last step──▶ TRAINED
 ▲                 │
 ├── producer gone ┤
 └── failure ──────┴── enough failures ──▶ QUARANTINED ──retry-quarantined──▶ FREE
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from producer.wire import MAX_MASK_BYTES, Chunk, Hello, ShardEnd, ShardFail, held_out_shards
from trainer.stream.ledger.revisions import Revisions

MAX_POSITIONS = 8 * MAX_MASK_BYTES
"""Positions of the largest shard: what a lease's mask can name."""
SUSPECT_DEATHS = 3
"""A shard is leased last when this many producers in a row were lost on it before they sent anything of it."""


class ShardState(Enum):
    """The lifecycle of a shard."""

    FREE = "free"
    """It can be leased."""
    LEASED = "leased"
    """A producer works on it, or has it waiting."""
    RECEIVED = "received"
    """All of its activations have arrived or were dropped; some are not trained yet."""
    TRAINED = "trained"
    QUARANTINED = "quarantined"
    """What arrived of it is still trained; the rest is not leased until an operator retries it."""


@dataclass(frozen=True)
class FailureReport:
    """A producer's report that its shard is broken."""

    reason: str
    rows: int | None = None
    """Activations of the whole shard, where the producer knows."""
    is_final: bool = False
    """Another try is not worth it."""


@dataclass(frozen=True)
class QuarantinedShard:
    """A shard that is not trained on any further."""

    epoch: int
    shard: int
    rows: int | None
    """Activations of it that were never received; None when nobody knows how many."""
    reason: str


@dataclass(frozen=True)
class SuspectShard:
    """A shard on which producer after producer was lost."""

    epoch: int
    shard: int
    deaths: int


@dataclass(frozen=True)
class Quarantine:
    """All shards that are quarantined, oldest first."""

    shards: tuple[QuarantinedShard, ...]
    ratio: float
    """Share of the shards begun so far."""

    @property
    def tokens(self) -> int | None:
        """Tokens of these shards that are not trained on; None when nobody knows how many some of them have."""
        counts = [shard.rows for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count)


@dataclass(eq=False)
class OpenShard:
    """A shard that was leased at least once and is not trained. Bits are bool arrays over its positions."""

    serial: int
    """Names the (epoch, shard) pair inside the buffer."""
    epoch: int
    shard: int
    corpus: str | None = None
    """Name of its corpus in a mixture."""
    revision: str = ""
    """Of a language model under training: the checkpoint whose activations these are."""
    attempt: int = 0
    state: ShardState = ShardState.FREE
    holder: str | None = None
    """The session that it is leased to."""
    has_progress: bool = False
    """The present attempt has brought an activation or an outlier."""
    rows: int | None = None
    """How many activations it has; known once a producer has been through."""
    failures: int = 0
    """Reports that it is broken, by producers that serve others."""
    deaths: int = 0
    """Producers in a row that were lost on it before they sent anything of it."""
    reporters: dict[str, bool] = field(default_factory=dict)
    """Producers that have reported it as broken and served no other shard since; whether that counts as a failure."""
    last_report: FailureReport | None = None
    setbacks: int = 0
    """How often it was reported, or its producer lost, since it last had progress."""
    retry_at: float = float("-inf")
    """It is not leased before this time."""
    buffered: int = 0
    """Activations received and not trained in this incarnation of the trainer."""
    prefix_end: int = 0
    """Deterministic mode: every activation at a position below this has arrived."""
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Positions that need not be sent: received or dropped in this incarnation of the trainer."""
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Outliers, which producers name and do not send."""

    def __str__(self) -> str:
        return f"shard {self.shard} of epoch {self.epoch}"

    @property
    def is_pending(self) -> bool:
        """Activations of it are still asked for."""
        return self.state in (ShardState.FREE, ShardState.LEASED)

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS

    @property
    def is_in_trouble(self) -> bool:
        """Producers have failed on it, or were lost: one that does not serve it need not be broken."""
        return bool(self.failures or self.reporters or self.is_suspect)

    @property
    def is_trained(self) -> bool:
        return self.state is ShardState.RECEIVED and count_bits(self.trained) + count_bits(self.dropped) == self.rows

    def is_meant_by(self, message: Chunk | ShardEnd | ShardFail) -> bool:
        """Whether a message is of this lease, and not of an earlier one."""
        return (self.shard, self.epoch, self.attempt) == (message.shard, message.epoch, message.attempt)

    def lease(self, session: str) -> None:
        """FREE → LEASED, under the next attempt."""
        self.attempt += 1
        self.state, self.holder, self.has_progress = ShardState.LEASED, session, False

    def release(self) -> None:
        """LEASED → FREE."""
        self.state, self.holder = ShardState.FREE, None
        if self.has_progress:
            self.deaths = self.setbacks = 0

    def has_any(self, start: int, rows: np.ndarray, outliers: np.ndarray) -> bool:
        """Whether a position from `start` on is named twice, or is here already; bool arrays of the same length."""
        self.reach(start + len(rows))
        mask = self.mask[start : start + len(rows)]
        return bool((mask & (rows | outliers)).any() or (rows & outliers).any())

    def receive(self, start: int, rows: np.ndarray, outliers: np.ndarray) -> None:
        """Activations are in the buffer, and outliers are dropped; after `has_any`."""
        end = start + len(rows)
        positions = rows | outliers
        self.mask[start:end] |= positions
        self.dropped[start:end] |= outliers
        self.prefix_end = max(self.prefix_end, end)
        self.has_progress |= bool(positions.any())
        self.buffered += count_bits(rows)

    def mark_trained(self, positions: np.ndarray) -> bool:
        """A step has consumed these; False when one was trained before, or never received."""
        is_right = bool(self.mask[positions].all() and not self.trained[positions].any())
        self.trained[positions] = True
        self.buffered -= len(positions)
        return is_right

    def reach(self, positions: int) -> None:
        """Lengthens the bit arrays to at least `positions`; memory is used only where bits are set."""
        old = len(self.mask)
        if positions > old:
            size = min(max(positions, old + old // 2), MAX_POSITIONS)
            for name in ("mask", "trained", "dropped"):
                bits = np.zeros(size, bool)
                bits[:old] = getattr(self, name)
                setattr(self, name, bits)


class ShardQueue:
    """The shards of every epoch in the order in which they are leased, and those that are open."""

    def __init__(self, seed: int, epochs: int | None, revisions: Revisions) -> None:
        self.seed = seed
        self.revisions = revisions
        self.open: dict[int, OpenShard] = {}
        """Open shards by serial, in the order of serials."""
        self.quarantined: list[QuarantinedShard] = []
        self.tokens_by_corpus: Counter[str] = Counter()
        """Tokens trained of each corpus of a mixture."""
        self.epoch = 0
        self.trained_in_epoch = 0
        self.cursor = 0
        """Shards of the epoch that were leased at least once."""
        self.next_serial = 0
        self.forgotten_hooks: set[str] = set()
        """Hooks whose activations no lease asks for: no SAE reads them any more."""
        self._epochs = epochs
        self._stream: Hello | None = None
        self._order = np.zeros(0, np.int64)

    def begin(self, stream: Hello) -> None:
        """Starts with the first epoch of a stream."""
        self.open, self.quarantined = {}, []
        self.trained_in_epoch = 0
        self.go_on(stream, epoch=0, cursor=0)

    def go_on(self, stream: Hello, epoch: int, cursor: int) -> None:
        """Continues a stream at the shard numbered `cursor` in the order of an epoch."""
        self._stream = stream
        self.epoch, self.cursor = epoch, cursor
        self._order = epoch_order(stream, self.seed, epoch)

    # Fresh shards: those that were never leased

    @property
    def has_fresh_in_epoch(self) -> bool:
        return self.cursor < len(self._order)

    @property
    def has_fresh(self) -> bool:
        """There is a fresh shard in this epoch, or there may be in the next one."""
        return self.has_fresh_in_epoch or self._may_begin_epoch()

    def open_next(self) -> OpenShard | None:
        """Opens the next fresh shard, if need be of the next epoch; None when there is none."""
        if not self.has_fresh:
            return None
        if not self.has_fresh_in_epoch:
            assert self._stream is not None
            self.go_on(self._stream, self.epoch + 1, cursor=0)
            self.trained_in_epoch = 0
        shard = self.new_shard(self.next_serial, self.epoch, int(self._order[self.cursor]))
        self.open[shard.serial] = shard
        self.next_serial += 1
        self.cursor += 1
        return shard

    def new_shard(self, serial: int, epoch: int, number: int) -> OpenShard:
        """A shard of the stream of which nothing has arrived."""
        return OpenShard(serial, epoch, number, corpus_of(self._stream, number) if self._stream else None)

    def _may_begin_epoch(self) -> bool:
        """There is another epoch, and this one shows that shards can be served: else all epochs would pass at once."""
        return (
            self._stream is not None
            and (self._epochs is None or self.epoch + 1 < self._epochs)
            and (
                self.trained_in_epoch > 0
                or any(shard.epoch == self.epoch and shard.state is ShardState.RECEIVED for shard in self.open.values())
            )
        )

    # Open shards

    def free(self) -> list[OpenShard]:
        """Open shards that can be leased again."""
        return [shard for shard in self.open.values() if shard.state is ShardState.FREE]

    def pending(self) -> Iterator[OpenShard]:
        """Open shards of which activations are still asked for."""
        return (shard for shard in self.open.values() if shard.is_pending)

    @property
    def oldest(self) -> int:
        """The first serial of which activations may still come: those of all serials below are here."""
        return next(
            (serial for serial, shard in self.open.items() if shard.state is not ShardState.RECEIVED), self.next_serial
        )

    @property
    def early_tokens(self) -> int:
        """Buffered tokens of shards after the oldest unfinished one."""
        oldest = self.oldest
        return sum(shard.buffered for serial, shard in self.open.items() if serial > oldest)

    @property
    def is_exhausted(self) -> bool:
        """No activation will come any more: the last epoch's shards are all received or quarantined."""
        return self._stream is not None and not self.has_fresh and not any(self.pending())

    def suspects(self) -> list[SuspectShard]:
        """Pending shards on which producer after producer was lost."""
        return [SuspectShard(one.epoch, one.shard, one.deaths) for one in self.pending() if one.is_suspect]

    def complete(self, shard: OpenShard, rows: int) -> None:
        """All `rows` activations of a shard are here."""
        shard.rows, shard.state, shard.deaths = rows, ShardState.RECEIVED, 0
        shard.reporters.clear()
        self.close_if_trained(shard)

    def mark_trained(self, serial: np.ndarray, position: np.ndarray) -> list[OpenShard]:
        """A step has consumed these activations; returns shards of which some were trained before or never received."""
        wrong = []
        for number in np.unique(serial).tolist():
            shard = self.open[number]
            positions = position[serial == number]
            if not shard.mark_trained(positions):
                wrong.append(shard)
            if shard.corpus is not None:
                self.tokens_by_corpus[shard.corpus] += len(positions)
            self.revisions.tokens[shard.revision] += len(positions)
            self.close_if_trained(shard)
        return wrong

    def close_if_trained(self, shard: OpenShard) -> None:
        """Forgets a shard after its last step. The bits of quarantined ones are kept, for `retry_quarantined`."""
        if shard.is_trained:
            shard.state = ShardState.TRAINED
            del self.open[shard.serial]
            self.trained_in_epoch += shard.epoch == self.epoch

    # Quarantine

    @property
    def quarantine(self) -> Quarantine:
        return Quarantine(tuple(self.quarantined), len(self.quarantined) / max(self.next_serial, 1))

    def set_quarantined(self, shard: OpenShard, report: FailureReport) -> QuarantinedShard:
        """Stops asking for a shard. What was received of it is still trained; the rest is listed."""
        received = count_bits(shard.mask)
        missing = None if report.rows is None else max(0, report.rows - received)
        entry = QuarantinedShard(shard.epoch, shard.shard, missing, report.reason)
        self.quarantined.append(entry)
        shard.rows, shard.state = received, ShardState.QUARANTINED
        shard.reporters.clear()
        return entry

    def forget_buffered(self, shard: OpenShard) -> None:
        """After a restart: what was buffered of a quarantined shard is not asked for again, and is missing too."""
        received = count_bits(shard.mask)
        lost, shard.rows = (shard.rows or 0) - received, received
        self.quarantined = [
            replace(entry, rows=entry.rows + lost)
            if (entry.epoch, entry.shard) == (shard.epoch, shard.shard) and entry.rows is not None
            else entry
            for entry in self.quarantined
        ]

    def retry_quarantined(self) -> int:
        """Frees the quarantined shards; how many these are.

        Those that stay listed were quarantined by an older release, which kept no bits of them.
        """
        shards = [shard for shard in self.open.values() if shard.state is ShardState.QUARANTINED]
        names = {(shard.epoch, shard.shard) for shard in shards}
        self.quarantined = [entry for entry in self.quarantined if (entry.epoch, entry.shard) not in names]
        for shard in shards:
            shard.state = ShardState.FREE
            shard.rows, shard.failures, shard.deaths, shard.setbacks = None, 0, 0, 0
            shard.retry_at = float("-inf")
        return len(shards)

    def counts(self) -> dict[ShardState, int]:
        """Shards of this epoch by state; open ones of the epoch before are among them."""
        states = Counter(shard.state for shard in self.open.values())
        return {
            ShardState.FREE: len(self._order) - self.cursor + states[ShardState.FREE],
            ShardState.LEASED: states[ShardState.LEASED],
            ShardState.RECEIVED: states[ShardState.RECEIVED],
            ShardState.TRAINED: self.trained_in_epoch,
            ShardState.QUARANTINED: len(self.quarantined),
        }


def epoch_order(stream: Hello, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch's training shards are leased: a function of seed and epoch.

    The shards of each corpus of a mixture are spread evenly, so that any part of the epoch has about its shares.
    """
    generator = np.random.default_rng((seed, epoch))
    if not stream.corpora:
        training = np.delete(np.arange(stream.shards), held_out_shards(stream.shards, stream.held_out))
        return generator.permutation(training)
    places = [(np.arange(corpus.shards) + generator.random()) / corpus.shards for corpus in stream.corpora]
    order = np.argsort(np.concatenate(places), kind="stable")
    firsts = np.cumsum([0, *(corpus.shards for corpus in stream.corpora)])
    shuffled = [
        first + generator.permutation(corpus.shards) for first, corpus in zip(firsts, stream.corpora, strict=False)
    ]
    return np.concatenate(shuffled)[order]


def corpus_of(stream: Hello, shard: int) -> str | None:
    """The name of the corpus that a shard of a mixture belongs to; None for one corpus alone."""
    end = 0
    for corpus in stream.corpora:
        end += corpus.shards
        if shard < end:
            return corpus.name
    return None


def count_bits(bits: np.ndarray) -> int:
    """How many of `bits` are set."""
    return int(np.count_nonzero(bits))
