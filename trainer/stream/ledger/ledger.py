"""The ledger of a run, as a pure state machine: which shard is leased to whom, and which activations are trained.

Events go in (a producer says hello, a chunk arrives, a batch was trained, time passes), messages to send come out.
No sockets, threads or torch; the clock is an argument. Every activation of the corpus has a name, (epoch, shard,
position), and each ends up in exactly one place:

    missing ──chunk──▶ buffered ──step──▶ trained
       └─────outlier──▶ dropped       └─ quarantined, with its shard, after failures

Four counters fence what is late: a lease's `attempt`, a session's chunk `number`, the trainer's `incarnation`, and
absolute `credit`; all only grow. Memory is bounded by one rule: tokens buffered plus tokens that producers may still
send never exceed the buffer's capacity.

A checkpoint keeps, per open shard, one bit per position for *trained* and one for *dropped*; see `resume`. Activations
that were buffered and not trained are leased again after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from producer.wire import (
    MAX_CHUNK_BYTES,
    Bye,
    Chunk,
    Drain,
    Heartbeat,
    Hello,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    unpack_bits,
)
from trainer.stream.ledger.admission import admission_fault
from trainer.stream.ledger.credit import CreditPolicy, FairCredit
from trainer.stream.ledger.failures import Failures
from trainer.stream.ledger.identity import StreamIdentity
from trainer.stream.ledger.invariants import Invariants
from trainer.stream.ledger.phase import StreamPhase
from trainer.stream.ledger.revisions import Revisions
from trainer.stream.ledger.sessions import Send, Session
from trainer.stream.ledger.shards import FailureReport, Quarantine, ShardQueue, count_bits


@dataclass(frozen=True)
class Limits:
    """The run's settings of the stream."""

    capacity: int
    """Tokens that the buffer holds."""
    seed: int
    epochs: int | None
    heartbeat_seconds: float
    dead_seconds: float
    stall_seconds: float
    expected: dict[str, Any] = field(default_factory=dict)
    """Facts of the stream in the trainer's own run file: `hooks` (names), dtype, context, held_out."""
    revisions: tuple[str, ...] = ()
    """model.revisions: one for each epoch."""
    watches_checkpoints: bool = False
    """model.watch is set: producers say which checkpoint of the language model is the newest."""


@dataclass(frozen=True)
class AcceptedChunk:
    """A chunk whose activations go into the buffer."""

    serial: int
    """Serial of its shard."""
    position: np.ndarray
    """Position of each activation, int64 [activations], in payload order."""


Insert = Callable[[AcceptedChunk], None]
"""Puts the activations of an accepted chunk into the buffer."""


