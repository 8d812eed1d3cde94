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
from trainer.report import SaeReport, StepReport
from trainer.saes.inference import check, export
from trainer.settings import SaeSettings, TrainerSettings
from trainer.snapshot import SnapshotError, finite, publish, retire
from trainer.trainee import Trainee

log = logging.getLogger("sluice.trainer")

SAMPLE_ROWS = 32_768
"""Rows that scale, centre and first thresholds are estimated from."""
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
        self.trainees = [self._trainee(sae) for sae in settings.sae]
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

    def _trainee(self, sae: SaeSettings) -> Trainee:
        hook = self.settings.hook_of(sae)
        d_in, optimizer = self.stream.hooks[hook].width, self.settings.optimizer
        if optimizer.matmul == "auto":
            dtype = fastest_dtype(optimizer.batch, d_in, sae.d_sae, self.device)
        else:
            dtype = getattr(torch, optimizer.matmul)
        log.info("sae %s: %s, %d → %d, encoder product in %s", sae.name, sae.architecture, d_in, sae.d_sae, dtype)
        return Trainee(sae, optimizer, d_in, hook, self.device, dtype)

    def initialise(self, sample: list[Tensor]) -> None:
        """Scales and first weights from raw rows per hook; does nothing for a run that was restored."""
        if self.scales is not None:
            return
        rows = [x.to(self.device).float() for x in sample]
        self.scales = [float((x.shape[1] / x.double().square().sum(1).mean()).sqrt()) for x in rows]
        for number, trainee in enumerate(self.trainees):
            generator = torch.Generator().manual_seed(self.settings.run.seed * 1000 + number)
            trainee.initialise((rows[trainee.hook] * self.scales[trainee.hook]).cpu(), generator)

    def learn(self, batch: Batch, tokens: int) -> None:
        """One step of every SAE on the same rows; what they share is done once."""
        assert self.scales is not None
        hooks = {trainee.hook for trainee in self.trainees}
        scaled = {hook: batch.x[hook].to(self.device).float() * self.scales[hook] for hook in hooks}

        def step(trainee: Trainee) -> None:
            trainee.step(scaled[trainee.hook], tokens, self.settings.run.tokens)

        for _ in self._pool.map(step, self.trainees) if self._pool else map(step, self.trainees):
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

    def publish(self, report: StepReport, run: dict[str, Any]) -> Path:
        """Writes a snapshot of every SAE, self-tested, and retires old ones."""
        assert self.last_batch is not None and self.scales is not None
        directory = Path(self.settings.run.directory)
        exports = [
            export(
                trainee.sae,
                self.scales[trainee.hook],
                trainee.statistics.firing_rate(),
                self.last_batch.x[trainee.hook][:1024],
                self._metadata(trainee, report, run),
                self.numbers(trainee, _of(report, trainee)),
            )
            for trainee in self.trainees
        ]
        folder = publish(directory, report.tokens, exports, run, check)
        retire(directory, self.settings.snapshots.keep)
        return folder

    def numbers(self, trainee: Trainee, report: SaeReport) -> dict[str, Any]:
        """What manifest and summary tell of one SAE."""
        return {
            "architecture": trainee.settings.architecture,
            "d_in": trainee.sae.d_in,
            "d_sae": trainee.sae.d_sae,
            "hook": self.stream.hooks[trainee.hook].name,
            "l0": finite(report.l0),
            "mse": finite(report.mse),
            "fvu": finite(report.fvu),
            "dead_latents": report.dead_latents,
            "dead_latents_ratio": report.dead_latents_ratio,
            "shrinkage": finite(report.shrinkage),
        }

    def _metadata(self, trainee: Trainee, report: StepReport, run: dict[str, Any]) -> dict[str, Any]:
        """What SAELens and others look for beside the weights, and where this SAE came from."""
        facts, hook = self.stream.provenance, self.stream.hooks[trainee.hook]
        measured = _of(report, trainee)
        return {
            "model_name": facts.get("model"),
            "model_revision": facts.get("model_revision"),
            "model_from_pretrained_kwargs": {},
            "hook_name": hook.name,
            "hf_hook_name": hook.module,
            "context_size": self.stream.context,
            "prepend_bos": facts.get("prepend_bos"),
            "exclude_special_tokens": facts.get("exclude_special"),
            "dataset_path": facts.get("corpus"),
            "sae_lens_training_version": None,
            "trained_with": "sluice",
            "tokens_trained": report.tokens,
            "input_scale": self.scales[trainee.hook] if self.scales else None,
            "settings": trainee.settings.model_dump(mode="json", exclude_none=True),
            "run": run["id"],
            "stream": facts,
            "l0": finite(measured.l0),
            "fvu": finite(measured.fvu),
            "num_dead_features": measured.dead_latents,
        }


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
    if written("snapshot", lambda: run.publish(report, run_facts(run, intake))):
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
        self._run.learn(batch, self.tokens)
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
            saes=tuple(trainee.report(run.scales[trainee.hook]) for trainee in run.trainees),
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


def run_facts(run: Run, intake: Intake) -> dict[str, Any]:
    """What a manifest tells of the run."""
    hooks, bounds = run.stream.hooks, intake.ledger.norm_bounds
    return {
        "id": intake.ledger.run,
        "settings": run.settings.model_dump(mode="json", exclude_none=True),
        "stream": {
            **run.stream.provenance,
            "fingerprint": run.stream.fingerprint,
            "shards": run.stream.shards,
            "held_out": run.stream.held_out,
            "hooks": [hook.model_dump() for hook in hooks],
            "norm_bounds": bounds and {hook.name: bound for hook, bound in zip(hooks, bounds, strict=True)},
        },
        "epoch": intake.ledger.epoch,
    }


def summary(run: Run, intake: Intake, report: StepReport) -> dict[str, Any]:
    """The content of summary.json; the monitor adds the evaluation."""
    return {
        "tokens": report.tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_second": round(report.tokens / max(run.seconds, 1e-9), 1),
        "rows_trained": intake.ledger.rows_trained,
        "rows_set_aside": intake.ledger.rows_set_aside,
        "shards_set_aside": intake.ledger.set_aside,
        "saes": {trainee.settings.name: run.numbers(trainee, _of(report, trainee)) for trainee in run.trainees},
    }


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
    return {"architecture": sae.architecture, "d_sae": sae.d_sae, "hook": sae.hook, "k": sae.k}


def _of(report: StepReport, trainee: Trainee) -> SaeReport:
    return next(sae for sae in report.saes if sae.name == trainee.settings.name)
