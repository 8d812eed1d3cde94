"""The trainer's end of the stream: chunks of producers → ledger → buffer → batches for the training thread.

Ledger and buffer sit behind one lock. The socket's thread, in `server`, brings activations in; the training thread
takes batches out with `take` and reports them with `mark_trained`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from producer.settings import StreamSettings
from producer.wire import Hello
from trainer.phases import RunPhase
from trainer.report import StreamReport
from trainer.state.format import NEW_BUFFER, BufferState, LedgerState, ShardBits
from trainer.stream.buffer import Batch, ShuffleBuffer
from trainer.stream.connections import ConnectionLimits
from trainer.stream.ingest import Ingest
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.phase import StreamPhase
from trainer.stream.ledger.resume import ledger_state
from trainer.stream.ledger.shards import Quarantine, SuspectShard
from trainer.stream.ledger.totals import stream_report
from trainer.stream.router import IntakeError
from trainer.stream.server import StreamServer
from trainer.stream.wait_times import WaitTimes

log = logging.getLogger("sluice.trainer")

DRAIN_SECONDS = 5.0
"""How long a finished run waits for producers to hear of its end."""


@dataclass(frozen=True)
class BufferReport:
    """The buffer and the wait for it."""

    phase: RunPhase
    """FILLING, TRAINING, STARVED or DRAINING."""
    rows: int
    capacity: int
    data_wait_seconds: float


class Interrupt(Protocol):
    """A flag that ends a wait early: an event, or anything else that can be set."""

    def is_set(self) -> bool: ...


class Intake:
    """See the module's docstring. A context manager; `take` and `mark_trained` belong to one training thread."""

    def __init__(
        self,
        settings: StreamSettings,
        ledger: Ledger,
        make_buffer: Callable[[Hello], ShuffleBuffer],
        saved: BufferState = NEW_BUFFER,
        limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008 (frozen)
    ) -> None:
        """Binds the socket. Raises IntakeError, or KeysError for keys that cannot be used.

        `make_buffer` may raise NoRoomError; `saved` is what a checkpoint kept of the buffer.
        """
        self.ledger = ledger
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._ingest = Ingest(ledger, make_buffer, saved)
        self._waits = WaitTimes()
        self._has_served = False
        """A batch was taken."""
        self._wanted: int | None = None
        """Size of the batch that the training thread waits for."""
        self._server = StreamServer(settings, ledger, self._ingest, self.lock, self._on_tick, limits)
        self.endpoint = self._server.endpoint

    def __enter__(self) -> Intake:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    # The stream as the loop and its commands see it

    @property
    def phase(self) -> StreamPhase:
        """How much is still to come."""
        with self.lock:
            return self.ledger.phase

    @property
    def is_winding_down(self) -> bool:
        """`wind_down` was called: producers are given no more work."""
        return self.ledger.is_winding_down

    @property
    def run_id(self) -> str:
        """The run's name in HELLO, checkpoints and snapshots."""
        return self.ledger.run

    @property
    def tokens_trained(self) -> int:
        """Tokens trained since the run began, restarts included."""
        return self.ledger.tokens_trained

    @property
    def epoch(self) -> int:
        """The epoch whose shards are leased, from 0."""
        return self.ledger.shards.epoch

    @property
    def stream(self) -> Hello | None:
        """The HELLO of the run's stream; None until the first activations have arrived, which decide it for good."""
        with self.lock:
            return self.ledger.identity.hello if self.ledger.identity.is_settled else None

    @property
    def norm_bounds(self) -> list[float] | None:
        """For each hook, the norm beyond which producers drop an activation; of the revision that is trained on."""
        revisions = self.ledger.shards.revisions
        return revisions.bounds.get(revisions.last_trained or "", self.ledger.identity.norm_bounds)

    @property
    def revisions(self) -> dict[str, int] | None:
        """Tokens trained of each revision of a language model under training; None for one that does not change."""
        with self.lock:
            revisions = self.ledger.shards.revisions
            return None if revisions.last_trained is None else dict(revisions.tokens)

    @property
    def failure(self) -> BaseException | None:
        """The exception that has ended the socket's thread, if any."""
        return self._server.failure

    def quarantine(self) -> Quarantine:
        """The quarantined shards."""
        with self.lock:
            return self.ledger.quarantine

    def suspects(self) -> list[SuspectShard]:
        """Shards on which producers are lost; they are leased last."""
        with self.lock:
            return self.ledger.shards.suspects()

    def retry_quarantined(self) -> int:
        """Leases quarantined shards again, for the activations that they lack; how many shards these are."""
        with self.lock:
            return self.ledger.retry_quarantined()

    def wind_down(self) -> int:
        """Asks nothing more of producers; how many tokens are buffered or may still come."""
        with self.lock:
            self.ledger.wind_down()
            return self.ledger.tokens_buffered + self.ledger.tokens_credited

    def forget_hooks(self, names: Collection[str]) -> None:
        """Asks for these hooks no longer, and gives their memory back: no SAE reads them any more."""
        with self.lock:
            self.ledger.shards.forgotten_hooks |= set(names)
            self._ingest.forget_hooks()

    def reload_keys(self) -> None:
        """Ends sessions whose key is no longer there; the others do not notice. For a signal's handler."""
        self._server.keys_changed.set()

    def drain(self, finished: bool) -> None:
        """Tells every producer that this trainer is done or leaves, and waits a moment for them to go.

        A finished run also waits for producers that are just coming back: nobody else would tell them.
        """
        with self._changed:
            had_sessions = bool(self.ledger.sessions)
            self._server.outbox += self.ledger.drain(finished)
            deadline = time.monotonic() + (DRAIN_SECONDS if finished else 1.0)
            while time.monotonic() < deadline and (self.ledger.sessions or (finished and not had_sessions)):
                self._changed.wait(0.05)

    # Batches

    @property
    def buffer(self) -> ShuffleBuffer | None:
        """None until a producer has said what it streams."""
        return self._ingest.buffer

    def is_ready(self, count: int) -> bool:
        """Whether `take(count)` would not wait."""
        with self.lock:
            return self._is_ready(count)

    def wait_until_ready(self, count: int, stop: Interrupt, seconds: float = float("inf")) -> bool:
        """Waits until `take(count)` would not; False when `stop` was set, the data ended or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._wanted = count
            try:
                while not self._is_ready(count):
                    self._check_quarantine()
                    if stop.is_set() or self.ledger.phase.is_over or time.monotonic() >= deadline:
                        return False
                    self._wait()
            finally:
                self._wanted = None
            return True

    def take(self, count: int, stop: Interrupt) -> Batch | None:
        """The next batch: `count` activations, fewer at the very end; None when the data is over or `stop` was set.

        Activations are handed out while the buffer is at least half full, so that each batch mixes many contexts; once
        no further one will come, it is drained.
        """
        if not self.wait_until_ready(count, stop):
            return None
        with self.lock:
            assert self.buffer is not None
            self._has_served = True
            return self.buffer.draw(min(count, self.buffer.rows))

    def mark_trained(self, batch: Batch) -> None:
        """A step has consumed `batch`: its activations count as trained and their places are free again."""
        with self.lock:
            self.ledger.mark_trained(batch.serial, batch.position)

    def peek(self, count: int) -> list[torch.Tensor]:
        """Copies of up to `count` waiting activations per hook, none while no producer has come; they stay."""
        with self.lock:
            return self.buffer.peek(count) if self.buffer is not None else []

    # Reports

    def state(self) -> tuple[LedgerState, dict[int, ShardBits], BufferState]:
        """The state for a checkpoint: the ledger, the bits of open shards by serial, and the buffer's draw."""
        with self.lock:
            return *ledger_state(self.ledger), self._ingest.state()

    def stream_report(self) -> StreamReport:
        """The numbers of the stream."""
        with self.lock:
            data, credit = self._waits.ratios()
            return replace(stream_report(self.ledger), data_wait_ratio=data, credit_wait_ratio=credit)

    def buffer_report(self) -> BufferReport:
        """The numbers of the buffer."""
        with self.lock:
            rows = self.buffer.used_slots if self.buffer else 0
            capacity = self.ledger.limits.capacity
            if self.ledger.phase is not StreamPhase.OPEN:
                phase = RunPhase.DRAINING
            elif not self._has_served:
                phase = RunPhase.FILLING
            else:
                phase = RunPhase.TRAINING if rows >= capacity // 2 else RunPhase.STARVED
            return BufferReport(phase, rows, capacity, self._waits.data_seconds)

    def _is_ready(self, count: int) -> bool:
        if self.failure is not None:
            raise IntakeError(f"the stream's thread failed: {self.failure!r}") from self.failure
        if self.buffer is None:
            return False
        is_full = self.buffer.is_full_enough(count, self.ledger.shards.oldest)
        return is_full or (self.buffer.rows > 0 and not self.ledger.phase.is_receiving)

    def _check_quarantine(self) -> None:
        """Deterministic mode: a quarantined shard ends the run; how much of it came depends on who failed."""
        if self.ledger.policy.quarantine_ends_run and self.ledger.shards.quarantined:
            shard = self.ledger.shards.quarantined[0]
            raise IntakeError(
                f"shard {shard.shard} failed ({shard.reason}), and run.deterministic trains on all activations or "
                "none: mend what is wrong with it, then start the trainer again; it goes on from its checkpoint"
            )

    def _wait(self) -> None:
        start = time.monotonic()
        self._changed.wait(timeout=0.1)
        self._waits.add_data_wait(time.monotonic() - start)

    def _on_tick(self) -> None:
        """After each tick, with the lock held: wakes the training thread, and every second checks the invariants."""
        if self._waits.update(self.ledger.sessions.values()):
            for fault in self.ledger.audit(self.buffer.used_slots if self.buffer is not None else 0):
                log.error("an invariant is broken, please report it: %s", fault)
            for notice in self.ledger.failures.pop_notices():
                self._server.outside_log.warning("%s", notice)
        # Not for every chunk: a thread that is woken takes the interpreter from this one.
        if self._wanted is None or self._is_ready(self._wanted) or self.ledger.phase.is_over:
            self._changed.notify_all()