class Ledger:
    """See the module's docstring. Every method is called with a lock held by the owner.

    The owner lets in only events of sessions that are in `sessions`, and turns unknown peers away itself.
    """

    def __init__(
        self, limits: Limits, run: str, incarnation: str, endpoints: list[str], policy: CreditPolicy | None = None
    ) -> None:
        """`policy` says who is leased and granted what: `FairCredit`, or in deterministic mode `OrderedCredit`."""
        self.limits = limits
        self.policy = policy or FairCredit()
        self.run = run
        self.incarnation = incarnation
        self.endpoints = endpoints
        self.identity = StreamIdentity(limits.expected, self.policy.fixed_chunks)
        self.sessions: dict[str, Session] = {}
        self.shards = ShardQueue(limits.seed, limits.epochs, Revisions(limits.revisions, limits.watches_checkpoints))
        self.failures = Failures(self.shards, self.sessions, limits.dead_seconds, self.policy.counts_reports_at_once)
        self.tokens_received = self.tokens_trained = self.tokens_dropped = 0
        self.sessions_lost = self.auth_failures = 0
        self.rejected: Counter[str] = Counter()
        """Tokens that arrived and were not taken, by reason."""
        self.errors: Counter[str] = Counter()
        """Messages that could not be used, by kind of fault."""
        self.invariants = Invariants()
        self.is_winding_down = False
        self._steps = 0
        self._drain: Drain | None = None
        """The message of this trainer's end, once it is sent; producers that come later get it too."""

    # What the owner asks

    @property
    def tokens_buffered(self) -> int:
        return self.tokens_received - self.tokens_trained

    @property
    def tokens_credited(self) -> int:
        """Tokens that producers may still send."""
        return sum(session.credit_tokens for session in self.sessions.values())

    @property
    def _room(self) -> int:
        return self.limits.capacity - self.tokens_buffered - self.tokens_credited

    @property
    def phase(self) -> StreamPhase:
        """The one answer to what may still come."""
        has_gap = self.policy.quarantine_ends_run and self.shards.quarantined
        if self.shards.is_exhausted and not has_gap:
            return StreamPhase.DRAINING if self.tokens_buffered else StreamPhase.EXHAUSTED
        if not self.is_winding_down:
            return StreamPhase.OPEN
        if any(session.leases and session.credit_tokens for session in self.sessions.values()):
            return StreamPhase.WINDING_DOWN
        return StreamPhase.DRAINING if self.tokens_buffered else StreamPhase.WOUND_DOWN

    @property
    def quarantine(self) -> Quarantine:
        return self.shards.quarantine

    # Events: each returns the messages to send

    def hello(self, hello: Hello, now: float) -> list[Send]:
        """A producer introduces itself; an older session of the same process, or of the same name, ends."""
        for name, session in list(self.sessions.items()):
            if session.hello.producer == hello.producer or name == hello.session:
                self._end(name, died=False)
        if reject := admission_fault(hello, self.identity, self.sessions, self.limits.capacity):
            self.errors[f"refused_{reject.code}"] += 1
            return [Send(hello.session, reject)]
        if self.identity.is_new(hello):
            self.identity.adopt(hello)
            self.shards.begin(hello)
        elif not self.identity.is_settled and not self.sessions:
            # Bounds and provenance of a producer that has left without an activation decide nothing.
            self.identity.adopt(hello)
        self.sessions[hello.session] = Session(hello, last_heard=now, last_progress=now)
        self._note_revision(hello.revision, hello.revision_number)
        welcome = Welcome(
            session=hello.session,
            run=self.run,
            incarnation=self.incarnation,
            endpoints=self.endpoints,
            heartbeat_seconds=self.limits.heartbeat_seconds,
            dead_seconds=self.limits.dead_seconds,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            norm_bounds=self.identity.norm_bounds,
        )
        drain = [Send(hello.session, self._drain)] if self._drain is not None else []
        return [Send(hello.session, welcome), *drain]

    def chunk(
        self, session: str, chunk: Chunk, payload_bytes: int, now: float, insert: Insert = lambda accepted: None
    ) -> tuple[AcceptedChunk | None, list[Send]]:
        """A chunk arrived. If it is accepted, `insert` has put its activations into the buffer.

        Nothing of them is counted before that, so that an exception of `insert` leaves them missing.
        """
        sender = self.sessions[session]
        sender.last_heard = sender.last_progress = now
        if fault := sender.chunk_fault(chunk, payload_bytes, self.incarnation, self.shards.forgotten_hooks):
            return None, self.reject(session, fault.code, fault.reason, rows=chunk.rows)
        sender.received = chunk.number
        shard = sender.lease_of(chunk)
        if shard is None:
            self.rejected["fenced"] += chunk.rows
            return None, []
        start, count = chunk.first_window * sender.hello.context, chunk.windows * sender.hello.context
        rows, outliers = unpack_bits(chunk.kept, count), unpack_bits(chunk.outliers, count)
        if shard.has_any(start, rows, outliers):
            return None, self.reject(session, "duplicate", "chunk repeats activations", rows=chunk.rows)
        if fault := self.policy.order_fault(sender, shard, chunk, self.shards):
            return None, self.reject(session, fault.code, fault.reason, rows=chunk.rows)
        accepted = AcceptedChunk(shard.serial, start + np.flatnonzero(rows))
        insert(accepted)
        shard.receive(start, rows, outliers)
        self.tokens_dropped += count_bits(outliers)
        self.tokens_received += chunk.rows
        self.identity.is_settled |= shard.has_progress
        return accepted, []

    def shard_end(self, session: str, end: ShardEnd, now: float) -> list[Send]:
        """A producer has been through its shard; all activations must be here."""
        sender = self.sessions[session]
        sender.last_heard = sender.last_progress = now
        shard = sender.lease_of(end)
        if shard is None:
            return []
        sender.release(shard)
        received, producer = count_bits(shard.mask), sender.hello.producer
        if received != end.rows:
            code, reason = "short_shard", f"{received} activations arrived, the producer counts {end.rows}"
        elif not received:
            # Text of which nothing is kept is rare, and a producer that skips its work looks the same.
            code, reason = "empty_shard", "no activation of it is kept"
        else:
            if end.norm_bounds is not None and len(end.norm_bounds) == len(sender.hello.hooks):
                self.shards.revisions.bounds.setdefault(shard.revision, end.norm_bounds)
            self.shards.complete(shard, end.rows)
            self.failures.confirm_reports(producer)
            return []
        self.errors[code] += 1
        self.failures.record_report(shard, producer, FailureReport(reason, end.rows))
        return []

    def shard_fail(self, session: str, fail: ShardFail, now: float) -> list[Send]:
        """A producer could not read or run its shard."""
        sender = self.sessions[session]
        sender.last_heard = sender.last_progress = now
        if shard := sender.lease_of(fail):
            sender.release(shard)
            report = FailureReport(fail.error, is_final=not fail.retry)
            self.failures.record_report(shard, sender.hello.producer, report)
        return []

    def heartbeat(self, session: str, beat: Heartbeat, now: float) -> list[Send]:
        """A producer lives, and says how far it is."""
        self.sessions[session].hear_heartbeat(beat.progress, now)
        self._note_revision(beat.revision, beat.revision_number)
        return []

    def bye(self, session: str, bye: Bye, now: float) -> list[Send]:
        """A producer leaves, and gives its leases back."""
        self._end(session, died=False)
        return []

    def disconnect(self, session: str) -> None:
        """The connection of a producer is gone."""
        if session in self.sessions:
            self.sessions_lost += 1
            self._end(session, died=True)

    def reject(
        self, session: str, code: str, reason: str, rows: int = 0, blames_shard: bool = False, retry: bool = True
    ) -> list[Send]:
        """Ends a session for a fault of its own. `blames_shard`: its shard counts as reported with that reason."""
        self.errors[code] += 1
        if rows:
            self.rejected[code] += rows
        sender = self.sessions[session]
        shards = sender.leases[:1] if blames_shard else []
        self.sessions_lost += 1
        self._end(session, died=not blames_shard)
        for shard in shards:
            self.failures.record_report(shard, sender.hello.producer, FailureReport(reason))
        return [Send(session, Reject(code=code, reason=reason, retry=retry))]

    def mark_trained(self, serial: np.ndarray, position: np.ndarray) -> None:
        """A step has consumed these activations, named by int64 [batch] each."""
        for shard in self.shards.mark_trained(serial, position):
            self.invariants.violate("trained_once", f"tokens of {shard} are trained twice, or were never received")
        self.tokens_trained += len(serial)
        self._steps += 1

    def audit(self, in_buffer: int) -> list[str]:
        """Violations of invariants since the last audit, in sentences; `in_buffer` tokens are in the real buffer."""
        self.invariants.check_memory(self.tokens_buffered, self.tokens_credited, self.limits.capacity)
        self.invariants.check_buffer(in_buffer, self.tokens_buffered)
        return self.invariants.pop_sentences()

    def retry_quarantined(self) -> int:
        """Leases quarantined shards again, for the activations that they lack; how many these are."""
        return self.shards.retry_quarantined()

    def wind_down(self) -> None:
        """Leases and grants nothing more. What producers may still send under their credit is taken in."""
        self.is_winding_down = True

    def drain(self, finished: bool) -> list[Send]:
        """The run is over, or this trainer is leaving: nothing more is leased."""
        self._drain = Drain(finished=finished)
        return [Send(session, self._drain) for session in self.sessions]

    def tick(self, now: float) -> list[Send]:
        """Time passes: silent sessions end, shards are leased, credit is granted, heartbeats are sent."""
        self.failures.now = now
        sends = self._reject_silent(now)
        if self._drain is None and not self.is_winding_down:
            sends += self.policy.assign(self.shards, self.sessions, now)
            sends += self._end_all(self.policy.make_way(self._room, self.shards, self.sessions, now))
            sends += self._end_all(self.policy.reclaim(self._room, self.sessions))
            sends += self.policy.grant(self._room, self.shards, self.sessions, now)
            self.failures.notice_if_stuck()
        for name, session in self.sessions.items():
            if now - session.last_heartbeat >= self.limits.heartbeat_seconds:
                session.last_heartbeat = now
                sends.append(Send(name, Heartbeat(progress=self._steps)))
        return sends

    # Inside

    def _note_revision(self, name: str, number: int) -> None:
        """A producer sees this checkpoint of the language model."""
        if self.shards.revisions.report(name, number):
            self.failures.add_notice(
                f"shards are leased with checkpoint {name} of the language model from now on, at "
                f"{self.tokens_trained:,} tokens"
            )

    def _reject_silent(self, now: float) -> list[Send]:
        sends = []
        for name, session in list(self.sessions.items()):
            if now - session.last_heard > self.limits.dead_seconds:
                sends += self.reject(name, "silent", f"nothing heard for {self.limits.dead_seconds:g} s")
            elif session.has_stalled(now, self.limits.stall_seconds):
                reason = f"no progress for {self.limits.stall_seconds:g} s in spite of credit"
                sends += self.reject(name, "stalled", reason, blames_shard=True)
        return sends

    def _end_all(self, sends: list[Send]) -> list[Send]:
        """Ends the sessions that these messages are for."""
        for send in sends:
            self._end(send.session, died=False)
        return sends

    def _end(self, session: str, died: bool) -> None:
        """Forgets a session: its leases and its credit return. `died`: its producer was lost, maybe for its shard."""
        shard = self.sessions.pop(session).release_all()
        if died and shard is not None and not shard.has_progress:
            self.failures.record_death(shard)
