"""`python -m trainer RUN.toml`: trains the run's SAEs from the stream until the tokens or the data are used up.

`python -m trainer ctl …` speaks to one that is running, `python -m trainer check …` tells whether a run directory is
whole, `python -m trainer export …` converts a snapshot, `python -m trainer estimate …` tells what a run will cost.
Settings are read first, so that `--help` and faults answer at once; torch is imported after. SIGTERM, Ctrl-C, a closed
terminal and what batch systems send (SIGUSR1, SIGUSR2) write a checkpoint and leave; the same command goes on from
there. Exit codes: 0 finished or stopped, 1 failed, 2 bad settings.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer.common.logs import set_up
from producer.common.process import run_within_limits, stop_on_signals
from producer.common.shell import shell_command
from producer.settings import parse_command_line
from trainer.control import ctl
from trainer.control.ctl import Inbox, listening
from trainer.settings import TrainerSettings
from trainer.state.home import Home, HomeError

if TYPE_CHECKING:
    from producer.wire import Hello
    from trainer.health import Health
    from trainer.metrics import TrainerMetrics
    from trainer.report import StepReport
    from trainer.state.checkpoint import Saved
    from trainer.stream.ledger import Ledger
    from trainer.training.roster import Roster

PURPOSE = f"""Trains sparse autoencoders from the activations that producers stream to it.

Owns the run directory: checkpoint, snapshots, metrics.jsonl, summary.json. Start it again with the same file and it
goes on where it was; every row of the corpus is trained on once per epoch, whatever was killed.

Beside it:
  {shell_command("trainer", "ctl", "RUN_DIR", "COMMAND")}
      speak to a running trainer: status, snapshot, attach, detach, cooldown, …
  {shell_command("trainer", "check", "RUN_DIR")}
      is the run directory whole, and what would a new start do
  {shell_command("trainer", "export", "SNAPSHOT")} …
      write a snapshot in another library's format
  {shell_command("trainer", "estimate", "RUN.toml")}
      how fast a run would be, and what it would hold, before it starts
Each has a --help of its own."""

log = logging.getLogger("sluice.trainer")
PROGRESS_SECONDS = 30.0
"""A line of the log tells how training goes this often."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["ctl"]:
        return ctl.main(arguments[1:])
    if arguments[:1] == ["check"]:
        from trainer.state.check import main as check

        return check(arguments[1:])
    if arguments[:1] == ["export"]:
        from trainer.saes.export import main as export

        return export(arguments[1:])
    if arguments[:1] == ["estimate"]:
        from trainer.planning.estimate import main as estimate

        return estimate(arguments[1:])
    settings = parse_command_line(shell_command("trainer"), PURPOSE, TrainerSettings, arguments)
    set_up("trainer")
    stop = threading.Event()
    stop_on_signals(stop.set)
    if settings.stream.keys is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # means that keys have changed, and there is no stream yet
    for warning in settings.warnings():
        log.warning("%s", warning)
    log.info("run directory %s", settings.run.folder)
    try:
        with Home(settings.run.folder) as home:
            # Open from the first moment, so that who asks waits for an answer and is not told that nobody is there.
            inbox = Inbox(stop)
            home.watch(stop.set)
            with listening(home.path, inbox):
                return run_within_limits(log, lambda: _run(settings, home, inbox))
    except HomeError as error:
        log.error("%s", error)
        return 1


def _run(settings: TrainerSettings, home: Home, inbox: Inbox) -> int:
    # Read when torch is loaded: its threads, waiting for the next product, would spin where the kernels' threads work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from producer.common.metrics import new_registry, start_metrics_server
    from producer.keys import KeysError
    from producer.lm.precision import take_deterministic_algorithms
    from trainer.health import Health
    from trainer.kernels.cpu import warm_up
    from trainer.metrics import TrainerMetrics
    from trainer.saes.start import check_starts
    from trainer.snapshot import SnapshotError, supersede_after
    from trainer.state.checkpoint import CheckpointError, load_newest, start_fault
    from trainer.state.durable import sweep
    from trainer.stream.intake import IntakeError
    from trainer.training.loop import write_settings
    from trainer.training.roster import Roster
    from trainer.training.run import DeviceError, NoVariance, pick_device, roster_of

    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    if settings.run.deterministic:
        take_deterministic_algorithms()
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
        ledger = _ledger(settings, saved)
        if moved := supersede_after(directory, ledger.rows_trained):
            log.warning(
                "%d snapshots are beyond the checkpoint, which has %s rows, and were moved to %s: %s",
                len(moved), f"{ledger.rows_trained:,}", moved[0].parent, ", ".join(path.name for path in moved),
            )  # fmt: skip
        registry = new_registry()
        model = settings.model.name if settings.model else "synthetic"
        info = {"id": ledger.run, "directory": settings.run.directory, "model": model}
        metrics = TrainerMetrics(registry, info, settings.checkpoint.every_seconds)
        health, table = Health(), settings.monitor
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


