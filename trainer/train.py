"""The training loop: take → step → report, with a snapshot and a checkpoint now and then.

A `Run` is the whole state of training at one instant. It learns its shape from the first producer's HELLO, its input
scales and first weights from the first half bufferful of rows, and everything after that from batches.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from producer.precision import fastest_dtype
from producer.wire import Hello
from trainer import checkpoint
from trainer.buffer import Batch, same_context_mates
from trainer.intake import Intake
from trainer.ledger import Ledger
from trainer.publishing import publish_snapshot, run_facts
from trainer.report import StepReport
from trainer.saes.start import read_start
from trainer.settings import SaeSettings, TrainerSettings
from trainer.snapshot import SnapshotError
from trainer.trainee import Trainee, Wiring

log = logging.getLogger("sluice.trainer")

SAMPLE_ROWS = 32_768
"""Rows that scale, centre and first thresholds are estimated from."""
SNAPSHOT_ROWS = 8_192
"""Rows that a snapshot's thresholds are estimated from."""
REPORT_SECONDS = 2.0


class Run:
    """The SAEs of a run and what they share. `stream` is the frozen HELLO of the first producer."""

    def __init__(self, settings: TrainerSettings, stream: Hello) -> None:
        self.settings = settings
        self.stream = stream
        self.step = 0
        self.seconds = 0.0
        """Time spent training, restarts included."""
        self.scales: list[float] | None = None
        """One per hook: rows are multiplied by it, so that an element's mean square is 1. Frozen."""
        self.last_batch: Batch | None = None
        self.device = pick_device(settings.optimizer.device)
        self.trainees = [self._trainee(sae, number) for number, sae in enumerate(settings.sae)]
        self._pool = self._side_by_side()

    def _side_by_side(self) -> ThreadPoolExecutor | None:
        """On a CPU several SAEs learn at the same time, each on its share of the threads.

        Their steps are independent, and half of a step does not profit from a second thread: two SAEs on two cores
        take little longer than one. A GPU is kept busy by one thread.
        """
        if self.device.type != "cpu" or len(self.trainees) == 1:
            return None
        threads = os.cpu_count() or 1
        if self.settings.run.threads is None:
            torch.set_num_threads(max(1, threads // len(self.trainees)))
        return ThreadPoolExecutor(min(len(self.trainees), threads), thread_name_prefix="sae")

    def _trainee(self, sae: SaeSettings, number: int) -> Trainee:
        widths = tuple(hook.width for hook in self.stream.hooks)
        wiring = Wiring(tuple(self.settings.inputs_of(sae)), self.settings.target_of(sae), widths)
        d_in, optimizer = sum(widths[hook] for hook in wiring.inputs), self.settings.optimizer
        if optimizer.matmul == "auto":
            dtype = fastest_dtype(optimizer.batch, d_in, sae.d_sae, self.device)
        else:
            dtype = getattr(torch, optimizer.matmul)
        log.info("sae %s: %s, %d → %d, encoder product in %s", sae.name, sae.architecture, d_in, sae.d_sae, dtype)
        return Trainee(sae, optimizer, wiring, self.device, dtype, self.settings.run.seed * 1000 + number)

    def initialise(self, sample: list[Tensor]) -> None:
        """Scales and first weights from raw rows per hook; does nothing for a run that was restored."""
        if self.scales is not None:
            return
        rows = [x.float() for x in sample]
        self.scales = [float((x.shape[1] / x.double().square().sum(1).mean()).sqrt()) for x in rows]
        scaled = [x * scale for x, scale in zip(rows, self.scales, strict=True)]
        for trainee in self.trainees:
            trainee.initialise(scaled, self.scales, read_start(trainee.settings))

    def learn(self, batch: Batch) -> None:
        """One step of every SAE on the same rows; what they share is done once."""
        assert self.scales is not None
        learning = [trainee for trainee in self.trainees if not trainee.finished]
        needed = set().union(*(trainee.wiring.hooks for trainee in learning))
        scaled = [
            x.to(self.device).float() * scale if hook in needed else x
            for hook, (x, scale) in enumerate(zip(batch.x, self.scales, strict=True))
        ]

        def step(trainee: Trainee) -> None:
            trainee.step(scaled, self.settings.run.tokens)

        for _ in self._pool.map(step, learning) if self._pool else map(step, learning):
            pass
        self.step += 1
        self.last_batch = batch

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain JSON, tensors) from which `restore` continues."""
        document: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "scales": self.scales, "saes": {}}
        tensors: dict[str, Tensor] = {}
        for trainee in self.trainees:
            document["saes"][trainee.settings.name], more = trainee.state()
            document["saes"][trainee.settings.name]["shape"] = _shape(trainee.settings)
            document["saes"][trainee.settings.name]["matmul"] = str(trainee.sae.matmul_dtype).removeprefix("torch.")
            tensors |= more
        return document, tensors

    def restore(self, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Raises CheckpointError when the run file names other SAEs than the checkpoint holds."""
        ours = {trainee.settings.name: _shape(trainee.settings) for trainee in self.trainees}
        theirs = {name: saved["shape"] for name, saved in document["saes"].items()}
        if ours != theirs:
            raise checkpoint.CheckpointError(
                f"the run file has SAEs {ours}, the checkpoint of {self.settings.run.directory} has {theirs}: "
                "restore the file, or start a new run directory"
            )
        self.step, self.seconds, self.scales = document["step"], document["seconds"], document["scales"]
        for trainee in self.trainees:
            saved = document["saes"][trainee.settings.name]
            trainee.restore(saved, tensors)
            trainee.sae.matmul_dtype = getattr(torch, saved["matmul"])


class Listener(Protocol):
    """Who is told what the loop does."""

    def report(self, report: StepReport) -> None: ...
    def published(self, tokens: int) -> None: ...
    def saved(self) -> None: ...


def train(run: Run, intake: Intake, stop: threading.Event, listener: Listener) -> bool:
    """Trains until the token budget or the data is used up, or `stop` is set. True when the run is complete."""
    settings = run.settings
    if not intake.wait_until_filled(settings.optimizer.batch, stop):
        return intake.ledger.finished
    run.initialise(intake.peek(SAMPLE_ROWS))
    clock = Clock(run, intake)
    # Counted from the run's beginning, so that a trainer restarted more often than it publishes publishes all the same.
    every = settings.snapshots.every_tokens
    next_snapshot = (clock.tokens // every + 1) * every
    next_checkpoint = time.monotonic() + settings.checkpoint.every_seconds
    while (count := _rows_due(settings, clock.tokens)) and (batch := intake.take(count, stop)):
        clock.work(batch)
        snapshot_due = clock.tokens >= next_snapshot
        if snapshot_due or clock.report_due():
            listener.report(report := clock.report())
            if snapshot_due:
                next_snapshot += every
                _publish(run, intake, report, listener)
        if time.monotonic() >= next_checkpoint and not is_complete(settings, intake.ledger):
            if written("checkpoint", lambda: save_checkpoint(run, intake)):
                listener.saved()
            next_checkpoint = time.monotonic() + settings.checkpoint.every_seconds
    complete = is_complete(settings, intake.ledger)
    if run.last_batch is not None:
        listener.report(report := clock.report())
        if complete:
            _publish(run, intake, report, listener)
    return complete


def _publish(run: Run, intake: Intake, report: StepReport, listener: Listener) -> None:
    assert run.last_batch is not None
    # Rows that are still to be trained on; at the end of the data there are none left.
    waiting = intake.peek(SNAPSHOT_ROWS)
    rows = waiting if len(waiting[0]) else run.last_batch.x
    if written("snapshot", lambda: publish_snapshot(run, report, rows, run_facts(run, intake))):
        listener.published(report.tokens)


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
    return ledger.finished or not _rows_due(settings, ledger.rows_trained)


def _rows_due(settings: TrainerSettings, tokens: int) -> int:
    """Rows of the next batch: a whole one, or what the budget leaves; 0 ends the run."""
    left = settings.optimizer.batch if settings.run.tokens is None else settings.run.tokens - tokens
    return min(settings.optimizer.batch, left)


class Clock:
    """Does steps and keeps their times: the only place of the loop that looks at a clock."""

    def __init__(self, run: Run, intake: Intake) -> None:
        self._run, self._intake = run, intake
        self._reported_at = time.monotonic()
        self._reported_tokens = self.tokens
        self._busy = 0.0
        self._steps = 0
        self._waited_before = intake.buffer_report().data_wait_seconds

    @property
    def tokens(self) -> int:
        return self._intake.ledger.rows_trained

    def work(self, batch: Batch) -> None:
        began = time.monotonic()
        self._run.learn(batch)
        self._intake.trained(batch)
        self._busy += time.monotonic() - began
        self._steps += 1

    def report_due(self) -> bool:
        return time.monotonic() - self._reported_at >= REPORT_SECONDS

    def report(self) -> StepReport:
        """The state of the run, with rates since the report before."""
        now, run, buffer = time.monotonic(), self._run, self._intake.buffer_report()
        assert run.scales is not None and run.last_batch is not None
        elapsed = now - self._reported_at
        run.seconds += elapsed
        report = StepReport(
            time=time.time(),
            tokens=self.tokens,
            step=run.step,
            target_tokens=run.settings.run.tokens,
            tokens_per_second=(self.tokens - self._reported_tokens) / max(elapsed, 1e-9),
            step_seconds=self._busy / max(self._steps, 1),
            data_wait_seconds=buffer.data_wait_seconds,
            state=buffer.state,
            buffer_rows=buffer.rows,
            buffer_capacity_rows=buffer.capacity,
            same_context_mates=same_context_mates(run.last_batch, run.stream.context),
            stream=self._intake.stream_report(),
            saes=tuple(trainee.report(run.scales) for trainee in run.trainees),
        )
        self._reported_at, self._reported_tokens, self._busy, self._steps = now, self.tokens, 0.0, 0
        return report


def save_checkpoint(run: Run, intake: Intake) -> None:
    """One instant on disk: weights and ledger between two steps."""
    document, tensors = run.state()
    with intake.lock:
        document["ledger"], bits = intake.ledger.state()
        document["buffer_random"] = intake.buffer.random_state() if intake.buffer else None
    tensors |= {f"ledger/{name}": torch.from_numpy(value) for name, value in bits.items()}
    settings = run.settings
    directory = Path(settings.run.directory)
    checkpoint.save(directory, intake.ledger.rows_trained, document, tensors, settings.checkpoint.keep)


class DeviceError(ValueError):
    """The device asked for is not here."""


def pick_device(name: str) -> torch.device:
    """The device of optimizer.device; auto takes a GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"optimizer.device = {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            'set it to "auto" or "cpu", or install a torch build for your CUDA'
        )
    return device


def _shape(sae: SaeSettings) -> dict[str, Any]:
    """What of an SAE's settings must not change when a run is resumed."""
    return sae.model_dump(
        mode="json",
        include={"architecture", "d_sae", "hook", "hooks", "target", "skip", "k", "matryoshka", "whitening", "train"},
        exclude_none=True,
    )
