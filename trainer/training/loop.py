"""The training loop: take → step → report, with a snapshot and a checkpoint now and then.

Between two steps, and while it waits, the loop does what a person asks for: SAEs join and leave, the run pauses or
drains. Whatever changes the run happens there and nowhere else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from producer.common.run_file import show_settings
from producer.common.shell import shell_command
from trainer.control.ctl import Inbox, Request
from trainer.phases import SaePhase
from trainer.report import StepReport
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError
from trainer.state import checkpoint
from trainer.state.checkpoint import Saved
from trainer.state.durable import replace_text
from trainer.stream.buffer import Batch, same_context_mates
from trainer.stream.intake import Intake
from trainer.stream.ledger.ledger import Ledger, StreamPhase
from trainer.stream.ledger.shards import Quarantine
from trainer.training.publishing import publish_snapshot, run_facts
from trainer.training.roster import Roster
from trainer.training.run import Run

log = logging.getLogger("sluice.trainer")

SAMPLE_ROWS = 32_768
"""Rows that scale, centre and first thresholds are estimated from."""
SNAPSHOT_ROWS = 8_192
"""Rows that a snapshot's thresholds are estimated from."""
REPORT_SECONDS = 2.0
STARVED_REPORT_SECONDS = 5.0
PAUSED_REPORT_SECONDS = 30.0
RETRY_SECONDS = 30.0
"""After a last snapshot of an SAE could not be written."""

NEW: Saved = ({"step": 0, "seconds": 0.0, "scales": None, "saes": {}, "buffer_random": None}, {})


class Listener(Protocol):
    """Who is told what the loop does."""

    def waiting(self, report: StepReport) -> None:
        """The stream, while the first rows come in; there is nothing of SAEs in it."""

    def report(self, report: StepReport) -> None: ...
    def published(self, tokens: int) -> None: ...
    def saved(self) -> None: ...