def _ledger(settings: TrainerSettings, saved: Saved | None) -> Ledger:
    """The ledger of a new run, or of the one that `saved` holds."""
    from trainer.state.check import ledger_faults
    from trainer.state.checkpoint import CheckpointError
    from trainer.stream.buffer import pool_rows
    from trainer.stream.ledger import Ledger, Limits
    from trainer.training.loop import quarantine_fault

    deterministic = settings.run.deterministic
    limits = Limits(
        capacity_rows=settings.buffer.rows,
        seed=settings.run.seed,
        epochs=settings.corpus.epochs or None,
        heartbeat_seconds=settings.stream.heartbeat_seconds,
        dead_seconds=settings.stream.dead_seconds,
        stall_seconds=settings.stream.stall_seconds,
        pool_rows=pool_rows(settings.buffer.rows) if deterministic else None,
        expected={
            "hooks": settings.hooks,
            "dtype": settings.stream.dtype,
            "context": settings.corpus.context,
            "held_out": settings.corpus.held_out,
        }
        | ({"deterministic": True} if deterministic else {}),
    )
    ledger = Ledger(limits, uuid.uuid4().hex[:12], uuid.uuid4().hex, [settings.stream.endpoint])
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
        log.info("resuming run %s at %s rows", ledger.run, f"{ledger.rows_trained:,}")
        if ledger.exhausted and quarantine_fault(settings, ledger):
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
    health: Health,
) -> None:
    """Opens the stream, trains until the end or until told to stop, and leaves everything on disk."""
    from trainer.control.commands import answer
    from trainer.planning.machine import free_memory
    from trainer.state.durable import replace_text
    from trainer.stream.buffer import OrderedBuffer, ShuffleBuffer
    from trainer.stream.intake import TORCH_DTYPE, Intake, IntakeError, check_room
    from trainer.training.loop import Loop, is_complete, quarantine_fault
    from trainer.training.publishing import summary
    from trainer.training.run import NoVariance, buffer_of

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
            if fault := quarantine_fault(settings, ledger):
                raise IntakeError(fault)
            what = "every SAE is finished" if roster.ended else "raise run.tokens to go on"
            log.info("the run is complete with %s rows; %s", f"{ledger.rows_trained:,}", what)
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
        if complete and reports.last is None:
            intake.drain(finished=True)
            raise IntakeError(f"not one row could be trained on; quarantined shards: {ledger.quarantined[:3]}")
        # The checkpoint comes last: it makes the run count as complete, and a complete run has a summary.
        fault = quarantine_fault(settings, ledger) if complete else None
        if complete and loop.run is not None and reports.last is not None:
            told = summary(loop.run, intake, reports.last, fault)
            replace_text(directory / "summary.json", json.dumps(told, indent=1) + "\n")
        if loop.run is not None and (present := home.present_path) is not None:
            loop.save(present)
        intake.drain(finished=complete)
        if ledger.quarantined:
            tokens = ledger.tokens_quarantined
            number = "an unknown number of" if tokens is None else f"{tokens:,}"
            log.warning("%d shards are quarantined, %s tokens were not trained on", len(ledger.quarantined), number)
        if fault is not None:
            raise IntakeError(fault)
        if complete:
            log.info("finished: %s rows, snapshots in %s", f"{ledger.rows_trained:,}", directory / "snapshots")
        elif not home.is_here:
            raise HomeError(home.fault())
        else:
            log.info("stopped at %s rows; the same command goes on", f"{ledger.rows_trained:,}")


class Reports:
    """Where the loop's reports go: a line of metrics.jsonl each, and Prometheus."""

    def __init__(self, directory: Path, metrics: TrainerMetrics) -> None:
        self.last: StepReport | None = None
        self._told = time.monotonic()
        self._history = open(directory / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed on exit)
        self._metrics = metrics

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        self._history.close()

    def waiting(self, report: StepReport) -> None:
        self._metrics.update(report)

    def report(self, report: StepReport) -> None:
        self._tell(report, self.last)
        self.last = report
        self._metrics.update(report)
        self._remember(json.dumps(_without_nan(report.as_json())).encode() + b"\n")

    def _remember(self, line: bytes) -> None:
        """A line of the history. A full disk costs it this line, never the training."""
        end = self._history.tell()
        try:
            if self._history.write(line) == len(line):
                return
            fault = "no space left on the disk"
        except OSError as error:
            fault = str(error)
        with suppress(OSError):
            self._history.truncate(end)  # half a line would spoil the next one
        log.error("metrics.jsonl not written: %s; training goes on", fault)

    def published(self, tokens: int) -> None:
        self._metrics.set_snapshot(tokens, time.time())
        log.info("snapshot of %s rows published", f"{tokens:,}")

    def _tell(self, report: StepReport, before: StepReport | None) -> None:
        """A line for people: at once when something is wrong, every half minute when nothing is."""
        stream = report.stream
        if before is not None and (lost := stream.sessions_lost - before.stream.sessions_lost) > 0:
            log.warning("%d producer(s) lost; what they had leased goes to others", lost)
        if report.state == "starved" and (before is None or before.state != "starved"):
            at_work = sum(stream.producers.values())
            log.warning("the buffer is under half full and training waits; producers at work: %d", at_work)
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            saes = " · ".join(f"{sae.name} fvu {sae.fvu:.4f} l0 {sae.l0:.1f}" for sae in report.saes)
            log.info("%s rows · %s/s · %s", f"{report.tokens:,}", f"{report.tokens_per_second:,.0f}", saes)
            log.info("%s", report.bottleneck)

    def saved(self) -> None:
        self._metrics.set_checkpoint_time(time.time())


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity; null stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
