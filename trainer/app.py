"""The trainer as a process: it loads what is in the run directory, opens the stream, runs the loop and saves."""

from __future__ import annotations

import json
import logging
import signal
import threading
import uuid
from itertools import count
from pathlib import Path

import torch

from producer.common.metrics import new_registry, start_metrics_server
from producer.common.shell import shell_command
from producer.keys import KeysError
from producer.lm.precision import use_deterministic_algorithms
from producer.wire import Hello
from trainer.control.commands import answer
from trainer.control.ctl import Inbox
from trainer.health import TrainerHealth
from trainer.kernels.cpu import warm_up
from trainer.metrics import TrainerMetrics
from trainer.planning.machine import free_memory
from trainer.reporting import Reports
from trainer.saes.start import check_starts
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError, supersede_after
from trainer.state.check import ledger_faults
from trainer.state.checkpoint import CheckpointError, Saved, load_newest, start_fault
from trainer.state.durable import replace_text, sweep
from trainer.state.home import Home, HomeError
from trainer.stream.buffer import OrderedBuffer, ShuffleBuffer, pool_rows
from trainer.stream.intake import TORCH_DTYPE, Intake, IntakeError, check_room
from trainer.stream.ledger.credit import CreditPolicy, FairCredit, OrderedCredit
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.training.loop import Loop, is_complete, quarantine_fault, write_settings
from trainer.training.publishing import summary
from trainer.training.roster import Roster
from trainer.training.run import DeviceError, NoVariance, buffer_of, pick_device, roster_of

log = logging.getLogger("sluice.trainer")


def run(settings: TrainerSettings, home: Home, inbox: Inbox) -> int:
    """Trains in the run directory that `home` holds; returns the exit code."""

    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    if settings.run.deterministic:
        use_deterministic_algorithms()
    try:
        directory = home.path
        sweep(directory)
        saved = load_newest(directory)
        if fault := start_fault(directory, saved):
            raise CheckpointError(fault)
        if pick_device(settings.optimizer.device).type == "cpu":
            threading.Thread(target=warm_up, name="warm-up").start()
        if saved is None:
            check_starts(settings)
            _set_reports_aside(directory)
        roster = Roster.of(settings.sae) if saved is None else roster_of(saved[0], settings)
        write_settings(settings, roster)
        ledger = open_ledger(settings, saved)
        if moved := supersede_after(directory, ledger.tokens_trained):
            log.warning(
                "%d snapshots are beyond the checkpoint, which has %s rows, and were moved to %s: %s",
                len(moved), f"{ledger.tokens_trained:,}", moved[0].parent, ", ".join(path.name for path in moved),
            )  # fmt: skip
        registry = new_registry()
        model = settings.model.name if settings.model else "synthetic"
        info = {"id": ledger.run, "directory": settings.run.directory, "model": model}
        metrics = TrainerMetrics(registry, info, settings.checkpoint.every_seconds)
        health, table = TrainerHealth(), settings.monitor
        port, close_metrics = start_metrics_server(
            registry,
            table.host,
            table.trainer_port,
            alive=health.alive,
            ready=health.ready,
            allowed_hosts=table.allowed_hosts,
        )
        log.info("metrics at http://%s:%d/metrics", table.host, port)
        try:
            _train(settings, home, inbox, ledger, roster, saved, metrics, health)
        finally:
            close_metrics()
        return 0
    except (CheckpointError, DeviceError, IntakeError, KeysError, NoVariance, SnapshotError, OSError) as error:
        log.error("%s", error)
        return 1


