"""Exactly once, whatever happens: the real ledger and the real buffer against an adversary that Hypothesis steers.

Producers behave, fall silent, repeat and lose messages, die, come back with old leases, or bring another corpus; the
trainer crashes and comes back with its last checkpoint, winds down or takes its leave; shards fail, and are tried
again. A model that shares no code with the ledger keeps the books from the messages alone, and the two are compared
after every step. However an example ended, healthy producers must then be able to finish the run, and every token of
every epoch be accounted for.

    SLUICE_HYPOTHESIS_STEPS=400 pytest tests/test_ledger_machine.py      # 400 examples of 400 steps, at random

By default 100 examples of 40 steps, the same each time: a few seconds.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from producer.wire import (
    Bye,
    Chunk,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Hook,
    Lease,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    decode,
    encode,
    held_out_shards,
    pack_bits,
    unpack_bits,
)
from tests.small_run import ledger_through_json
from trainer.state.format import LedgerState, ShardBits
from trainer.stream.buffer import Batch, ShuffleBuffer
from trainer.stream.ledger.credit import LEASES_PER_PRODUCER, CreditPolicy, FairCredit
from trainer.stream.ledger.failures import FAILURES_ALLOWED, MAX_BACKOFF
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.ledger.resume import ledger_state, restore_ledger
from trainer.stream.ledger.sessions import Send
from trainer.stream.ledger.shards import ShardState
from trainer.stream.ledger.totals import stream_report

SHARDS, HELD_OUT, CONTEXT, WIDTH = 5, 0.2, 4, 2
DEAD_SECONDS, STALL_SECONDS = 10.0, 5.0
PATIENCE = int(16 * MAX_BACKOFF * DEAD_SECONDS)
"""Rounds of half a second in which healthy producers must bring something: longer than any time-out, also when each of
four producers must fail on a shard, which rests after every try, before a failure counts."""

Name = tuple[int, int]
"""(epoch, shard)."""
Row = tuple[int, int, int]
"""(epoch, shard, position)."""


@dataclass(frozen=True)
class Shard:
    """Contents of a shard, and the fate of a producer that works on it."""

    kept: np.ndarray
    """Bool [windows, CONTEXT]: its rows."""
    outliers: np.ndarray
    """Bool [windows, CONTEXT]: those of its rows whose norm is too large."""
    fate: str = "sound"
    """Or: failing, unreadable (never worth a retry), deadly."""
    fate_window: int = 0
    """Where that happens."""

    def rows(self) -> set[int]:
        return set(np.flatnonzero(self.kept).tolist())


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    bits = draw(st.lists(st.tuples(st.integers(0, 15), st.sampled_from((0, 0, 0, 5, 15))), max_size=6))
    masks = np.array([[word >> place & 1 for place in range(CONTEXT)] for word, _ in bits], bool).reshape(-1, CONTEXT)
    large = np.array([[word >> place & 1 for place in range(CONTEXT)] for _, word in bits], bool).reshape(-1, CONTEXT)
    fate = draw(st.sampled_from(("sound",) * 9 + ("failing", "unreadable", "deadly")))
    return Shard(masks, masks & large, fate, draw(st.integers(0, 3)))


@dataclass
class Pipe:
    """One session's messages under way, first in first out, as a connection keeps them."""

    session: str
    up: deque[tuple[Message, torch.Tensor | None]] = field(default_factory=deque)
    down: deque[tuple[Message, bytes]] = field(default_factory=deque)


@dataclass
class Work:
    """A lease and how far its producer has come."""

    lease: Lease
    had: np.ndarray
    window: int = 0


