"""Credit and leases: which producer is leased which shard, and how much each may send.

Credit is absolute: the number of the last chunk that a session may send. What is buffered and what producers may still
send never exceeds the buffer. A run has one policy from its start to its end.

`FairCredit` spreads both evenly, and activations enter the buffer as they come.

`OrderedCredit` is the policy of deterministic mode. Activations enter the pool of the buffer in the order of shards'
serials and of positions. Those of shards after the oldest unfinished one are *early*, and wait. So that the others can
always come, early ones leave room for the pool and one chunk, the session that has the oldest shard is granted credit
before those that are ahead, and some session always has it first: if need be, the session that is furthest ahead is
ended, and comes back without leases and credit. A shard in trouble is leased again at once, and one that is quarantined
ends the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from producer.wire import Chunk, Credit, Lease, Reject, pack_bits
from trainer.stream.ledger.sessions import Fault, Send, Session
from trainer.stream.ledger.shards import OpenShard, ShardQueue

LEASES_PER_PRODUCER = 2
"""One being worked on and one waiting, so that a producer never waits for the next."""
CHUNKS_IN_FLIGHT = 8
"""Most chunks one producer may have under way; enough to hide a round trip, little enough to share the buffer."""

Sessions = Mapping[str, Session]


class CreditPolicy(ABC):
    """The decisions in which fair and deterministic mode differ, and the loops that they share."""

    fixed_chunks: bool
    """Whether all producers must send the same number of activations per chunk."""
    counts_reports_at_once: bool
    """Whether a report that a shard is broken counts before its producer has served another."""
    quarantine_ends_run: bool
    """Whether a run cannot go on without the activations of a quarantined shard."""

    def __init__(self) -> None:
        self._grants = 0
        """Chunks granted so far."""

    @abstractmethod
    def _choose(
        self, session: Session, free: list[OpenShard], shards: ShardQueue, sessions: Sessions, now: float
    ) -> OpenShard | None:
        """The shard that a session is leased next: one of `free`, or a fresh one; None when there is none for it."""

    @abstractmethod
    def _first_and_limit(self, room: int, shards: ShardQueue, sessions: Sessions) -> tuple[Session | None, int]:
        """A session that all of `room` may be granted to, and how many tokens of it may go to the others."""

    def order_fault(self, session: Session, shard: OpenShard, chunk: Chunk, shards: ShardQueue) -> Fault | None:
        """Why the activations of a chunk cannot take their place in the order now."""
        return None

    def make_way(self, room: int, shards: ShardQueue, sessions: Sessions, now: float) -> list[Send]:
        """The end of a session without which the oldest shard cannot go on."""
        return []

    def assign(self, shards: ShardQueue, sessions: Sessions, now: float) -> list[Send]:
        """Leases shards, evenly: each session gets its first before any gets its second."""
        sends: list[Send] = []
        wanting = [
            (depth, name, session)
            for depth in range(LEASES_PER_PRODUCER)
            for name, session in sessions.items()
            if len(session.leases) <= depth
        ]
        if not wanting:
            return sends
        free = shards.free()
        for depth, name, session in wanting:
            if len(session.leases) > depth:
                continue
            if not free and not shards.has_fresh:
                break
            shard = self._choose(session, free, shards, sessions, now)
            if shard is None:
                continue
            if shard in free:
                free.remove(shard)
            if not shard.mask.any():
                shard.revision = shards.revisions.of_epoch(shard.epoch)
            shard.lease(name)
            if not session.leases:
                session.last_progress = now
            session.leases.append(shard)
            lease = Lease(
                shard=shard.shard,
                epoch=shard.epoch,
                attempt=shard.attempt,
                revision=shard.revision,
                hooks=session.hooks_wanted(shards.forgotten_hooks),
            )
            sends.append(Send(name, lease, pack_bits(shard.mask) if shard.mask.any() else b""))
        return sends

    def reclaim(self, room: int, sessions: Sessions) -> list[Send]:
        """The end of sessions that hold credit and no lease, while others have a lease and can get no credit.

        They come back without the credit.
        """
        waiting = [session for session in sessions.values() if session.leases and not session.credit_tokens]
        if not any(session.hello.chunk_rows > room for session in waiting):
            return []
        reject = Reject(code="idle", reason="others need the credit it holds", retry=True)
        return [Send(name, reject) for name, one in sessions.items() if one.credit_tokens and not one.leases]

    def grant(self, room: int, shards: ShardQueue, sessions: Sessions, now: float) -> list[Send]:
        """Spreads `room` tokens of the buffer over the sessions that have a lease, one chunk at a time."""
        first, limit = self._first_and_limit(room, shards, sessions)
        working = [session for session in sessions.values() if session.leases]
        while working:
            session = min(working, key=lambda one: (one.chunks_in_flight, one.last_grant))
            chunk = session.hello.chunk_rows
            if session.chunks_in_flight >= CHUNKS_IN_FLIGHT or chunk > room:
                break
            if session is not first:
                if chunk > limit:
                    working.remove(session)
                    continue
                limit -= chunk
            if not session.chunks_in_flight:
                session.last_progress = now  # without credit it could not make any
            self._grants += 1
            session.last_grant = self._grants
            session.granted += 1
            room -= chunk
        sends = []
        for name, session in sessions.items():
            if session.granted > session.announced_credit:
                session.announced_credit = session.granted
                sends.append(Send(name, Credit(number=session.granted)))
        return sends


class FairCredit(CreditPolicy):
    """Shards and credit are spread evenly; activations enter the buffer as they come."""

    fixed_chunks = counts_reports_at_once = quarantine_ends_run = False

    def _choose(
        self, session: Session, free: list[OpenShard], shards: ShardQueue, sessions: Sessions, now: float
    ) -> OpenShard | None:
        """The first of: a shard that was given back, the epoch's next one, one in trouble, one of the next epoch."""
        producer = session.hello.producer
        ready = [shard for shard in free if shard.retry_at <= now]
        for shard in ready:
            if not shard.is_suspect and producer not in shard.reporters:
                return shard
        if not shards.has_fresh_in_epoch:
            retries = [shard for shard in ready if not self._suits_another(shard, producer, sessions)]
            if retries:
                return min(retries, key=lambda shard: (producer in shard.reporters, shard.setbacks))
        return shards.open_next()

    @staticmethod
    def _suits_another(shard: OpenShard, producer: str, sessions: Sessions) -> bool:
        """This producer has failed on the shard, and one that has not is idle."""
        return producer in shard.reporters and any(
            not session.leases and session.hello.producer not in shard.reporters for session in sessions.values()
        )

    def _first_and_limit(self, room: int, shards: ShardQueue, sessions: Sessions) -> tuple[Session | None, int]:
        return None, room


