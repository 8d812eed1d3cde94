"""The demo's producer alone, its trainer alone, and both together, in tokens per second.

alone     the producer against a trainer that takes rows in and learns nothing; the trainer on a bufferful of the
          producer's rows, over and over. Each has all cores of the machine.
together  the two processes as the demo runs them, sharing the cores.

The trainer is measured, alone and together, after the same number of tokens: early JumpReLU steps have more latents.
On shared cores no schedule can beat 1 / (1/p + 1/t): a token needs 1/p seconds of the machine in the producer and 1/t
in the trainer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from monitor.run_directory import last_report
from producer.sources.language_model import LanguageModelSource
from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.producer import RUN_FILE, RunningProducer, demo_settings
from tests.benchmarks.subject import hello_of
from trainer.stream.buffer import ShuffleBuffer
from trainer.training.run import Run

SECONDS = 6.0
WARM_TOKENS = 300_000
PRODUCER, TRAINER, BEST, TOGETHER = "producer alone", "trainer alone", "best possible, 1/(1/p + 1/t)", "together"


def run(options: Options) -> Iterator[Result]:
    seconds = 2.0 if options.quick else SECONDS
    warm = WARM_TOKENS // 10 if options.quick else WARM_TOKENS
    result, memory = Result("The demo's stream", "tokens/s"), list[float]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = LanguageModelSource(demo_settings(f"model.device={options.device}"))  # type: ignore[arg-type]
        producer = stack.enter_context(RunningProducer(folder, source, options.device))
        producer.rate(1.0)
        trainer = _TrainerAlone(producer.rows(), folder, options.device)
        contenders = {
            PRODUCER: partial(producer.rate, seconds),
            TRAINER: partial(trainer.rate, seconds, warm),
            TOGETHER: partial(_together, seconds, warm, options.device, memory),
        }
        result.take_turns(options.rounds, contenders)
    producers, trainers = result.measured[PRODUCER], result.measured[TRAINER]
    result.measured[BEST] = [1 / (1 / p + 1 / t) for p, t in zip(producers, trainers, strict=True)]
    result.figures = [Figure("together / best possible", result.ratio(TOGETHER, BEST), 0.9, at_least=True)]
    slower = "producer" if result.middle(PRODUCER) < result.middle(TRAINER) else "trainer"
    result.notes.append(f"the {slower} is the slower side")
    if memory:
        result.notes.append(f"memory at the end: trainer {memory[-2]:.0f} MB, producer {memory[-1]:.0f} MB")
    yield result


def demo_overrides(folder: Path, device: str) -> list[str]:
    """The demo in a folder and on a socket of its own, for ever."""
    return [
        f"run.directory={folder}/run",
        f"stream.endpoint=ipc://{folder}/stream",
        f"model.device={device}",
        f"optimizer.device={device}",
        "monitor.trainer_port=0",
        "monitor.producer_port=0",
        "run.tokens=1_000_000_000",
        "corpus.epochs=1000",
    ]


def start(program: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", program, RUN_FILE, *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class _TrainerAlone:
    """The demo's run, learning from rows that are there already."""

    def __init__(self, rows: torch.Tensor, folder: Path, device: str) -> None:
        settings = demo_settings(*demo_overrides(folder, device))
        self._batch = settings.optimizer.batch
        self._run = Run(settings, hello_of(settings.hooks[0], rows.shape[1]))
        self._run.initialise([rows])
        self._buffer = ShuffleBuffer(len(rows), [rows.shape[1]], torch.bfloat16, 0)
        self._buffer.insert([rows], 0, torch.arange(len(rows)).numpy())
        self._tokens = 0

    def rate(self, seconds: float, warm: int) -> float:
        while self._tokens < warm:
            self._step()
        tokens, began = self._tokens, time.monotonic()
        while time.monotonic() - began < seconds:
            self._step()
        return (self._tokens - tokens) / (time.monotonic() - began)

    def _step(self) -> None:
        batch = self._buffer.draw(self._batch)
        self._run.train_step(batch)
        self._buffer.insert(batch.x, 0, batch.position)
        self._tokens += self._batch


def _together(seconds: float, warm: int, device: str, memory: list[float]) -> float:
    """Both processes as the demo runs them, once the first `warm` tokens are trained; their megabytes to `memory`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = demo_overrides(Path(folder), device)
        processes = [start("trainer", overrides), start("producer", overrides)]
        directory = Path(folder) / "run"
        try:
            first = _report(directory, processes, lambda report: report["tokens"] >= warm)
            last = _report(directory, processes, lambda report: report["time"] >= first["time"] + seconds)
            memory += [psutil.Process(process.pid).memory_info().rss / 1e6 for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])


def _report(
    directory: Path, processes: list[subprocess.Popen[bytes]], accepts: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first of the trainer's reports that is `wanted`."""
    while (report := last_report(directory)) is None or not accepts(report):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a process of the demo ended")
        time.sleep(0.05)
    return report