class ModelProducer:
    """A producer as the protocol describes it, one action at a time."""

    def __init__(
        self, name: str, corpus: list[Shard], chunk_windows: int, chatty: bool, fingerprint: str, now: float
    ) -> None:
        self.name, self.corpus, self.chunk_windows, self.chatty = name, corpus, chunk_windows, chatty
        self.fingerprint = fingerprint
        self.alive = True
        self.wedged = False
        self.sessions = self.progress = 0
        self.last_message_at = now
        self.open_session()

    @property
    def healthy(self) -> bool:
        return self.alive and not self.wedged and self.fingerprint == "ours"

    def open_session(self) -> None:
        """Starts over: HELLO on a new connection. The old one's messages may still arrive."""
        self.sessions += 1
        self.pipe = Pipe(f"{self.name}.{self.sessions}")
        self.incarnation: str | None = None
        self.granted = self.sent = 0
        self.work: list[Work] = []
        hello = Hello(
            producer=self.name,
            session=self.pipe.session,
            name=self.name,
            fingerprint=self.fingerprint,
            shards=SHARDS,
            held_out=HELD_OUT,
            context=CONTEXT,
            hooks=[Hook(name="blocks.0.hook_resid_post", module="h.0", width=WIDTH)],
            dtype="float32",
            chunk_rows=self.chunk_windows * CONTEXT,
            norm_bounds=None,
            provenance={},
        )
        self.pipe.up.append((hello, None))

    def act(self, now: float) -> None:
        """Reads what has come, then does one thing: a chunk, the end of a shard, or a heartbeat."""
        if self.pipe.down:
            self.last_message_at = now
        self.read()
        if now - self.last_message_at > DEAD_SECONDS:
            self.last_message_at = now
            self.open_session()
        if not self.alive or self.incarnation is None:
            return
        if not self.work or self.wedged:
            return self.send(Heartbeat(progress=self.progress))
        work = self.work[0]
        shard = self.corpus[work.lease.shard]
        last = min(work.window + self.chunk_windows, len(shard.kept))
        if shard.fate != "sound" and last > min(shard.fate_window, len(shard.kept) - 1):
            self.fail(work, shard.fate)
        elif work.window == len(shard.kept):
            self.work.remove(work)
            self.send(ShardEnd(**name_of(work.lease), rows=int(shard.kept.sum())))
        elif self.sent == self.granted:
            self.send(Heartbeat(progress=self.progress))
        else:
            self.send_windows(work, shard, last)

    def fail(self, work: Work, fate: str) -> None:
        if fate == "deadly":
            self.alive = False
        else:
            self.work.remove(work)
            self.send(ShardFail(**name_of(work.lease), error="cannot be read", retry=fate == "failing"))

    def send_windows(self, work: Work, shard: Shard, last: int) -> None:
        part = slice(work.window, last)
        mask = shard.kept[part] & ~work.had[part]
        outliers = mask & shard.outliers[part]
        kept_mask = mask & ~outliers
        if mask.any() or self.chatty:
            self.sent += 1
            chunk = Chunk(
                **name_of(work.lease),
                number=self.sent,
                incarnation=self.incarnation or "",
                first_window=work.window,
                windows=last - work.window,
                rows=int(kept_mask.sum()),
                kept=pack_bits(kept_mask),
                outliers=pack_bits(outliers) if outliers.any() else b"",
            )
            self.send(chunk, activations(work.lease.shard, CONTEXT * work.window + np.flatnonzero(kept_mask)))
        work.window = last
        self.progress += 1

    def read(self) -> None:
        while self.pipe.down:
            message, payload = self.pipe.down.popleft()
            if isinstance(message, Welcome) and message.session == self.pipe.session:
                self.incarnation = message.incarnation
            elif isinstance(message, Lease):
                masks = self.corpus[message.shard].kept
                self.work.append(Work(message, unpack_bits(payload, masks.size).reshape(masks.shape)))
            elif isinstance(message, Credit):
                self.granted = max(self.granted, message.number)
            elif isinstance(message, Drain):
                self.send(Bye())
                self.open_session()
            elif isinstance(message, Reject) and message.retry:
                self.open_session()
            elif isinstance(message, Reject):
                self.alive = False

    def send(self, message: Message, x: torch.Tensor | None = None) -> None:
        self.pipe.up.append((message, x))


def name_of(lease: Lease) -> dict[str, int]:
    return {"shard": lease.shard, "epoch": lease.epoch, "attempt": lease.attempt}


def activations(shard: int, position: np.ndarray) -> torch.Tensor:
    """Activations [tokens, WIDTH] that hold their own names, so that a batch can be checked."""
    return torch.tensor([[shard, at] for at in position.tolist()], dtype=torch.float32).reshape(-1, WIDTH)


@dataclass
class Books:
    """The model's account of one lineage, saved and restored with a checkpoint."""

    had: dict[Name, set[int]] = field(default_factory=dict)
    trained: dict[Name, set[int]] = field(default_factory=dict)
    discarded: dict[Name, set[int]] = field(default_factory=dict)
    attempt: dict[Name, int] = field(default_factory=dict)
    quarantined: dict[Name, int | None] = field(default_factory=dict)
    """Tokens never received of each quarantined shard; None where their number is unknown."""
    served_shards: int = 0
    """Shards with rows that came whole."""
    reports: dict[Name, list[int]] = field(default_factory=dict)
    """For each time a shard was reported as broken, how many had been served by then."""
    hopeless: set[Name] = field(default_factory=set)
    """Those of which a producer said that another try is not worth it."""

    def restored(self) -> Books:
        """After a restart: what was buffered is missing again, and lost where its shard is quarantined."""
        books = deepcopy(self)
        for name, had in books.had.items():
            settled = books.trained.get(name, set()) | books.discarded.get(name, set())
            if name in books.quarantined:
                unsettled = len(had) - len(settled)
                if (missing := books.quarantined[name]) is not None:
                    books.quarantined[name] = missing + unsettled
            books.had[name] = settled
        return books


