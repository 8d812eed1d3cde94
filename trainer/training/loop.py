"""The training loop: take a batch, step, report, publish, save, handle a request.

Everything that changes a run happens in this loop: between two steps, and while it waits, it carries out what an
operator asks for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from producer.common.shell import shell_command
from producer.wire import Hello
from trainer.control.requests import Inbox, Request
from trainer.phases import RunPhase, SaePhase
from trainer.report import StepReport
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError
from trainer.state import checkpoint
from trainer.state.format import Checkpoint, RunState, SaeTensors
from trainer.stream.buffer import Batch
from trainer.stream.intake import Intake
from trainer.stream.ledger.phase import StreamPhase
from trainer.training.meter import Meter, measure
from trainer.training.publishing import calibration_activations, publish_snapshot, run_facts, write_settings
from trainer.training.resuming import checkpoint_of
from trainer.training.roster import Member, Roster
from trainer.training.run import Run

log = logging.getLogger("sluice.trainer")

SAMPLE_SIZE = 32_768
"""Activations that scale, centre and first thresholds are estimated from."""
REPORT_SECONDS = 2.0
STARVED_REPORT_SECONDS = 5.0
PAUSED_REPORT_SECONDS = 30.0
REMINDER_SECONDS = 15.0
"""Between two lines of the log that say that nothing has come yet."""
RETRY_SECONDS = 30.0
"""After a last snapshot of an SAE could not be written."""

NEW_RUN = RunState(step=0, seconds=0.0, scales=None, saes={})


MakeRun = Callable[[TrainerSettings, Hello, Roster], Run]


class Listener(Protocol):
    """Receives the loop's events."""

    def on_fill(self, report: StepReport) -> None:
        """The buffer is being filled before the first step; the report has no SAEs."""

    def on_report(self, report: StepReport) -> None: ...
    def on_publish(self, tokens: int) -> None: ...
    def on_save(self) -> None: ...


