"""The trainer as a process: resume from the run directory, open the stream, run the loop, save."""

from __future__ import annotations

import json
import logging
import signal
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch

from producer.common.formatting import format_bytes
from producer.common.memory import free_memory
from producer.common.metrics import new_registry, start_metrics_server
from producer.common.shell import shell_command
from producer.keys import KeysError
from producer.lm.precision import use_deterministic_algorithms
from producer.wire import Hello
from trainer.control.commands import handle
from trainer.control.requests import Inbox
from trainer.health import TrainerHealth
from trainer.kernels.cpu import warm_up
from trainer.metrics import TrainerMetrics
from trainer.parallel.environment import ONE_PROCESS, Launch
from trainer.parallel.ranks import RankLostError, Ranks, World
from trainer.phases import RunPhase
from trainer.reporting import Reporter
from trainer.saes.start import check_starts
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError, supersede_after
from trainer.state.audit import ledger_faults
from trainer.state.checkpoint import CheckpointError, complete_folders, load_newest, start_fault
from trainer.state.durable import replace_text, sweep
from trainer.state.format import NEW_BUFFER, Checkpoint
from trainer.state.run_directory import RunDirectory, RunDirectoryError
from trainer.stream.buffer import OrderedBuffer, ShuffleBuffer, pool_rows
from trainer.stream.ingest import check_room
from trainer.stream.intake import Intake
from trainer.stream.ledger.credit import CreditPolicy, FairCredit, OrderedCredit
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.ledger.resume import restore_ledger
from trainer.stream.ledger.shards import Quarantine
from trainer.stream.mixing import mixing_advice
from trainer.stream.payload import TORCH_DTYPE
from trainer.stream.router import IntakeError
from trainer.training.device import DeviceError, pick_device
from trainer.training.leader import Leader, LeaderRun
from trainer.training.loop import Loop, MakeRun
from trainer.training.publishing import summary, write_settings
from trainer.training.resuming import buffer_of, roster_of, share_of
from trainer.training.roster import Roster
from trainer.training.run import NoVariance, Run

log = logging.getLogger("sluice.trainer")

FAILURES = (
    CheckpointError, DeviceError, IntakeError, KeysError, NoVariance, RankLostError, RunDirectoryError, SnapshotError,
    OSError,
)  # fmt: skip
"""Errors whose messages say what to do."""


def run(settings: TrainerSettings, run_directory: RunDirectory, inbox: Inbox, launch: Launch = ONE_PROCESS) -> int:
    """Trains in a run directory that is locked, as rank 0 of the ranks that were launched; returns the exit code."""
    leader: Leader | None = None
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    if settings.run.deterministic:
        use_deterministic_algorithms()
    try:
        directory = run_directory.path
        sweep(directory)
        ranks = host_ranks = Ranks(0, 1, None, settings.parallel.blocks, exchange=settings.parallel.exchange)
        if launch.world_size > 1:
            leader = Leader(World())
            ranks, host_ranks = leader.open(settings, directory)
            log.info(
                "%d ranks share the latents of each SAE%s", ranks.size,
                f", in each of {settings.parallel.groups} placement groups" if settings.parallel.groups > 1 else "",
            )  # fmt: skip
        saved = load_newest(directory, partial(share_of, settings, ranks) if launch.world_size > 1 else None)
        if fault := start_fault(directory, saved) or blocks_fault(settings, saved):
            raise CheckpointError(fault)
        if pick_device(settings.optimizer.device).type == "cpu":
            threading.Thread(target=warm_up, name="warm-up").start()
        if saved is None:
            check_starts(settings)
            _rename_old_reports(directory)
        roster = Roster.of(settings.sae) if saved is None else roster_of(saved.document, settings)
        write_settings(settings, roster)
        ledger = open_ledger(settings, saved)
        if snapshots := supersede_after(directory, ledger.tokens_trained):
            log.warning(
                "%d snapshots are beyond the checkpoint, which has %s tokens, and were moved to %s: %s",
                len(snapshots), f"{ledger.tokens_trained:,}", snapshots[0].parent,
                ", ".join(path.name for path in snapshots),
            )  # fmt: skip
        registry = new_registry()
        model = settings.model.name if settings.model else "synthetic"
        info = {"id": ledger.run, "directory": settings.run.directory, "model": model}
        metrics = TrainerMetrics(registry, info, settings.checkpoint.every_seconds)
        health, http = TrainerHealth(), settings.monitor
        port, close_metrics = start_metrics_server(
            registry,
            http.host,
            http.trainer_port,
            alive=health.alive,
            ready=health.ready,
            allowed_hosts=http.allowed_hosts,
        )
        log.info("metrics at http://%s:%d/metrics", http.host, port)
        try:
            make_run: MakeRun = partial(Run, ranks=ranks)
            if leader is not None:
                folder = None if saved is None else complete_folders(directory / "checkpoint")[-1]
                make_run = partial(LeaderRun, leader=leader, ranks=ranks, host_ranks=host_ranks, checkpoint=folder)
            keep_alive = leader.keep_alive if leader is not None else lambda: None
            _train(settings, run_directory, inbox, ledger, roster, saved, metrics, health, make_run, keep_alive)
        finally:
            close_metrics()
        return 0
    except FAILURES as error:
        log.error("%s", error)
        return 1
    finally:
        if leader is not None:
            with suppress(RankLostError):
                leader.end()