def move(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule that comes after a while in which nothing bad happens; without that, little would ever be got through."""

    def decorate(function: Callable[..., None]) -> Any:
        @wraps(function)
        def after_a_while(self: Stream, rounds: int, **arguments: Any) -> None:
            for _ in range(rounds):
                self.round()
            function(self, **arguments)

        del after_a_while.__wrapped__  # type: ignore[attr-defined]  # or Hypothesis sees the inner signature
        return rule(rounds=st.integers(0, 3), **strategies)(after_a_while)

    return decorate


class Stream(RuleBasedStateMachine):
    """The adversary's moves, the model's books, and what must hold after each move."""

    @initialize(
        corpus=st.lists(shards(), min_size=SHARDS, max_size=SHARDS),
        capacity=st.sampled_from((32, 37, 64)),
        epochs=st.sampled_from((1, 3, 9)),
    )
    def start(self, corpus: list[Shard], capacity: int, epochs: int) -> None:
        self.corpus = corpus
        self.limits = Limits(capacity, 0, epochs, 1.0, DEAD_SECONDS, STALL_SECONDS)
        self.now = 0.0
        self.starts = self.producer_count = 0
        self.producers: list[ModelProducer] = []
        self.zombies: list[Pipe] = []
        self.checkpoint: tuple[LedgerState, dict[int, ShardBits], Books] | None = None
        self.boot()
        self.add_producer()

    def policy(self) -> CreditPolicy:
        return FairCredit()

    def boot(self) -> None:
        """A new incarnation of the trainer, from the last checkpoint if there is one."""
        self.starts += 1
        self.ledger = Ledger(self.limits, "run", f"start-{self.starts}", ["tcp://here"], self.policy())
        self.buffer = ShuffleBuffer(self.limits.capacity, [WIDTH], torch.float32, seed=self.starts)
        self.books = Books()
        if self.checkpoint is not None:
            state, bits, books = self.checkpoint
            restore_ledger(self.ledger, state, bits)
            self.books = books.restored()
        self.batch: Batch | None = None
        self.serials: dict[int, Name] = {}
        self.credit_numbers: dict[str, int] = {}
        self.chunk_counts: Counter[str] = Counter()
        self.last_message_at: dict[str, float] = {}
        self.chunk_rows: dict[str, int] = {}
        self.holder: dict[Name, tuple[str, int]] = {}
        self.quarantine_count = len(self.ledger.shards.quarantined)
        self.tokens = 0
        self.has_left = False

    # The adversary's moves: producers

    @move(chunk_windows=st.integers(1, 2), chatty=st.booleans(), fingerprint=st.sampled_from(("ours", "theirs")))
    def join(self, chunk_windows: int, chatty: bool, fingerprint: str) -> None:
        """A producer joins; one of another corpus must be refused for good."""
        if len(self.producers) < 4:
            self.add_producer(chunk_windows, chatty, fingerprint)

    @move(which=st.integers(0, 99), times=st.integers(1, 6))
    def act(self, which: int, times: int) -> None:
        for _ in range(times):
            self.pick(which).act(self.now)

    @move(which=st.integers(0, 99), noticed=st.booleans(), politely=st.booleans())
    def kill(self, which: int, noticed: bool, politely: bool) -> None:
        """A producer goes. What it sent still arrives; the trainer's socket may or may not notice."""
        producer = self.pick(which)
        producer.alive = False
        if politely:
            producer.send(Bye())
        self.zombies.append(producer.pipe)
        if noticed:
            self.disconnect(producer.pipe.session)

    @move(which=st.integers(0, 99))
    def wedge(self, which: int) -> None:
        """A producer's GPU hangs, or recovers; its socket lives on."""
        producer = self.pick(which)
        producer.wedged = not producer.wedged

    @move(which=st.integers(0, 99))
    def reconnect(self, which: int) -> None:
        """The same process says HELLO again; its old connection's messages come later, or never."""
        producer = self.pick(which)
        if producer.alive:
            self.zombies.append(producer.pipe)
            producer.open_session()

    # The adversary's moves: the network

    @move(which=st.integers(0, 99), count=st.integers(1, 8))
    def deliver(self, which: int, count: int) -> None:
        pipe = self.pick_pipe(which)
        for _ in range(min(count, len(pipe.up))):
            self.receive(pipe, *pipe.up.popleft())

    @move(which=st.integers(0, 99), downwards=st.booleans())
    def lose(self, which: int, downwards: bool) -> None:
        pipe = self.pick_pipe(which)
        if queue := (pipe.down if downwards else pipe.up):
            queue.popleft()

    @move(which=st.integers(0, 99))
    def swallow(self, which: int) -> None:
        """What a producer says next is lost: perhaps a shard's last chunk, and only the shard's end tells of it."""
        producer = self.pick(which)
        before = len(producer.pipe.up)
        producer.act(self.now)
        if len(producer.pipe.up) > before:
            producer.pipe.up.pop()

    @move(which=st.integers(0, 99))
    def repeat(self, which: int) -> None:
        pipe = self.pick_pipe(which)
        if pipe.up:
            pipe.up.appendleft(pipe.up[0])

    @move(
        which=st.integers(0, 99),
        fault=st.sampled_from(("attempt", "duplicate", "gap", "incarnation", "session", "credit")),
    )
    def forge(self, which: int, fault: str) -> None:
        """A chunk that is right in all but one point."""
        names = sorted((name, *holder) for name, holder in self.holder.items())
        if not names:
            return
        (epoch, shard), session, attempt = names[which % len(names)]
        others = [one for one in self.credit_numbers if one != session]
        had = sorted(self.books.had.get((epoch, shard), set()))
        free = [at for at in range(4 * CONTEXT) if at not in had]
        at = (had if fault == "duplicate" else free or [0])[:1]
        if not at or (fault == "session" and not others):
            return
        sender = others[0] if fault == "session" else session
        if fault == "credit" and self.chunk_counts[sender] < self.credit_numbers[sender]:
            return
        mask = np.arange(CONTEXT) == at[0] % CONTEXT
        chunk = Chunk(
            number=self.chunk_counts[sender] + (2 if fault == "gap" else 1),
            incarnation=self.ledger.incarnation + ("?" if fault == "incarnation" else ""),
            shard=shard,
            epoch=epoch,
            attempt=attempt - (fault == "attempt"),
            first_window=at[0] // CONTEXT,
            windows=1,
            rows=1,
            kept=pack_bits(mask),
            outliers=b"",
        )
        before = self.buffer.used_slots
        self.receive(Pipe(sender), chunk, activations(shard, np.array(at)))
        assert self.buffer.used_slots == before, f"a chunk with a wrong {fault} was taken"

    # The adversary's moves: time and the trainer

    @move(mended=st.booleans())
    def retry(self, mended: bool) -> None:
        """`ctl retry-quarantined`, perhaps after what was wrong with the shards is mended."""
        if mended:
            for _, shard in self.books.quarantined:
                self.corpus[shard] = replace(self.corpus[shard], fate="sound")
        assert self.ledger.retry_quarantined() == len(self.books.quarantined)
        for name in self.books.quarantined:
            self.books.reports.pop(name, None)
            self.books.hopeless.discard(name)
        self.books.quarantined.clear()
        self.quarantine_count = 0

    @move(seconds=st.sampled_from((0.5, 0.5, 1.0, 6.0, DEAD_SECONDS + 1, 2.0)))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.tick_ledger()

    @move()
    def nothing(self) -> None:
        """Not every move does harm."""

    @move(count=st.integers(1, 24))
    def take(self, count: int) -> None:
        """A batch is drawn, however little there is; its step is done in the next round, or never."""
        if self.batch is None and self.buffer.rows:
            self.draw(count)

    @move()
    def save(self) -> None:
        """A checkpoint, between two steps."""
        self.write_checkpoint()

    @move()
    def crash(self) -> None:
        """The trainer dies and starts again. What was under way to it arrives at its successor."""
        self.boot()

    @move()
    def wind_down(self) -> None:
        """`ctl drain`: nothing more is leased or granted, and what was is used up. Only a new start undoes it."""
        self.ledger.wind_down()

    @move(everybody_hears=st.booleans())
    def leave(self, everybody_hears: bool) -> None:
        """SIGTERM: a checkpoint, DRAIN to everybody, and the next start goes on from there."""
        self.stop(everybody_hears)

    def stop(self, everybody_hears: bool) -> None:
        self.write_checkpoint()
        sends = self.ledger.drain(finished=False)
        assert {send.session for send in sends} == set(self.credit_numbers)
        self.has_left = True
        if everybody_hears:
            self.dispatch(sends)
        self.tick_ledger()
        self.boot()

    def write_checkpoint(self) -> None:
        self.step()
        state, bits = ledger_state(self.ledger)
        self.checkpoint = (ledger_through_json(state), deepcopy(bits), deepcopy(self.books))

    # What must hold after each move

    @invariant()
    def check(self) -> None:
        self.check_memory_bound()
        self.check_token_counts()
        self.check_bits()
        self.check_leases()
        self.check_quarantine()
        self.check_report()
        self.check_end()

    def check_memory_bound(self) -> None:
        """Tokens in memory and tokens under credit never exceed the buffer."""
        waiting = sum(
            self.chunk_rows[one] * (self.credit_numbers[one] - self.chunk_counts[one]) for one in self.credit_numbers
        )
        assert waiting == self.ledger.tokens_credited
        assert self.in_memory() + waiting <= self.limits.capacity

    def check_token_counts(self) -> None:
        trained_count = sum(map(len, self.books.trained.values()))
        assert self.ledger.tokens_trained == trained_count
        assert self.ledger.tokens_received == self.in_memory() + trained_count
        assert self.ledger.tokens_dropped == sum(map(len, self.books.discarded.values()))
        assert self.ledger.tokens_trained >= self.tokens
        self.tokens = self.ledger.tokens_trained

    def check_bits(self) -> None:
        """The ledger's bits are the model's sets, for every open shard; a closed one has all its tokens trained."""
        open_names = set()
        for shard in self.ledger.shards.open.values():
            name = (shard.epoch, shard.shard)
            open_names.add(name)
            for bits, model in (
                (shard.mask, self.books.had),
                (shard.trained, self.books.trained),
                (shard.dropped, self.books.discarded),
            ):
                assert set(np.flatnonzero(bits).tolist()) == model.get(name, set())
            if shard.state is ShardState.RECEIVED:
                assert self.books.had.get(name, set()) == self.corpus[shard.shard].rows(), (
                    "a shard without all its rows"
                )
        assert len(open_names) == len(self.ledger.shards.open)
        for name, had in self.books.had.items():
            if name not in open_names:
                assert had == self.books.trained.get(name, set()) | self.books.discarded.get(name, set())
                assert name in self.books.quarantined or had == self.corpus[name[1]].rows()

    def check_leases(self) -> None:
        """A leased shard has one holder, who is here; whatever a session held is free when it ends."""
        assert set(self.ledger.sessions) == set(self.credit_numbers)
        leases = {
            (shard.epoch, shard.shard): (shard.holder, shard.attempt)
            for shard in self.ledger.shards.open.values()
            if shard.holder is not None
        }
        assert leases == self.holder
        for name, session in self.ledger.sessions.items():
            assert len(session.leases) <= LEASES_PER_PRODUCER
            assert all(shard.holder == name and shard.state is ShardState.LEASED for shard in session.leases)
        assert sum(len(session.leases) for session in self.ledger.sessions.values()) == len(leases)

    def check_quarantine(self) -> None:
        quarantined = {(entry.epoch, entry.shard): entry.rows for entry in self.ledger.shards.quarantined}
        assert quarantined == self.books.quarantined and len(quarantined) == len(self.ledger.shards.quarantined)

    def check_report(self) -> None:
        report = stream_report(self.ledger)
        assert report.credit_rows_outstanding == self.ledger.tokens_credited
        assert sum(report.producers.values()) == len(self.credit_numbers)
        assert report.leases["leased"] == len(self.holder)
        if (
            all(shard.epoch == self.ledger.shards.epoch for shard in self.ledger.shards.open.values())
            and self.ledger.identity.hello
        ):
            quarantined = sum(epoch == self.ledger.shards.epoch for epoch, _ in self.books.quarantined)
            others = sum(count for state, count in report.leases.items() if state != "set_aside")
            assert others + quarantined == SHARDS - len(held_out_shards(SHARDS, HELD_OUT))

    def check_end(self) -> None:
        """The data is exhausted when each token of each epoch has come, or its shard was given up."""
        if self.ledger.shards.is_exhausted:
            for name in self.all_shards():
                assert name in self.books.quarantined or self.books.had.get(name, set()) == self.corpus[name[1]].rows()

    def all_shards(self) -> list[Name]:
        """Of every epoch, without the held-out ones."""
        shards = set(range(SHARDS)) - set(held_out_shards(SHARDS, HELD_OUT))
        # An epoch in which nothing could be served is the last.
        barren = all((self.ledger.shards.epoch, shard) in self.books.quarantined for shard in shards)
        epochs = self.ledger.shards.epoch + 1 if barren else self.limits.epochs or 0
        return [(epoch, shard) for epoch in range(epochs) for shard in shards]

    def teardown(self) -> None:
        """From wherever the example ended, healthy producers finish the run, and the books balance."""
        if sys.exc_info()[0] is None and hasattr(self, "ledger"):
            self.finish()
            self.balance()

    def finish(self) -> None:
        idle_rounds = 0
        # On a deadly shard the run waits for ever: somebody mends it.
        self.corpus[:] = [replace(shard, fate="sound") if shard.fate == "deadly" else shard for shard in self.corpus]
        while not self.is_over():
            if not self.ledger.phase.is_receiving and self.in_memory() == 0:
                self.stop(everybody_hears=True)
            before = self.progress_made()
            if not any(producer.healthy for producer in self.producers):
                self.add_producer(chatty=True)
            self.round()
            self.check_memory_bound()
            self.check_leases()
            idle_rounds = 0 if self.progress_made() > before else idle_rounds + 1
            assert idle_rounds < PATIENCE, "healthy producers bring the run no further"

    def is_over(self) -> bool:
        return self.ledger.shards.is_exhausted and self.in_memory() == 0

    def progress_made(self) -> tuple[int, ...]:
        """Grows with whatever brings the end nearer."""
        ledger, books = self.ledger, self.books
        closed_shards = (
            sum(not shard.is_pending for shard in ledger.shards.open.values())
            + ledger.shards.next_serial
            - len(ledger.shards.open)
        )
        failures = sum(shard.failures for shard in ledger.shards.open.values())
        return (
            ledger.tokens_received + ledger.tokens_dropped,
            ledger.tokens_trained,
            closed_shards,
            len(books.quarantined),
            failures,
        )

    def balance(self) -> None:
        """Every token of every epoch is trained once, discarded by name, or in a shard that is listed as given up."""
        self.check()
        assert all(shard.state is ShardState.QUARANTINED for shard in self.ledger.shards.open.values())
        for name in self.all_shards():
            content, trained_rows = self.corpus[name[1]], self.books.trained.get(name, set())
            discarded = self.books.discarded.get(name, set())
            missing = content.rows() - trained_rows - discarded
            assert not trained_rows & discarded and trained_rows | discarded <= content.rows()
            assert discarded <= set(np.flatnonzero(content.outliers).tolist())
            assert not trained_rows & set(np.flatnonzero(content.outliers).tolist())
            if name not in self.books.quarantined:
                assert not missing, f"rows of {name} were forgotten"
            elif self.books.quarantined[name] is not None:
                assert self.books.quarantined[name] == len(missing)

    # The trainer's loop

    def draw(self, count: int) -> None:
        self.batch = self.buffer.draw(min(count, self.buffer.rows))
        names = [[self.serials[serial][1], at] for serial, at in self.names_in_batch()]
        expected = torch.tensor(names, dtype=torch.float32)
        assert torch.equal(self.batch.x[0], expected), "a row came out of the buffer under another name"

    def step(self) -> None:
        """The step whose batch is in hand is done: its tokens are trained."""
        if self.batch is None:
            return
        for serial, at in self.names_in_batch():
            trained_rows = self.books.trained.setdefault(self.serials[serial], set())
            assert at not in trained_rows, "a row was trained twice"
            trained_rows.add(at)
        self.ledger.mark_trained(self.batch.serial, self.batch.position)
        self.batch = None

    def names_in_batch(self) -> list[tuple[int, int]]:
        assert self.batch is not None
        return list(zip(self.batch.serial.tolist(), self.batch.position.tolist(), strict=True))

    # The model's bookkeeping, from messages alone

    def receive(self, pipe: Pipe, message: Message, x: torch.Tensor | None) -> None:
        """One message reaches the trainer, which does as `intake` does."""
        session, message = pipe.session, decode(encode(message))
        self.last_message_at[session] = self.now
        if isinstance(message, Hello):
            return self.receive_hello(message)
        if session not in self.ledger.sessions:
            return self.dispatch([Send(session, Reject(code="unknown_session", reason="ended", retry=True))])
        if isinstance(message, Chunk):
            assert x is not None
            return self.receive_chunk(session, message, x)
        if isinstance(message, ShardEnd | ShardFail):
            if self.holder.get((message.epoch, message.shard)) == (session, message.attempt):
                del self.holder[message.epoch, message.shard]
                self.record_end((message.epoch, message.shard), message)
            method = self.ledger.shard_end if isinstance(message, ShardEnd) else self.ledger.shard_fail
            self.dispatch(method(session, message, self.now))  # type: ignore[arg-type]
        elif isinstance(message, Heartbeat):
            self.dispatch(self.ledger.heartbeat(session, message, self.now))
        elif isinstance(message, Bye):
            self.forget(session)
            self.dispatch(self.ledger.bye(session, message, self.now))

    def receive_hello(self, hello: Hello) -> None:
        if not self.ledger.identity.is_settled and hello.fingerprint != "ours":
            return  # it would rightly become this run's corpus
        for session in [one for one in self.credit_numbers if one.split(".")[0] == hello.producer]:
            self.forget(session)
        sends = self.ledger.hello(hello, self.now)
        if hello.fingerprint == "ours":
            assert [type(send.message) for send in sends] == [Welcome]
            self.credit_numbers[hello.session], self.chunk_rows[hello.session] = 0, hello.chunk_rows
            self.chunk_counts[hello.session] = 0
        else:
            assert [(send.message.code, send.message.retry) for send in sends] == [("mismatch", False)]  # type: ignore[attr-defined]
        self.dispatch(sends)

    def receive_chunk(self, session: str, chunk: Chunk, x: torch.Tensor) -> None:
        """The ledger must take the chunk exactly when the model would."""
        name, rejected = (chunk.epoch, chunk.shard), sum(self.ledger.rejected.values())
        at = chunk.first_window * CONTEXT
        mask, outliers = (
            set((at + np.flatnonzero(unpack_bits(bits, chunk.windows * CONTEXT))).tolist())
            for bits in (chunk.kept, chunk.outliers)
        )
        had = self.books.had.setdefault(name, set())
        in_turn = chunk.number == self.chunk_counts[session] + 1 and chunk.number <= self.credit_numbers[session]
        in_session = in_turn and chunk.incarnation == self.ledger.incarnation
        leased = self.holder.get(name) == (session, chunk.attempt)
        fits = not had & (mask | outliers) and self.may_receive(name, chunk)
        accepted, sends = self.ledger.chunk(session, chunk, x.nbytes, self.now)
        assert (accepted is not None) == (in_session and leased and fits), "fenced wrongly"
        assert (session in self.ledger.sessions) == (in_session and (not leased or accepted is not None))
        self.chunk_counts[session] += in_session
        self.dispatch(sends)
        if accepted is None:
            assert sum(self.ledger.rejected.values()) == rejected + chunk.rows, "rows vanished without being counted"
            return
        assert self.serials.setdefault(accepted.serial, name) == name
        assert accepted.position.tolist() == sorted(mask)
        self.buffer.insert([x], accepted.serial, accepted.position)
        had |= mask | outliers
        self.books.discarded.setdefault(name, set()).update(outliers)

    def may_receive(self, name: Name, chunk: Chunk) -> bool:
        """Tokens may come in any order."""
        return True

    def dispatch(self, sends: list[Send]) -> None:
        """Notes what the trainer says, and puts it on its way."""
        pipes = {producer.pipe.session: producer.pipe for producer in self.producers}
        for send in sends:
            message = decode(encode(send.message))
            assert not (isinstance(message, Lease | Credit) and (self.has_left or self.ledger.is_winding_down))
            if isinstance(message, Lease):
                name = (message.epoch, message.shard)
                assert name not in self.holder and name not in self.books.quarantined
                assert message.attempt > self.books.attempt.get(name, 0), "an attempt was used twice"
                had = np.flatnonzero(unpack_bits(send.payload or b"", 8 * len(send.payload or b""))).tolist()
                assert set(had) == self.books.had.get(name, set()), "the lease's mask is wrong"
                self.holder[name], self.books.attempt[name] = (send.session, message.attempt), message.attempt
            elif isinstance(message, Credit):
                assert message.number > self.credit_numbers[send.session], "credit fell"
                self.credit_numbers[send.session] = message.number
            elif isinstance(message, Reject):
                at_work = [name for name, holder in self.holder.items() if holder[0] == send.session][:1]
                for name in at_work if message.code == "stalled" else []:
                    self.books.reports.setdefault(name, []).append(self.books.served_shards)
                self.forget(send.session)
            if send.session in pipes:
                pipes[send.session].down.append((message, send.payload or b""))
        self.record_quarantine()

    def record_quarantine(self) -> None:
        """A shard given up is listed with the number of its tokens that never came, where that can be known."""
        for entry in self.ledger.shards.quarantined[self.quarantine_count :]:
            name = (entry.epoch, entry.shard)
            missing = len(self.corpus[name[1]].rows() - self.books.had.get(name, set()))
            assert entry.rows in (None, missing)
            self.is_proven_broken(name)
            self.books.quarantined[name] = entry.rows
        self.quarantine_count = len(self.ledger.shards.quarantined)

    def record_end(self, name: Name, message: ShardEnd | ShardFail) -> None:
        """Whoever has a shard ends it: it came whole, or that counts as a report that it is broken."""
        had = self.books.had.get(name, set())
        if isinstance(message, ShardEnd) and message.rows == len(had) > 0:
            self.books.served_shards += 1
            return
        self.books.reports.setdefault(name, []).append(self.books.served_shards)
        if isinstance(message, ShardFail) and not message.retry:
            self.books.hopeless.add(name)

    def is_proven_broken(self, name: Name) -> None:
        """A shard is quarantined for what was said of it, and only once others were served, or none was left."""
        reports = self.books.reports.get(name, [])
        assert len(reports) >= (1 if name in self.books.hopeless else FAILURES_ALLOWED), "deaths count"
        has_served = self.books.served_shards > reports[0]
        assert has_served or not self.has_other_shards(name), "a shard was quarantined before others were served"

    def has_other_shards(self, name: Name) -> bool:
        """Whether a producer could show by another shard that it is sound."""
        others = [shard for shard in self.ledger.shards.open.values() if (shard.epoch, shard.shard) != name]
        return self.ledger.shards.has_fresh_in_epoch or any(
            shard.is_pending and not shard.deaths and (shard.epoch, shard.shard) not in self.books.reports
            for shard in others
        )

    def disconnect(self, session: str) -> None:
        self.forget(session)
        self.ledger.disconnect(session)
        self.record_quarantine()

    def forget(self, session: str) -> None:
        self.credit_numbers.pop(session, None)
        self.holder = {name: holder for name, holder in self.holder.items() if holder[0] != session}

    def round(self) -> None:
        """Half a second in which everyone does one thing, a little of what was sent arrives, and a step is made."""
        for producer in self.producers:
            producer.act(self.now)
            for _ in range(min(2, len(producer.pipe.up))):
                self.receive(producer.pipe, *producer.pipe.up.popleft())
            if not producer.alive:
                self.disconnect(producer.pipe.session)
        self.producers = [producer for producer in self.producers if producer.alive]
        self.now += 0.5
        self.tick_ledger()
        self.step()
        if self.may_draw():
            self.draw(self.buffer.capacity // 4)

    def may_draw(self) -> bool:
        """As the real loop does: batches while the buffer is half full, the rest once no more will come."""
        return self.buffer.rows >= (self.buffer.capacity // 2 if self.ledger.phase.is_receiving else 1)

    def tick_ledger(self) -> None:
        """Time passes, and nobody stays who has been silent for too long."""
        self.dispatch(self.ledger.tick(self.now))
        assert all(self.now - self.last_message_at[session] <= DEAD_SECONDS for session in self.credit_numbers)

    def in_memory(self) -> int:
        return self.buffer.used_slots + (len(self.batch.serial) if self.batch else 0)

    def add_producer(self, chunk_windows: int = 2, chatty: bool = False, fingerprint: str = "ours") -> None:
        self.producer_count += 1
        name = f"p{self.producer_count}"
        self.producers.append(ModelProducer(name, self.corpus, chunk_windows, chatty, fingerprint, self.now))

    def pick(self, which: int) -> ModelProducer:
        if not self.producers:
            self.add_producer(chatty=True)
        return self.producers[which % len(self.producers)]

    def pick_pipe(self, which: int) -> Pipe:
        pipes = [self.pick(0).pipe, *(producer.pipe for producer in self.producers[1:]), *self.zombies]
        return pipes[which % len(pipes)]


STEPS = int(os.environ.get("SLUICE_HYPOTHESIS_STEPS", "0"))

Stream.TestCase.settings = settings(
    max_examples=STEPS or 100,
    stateful_step_count=STEPS or 40,
    derandomize=not STEPS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TestStream = Stream.TestCase