class Loop:
    """A run at work. `run` is None until the first rows have settled the stream's shape."""

    def __init__(
        self,
        settings: TrainerSettings,
        roster: Roster,
        intake: Intake,
        inbox: Inbox,
        listener: Listener,
        answer: Callable[[Loop, Request], None] | None = None,
        saved: Saved | None = None,
    ) -> None:
        """`answer` does what requests of the `inbox` ask for; `saved` is the checkpoint to go on from.

        Its tensors are taken out when the run has them: whoever loaded it may hold on to it as long as the run lasts.
        """
        self.settings = settings
        self.roster = roster
        self.intake = intake
        self.run: Run | None = None
        self.last_report: StepReport | None = None
        self._inbox = inbox
        self._listener = listener
        self._answer = answer
        self._saved = saved or NEW
        self._told = time.monotonic()
        self._next_checkpoint = time.monotonic() + settings.checkpoint.every_seconds
        self._retry_at = 0.0
        self.moved_at = time.monotonic()
        """When the loop last came round; it stands still when a step, a snapshot or a checkpoint hangs."""

    @property
    def tokens(self) -> int:
        return self.intake.tokens_trained

    @property
    def complete(self) -> bool:
        """The token budget or the data is used up, or every SAE is finished."""
        with self.intake.lock:  # the ledger is not to be looked at while it turns to the next epoch
            used_up = is_complete(self.settings, self.intake.ledger)
        return used_up or (self.run is not None and not self.run.in_training)

    @property
    def drained(self) -> bool:
        """It was asked to leave, and everything that was under way is trained."""
        return self.intake.phase is StreamPhase.WOUND_DOWN

    def work(self) -> bool:
        """Trains until the run is complete (True), or until it is told to stop (False)."""
        self._begin()
        while not (self.complete or self.drained or self._inbox.stopping):
            self.moved_at = time.monotonic()
            # One request a turn: a flood of them must not stop the training.
            if (request := self._inbox.next()) is not None and self._answer is not None:
                self._answer(self, request)
            self._turn()
        if self.run is not None and self.run.publishable:
            self.report()
            if self.complete:
                if not self.publish():
                    raise SnapshotError(
                        "the last snapshot could not be written: mend what the log says, then start the trainer again; "
                        "it goes on from its checkpoint"
                    )
                for member in self.roster.members:
                    member.ended |= self.run.sae_trainer(member).phase is SaePhase.FINISHED
        return self.complete

    def begin(self, run: Run) -> None:
        """Goes on with `run`, whose roster is this loop's."""
        self.run = run
        self.clock = Clock(run, self.intake)
        # Counted from the run's beginning, so that a trainer restarted more often than it publishes publishes all the
        # same.
        every = self.settings.snapshots.every_tokens
        self._next_snapshot = (self.tokens // every + 1) * every

    def _turn(self) -> None:
        """One step, or a moment of waiting for what a step needs."""
        if self.run is None:
            self._wait_for_producer()
            return
        self._see_off()
        if self.roster.paused:
            self._rest()
        elif self.intake.wait_until_filled(
            rows := _rows_due(self.settings, self.tokens), self._inbox, STARVED_REPORT_SECONDS
        ):
            self.initialise()
            if self.run.in_training and (batch := self.intake.take(rows, self._inbox)) is not None:
                self._step(batch)
        elif self.clock.report_due(STARVED_REPORT_SECONDS):
            self.report()

    def initialise(self) -> None:
        """Draws the first weights of newcomers, from the rows that wait.

        One that was attached and cannot begin is let go again: it must not take the others with it.
        """
        run = self.run
        assert run is not None
        while run.lacking_weights:
            try:
                run.initialise(self.intake.peek(SAMPLE_ROWS))
            except Exception as error:
                member = self.roster.find(run.lacking_weights[0].settings.name)
                if not member.attached:
                    raise
                log.error("sae %s cannot begin, and is out of the run again: %s", member.name, error)
                run.detach(member)
                self.write_settings()

    def _step(self, batch: Batch) -> None:
        self.clock.work(batch)
        snapshot_due = self.tokens >= self._next_snapshot
        if snapshot_due or self.clock.report_due(REPORT_SECONDS):
            self.report()
        if snapshot_due:
            self._next_snapshot += self.settings.snapshots.every_tokens
            self.publish()
        self._see_off()
        if time.monotonic() >= self._next_checkpoint and not self.complete:
            self.save()

    def _see_off(self) -> None:
        """Publishes the SAEs that have come to their end, and lets go of those that were told to leave."""
        assert self.run is not None
        ended = [
            member
            for member in self.roster.members
            if not member.ended and self.run.sae_trainer(member).phase is SaePhase.FINISHED
        ]
        if not ended or time.monotonic() < self._retry_at:
            return
        if any(self.run.sae_trainer(member).tokens for member in ended):
            if not self.has_rows:
                return
            self.report()
            published = self.publish()
            # One that was left out stays, and is tried again: what leaves unpublished would be lost.
            ended = [member for member in ended if member.name in published or not self.run.sae_trainer(member).tokens]
            if not ended:
                self._retry_at = time.monotonic() + RETRY_SECONDS
                return
        for member in ended:
            member.ended = True
            log.info("sae %s %s", member.name, "has left the run" if member.leaving else "is finished")
            if member.leaving:
                self.run.detach(member)
        self.write_settings()
        self.save()

    def _begin(self) -> None:
        """Goes on with the run as it was saved, or with a new one, once the stream's shape is known."""
        if self.run is None and (stream := self.intake.stream) is not None:
            run = Run(self.settings, stream, self.roster)
            document, tensors = self._saved
            run.restore(document, tensors)
            tensors.clear()
            self.begin(run)

    def _wait_for_producer(self) -> None:
        self._inbox.wait(0.05)
        self._begin()
        if time.monotonic() - self._told > 15:
            self._told = time.monotonic()
            log.info("still no producer: start one with `%s`", shell_command("producer", "RUN.toml"))

    def _rest(self) -> None:
        """A moment of a pause. Producers come to rest by themselves, when the buffer is full."""
        self._inbox.wait(0.1)
        if self.clock.report_due(PAUSED_REPORT_SECONDS):
            self.report()

    # What the loop does now and then, and at a person's request

    def report(self) -> StepReport | None:
        """Tells the listener how things stand; None while nothing is trained that one could tell of."""
        if self.run is None:
            return None
        self.last_report = self.clock.report()
        if self.run.scales is None:
            self._listener.waiting(self.last_report)
            return None
        self._listener.report(self.last_report)
        return self.last_report

    @property
    def has_rows(self) -> bool:
        """There are rows to calibrate and test a snapshot with."""
        assert self.run is not None
        waiting = self.intake.peek(1)
        return bool(waiting and len(waiting[0])) or self.run.last_batch is not None

    def _snapshot_rows(self) -> list[Tensor]:
        """Rows that are still to be trained on; at the end of the data there are none left."""
        assert self.run is not None
        waiting = self.intake.peek(SNAPSHOT_ROWS)
        if waiting and len(waiting[0]):
            return waiting
        return self.run.last_batch.x if self.run.last_batch is not None else []

    def publish(self) -> list[str]:
        """A snapshot of this moment: the names of the SAEs in it, none, with a line in the log, when it failed."""
        run = self.run
        assert run is not None
        if not (rows := self._snapshot_rows()):
            return []
        if not checkpoint.complete(self.settings.run.folder / "checkpoint"):
            self.save()  # a start takes snapshots without a checkpoint for those of a run that has lost it
        report, published = self.clock.look(), list[str]()
        facts = run_facts(run, self.intake)
        if written("snapshot", lambda: published.extend(publish_snapshot(run, report, rows, facts))):
            self._listener.published(report.tokens)
        return published

    def save(self, directory: Path | None = None) -> bool:
        """One instant on disk: weights, roster and ledger between two steps. False, with a line in the log, if not.

        `directory` is where the run directory is now, if it was moved.
        """
        self._next_checkpoint = time.monotonic() + self.settings.checkpoint.every_seconds
        folder = directory or self.settings.run.folder
        if done := written("checkpoint", lambda: self._save(folder)):
            self._listener.saved()
        return done

    def _save(self, directory: Path) -> None:
        saved, tensors = self._saved
        if self.run is not None:
            document, tensors = self.run.state()
        else:  # what an earlier trainer left is passed on
            document = saved | {"roster": self.roster.state()}
        with self.intake.lock:
            document["ledger"], bits = self.intake.ledger.state()
            document["buffer_random"], names = self.intake.buffer_state()
        tensors = {name: value for name, value in tensors.items() if not name.startswith(("ledger/", "buffer/"))}
        tensors |= {f"ledger/{name}": torch.from_numpy(value) for name, value in bits.items()}
        tensors |= {f"buffer/{name}": torch.from_numpy(value) for name, value in names.items()}
        checkpoint.save(directory, self.tokens, document, tensors, self.settings.checkpoint.keep)

    def write_settings(self) -> None:
        """settings.toml, with the SAEs that live at this moment."""
        write_settings(self.settings, self.roster)


def write_settings(settings: TrainerSettings, roster: Roster) -> None:
    """The resolved settings, in the run directory."""
    replace_text(settings.run.folder / "settings.toml", show_settings(roster.resolve(settings)) + "\n")


def written(what: str, write: Callable[[], object]) -> bool:
    """A full or read-only disk costs a snapshot or a checkpoint, never the training."""
    try:
        write()
    except (OSError, SafetensorError, SnapshotError) as error:
        log.error("%s not written: %s; training goes on, the next one is tried in its turn", what, error)
        return False
    return True


def is_complete(settings: TrainerSettings, ledger: Ledger) -> bool:
    """The token budget or the data is used up."""
    return ledger.phase is StreamPhase.EXHAUSTED or not _rows_due(settings, ledger.tokens_trained)


def quarantine_fault(settings: TrainerSettings, quarantine: Quarantine) -> str | None:
    """Why a run that has come to its end has failed: too many of its shards are quarantined; None when it has not."""
    if quarantine.ratio <= settings.run.max_quarantined_ratio:
        return None
    first = quarantine.shards[0]
    return (
        f"{len(quarantine.shards)} shards, {quarantine.ratio:.1%} of those begun, are quarantined, and "
        f"run.max_quarantined_ratio = {settings.run.max_quarantined_ratio:g}: the run has failed. The first is shard "
        f"{first.shard} of epoch {first.epoch}: {first.reason!r}. Mend what is wrong and start the trainer "
        "again, which tries them again, or raise run.max_quarantined_ratio"
    )


def _rows_due(settings: TrainerSettings, tokens: int) -> int:
    """Rows of the next batch: a whole one, or what the budget leaves; 0 ends the run."""
    left = settings.optimizer.batch if settings.run.tokens is None else settings.run.tokens - tokens
    return max(0, min(settings.optimizer.batch, left))


class Clock:
    """Does steps and keeps their times: the only place of the loop that counts them."""

    def __init__(self, run: Run, intake: Intake) -> None:
        self._run, self._intake = run, intake
        self._reported_at = time.monotonic()
        self._reported_tokens = intake.tokens_trained
        self._busy = 0.0
        self._steps = 0
        self._rate = 0.0

    def work(self, batch: Batch) -> None:
        began = time.monotonic()
        self._run.train_step(batch)
        self._intake.trained(batch)
        self._busy += time.monotonic() - began
        self._steps += 1

    def rate(self) -> float:
        """Rows per second, lately."""
        if self._run.roster.paused:
            return 0.0
        elapsed = time.monotonic() - self._reported_at
        trained = self._intake.tokens_trained - self._reported_tokens
        # Just after a report its own rate tells more.
        return trained / elapsed if elapsed > REPORT_SECONDS / 2 else self._rate

    def report_due(self, seconds: float) -> bool:
        return time.monotonic() - self._reported_at >= seconds

    def report(self) -> StepReport:
        """The state of the run, with rates since the report before."""
        report, now = self.look(), time.monotonic()
        if report.state != "paused":
            self._run.seconds += now - self._reported_at
        if now - self._reported_at > REPORT_SECONDS / 2:
            self._rate = report.tokens_per_second
        self._reported_at, self._reported_tokens, self._busy, self._steps = now, report.tokens, 0.0, 0
        return report

    def look(self) -> StepReport:
        """What `report` would say, without beginning a new interval."""
        run, buffer, tokens = self._run, self._intake.buffer_report(), self._intake.tokens_trained
        elapsed = time.monotonic() - self._reported_at
        mates = same_context_mates(run.last_batch, run.stream.context) if run.last_batch is not None else float("nan")
        return StepReport(
            time=time.time(),
            tokens=tokens,
            step=run.step,
            target_tokens=run.settings.run.tokens,
            tokens_per_second=(tokens - self._reported_tokens) / max(elapsed, 1e-9),
            step_seconds=self._busy / max(self._steps, 1),
            data_wait_seconds=buffer.data_wait_seconds,
            state="paused" if run.roster.paused else buffer.state,
            buffer_rows=buffer.rows,
            buffer_capacity_rows=buffer.capacity,
            same_context_mates=mates,
            stream=self._intake.stream_report(),
            saes=tuple(
                sae_trainer.report(run.scales or run.by_hook([1.0] * len(run.stream.hooks)))
                for sae_trainer in run.publishable
            ),
        )