def _set_reports_aside(directory: Path) -> None:
    """A run that begins does not append to the reports and evaluations of one that was there before."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = directory / name
        if path.is_file() and path.stat().st_size:
            earlier = next(
                one for number in count(1) if not (one := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists()
            )
            path.rename(earlier)
            log.info("%s is of an earlier start, which left no checkpoint; it is %s now", path, earlier.name)


def open_ledger(settings: TrainerSettings, saved: Saved | None) -> Ledger:
    """The ledger of a new run, or of the one that `saved` holds."""

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
    )
    policy: CreditPolicy = FairCredit()
    if deterministic:
        policy = OrderedCredit(limits.capacity - pool_rows(limits.capacity), limits.dead_seconds)
    ledger = Ledger(limits, uuid.uuid4().hex[:12], uuid.uuid4().hex, [settings.stream.endpoint], policy)
    if saved is not None:
        document, tensors = saved
        if faults := ledger_faults(document["ledger"], tensors):
            raise CheckpointError(
                f"the newest checkpoint of {settings.run.folder} does not balance: {'; '.join(faults)}. Rows would "
                "be trained twice, or never: remove that checkpoint to resume from the one before it"
            )
        bits = {
            name.removeprefix("ledger/"): bits.numpy() for name, bits in tensors.items() if name.startswith("ledger/")
        }
        ledger.restore(document["ledger"], bits)
        log.info("resuming run %s at %s rows", ledger.run, f"{ledger.tokens_trained:,}")
        if not ledger.phase.is_receiving and quarantine_fault(settings, ledger.quarantine):
            log.warning("the run had failed; %d quarantined shards are tried again", ledger.retry_quarantined())
    return ledger


def _train(
    settings: TrainerSettings,
    home: Home,
    inbox: Inbox,
    ledger: Ledger,
    roster: Roster,
    saved: Saved | None,
    metrics: TrainerMetrics,
    health: TrainerHealth,
) -> None:
    """Opens the stream, trains until the end or until told to stop, and leaves everything on disk."""

    directory = home.path

    def make_buffer(hello: Hello) -> ShuffleBuffer:
        widths = [hook.width for hook in hello.hooks]
        kind = OrderedBuffer if settings.run.deterministic else ShuffleBuffer
        check_room(hello, settings.buffer.rows, free_memory())
        buffer = kind(settings.buffer.rows, widths, TORCH_DTYPE[hello.dtype], settings.run.seed)
        log.info("buffer: %s rows, %.1f MB", f"{buffer.capacity:,}", buffer.nbytes / 1e6)
        return buffer

    drawn = buffer_of(saved, settings) if saved is not None else (None, {})
    with Intake(settings.stream, ledger, make_buffer, drawn) as intake, Reports(directory, metrics) as reports:
        if settings.stream.keys is not None:
            signal.signal(signal.SIGHUP, lambda *_: intake.keys_changed())
        if is_complete(settings, ledger) or roster.ended:
            intake.drain(finished=True)
            if fault := quarantine_fault(settings, ledger.quarantine):
                raise IntakeError(fault)
            what = "every SAE is finished" if roster.ended else "raise run.tokens to go on"
            log.info("the run is complete with %s rows; %s", f"{ledger.tokens_trained:,}", what)
            return
        (directory / "summary.json").unlink(missing_ok=True)  # it speaks of an end that is no longer one
        log.info("waiting for producers at %s", intake.endpoint)
        if roster.paused:
            log.info("the run is paused: `%s` goes on", shell_command("trainer", "ctl", str(directory), "resume"))
        loop = Loop(settings, roster, intake, inbox, reports, answer, saved)
        health.watch(loop)
        try:
            complete = loop.work()
        except NoVariance:
            intake.drain(finished=True)  # starting again would not help
            raise
        inbox.close()
        quarantine = ledger.quarantine
        if complete and reports.last is None:
            intake.drain(finished=True)
            first = "; ".join(
                f"{shard.shard} of epoch {shard.epoch}: {shard.reason!r}" for shard in quarantine.shards[:3]
            )
            raise IntakeError(f"not one row could be trained on; quarantined shards: {first}")
        # The checkpoint comes last: it makes the run count as complete, and a complete run has a summary.
        fault = quarantine_fault(settings, ledger.quarantine) if complete else None
        if complete and loop.run is not None and reports.last is not None:
            told = summary(loop.run, intake, reports.last, fault)
            replace_text(directory / "summary.json", json.dumps(told, indent=1) + "\n")
        if loop.run is not None and (present := home.present_path) is not None:
            loop.save(present)
        intake.drain(finished=complete)
        if quarantine.shards:
            tokens = quarantine.tokens
            number = "an unknown number of" if tokens is None else f"{tokens:,}"
            log.warning("%d shards are quarantined, %s tokens were not trained on", len(quarantine.shards), number)
        if fault is not None:
            raise IntakeError(fault)
        if complete:
            log.info("finished: %s rows, snapshots in %s", f"{ledger.tokens_trained:,}", directory / "snapshots")
        elif not home.is_here:
            raise HomeError(home.fault())
        else:
            log.info("stopped at %s rows; the same command goes on", f"{ledger.tokens_trained:,}")
