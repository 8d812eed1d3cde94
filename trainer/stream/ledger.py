"""Who works on what, and what is trained: the truth of a run, as a pure state machine.

Events go in (a producer says hello, a chunk arrives, rows were trained, time passes), messages to send come out.
No sockets, threads or torch; the clock is an argument. Every row of the corpus has a name, (epoch, shard, position),
and each ends up in exactly one place:

    missing ──chunk──▶ buffered ──step──▶ trained
       └─────outlier──▶ discarded      └─ quarantined, with its shard, after failures

Four counters fence what is late: a lease's `attempt`, a session's chunk `number`, the trainer's `incarnation`, and
absolute `credit`; all only grow. Memory is bounded by one rule: rows buffered plus rows that producers may still send
never exceed the buffer's capacity.

What a checkpoint keeps is `state()`: per open shard one bit per row for *trained* and one for *discarded*. Rows that
were buffered and not trained are leased again after a restart.

A shard's faults and the deaths of producers are different things. That a producer reports its shard as broken counts
against the shard once the same producer has served another one, or when there is no other left to serve: a producer
that is broken itself, or a disk that is away for a while, quarantines nothing. A shard with three such failures is
quarantined: listed, its bits kept, leased again only when a person asks for it. A shard on which producer after
producer is lost is never given up; it becomes a *suspect*, which is leased last. Shards in trouble rest for a while
before they are leased again.

In deterministic mode rows enter the pool of the buffer in the order of shards' serials and of positions. Rows of shards
after the oldest unfinished one are *early*, and wait. So that the others can always come, these leave room for the pool
and one chunk, who has the oldest shard is granted credit before those who run ahead, and somebody always has it first:
if need be, the session that is furthest ahead is ended, and comes back without leases and credit. There, a shard in
trouble is leased again at once, and one that is quarantined ends the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from producer.wire import (
    DTYPE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MASK_BYTES,
    TARGET_CHUNK_BYTES,
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
    held_out_shards,
    pack_bits,
    unpack_bits,
)
from trainer.report import StreamReport

LEASES_PER_PRODUCER = 2
"""One being worked on and one waiting, so that a producer never waits for the next."""
CHUNKS_IN_FLIGHT = 8
"""Most chunks one producer may have under way; enough to hide a round trip, little enough to share the buffer."""
MAX_SESSIONS = 256
"""A tick looks at each of them; who comes later is asked to come again."""
FAILURES_ALLOWED = 3
"""A shard that was reported broken this often, by producers that serve others, is quarantined."""
SUSPECT_DEATHS = 3
"""A shard is leased last when this many producers in a row were lost on it before they sent a row."""
LONGEST_REST = 3
"""A shard in trouble is not leased again for up to this many times `dead_seconds`."""
STUCK_SECONDS = 60.0
"""While only shards in trouble are left, this is told so often."""

MAX_POSITIONS = 8 * MAX_MASK_BYTES
"""Positions of the largest shard: what a lease's mask can name."""

STREAM_FACTS = ("fingerprint", "shards", "held_out", "context", "hooks", "dtype")
"""What every producer of a run must agree on: the values of the first one that brings something."""

Fact = tuple[str, Any, Any]
"""A name, the run's value and a producer's."""


class StreamPhase(Enum):
    """How much is still to come from the stream. A run goes down this list; `retry_quarantined` takes it up again."""

    OPEN = "open"
    """Shards are leased and credit is granted."""
    WINDING_DOWN = "winding down"
    """Nothing is leased or granted any more; chunks under the credit granted before still arrive."""
    DRAINING = "draining"
    """No further activation arrives; the buffered ones are being trained."""
    WOUND_DOWN = "wound down"
    """The trainer was asked to leave: all that arrived is trained, and data is left."""
    EXHAUSTED = "exhausted"
    """Every activation of the data is trained, quarantined or dropped."""

    @property
    def is_over(self) -> bool:
        """Nothing is left to train on, here or on its way."""
        return self in (StreamPhase.WOUND_DOWN, StreamPhase.EXHAUSTED)


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
    tokens: int | None
    """Not trained on; None when nobody knows how many some of the shards have."""
    ratio: float
    """Share of the shards begun so far."""


@dataclass(frozen=True)
class Limits:
    """What the run's settings say about the stream."""

    capacity_rows: int
    seed: int
    epochs: int | None
    heartbeat_seconds: float
    dead_seconds: float
    stall_seconds: float
    pool_rows: int | None = None
    """Deterministic mode: how many of the capacity are drawn from, filled in order. None: rows count as they come."""
    expected: dict[str, Any] = field(default_factory=dict)
    """What the trainer's own run file says of the stream: `hooks` (names), dtype, context, held_out."""


@dataclass(frozen=True)
class Send:
    """A message for one session; `payload` is the raw frame behind the header, when the kind has one."""

    session: str
    message: Message
    payload: bytes | None = None


@dataclass
class Session:
    """One producer's conversation with this trainer."""

    hello: Hello
    last_heard: float
    last_progress: float
    progress: int = 0
    granted: int = 0
    received: int = 0
    told_credit: int = 0
    last_turn: int = 0
    """When it was last granted a chunk, counted in grants; the longest waiting goes first."""
    last_heartbeat: float = float("-inf")
    leases: list[OpenShard] = field(default_factory=list)

    @property
    def credit_rows(self) -> int:
        return (self.granted - self.received) * self.hello.chunk_rows


@dataclass(frozen=True)
class Report:
    """What a producer says is wrong with its shard; `rows` is how many it has, where that is known."""

    reason: str
    rows: int | None = None
    final: bool = False
    """It is not worth another try."""