class OrderedCredit(CreditPolicy):
    """The policy of deterministic mode. See the module's docstring."""

    fixed_chunks = counts_reports_at_once = quarantine_ends_run = True

    def __init__(self, waiting_room: int, dead_seconds: float) -> None:
        """`waiting_room`: tokens of the buffer outside the pool; `dead_seconds`: how long a session may be away."""
        super().__init__()
        self._waiting_room = waiting_room
        self._dead_seconds = dead_seconds
        self._made_way = (-1, float("-inf"))
        """The serial for which a session was ended, so that another takes it, and when."""

    def _choose(
        self, session: Session, free: list[OpenShard], shards: ShardQueue, sessions: Sessions, now: float
    ) -> OpenShard | None:
        """The first one in the order; none that would come after activations that wait for its own."""
        if not free:
            return shards.open_next()
        if session.leases and free[0].serial < session.leases[-1].serial:
            return None
        return free[0]

    def order_fault(self, session: Session, shard: OpenShard, chunk: Chunk, shards: ShardQueue) -> Fault | None:
        start = chunk.first_window * session.hello.context
        if start < shard.prefix_end and chunk.rows:
            return Fault("order", f"chunk of position {start} comes after one that ends at {shard.prefix_end}")
        room = self._waiting_room - session.hello.chunk_rows
        if shard.serial > shards.oldest and shards.early_tokens + chunk.rows > room:
            return Fault("early", "no room for activations whose turn comes much later")
        return None

    def make_way(self, room: int, shards: ShardQueue, sessions: Sessions, now: float) -> list[Send]:
        """The end of the session furthest ahead, when none can take the oldest shard, or its holder can get no credit.

        It comes back without leases and credit, and is leased the oldest shard first.
        """
        serial = shards.oldest
        if serial not in shards.open:
            return []
        first = self._first(shards, sessions)
        others = [session for session in sessions.values() if session.leases and session is not first]
        if first is None:
            ended_serial, ended_at = self._made_way
            if ended_serial == serial and now - ended_at < self._dead_seconds:
                return []  # the session that was ended for it is still on its way back
            self._made_way = (serial, now)
        elif first.credit_tokens or first.hello.chunk_rows <= room:
            return []
        else:
            others = [session for session in others if session.credit_tokens]
        if not others:
            return []
        name = max(others, key=lambda session: session.leases[0].serial).hello.session
        return [Send(name, Reject(code="early", reason="an earlier shard must come first", retry=True))]

    def _first_and_limit(self, room: int, shards: ShardQueue, sessions: Sessions) -> tuple[Session | None, int]:
        first = self._first(shards, sessions)
        credited = sum(session.credit_tokens for session in sessions.values() if session is not first)
        return first, self._waiting_room // 2 - shards.early_tokens - credited

    @staticmethod
    def _first(shards: ShardQueue, sessions: Sessions) -> Session | None:
        """The session that has the oldest unfinished shard."""
        shard = shards.open.get(shards.oldest)
        return None if shard is None or shard.holder is None else sessions[shard.holder]