def blocks_fault(settings: TrainerSettings, saved: Checkpoint | None) -> str | None:
    """Why the run in the checkpoint cannot go on with these blocks of latents; None when it can."""
    blocks = settings.parallel.blocks
    if saved is None or not saved.tokens or saved.document.blocks == blocks:
        return None
    return (
        f"parallel.blocks = {blocks}, and the run in {settings.run.folder} began with {saved.document.blocks}, which "
        "is fixed for a run: set it to what it was, or use a new run.directory"
    )


def _rename_old_reports(directory: Path) -> None:
    """Renames the reports and evaluations of an earlier run, so that a new one does not append to them."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = directory / name
        if path.is_file() and path.stat().st_size:
            candidates = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
            new_path = next(candidate for candidate in candidates if not candidate.exists())
            path.rename(new_path)
            log.info("%s is of an earlier start, which left no checkpoint; it is %s now", path, new_path.name)


def open_ledger(settings: TrainerSettings, saved: Checkpoint | None) -> Ledger:
    """The ledger of a new run, or of the one that `saved` holds. Raises CheckpointError when that does not balance."""
    deterministic = settings.run.deterministic
    limits = Limits(
        capacity=settings.buffer.rows,
        seed=settings.run.seed,
        epochs=settings.corpus.epochs or None,
        heartbeat_seconds=settings.stream.heartbeat_seconds,
        dead_seconds=settings.stream.dead_seconds,
        stall_seconds=settings.stream.stall_seconds,
        expected={
            "hooks": settings.hooks,
            "dtype": settings.stream.dtype,
            "context": settings.corpus.context,
            "held_out": settings.corpus.held_out,
        }
        | ({"deterministic": True} if deterministic else {}),
        revisions=tuple(settings.model.revisions or ()) if settings.model is not None else (),
        watches_checkpoints=settings.model is not None and settings.model.watch is not None,
    )
    policy: CreditPolicy = FairCredit()
    if deterministic:
        policy = OrderedCredit(limits.capacity - pool_rows(limits.capacity), limits.dead_seconds)
    ledger = Ledger(limits, uuid.uuid4().hex[:12], uuid.uuid4().hex, [settings.stream.endpoint], policy)
    if saved is not None:
        books, bits = saved.document.ledger, saved.tensors.shards
        if faults := ledger_faults(books, bits):
            raise CheckpointError(
                f"the newest checkpoint of {settings.run.folder} does not balance: {'; '.join(faults)}. Tokens would "
                "be trained twice, or never: remove that checkpoint to resume from the one before it"
            )
        restore_ledger(ledger, books, bits)
        log.info("resuming run %s at %s tokens", ledger.run, f"{ledger.tokens_trained:,}")
        if not ledger.phase.is_receiving and quarantine_fault(settings, ledger.quarantine):
            log.warning("the run had failed; %d quarantined shards are tried again", ledger.retry_quarantined())
    return ledger


def quarantine_fault(settings: TrainerSettings, quarantine: Quarantine) -> str | None:
    """Why a run that is over has failed: too many of its shards are quarantined; None when it has not."""
    if quarantine.ratio <= settings.run.max_quarantined_ratio:
        return None
    first = quarantine.shards[0]
    return (
        f"{len(quarantine.shards)} shards, {quarantine.ratio:.1%} of those begun, are quarantined, and "
        f"run.max_quarantined_ratio = {settings.run.max_quarantined_ratio:g}: the run has failed. The first is shard "
        f"{first.shard} of epoch {first.epoch}: {first.reason!r}. Mend what is wrong and start the trainer "
        "again, which tries them again, or raise run.max_quarantined_ratio"
    )


def _train(
    settings: TrainerSettings,
    run_directory: RunDirectory,
    inbox: Inbox,
    ledger: Ledger,
    roster: Roster,
    saved: Checkpoint | None,
    metrics: TrainerMetrics,
    health: TrainerHealth,
    make_run: MakeRun,
    keep_alive: Callable[[], None],
) -> None:
    """Opens the stream, trains until the end or until the trainer is asked to stop, and saves everything."""

    def make_buffer(hello: Hello) -> ShuffleBuffer:
        widths = [hook.width for hook in hello.hooks]
        kind = OrderedBuffer if settings.run.deterministic else ShuffleBuffer
        check_room(hello, settings.buffer.rows, free_memory())
        buffer = kind(settings.buffer.rows, widths, TORCH_DTYPE[hello.dtype], settings.run.seed)
        log.info("buffer: %s tokens, %s", f"{buffer.capacity:,}", format_bytes(buffer.nbytes))
        if advice := mixing_advice(hello, buffer.capacity):
            log.warning("%s", advice)
        return buffer

    buffer_state = buffer_of(saved, settings) if saved is not None else NEW_BUFFER
    intake = Intake(settings.stream, ledger, make_buffer, buffer_state)
    intake.forget_hooks(roster.forgotten_hooks)
    with intake, Reporter(run_directory.path, metrics) as reporter:
        if settings.stream.keys is not None:
            signal.signal(signal.SIGHUP, lambda *_: intake.reload_keys())
        loop = Loop(settings, roster, intake, inbox, reporter, handle, saved, make_run=make_run, keep_alive=keep_alive)
        if loop.phase is RunPhase.FINISHED:
            _refuse_to_begin(settings, roster, intake)
            return
        (run_directory.path / "summary.json").unlink(missing_ok=True)  # it is of an end that is no longer one
        log.info("waiting for producers at %s", intake.endpoint)
        if roster.paused:
            log.info(
                "the run is paused: `%s` goes on", shell_command("trainer", "ctl", str(run_directory.path), "resume")
            )
        health.watch(loop)
        try:
            phase = loop.train()
        except NoVariance:
            intake.drain(finished=True)  # starting again would not help
            raise
        inbox.close()
        _end(run_directory, loop, reporter, is_complete=phase is RunPhase.FINISHED)


def early_end(settings: TrainerSettings, tokens: int, roster: Roster) -> str | None:
    """Why a complete run has trained on fewer tokens than its target; None when it has not."""
    target = settings.run.tokens
    if target is None or tokens >= target:
        return None
    reason = (
        "every SAE is finished"
        if roster.is_finished
        else "the data is used up: raise corpus.epochs, or name more text, for more"
    )
    return f"the run ended after {tokens:,} of run.tokens = {target:,} tokens ({tokens / target:.0%}): {reason}"


def _refuse_to_begin(settings: TrainerSettings, roster: Roster, intake: Intake) -> None:
    """Sends producers away from a run that is complete. Raises IntakeError when it had failed."""
    intake.drain(finished=True)
    if fault := quarantine_fault(settings, intake.quarantine()):
        raise IntakeError(fault)
    advice = "every SAE is finished" if roster.is_finished else "raise run.tokens to go on"
    log.info("the run is complete with %s tokens; %s", f"{intake.tokens_trained:,}", advice)


def _end(run_directory: RunDirectory, loop: Loop, reporter: Reporter, is_complete: bool) -> None:
    """Writes summary and checkpoint, and sends producers away. Raises IntakeError when the run has failed."""
    intake, quarantine, tokens = loop.intake, loop.intake.quarantine(), f"{loop.tokens:,}"
    if is_complete and reporter.last is None:
        intake.drain(finished=True)
        shards = "; ".join(f"{one.shard} of epoch {one.epoch}: {one.reason!r}" for one in quarantine.shards[:3])
        raise IntakeError(f"not one token could be trained on; quarantined shards: {shards}")
    # The checkpoint comes last: it makes the run count as complete, and a complete run has a summary.
    fault = quarantine_fault(loop.settings, quarantine) if is_complete else None
    if is_complete and loop.run is not None and reporter.last is not None:
        document = summary(loop.run, intake, reporter.last, fault)
        replace_text(run_directory.path / "summary.json", json.dumps(document, indent=1) + "\n")
    if loop.run is not None and (directory := run_directory.current_path) is not None:
        loop.save(directory)
    intake.drain(finished=is_complete)
    if quarantine.shards:
        number = "an unknown number of" if quarantine.tokens is None else f"{quarantine.tokens:,}"
        log.warning("%d shards are quarantined, %s tokens were not trained on", len(quarantine.shards), number)
    if fault is not None:
        raise IntakeError(fault)
    if is_complete:
        if early := early_end(loop.settings, loop.tokens, loop.roster):
            log.warning("%s", early)
        log.info("finished: %s tokens, snapshots in %s", tokens, run_directory.path / "snapshots")
    elif not run_directory.is_in_place:
        raise RunDirectoryError(run_directory.fault())
    else:
        log.info("stopped at %s tokens; the same command goes on", tokens)