@dataclass(eq=False)
class OpenShard:
    """A shard that was leased at least once and is not finished. Bits are bool arrays over its positions."""

    serial: int
    """Names the (epoch, shard) pair inside the buffer."""
    epoch: int
    shard: int
    attempt: int = 0
    holder: str | None = None
    moved: bool = False
    """The present attempt has brought something."""
    complete: bool = False
    """Every row was received or discarded."""
    rows: int | None = None
    """How many rows there are; known once a producer has been through."""
    failures: int = 0
    """Reports that it is broken, by producers that serve others."""
    deaths: int = 0
    """Producers in a row that were lost on it before they sent a row of it."""
    given_up: bool = False
    """Quarantined: what was received is still trained, the rest is not asked for until a person says so."""
    doubted_by: dict[str, bool] = field(default_factory=dict)
    """Producers that have reported it as broken, and have not served another shard since; whether that has counted."""
    report: Report | None = None
    """The newest of those reports."""
    tries: int = 0
    """How often it was reported, or its producer lost, since it last moved."""
    rests_until: float = float("-inf")
    buffered: int = 0
    """Rows received and not trained in this incarnation of the trainer."""
    through: int = 0
    """Deterministic mode: all rows at positions below this are had."""
    had: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Received or discarded in this incarnation of the trainer."""
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    discarded: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def in_trouble(self) -> bool:
        """Producers have failed on it, or were lost: whoever does not serve it need not be broken."""
        return bool(self.failures or self.doubted_by or self.is_suspect)

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS

    @property
    def finished(self) -> bool:
        return self.complete and _count(self.trained) + _count(self.discarded) == self.rows

    def reach(self, positions: int) -> None:
        """Lengthens the bit arrays to at least `positions`; memory is used only where bits are set."""
        old = len(self.had)
        if positions > old:
            size = min(max(positions, old + old // 2), MAX_POSITIONS)
            for name in ("had", "trained", "discarded"):
                bits = np.zeros(size, bool)
                bits[:old] = getattr(self, name)
                setattr(self, name, bits)


SAVED = ("serial", "epoch", "shard", "attempt", "rows", "failures", "deaths", "given_up")
"""What a checkpoint keeps of an open shard besides its bits."""


@dataclass(frozen=True)
class Accepted:
    """A chunk whose rows go into the buffer: the shard's serial and each row's position, in payload order."""

    serial: int
    position: np.ndarray


class Ledger:
    """See the module's docstring. Every method is called with a lock held by the owner.

    The owner lets in only events of sessions that are in `sessions`, and turns strangers away itself.
    """

    def __init__(self, limits: Limits, run: str, incarnation: str, endpoints: list[str]) -> None:
        self.limits = limits
        self.run = run
        self.incarnation = incarnation
        self.endpoints = endpoints
        self.stream: Hello | None = None
        self.settled = False
        """Rows of `stream` were taken: it is the run's for good. Before that it lasts as long as a session has it."""
        self.norm_bounds: list[float] | None = None
        self.sessions: dict[str, Session] = {}
        self.epoch = 0
        self.finished_in_epoch = 0
        self.open: dict[int, OpenShard] = {}
        self.set_aside: list[dict[str, Any]] = []
        self.rows_trained = 0
        self.rows_discarded = 0
        self.rows_received = 0
        self.rows_set_aside = 0
        self.sessions_lost = 0
        self.rejected: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.auth_failures = 0
        self.breaches: Counter[str] = Counter()
        self.progress = 0
        self._next_serial = 0
        self._cursor = 0
        self._turn = 0
        self._way_made = (-1, float("-inf"))
        """Deterministic mode: the serial for which a session was ended, so that somebody takes it, and when."""
        self._queue = np.zeros(0, np.int64)
        self._drained: bool | None = None
        self._faults: list[str] = []
        self._notices: list[str] = []
        self._now = 0.0
        self._stuck_told_at: float | None = None
        self.winding_down = False
        """No lease and no credit is given any more; what was given is used up."""

    # What the owner asks

    @property
    def rows_buffered(self) -> int:
        return self.rows_received - self.rows_trained

    @property
    def rows_credited(self) -> int:
        return sum(session.credit_rows for session in self.sessions.values())

    @property
    def oldest(self) -> int:
        """The first serial of which rows may still come: those of all serials below are here."""
        return next((serial for serial, shard in self.open.items() if not shard.complete), self._next_serial)

    @property
    def _free_rows(self) -> int:
        return self.limits.capacity_rows - self.rows_buffered - self.rows_credited

    @property
    def _early_rows(self) -> int:
        """Rows here whose turn comes after those of a shard that is not complete."""
        oldest = self.oldest
        return sum(shard.buffered for serial, shard in self.open.items() if serial > oldest)

    @property
    def exhausted(self) -> bool:
        """No further row will come: the last epoch's shards are all received or set aside."""
        return (
            self.stream is not None and not self._fresh_left() and all(shard.complete for shard in self.open.values())
        )

    @property
    def dry(self) -> bool:
        """No further row will come to this trainer: the data is exhausted, or what was given before winding down is
        used up."""
        under_way = any(session.leases and session.credit_rows for session in self.sessions.values())
        return self.exhausted or (self.winding_down and not under_way)

    @property
    def finished(self) -> bool:
        """Every row there will ever be is trained."""
        return self.exhausted and not self.rows_buffered

    @property
    def phase(self) -> StreamPhase:
        """The one answer to what may still come."""
        if self.exhausted:
            return StreamPhase.DRAINING if self.rows_buffered else StreamPhase.EXHAUSTED
        if not self.winding_down:
            return StreamPhase.OPEN
        if any(session.leases and session.credit_rows for session in self.sessions.values()):
            return StreamPhase.WINDING_DOWN
        return StreamPhase.DRAINING if self.rows_buffered else StreamPhase.WOUND_DOWN

    @property
    def quarantine(self) -> Quarantine:
        shards = tuple(QuarantinedShard(**entry) for entry in self.set_aside)
        return Quarantine(shards, self.tokens_quarantined, self.quarantined_ratio)

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """Each with epoch, shard, reason, and `rows` never received: None where nobody knows how many."""
        return self.set_aside

    @property
    def quarantined_ratio(self) -> float:
        """Share of the shards begun so far."""
        return len(self.set_aside) / max(self._next_serial, 1)

    @property
    def tokens_quarantined(self) -> int | None:
        """Rows of quarantined shards that are not trained on; None when nobody knows how many some of them have."""
        rows = [entry["rows"] for entry in self.set_aside]
        return None if None in rows else sum(rows)

    @property
    def suspects(self) -> list[OpenShard]:
        """Shards on which producer after producer was lost."""
        return [shard for shard in self.open.values() if shard.is_suspect and not shard.complete]

    def report(self) -> StreamReport:
        leased = sum(shard.holder is not None for shard in self.open.values())
        given_up = sum(shard.given_up for shard in self.open.values())
        received = sum(shard.complete and not shard.given_up for shard in self.open.values())
        waiting = len(self.open) - leased - received - given_up
        return StreamReport(
            producers={
                "working": sum(bool(session.leases) for session in self.sessions.values()),
                "idle": sum(not session.leases for session in self.sessions.values()),
            },
            leases={
                "free": len(self._queue) - self._cursor + waiting,
                "leased": leased,
                "received": received,
                "trained": self.finished_in_epoch,
                "set_aside": len(self.set_aside),
            },
            epoch=self.epoch,
            tokens_received=self.rows_received,
            tokens_quarantined=self.tokens_quarantined,
            suspect_shards=len(self.suspects),
            rows_rejected=dict(self.rejected),
            rows_discarded=self.rows_discarded,
            protocol_errors=dict(self.errors),
            auth_failures=self.auth_failures,
            breaches={"trained_once": 0, "rows_accounted": 0, "memory_bound": 0} | self.breaches,
            credit_rows_outstanding=self.rows_credited,
            sessions_lost=self.sessions_lost,
        )

    # Events: each returns the messages to send

    def hello(self, hello: Hello, now: float) -> list[Send]:
        """A producer introduces itself; an older session of the same process, or of the same name, ends."""
        for session, known in list(self.sessions.items()):
            if known.hello.producer == hello.producer or session == hello.session:
                self._end(session, died=False)
        if fault := self._refusal(hello):
            code, reason, retry = fault
            self.errors[f"refused_{code}"] += 1
            return [Send(hello.session, Reject(code=code, reason=reason, retry=retry))]
        if self.stream is None or _differences(self._facts_of_stream(hello)):
            self._propose(hello)
        elif not self.settled and not self.sessions:
            # Bounds and provenance of a producer that has left without a row decide nothing.
            self.stream, self.norm_bounds = hello, hello.norm_bounds
        self.sessions[hello.session] = Session(hello, last_heard=now, last_progress=now)
        welcome = Welcome(
            session=hello.session,
            run=self.run,
            incarnation=self.incarnation,
            endpoints=self.endpoints,
            heartbeat_seconds=self.limits.heartbeat_seconds,
            dead_seconds=self.limits.dead_seconds,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            norm_bounds=self.norm_bounds,
        )
        late = [] if self._drained is None else [Send(hello.session, Drain(finished=self._drained))]
        return [Send(hello.session, welcome), *late]

    def chunk(
        self,
        session: str,
        chunk: Chunk,
        payload_bytes: int,
        now: float,
        insert: Callable[[Accepted], None] = lambda accepted: None,
    ) -> tuple[Accepted | None, list[Send]]:
        """A chunk arrived. Accepted: its rows are now `buffered`, and `insert` has put them there.

        Nothing of them is counted before that, so that an exception of `insert` leaves them missing.
        """
        known = self.sessions[session]
        known.last_heard = known.last_progress = now
        if fault := self._chunk_fault(known, chunk, payload_bytes):
            return None, self.refuse(session, fault[0], fault[1], rows=chunk.rows)
        known.received = chunk.number
        shard = next((lease for lease in known.leases if _same(lease, chunk)), None)
        if shard is None:
            self.rejected["fenced"] += chunk.rows
            return None, []
        start, count = chunk.first_window * known.hello.context, chunk.windows * known.hello.context
        kept, outliers = unpack_bits(chunk.kept, count), unpack_bits(chunk.outliers, count)
        shard.reach(start + count)
        had = shard.had[start : start + count]
        if (had & (kept | outliers)).any() or (kept & outliers).any():
            return None, self.refuse(session, "duplicate", "chunk brings rows that were already had", rows=chunk.rows)
        if fault := self._order_fault(known, shard, chunk, start):
            return None, self.refuse(session, fault[0], fault[1], rows=chunk.rows)
        accepted = Accepted(shard.serial, start + np.flatnonzero(kept))
        insert(accepted)
        shard.through = max(shard.through, start + count)
        had |= kept | outliers
        shard.discarded[start : start + count] |= outliers
        discarded = _count(outliers)
        shard.moved |= chunk.rows + discarded > 0
        shard.buffered += chunk.rows
        self.rows_discarded += discarded
        self.rows_received += chunk.rows
        self.settled |= shard.moved
        return accepted, []

    def shard_end(self, session: str, end: ShardEnd, now: float) -> list[Send]:
        """A producer has been through its shard; all rows must be here."""
        known = self.sessions[session]
        known.last_heard = known.last_progress = now
        shard = next((lease for lease in known.leases if _same(lease, end)), None)
        if shard is None:
            return []
        self._return(known, shard)
        had = _count(shard.had)
        if had != end.rows:
            self.errors["short_shard"] += 1
            self._failed(shard, known, Report(f"{had} rows arrived, the producer counts {end.rows}", end.rows))
        elif not had:
            # Text of which nothing is kept is rare, and a producer that skips its work looks the same.
            self.errors["empty_shard"] += 1
            self._failed(shard, known, Report("not one row of it is kept", 0))
        else:
            self._complete(shard, end.rows)
            self._believe(known.hello.producer)
        return []

    def shard_fail(self, session: str, fail: ShardFail, now: float) -> list[Send]:
        """A producer could not read or run its shard."""
        known = self.sessions[session]
        known.last_heard = known.last_progress = now
        if shard := next((lease for lease in known.leases if _same(lease, fail)), None):
            self._return(known, shard)
            self._failed(shard, known, Report(fail.error, final=not fail.retry))
        return []

    def heartbeat(self, session: str, beat: Heartbeat, now: float) -> list[Send]:
        known = self.sessions[session]
        known.last_heard = now
        if beat.progress > known.progress:
            known.progress, known.last_progress = beat.progress, now
        return []

    def bye(self, session: str, bye: Bye, now: float) -> list[Send]:
        self._end(session, died=False)
        return []

    def gone(self, session: str) -> None:
        """The socket says that this peer is no longer there."""
        if session in self.sessions:
            self.sessions_lost += 1
            self._end(session, died=True)

    def refuse(
        self, session: str, code: str, reason: str, rows: int = 0, poisoned: bool = False, retry: bool = True
    ) -> list[Send]:
        """Ends a session for a fault of its own. `poisoned`: it reports with that that its shard is broken."""
        self.errors[code] += 1
        if rows:
            self.rejected[code] += rows
        known = self.sessions[session]
        at_work = known.leases[:1] if poisoned else []
        self.sessions_lost += 1
        self._end(session, died=not poisoned)
        for shard in at_work:
            self._failed(shard, known, Report(reason))
        return [Send(session, Reject(code=code, reason=reason, retry=retry))]

    def trained(self, serial: np.ndarray, position: np.ndarray) -> None:
        """A step has consumed these rows."""
        for one in np.unique(serial):
            shard = self.open[int(one)]
            named = position[serial == one]
            if shard.trained[named].any() or not shard.had[named].all():
                self._breach("trained_once", f"rows of shard {shard.shard} are trained twice, or were never received")
            shard.trained[named] = True
            shard.buffered -= len(named)
            self._close_if_finished(shard)
        self.rows_trained += len(serial)
        self.progress += 1

    def audit(self, rows_in_buffer: int) -> list[str]:
        """What does not balance, in sentences: now, and in the steps since the last audit. Empty, or Sluice is wrong.

        These are the checks that cost nothing; that each row is in exactly one place is for the tests to show.
        """
        promised = self.rows_buffered + self.rows_credited
        if promised > self.limits.capacity_rows:
            room = f"room for {self.limits.capacity_rows}"
            self._breach("memory_bound", f"{promised} rows are here or may still come, and there is {room}")
        if not 0 <= rows_in_buffer <= self.rows_buffered:
            self._breach("rows_accounted", f"the buffer holds {rows_in_buffer} rows, the ledger {self.rows_buffered}")
        faults, self._faults = self._faults, []
        return faults

    def take_notices(self) -> list[str]:
        """What a person should know of since the last call: shards that were quarantined, or that kill producers."""
        notices, self._notices = self._notices, []
        return notices

    def retry_quarantined(self) -> int:
        """Quarantined shards are leased again, for the rows that they lack; how many these are.

        Those that stay listed were quarantined by an older release, which kept no bits of them.
        """
        shards = [shard for shard in self.open.values() if shard.given_up]
        names = {(shard.epoch, shard.shard) for shard in shards}
        self.set_aside = [entry for entry in self.set_aside if (entry["epoch"], entry["shard"]) not in names]
        self.rows_set_aside = sum(entry["rows"] or 0 for entry in self.set_aside)
        for shard in shards:
            shard.given_up = shard.complete = False
            shard.rows, shard.failures, shard.deaths, shard.tries = None, 0, 0, 0
            shard.rests_until = float("-inf")
        return len(shards)

    def wind_down(self) -> None:
        """This trainer is going to leave, but first takes in what producers may still send under their credit."""
        self.winding_down = True

    def drain(self, finished: bool) -> list[Send]:
        """The run is over, or this trainer is leaving: nothing more is leased."""
        self._drained = finished
        return [Send(session, Drain(finished=finished)) for session in self.sessions]

    def tick(self, now: float) -> list[Send]:
        """Time passes: the silent are dropped, shards and credit handed out, heartbeats sent."""
        self._now = now
        sends = self._drop_silent(now)
        if self._drained is None and not self.winding_down:
            sends += self._assign(now)
            sends += self._make_way(now)
            sends += self._reclaim()
            sends += self._grant(now)
            self._tell_if_stuck()
        for name, session in self.sessions.items():
            if now - session.last_heartbeat >= self.limits.heartbeat_seconds:
                session.last_heartbeat = now
                sends.append(Send(name, Heartbeat(progress=self.progress)))
        return sends

    # What a checkpoint keeps

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(plain JSON, bit arrays) from which `restore` rebuilds the ledger at this instant."""
        shards = list(self.open.values())
        document = {
            "run": self.run,
            "seed": self.limits.seed,
            "stream": self.stream.model_dump() if self.stream else None,
            "norm_bounds": self.norm_bounds,
            "epoch": self.epoch,
            "cursor": self._cursor,
            "next_serial": self._next_serial,
            "finished_in_epoch": self.finished_in_epoch,
            "rows_trained": self.rows_trained,
            "rows_discarded": self.rows_discarded,
            "rows_set_aside": self.rows_set_aside,
            "set_aside": [dict(entry) for entry in self.set_aside],
            "sessions_lost": self.sessions_lost,
            "rejected": dict(self.rejected),
            "errors": dict(self.errors),
            "auth_failures": self.auth_failures,
            "breaches": dict(self.breaches),
            "open": [
                {name: getattr(shard, name) for name in SAVED} | {"positions": len(shard.had)} for shard in shards
            ],
        }
        bits = {
            f"{shard.serial}.{name}": np.packbits(getattr(shard, name), bitorder="little")
            for shard in shards
            for name in ("trained", "discarded")
        }
        return document, bits

    def restore(self, document: dict[str, Any], bits: dict[str, np.ndarray]) -> None:
        """Becomes the ledger that `state` described; rows that were buffered then are missing again."""
        self.run = document["run"]
        self.limits = replace(self.limits, seed=document["seed"])  # the cursor below is one into that seed's order
        self.stream = Hello.model_validate(document["stream"]) if document["stream"] else None
        self.settled = self.stream is not None
        self.norm_bounds = document["norm_bounds"]
        for name in (
            "epoch",
            "finished_in_epoch",
            "rows_trained",
            "rows_discarded",
            "rows_set_aside",
            "sessions_lost",
            "auth_failures",
        ):
            setattr(self, name, document[name])
        self.set_aside = [dict(entry) for entry in document["set_aside"]]
        self.rejected, self.errors = Counter(document["rejected"]), Counter(document["errors"])
        self.breaches = Counter(document.get("breaches"))  # checkpoints of older releases have none
        self.rows_received = self.rows_trained
        self._cursor, self._next_serial = document["cursor"], document["next_serial"]
        if self.stream:
            self._queue = self._permutation(self.epoch)
        for saved in document["open"]:
            shard = OpenShard(**{name: value for name, value in saved.items() if name != "positions"})
            shard.trained = unpack_bits(bits[f"{shard.serial}.trained"].tobytes(), saved["positions"])
            shard.discarded = unpack_bits(bits[f"{shard.serial}.discarded"].tobytes(), saved["positions"])
            shard.had = shard.trained | shard.discarded
            if shard.given_up:
                self._lose_buffered(shard)
            shard.complete = _count(shard.had) == shard.rows
            self.open[shard.serial] = shard
            self._close_if_finished(shard)
        if self.limits.pool_rows is not None:
            self.retry_quarantined()  # it had ended the run

    # Inside

    def _breach(self, invariant: str, fault: str) -> None:
        self.breaches[invariant] += 1
        self._faults.append(fault)

    def _refusal(self, hello: Hello) -> tuple[str, str, bool] | None:
        """Why this producer cannot serve this run: (code, sentence, whether it may come again), or None."""
        from_file, from_stream = _differences(self._facts_of_file(hello)), _differences(self._facts_of_stream(hello))
        if from_file or (from_stream and (self.settled or self.sessions)):
            told = "; ".join((from_file | from_stream).values())
            told = told if len(told) <= 900 else f"{told[:900]} …"  # the wire's limit; the first ones tell most
            if from_file or self.settled:
                return "mismatch", f"{told}. Start it with the run's own file, or start a new run directory", False
            return "mismatch", f"{told}. No row was received so far: the first ones decide", True
        row_bytes = DTYPE_BYTES[hello.dtype] * sum(hook.width for hook in hello.hooks)
        if hello.chunk_rows * row_bytes > MAX_CHUNK_BYTES:
            sentence = (
                f"chunks of {hello.chunk_rows} rows × {row_bytes} bytes exceed {MAX_CHUNK_BYTES} bytes; "
                "lower corpus.context, or stream fewer hooks"
            )
            return "chunk", sentence, False
        if 4 * hello.chunk_rows > self.limits.capacity_rows:
            sentence = (
                f"buffer.rows = {self.limits.capacity_rows} holds fewer than four chunks of {hello.chunk_rows} rows; "
                f"raise buffer.rows to {4 * hello.chunk_rows}{self._or_a_shorter_context(hello, row_bytes)}"
            )
            return "buffer", sentence, False
        if len(self.sessions) >= MAX_SESSIONS:
            return "full", f"{len(self.sessions)} producers are at work, and there is room for no more", True
        return None

    def _or_a_shorter_context(self, hello: Hello, row_bytes: int) -> str:
        """Advice that mends a chunk of one long window, and no other: shorter windows come several to a chunk."""
        small_enough = 4 * (TARGET_CHUNK_BYTES // row_bytes) <= self.limits.capacity_rows
        return ", or lower corpus.context" if hello.chunk_rows == hello.context and small_enough else ""

    def _facts_of_file(self, hello: Hello) -> list[Fact]:
        """What the trainer's own run file says of the stream, beside what this producer says."""
        theirs = {fact: getattr(hello, fact) for fact in STREAM_FACTS} | {
            "hooks": [hook.name for hook in hello.hooks],
            "deterministic": hello.provenance.get("deterministic", False),
        }
        return [(name, ours, theirs[name]) for name, ours in self.limits.expected.items()]

    def _facts_of_stream(self, hello: Hello) -> list[Fact]:
        """What the run streams so far, beside what this producer would."""
        if self.stream is None:
            return []
        names = [name for name in STREAM_FACTS if name != "fingerprint"]
        facts = [(name, getattr(self.stream, name), getattr(hello, name)) for name in names]
        if self.limits.pool_rows is not None:
            facts.append(("rows per chunk", self.stream.chunk_rows, hello.chunk_rows))
        if self.stream.fingerprint != hello.fingerprint:
            facts += self._what_the_fingerprint_hides(hello)
        return facts

    def _what_the_fingerprint_hides(self, hello: Hello) -> list[Fact]:
        """The facts behind two fingerprints; the fingerprints themselves when the facts tell nothing."""
        assert self.stream is not None
        ours, theirs = self.stream.provenance, hello.provenance
        facts = [(name, ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})]
        different = [fact for fact in facts if fact[1] != fact[2]]
        return different or [("fingerprint", self.stream.fingerprint, hello.fingerprint)]

    def _propose(self, hello: Hello) -> None:
        """What the run streams is what this producer says, as long as no row of anything else was received."""
        self.stream = hello
        self.norm_bounds = hello.norm_bounds
        self.epoch = self.finished_in_epoch = self.rows_set_aside = 0
        self.open, self.set_aside = {}, []
        self._queue, self._cursor = self._permutation(0), 0

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order in which an epoch's training shards are leased: a function of seed and epoch."""
        assert self.stream is not None
        kept = np.delete(np.arange(self.stream.shards), held_out_shards(self.stream.shards, self.stream.held_out))
        return np.random.default_rng((self.limits.seed, epoch)).permutation(kept)

    def _epochs_left(self) -> bool:
        return self.limits.epochs is None or self.epoch + 1 < self.limits.epochs

    def _fresh_left(self) -> bool:
        """Whether there is a shard that was never leased."""
        return self._cursor < len(self._queue) or self._may_begin_epoch()

    def _may_begin_epoch(self) -> bool:
        """There is another epoch, and this one has shown that shards can be served: or epochs would fly past."""
        return (
            self.stream is not None
            and self._epochs_left()
            and (
                self.finished_in_epoch > 0
                or any(one.epoch == self.epoch and one.complete and not one.given_up for one in self.open.values())
            )
        )

    def _chunk_fault(self, session: Session, chunk: Chunk, payload_bytes: int) -> tuple[str, str] | None:
        """What is wrong with a chunk, before its lease is looked at: (code, sentence), or None."""
        hello = session.hello
        positions = chunk.windows * hello.context
        row_bytes = DTYPE_BYTES[hello.dtype] * sum(hook.width for hook in hello.hooks)
        if chunk.incarnation != self.incarnation:
            return "incarnation", "chunk is meant for an earlier start of this trainer"
        if chunk.number != session.received + 1:
            return "gap", f"chunk {chunk.number} arrived where {session.received + 1} was due"
        if chunk.number > session.granted:
            return "credit", f"chunk {chunk.number} is beyond the credit of {session.granted}"
        if chunk.rows > hello.chunk_rows:
            return "shape", f"chunk of {chunk.rows} rows where HELLO announced {hello.chunk_rows} at most"
        if chunk.first_window * hello.context + positions > MAX_POSITIONS:
            return "shape", f"window {chunk.first_window} lies beyond the {MAX_POSITIONS} positions a shard may have"
        if len(chunk.kept) != -(-positions // 8) or len(chunk.outliers) not in (0, len(chunk.kept)):
            return "shape", f"masks of {len(chunk.kept)} and {len(chunk.outliers)} bytes for {positions} positions"
        if (kept := _count(unpack_bits(chunk.kept, positions))) != chunk.rows:
            return "shape", f"chunk names {kept} rows and announces {chunk.rows}"
        if payload_bytes != chunk.rows * row_bytes:
            return "shape", f"payload of {payload_bytes} bytes where {chunk.rows} rows × {row_bytes} were due"
        return None

    def _order_fault(self, session: Session, shard: OpenShard, chunk: Chunk, start: int) -> tuple[str, str] | None:
        """Deterministic mode: why these rows cannot take their place in the order now: (code, sentence), or None."""
        if self.limits.pool_rows is None:
            return None
        if start < shard.through and chunk.rows:
            return "order", f"chunk of position {start} comes after one that ends at {shard.through}"
        room = self.limits.capacity_rows - self.limits.pool_rows - session.hello.chunk_rows
        if shard.serial > self.oldest and self._early_rows + chunk.rows > room:
            return "early", "no room for rows whose turn comes much later"
        return None

    def _drop_silent(self, now: float) -> list[Send]:
        sends: list[Send] = []
        for name, session in list(self.sessions.items()):
            if now - session.last_heard > self.limits.dead_seconds:
                sends += self.refuse(name, "silent", f"nothing heard for {self.limits.dead_seconds:g} s")
            elif (
                session.leases
                and session.granted > session.received
                and now - session.last_progress > self.limits.stall_seconds
            ):
                reason = f"no progress for {self.limits.stall_seconds:g} s in spite of credit"
                sends += self.refuse(name, "stalled", reason, poisoned=True)
        return sends

    def _assign(self, now: float) -> list[Send]:
        """Hands out shards, evenly: those given back first, then the epoch's next."""
        sends: list[Send] = []
        wanting = [
            (depth, name, session)
            for depth in range(LEASES_PER_PRODUCER)
            for name, session in self.sessions.items()
            if len(session.leases) <= depth
        ]
        if not wanting:
            return sends
        free = [one for one in self.open.values() if one.holder is None and not one.complete and not one.given_up]
        for depth, name, session in wanting:
            if len(session.leases) > depth:
                continue
            if not free and not self._fresh_left():
                break
            if (shard := self._next_shard(session.hello.producer, free)) is None:
                continue
            if self.limits.pool_rows is not None and session.leases and shard.serial < session.leases[-1].serial:
                continue  # it would come after rows that wait for its own
            free.remove(shard)
            shard.attempt += 1
            shard.holder, shard.moved = name, False
            if not session.leases:
                session.last_progress = now
            session.leases.append(shard)
            lease = Lease(shard=shard.shard, epoch=shard.epoch, attempt=shard.attempt)
            sends.append(Send(name, lease, pack_bits(shard.had) if shard.had.any() else b""))
        return sends

    def _next_shard(self, producer: str, free: list[OpenShard]) -> OpenShard | None:
        """What this producer is to work on: what was given back, the epoch's next, then what is in trouble.

        One of `free`, the open shards that nobody has, to which the epoch's next is added.
        """
        if self.limits.pool_rows is not None and free:
            return free[0]  # order is all
        rested = [shard for shard in free if shard.rests_until <= self._now]
        for shard in rested:
            if not shard.is_suspect and producer not in shard.doubted_by:
                return shard
        if self._cursor >= len(self._queue):
            if rested := [shard for shard in rested if not self._leave_to_another(shard, producer)]:
                return min(rested, key=lambda shard: (producer in shard.doubted_by, shard.tries))
            if not self._may_begin_epoch():
                return None
            self.epoch += 1
            self.finished_in_epoch = 0
            self._queue, self._cursor = self._permutation(self.epoch), 0
        shard = OpenShard(self._next_serial, self.epoch, int(self._queue[self._cursor]))
        self.open[shard.serial] = shard
        free.append(shard)
        self._next_serial += 1
        self._cursor += 1
        return shard

    def _leave_to_another(self, shard: OpenShard, producer: str) -> bool:
        """This producer has failed on it, and one that has not is idle."""
        return producer in shard.doubted_by and any(
            not one.leases and one.hello.producer not in shard.doubted_by for one in self.sessions.values()
        )

    def _reclaim(self) -> list[Send]:
        """Ends sessions that hold credit and no work while others have work and no credit; they return without it."""
        free = self._free_rows
        waiting = [session for session in self.sessions.values() if session.leases and not session.credit_rows]
        if not any(session.hello.chunk_rows > free for session in waiting):
            return []
        idle = [name for name, session in self.sessions.items() if session.credit_rows and not session.leases]
        for name in idle:
            self._end(name, died=False)
        return [Send(name, Reject(code="idle", reason="others need the credit it holds", retry=True)) for name in idle]

    def _first_in_turn(self) -> Session | None:
        """Deterministic mode: who works on the oldest shard that is not complete."""
        shard = self.open.get(self.oldest)
        return None if shard is None or shard.holder is None else self.sessions[shard.holder]

    def _make_way(self, now: float) -> list[Send]:
        """Deterministic mode: when nobody can take the oldest shard, or who has it can get no credit, ends a session.

        It is the one that is furthest ahead. It returns without leases and credit, and is given the oldest shard first.
        """
        serial = self.oldest
        if self.limits.pool_rows is None or serial not in self.open:
            return []
        first = self._first_in_turn()
        others = [session for session in self.sessions.values() if session.leases and session is not first]
        if first is None:
            if self._way_made[0] == serial and now - self._way_made[1] < self.limits.dead_seconds:
                return []  # who was ended for it is still on its way back
            self._way_made = (serial, now)
        elif first.credit_rows or first.hello.chunk_rows <= self._free_rows:
            return []
        else:
            others = [session for session in others if session.credit_rows]
        if not others:
            return []
        name = max(others, key=lambda session: session.leases[0].serial).hello.session
        self._end(name, died=False)
        return [Send(name, Reject(code="early", reason="an earlier shard must come first", retry=True))]

    def _grant(self, now: float) -> list[Send]:
        """Spreads free space of the buffer over the producers that have work, one chunk at a time."""
        free = ahead = self._free_rows
        first = None
        if self.limits.pool_rows is not None:
            first = self._first_in_turn()
            credited = self.rows_credited - (first.credit_rows if first is not None else 0)
            ahead = (self.limits.capacity_rows - self.limits.pool_rows) // 2 - self._early_rows - credited
        working = [session for session in self.sessions.values() if session.leases]
        while working:
            session = min(working, key=lambda one: (one.granted - one.received, one.last_turn))
            if session.granted - session.received >= CHUNKS_IN_FLIGHT or session.hello.chunk_rows > free:
                break
            if session is not first:
                if session.hello.chunk_rows > ahead:
                    working.remove(session)
                    continue
                ahead -= session.hello.chunk_rows
            if session.granted == session.received:
                session.last_progress = now  # without credit it could not move
            self._turn += 1
            session.last_turn = self._turn
            session.granted += 1
            free -= session.hello.chunk_rows
        sends = []
        for name, session in self.sessions.items():
            if session.granted > session.told_credit:
                session.told_credit = session.granted
                sends.append(Send(name, Credit(number=session.granted)))
        return sends

    def _end(self, session: str, died: bool) -> None:
        """Forgets a session: its leases and its credit return."""
        known = self.sessions.pop(session)
        for index, shard in enumerate(list(known.leases)):
            self._return(known, shard)
            if died and index == 0 and not shard.moved:
                self._died_on(shard)

    def _return(self, session: Session, shard: OpenShard) -> None:
        session.leases.remove(shard)
        shard.holder = None
        if shard.moved:
            shard.deaths = shard.tries = 0

    def _died_on(self, shard: OpenShard) -> None:
        """A producer was lost before it sent a row of its shard: that may be the shard's doing, or not."""
        shard.deaths += 1
        if not shard.is_suspect:
            return
        self._let_rest(shard)
        # Told at 3, 6, 12, 24 … deaths.
        if shard.deaths % SUSPECT_DEATHS == 0 and (shard.deaths // SUSPECT_DEATHS).bit_count() == 1:
            self._notices.append(
                f"{shard.deaths} producers in a row were lost on {_name(shard)} before they sent a row of it; it is "
                "leased last, and not given up: do they lack memory, or end at once for another reason? Their logs tell"
            )

    def _let_rest(self, shard: OpenShard) -> None:
        """Nobody is given this shard for a while, each time a longer one; the first try comes at once."""
        shard.rests_until = self._now + min(shard.tries, LONGEST_REST) * self.limits.dead_seconds
        shard.tries += 1

    def _failed(self, shard: OpenShard, session: Session, report: Report) -> None:
        """A producer reports its shard as broken; that counts when the producer is known to be sound."""
        shard.report = report
        shard.doubted_by[session.hello.producer] = False
        self._let_rest(shard)
        if self.limits.pool_rows is not None or not self._others_left(shard):
            shard.doubted_by[session.hello.producer] = True
            self._count_failure(shard)

    def _others_left(self, shard: OpenShard) -> bool:
        """Whether a shard not in trouble, or a producer that has not failed on this one, can show who is broken."""
        return (
            self._fresh_left()
            or any(one is not shard and not one.complete and not one.in_trouble for one in self.open.values())
            or any(one.hello.producer not in shard.doubted_by for one in self.sessions.values())
        )

    def _believe(self, producer: str) -> None:
        """This producer has served a shard: what it reported of others since it last did is true."""
        for shard in list(self.open.values()):
            if shard.doubted_by.pop(producer, True) is False:
                self._count_failure(shard)

    def _count_failure(self, shard: OpenShard) -> None:
        assert shard.report is not None
        shard.failures += 1
        if shard.holder is not None or not (shard.failures >= FAILURES_ALLOWED or shard.report.final):
            return
        if shard.report.rows == 0 == _count(shard.had):
            self._complete(shard, 0)
        else:
            self._quarantine(shard, shard.report)

    def _complete(self, shard: OpenShard, rows: int) -> None:
        """All rows of a shard are here."""
        shard.rows, shard.complete, shard.deaths = rows, True, 0
        shard.doubted_by.clear()
        self._close_if_finished(shard)

    def _quarantine(self, shard: OpenShard, report: Report) -> None:
        """Gives a shard up. What was received of it is still trained; the rest is listed, never silently dropped."""
        had = _count(shard.had)
        missing = None if report.rows is None else max(0, report.rows - had)
        self.set_aside.append({"epoch": shard.epoch, "shard": shard.shard, "rows": missing, "reason": report.reason})
        self.rows_set_aside += missing or 0
        shard.rows, shard.given_up = had, True
        shard.complete = self.limits.pool_rows is None  # rows that come later in the order must not pass it
        shard.doubted_by.clear()
        self._notices.append(
            f"{_name(shard)} is quarantined, {_tokens(missing)} of it are not trained on: {report.reason!r}; "
            f"{len(self.set_aside)} of {self._next_serial} shards are; `ctl RUN_DIR retry-quarantined` tries again"
        )

    def _tell_if_stuck(self) -> None:
        """A run that waits for shards in trouble says so, again and again."""
        left = [shard for shard in self.open.values() if not shard.complete]
        if not left or self._fresh_left() or not all(shard.in_trouble for shard in left):
            self._stuck_told_at = None
        elif self._stuck_told_at is None:
            self._stuck_told_at = self._now
        elif self._now - self._stuck_told_at >= STUCK_SECONDS:
            self._stuck_told_at = self._now
            deaths = sum(shard.is_suspect for shard in left)
            self._notices.append(
                f"the run waits for its last {len(left)} shards: producers were lost on {deaths} of them, and "
                f"{len(left) - deaths} were reported as broken; the first is {_name(left[0])}, tried {left[0].attempt} "
                f"times; {len(self.sessions)} producers are here"
            )

    def _lose_buffered(self, shard: OpenShard) -> None:
        """After a restart: what was buffered of a shard given up is not asked for again, so it is set aside too."""
        had = _count(shard.had)
        lost, shard.rows = (shard.rows or 0) - had, had
        self.rows_set_aside += lost
        for entry in self.set_aside:
            if (entry["epoch"], entry["shard"]) == (shard.epoch, shard.shard) and entry["rows"] is not None:
                entry["rows"] += lost

    def _close_if_finished(self, shard: OpenShard) -> None:
        if shard.finished and not shard.given_up:  # the bits of those are kept, for `retry_quarantined`
            del self.open[shard.serial]
            self.finished_in_epoch += shard.epoch == self.epoch


def _differences(facts: list[Fact]) -> dict[str, str]:
    """A sentence for each fact in which the two sides differ, with both values; each fact once."""
    told: dict[str, str] = {}
    for name, ours, theirs in facts:
        if ours != theirs:
            told.setdefault(name, f"{name} differs: this run streams {_show(ours)}, the producer {_show(theirs)}")
    return told


def _count(bits: np.ndarray) -> int:
    return int(np.count_nonzero(bits))


def _same(shard: OpenShard, message: Chunk | ShardEnd | ShardFail) -> bool:
    return (shard.shard, shard.epoch, shard.attempt) == (message.shard, message.epoch, message.attempt)


def _name(shard: OpenShard) -> str:
    return f"shard {shard.shard} of epoch {shard.epoch}"


def _tokens(count: int | None) -> str:
    return "an unknown number of tokens" if count is None else f"{count:,} tokens"


def _show(fact: Any) -> str:
    if isinstance(fact, list):
        return ", ".join(_show(item) for item in fact)
    return f"{fact.name} ({fact.module}, width {fact.width})" if isinstance(fact, Hook) else str(fact)