class Loop:
    """Trains the SAEs of a run. `run` is None until the first activations have decided the shape of the stream."""

    def __init__(
        self,
        settings: TrainerSettings,
        roster: Roster,
        intake: Intake,
        inbox: Inbox,
        listener: Listener,
        handle_request: Callable[[Loop, Request], None],
        saved: Checkpoint | None = None,
        starved_report_seconds: float = STARVED_REPORT_SECONDS,
        make_run: MakeRun = Run,
        keep_alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`handle_request` carries out and answers what the `inbox` brings; `saved` is the checkpoint to resume from.

        Its tensors are cleared once the run has them: the caller may keep a reference as long as the run lasts. On many
        ranks `make_run` makes the run of all of them, and `keep_alive`, called every few seconds, tells that this one
        is alive.
        """
        self.settings = settings
        self.roster = roster
        self.intake = intake
        self.run: Run | None = None
        self.last_report: StepReport | None = None
        self.moved_at = time.monotonic()
        """When the last turn began; it stands still when a step, a snapshot or a checkpoint hangs."""
        self._inbox = inbox
        self._listener = listener
        self._handle_request = handle_request
        self._saved = (NEW_RUN, dict[str, SaeTensors]()) if saved is None else (saved.document.run, saved.tensors.saes)
        self._make_run = make_run
        self._keep_alive = keep_alive
        self._starved_report_seconds = starved_report_seconds
        self._meter = Meter(self.tokens)
        self._reminded_at = time.monotonic()
        # Counted from the run's beginning, so that a trainer restarted more often than it publishes still publishes.
        every = settings.snapshots.every_tokens
        self._next_snapshot = (self.tokens // every + 1) * every
        self._next_checkpoint = time.monotonic() + settings.checkpoint.every_seconds
        self._retry_release_at = 0.0
        self._published: tuple[int, frozenset[str]] = (0, frozenset())
        """Tokens of the last snapshot, and the SAEs in it."""

    def train(self) -> RunPhase:
        """Trains until the run is over or the trainer is asked to stop; returns the run's phase then.

        Raises SnapshotError when the last snapshot of a finished run cannot be written.
        """
        self._begin_run()
        while not (self.phase.is_over or self._inbox.is_stopping):
            self.moved_at = time.monotonic()
            self._keep_alive()
            if (request := self._inbox.next()) is not None:  # one in a turn: a flood of them must not stop the training
                self._handle_request(self, request)
            if self.run is None:
                self._wait_for_stream()
                continue
            self._release_finished_saes(self.run)
            if self.roster.paused:
                self._rest()
                continue
            if (batch := self._next_batch(self.run)) is None:
                continue
            self._step(self.run, batch)
            self._report_and_publish()
            self._release_finished_saes(self.run)
            if time.monotonic() >= self._next_checkpoint and not self.phase.is_over:
                self.save()
        phase = self.phase
        if self.run is not None and self.run.publishable:
            self._end(self.run, phase)
        return phase

    # Where the run stands

    @property
    def tokens(self) -> int:
        """Tokens that the run has trained on, restarts included."""
        return self.intake.tokens_trained

    @property
    def phase(self) -> RunPhase:
        """What the run does at this moment: the one answer to whether it is over."""
        stream = self.intake.phase
        has_sae_to_train = not self.roster.is_finished if self.run is None else bool(self.run.in_training)
        has_budget = next_batch_size(self.settings, self.tokens) > 0
        if stream is StreamPhase.EXHAUSTED or not has_sae_to_train or not has_budget:
            return RunPhase.FINISHED
        if stream is StreamPhase.WOUND_DOWN:
            return RunPhase.DRAINED
        if self.roster.paused:
            return RunPhase.PAUSED
        return RunPhase.WAITING if self.run is None else self.intake.buffer_report().phase

    @property
    def rate(self) -> float:
        """Tokens per second, lately."""
        return 0.0 if self.run is None or self.roster.paused else self._meter.recent_rate(self.tokens)

    # A turn

    def begin(self, run: Run) -> None:
        """Trains `run`, whose roster is this loop's, from now on."""
        self.run = run
        run.on_progress = self._move
        self._meter.begin(self.tokens)

    def _move(self) -> None:
        self.moved_at = time.monotonic()

    def _begin_run(self) -> None:
        """Restores the run that was saved, or makes a new one, once the shape of the stream is known."""
        if self.run is None and (stream := self.intake.stream) is not None:
            run = self._make_run(self.settings, stream, self.roster)
            state, tensors = self._saved
            run.restore(state, tensors)
            tensors.clear()
            self.begin(run)

    def _wait_for_stream(self) -> None:
        self._inbox.wait(0.05)
        self._begin_run()
        if self.run is None and time.monotonic() - self._reminded_at > REMINDER_SECONDS:
            self._reminded_at = time.monotonic()
            if producers := sum(self.intake.stream_report().producers.values()):
                log.info("no activation yet; producers that compute their first ones: %d", producers)
            else:
                log.info("still no producer: start one with `%s`", shell_command("producer", "RUN.toml"))

    def _rest(self) -> None:
        """Waits a moment of a pause. Producers stop by themselves when the buffer is full."""
        self._inbox.wait(0.1)
        if self._meter.seconds >= PAUSED_REPORT_SECONDS:
            self.report()

    def _next_batch(self, run: Run) -> Batch | None:
        """The next batch; None when it does not come soon, or when no SAE is left to train."""
        size = next_batch_size(self.settings, self.tokens)
        if not self.intake.wait_until_ready(size, self._inbox, self._starved_report_seconds):
            if self._meter.seconds >= self._starved_report_seconds:
                self.report()
            return None
        self.draw_weights(run)
        return self.intake.take(size, self._inbox) if run.in_training else None

    def draw_weights(self, run: Run) -> None:
        """Draws the first weights of SAEs that lack them from activations in the buffer."""
        if run.lacking_weights and run.initialise(self.intake.peek(SAMPLE_SIZE)):
            self.write_settings()

    def _step(self, run: Run, batch: Batch) -> None:
        start = time.monotonic()
        run.train_step(batch)
        self.intake.mark_trained(batch)
        self._meter.count_step(time.monotonic() - start)

    def _report_and_publish(self) -> None:
        """Reports every few seconds, and with each snapshot, which is due every so many tokens."""
        is_snapshot_due = self.tokens >= self._next_snapshot
        if is_snapshot_due or self._meter.seconds >= REPORT_SECONDS:
            self.report()
        if is_snapshot_due:
            self._next_snapshot += self.settings.snapshots.every_tokens
            self.publish()

    def _release_finished_saes(self, run: Run) -> None:
        """Publishes the SAEs that have just finished, and removes those of them that were asked to leave."""
        members = [one for one in self.roster.members if not one.ended and _is_finished(run, one)]
        if not members or time.monotonic() < self._retry_release_at:
            return
        if any(run.sae_trainer(member).tokens for member in members):
            if not self.can_publish:
                return
            self.report()
            published = self.publish()
            # An SAE that is not in the snapshot stays and is tried again: if it left unpublished it would be lost.
            members = [one for one in members if one.name in published or not run.sae_trainer(one).tokens]
            if not members:
                self._retry_release_at = time.monotonic() + RETRY_SECONDS
                return
        for member in members:
            member.ended = True
            log.info("sae %s %s", member.name, "has left the run" if member.leaving else "is finished")
            if member.leaving:
                run.detach(member)
                self.intake.forget_hooks(self.roster.forgotten_hooks)
        self.write_settings()
        self.save()

    def _end(self, run: Run, phase: RunPhase) -> None:
        """Reports for the last time, and publishes the last snapshot of a finished run."""
        self.report()
        if phase is not RunPhase.FINISHED:
            return
        names = {sae_trainer.settings.name for sae_trainer in run.publishable}
        is_published = self._published[0] == self.tokens and names <= self._published[1]
        if not is_published and not self.publish():
            raise SnapshotError(
                "the last snapshot could not be written: mend what the log says, then start the trainer again; "
                "it goes on from its checkpoint"
            )
        for member in self.roster.members:
            member.ended |= _is_finished(run, member)

    # Also at an operator's request

    def report(self) -> None:
        """Reports the state of the run to the listener, and begins a new interval of the meter."""
        if (run := self.run) is None:
            return
        report = measure(run, self.intake, self._meter)
        if report.state is not RunPhase.PAUSED:
            run.seconds += self._meter.seconds
        if report.state is RunPhase.PAUSED or run.scales is None:
            self._meter.begin(report.tokens)  # what does not train has no rate
        else:
            self._meter.restart(report.tokens)
        self.last_report = report
        if run.scales is None:
            self._listener.on_fill(report)
        else:
            self._listener.on_report(report)

    @property
    def can_publish(self) -> bool:
        """An SAE has trained, and there are activations to calibrate and test a snapshot with."""
        run = self.run
        return run is not None and bool(run.publishable and calibration_activations(run, self.intake, 1))

    def publish(self) -> list[str]:
        """Publishes a snapshot of this moment; returns the SAEs in it, none when it failed, as the log says."""
        if (run := self.run) is None or not (activations := calibration_activations(run, self.intake)):
            return []
        if not checkpoint.complete_folders(self.settings.run.folder / "checkpoint"):
            self.save()  # a start takes snapshots without a checkpoint for those of a run that has lost it
        report, facts = measure(run, self.intake, self._meter), run_facts(run, self.intake)
        names: list[str] = []
        if try_to_write("snapshot", lambda: names.extend(publish_snapshot(run, report, activations, facts))):
            self._published = (report.tokens, frozenset(names))
            self._listener.on_publish(report.tokens)
        return names

    def save(self, directory: Path | None = None) -> bool:
        """Writes a checkpoint, to `directory` if the run's was moved; returns False when it failed, as the log says."""
        self._next_checkpoint = time.monotonic() + self.settings.checkpoint.every_seconds
        folder = directory or self.settings.run.folder
        if is_written := try_to_write("checkpoint", lambda: self._save(folder)):
            self._listener.on_save()
        return is_written

    def _save(self, directory: Path) -> None:
        blocks, keep = self.settings.parallel.blocks, self.settings.checkpoint.keep
        if (run := self.run) is None:  # what an earlier trainer left is passed on
            checkpoint.save(directory, checkpoint_of(self._saved, {}, self.roster, self.intake, blocks), keep)
        else:
            saved = checkpoint_of(run.state(), run.latent_ranges(), self.roster, self.intake, blocks)
            checkpoint.save(directory, saved, keep, run.write_shards)

    def write_settings(self) -> None:
        """Writes settings.toml with the SAEs of this moment."""
        write_settings(self.settings, self.roster)


def _is_finished(run: Run, member: Member) -> bool:
    return run.sae_trainer(member).phase is SaePhase.FINISHED


def next_batch_size(settings: TrainerSettings, tokens: int) -> int:
    """Tokens of the batch after `tokens` tokens: a whole batch, or what the budget leaves; 0 ends the run."""
    batch, budget = settings.optimizer.batch, settings.run.tokens
    return batch if budget is None else max(0, min(batch, budget - tokens))


def try_to_write(kind: str, write: Callable[[], object]) -> bool:
    """Whether `write` succeeded: a full or read-only disk costs a snapshot or a checkpoint, never the training."""
    try:
        write()
    except (OSError, SafetensorError, SnapshotError) as error:
        log.error("%s not written: %s; training goes on, the next one is tried in its turn", kind, error)
        return False
    return True
