"""Tokens per second of the demo's producer alone, trainer alone and both together; memory of each process.

    python -m tests.benchmarks.throughput [--device cuda] [--seconds 8] [--rounds 3]

alone    the producer against a trainer that takes rows in and learns nothing; the trainer on a bufferful of the
         producer's rows, over and over. Each has all cores of the machine.
together the two processes as the demo runs them, sharing the cores.

The trainer is measured, alone and together, after the same number of tokens: early JumpReLU steps have more latents.
Rounds take turns, medians are told. On shared cores no schedule can beat 1 / (1/p + 1/t): a token needs 1/p seconds
of the machine in the producer and 1/t in the trainer. Prints a table and writes bench.json. A benchmark, not a test:
it never fails on a number.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table

from monitor.run_directory import last_report
from producer.settings import read_run_file
from producer.wire import Hello, Hook
from trainer.buffer import ShuffleBuffer
from trainer.intake import TORCH_DTYPE, Intake
from trainer.ledger import Ledger, Limits
from trainer.run import Run
from trainer.settings import TrainerSettings

RUN_FILE = "deploy/demo.toml"
WARM_TOKENS = 300_000


def settings_for(directory: Path, *overrides: str) -> tuple[TrainerSettings, list[str]]:
    """The demo's settings in a folder and on a socket of their own, and the overrides that say so."""
    given = [
        f"run.directory={directory}/run",
        f"stream.endpoint=ipc://{directory}/stream",
        "monitor.trainer_port=0",
        "monitor.producer_port=0",
        "run.tokens=1_000_000_000",
        "corpus.epochs=1000",
        *overrides,
    ]
    return read_run_file(TrainerSettings, RUN_FILE, given), given


def start(what: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", what, RUN_FILE, *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def megabytes(process: subprocess.Popen[bytes]) -> float:
    return psutil.Process(process.pid).memory_info().rss / 1e6


def producer_alone(seconds: float, device: str) -> tuple[float, torch.Tensor]:
    """(rows per second, a bufferful of rows): the real producer, its rows taken from the buffer and thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        settings, overrides = settings_for(Path(folder), f"run.threads={os.cpu_count()}", f"model.device={device}")
        limits = Limits(settings.buffer.rows, 0, None, 1.0, 10.0, 120.0)
        ledger = Ledger(limits, "bench", "bench", [settings.stream.endpoint])

        def make_buffer(hello: Hello) -> ShuffleBuffer:
            return ShuffleBuffer(settings.buffer.rows, [h.width for h in hello.hooks], TORCH_DTYPE[hello.dtype], 0)

        stop = threading.Event()
        with Intake(settings.stream, ledger, make_buffer) as intake:
            process = start("producer", overrides)
            try:
                began, rows = None, 0
                while began is None or time.monotonic() - began < seconds:
                    batch = intake.take(settings.optimizer.batch, stop)
                    assert batch is not None
                    intake.trained(batch)
                    if began is None:
                        began, rows = time.monotonic(), -ledger.rows_received
                rate = (rows + ledger.rows_received) / (time.monotonic() - began)
                return rate, intake.peek(settings.buffer.rows)[0]
            finally:
                process.kill()
                process.wait()


def trainer_alone(seconds: float, device: str, rows: torch.Tensor) -> float:
    """Rows per second of the loop's step on rows that are there already."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        settings, _ = settings_for(Path(folder), f"optimizer.device={device}")
    hook = Hook(name=settings.hooks[0], module="m", width=rows.shape[1])
    hello = Hello(
        producer="p", session="s", name="bench", fingerprint="f", shards=1, held_out=0.0, context=256, hooks=[hook],
        dtype="bfloat16", chunk_rows=4096, norm_bounds=None, provenance={},
    )  # fmt: skip
    run = Run(settings, hello)
    run.initialise([rows])
    buffer = ShuffleBuffer(len(rows), [rows.shape[1]], torch.bfloat16, 0)
    buffer.insert([rows], 0, torch.arange(len(rows)).numpy())
    tokens, began = 0, None
    while began is None or time.monotonic() - began < seconds:
        if began is None and tokens >= WARM_TOKENS:
            began, warm = time.monotonic(), tokens
        batch = buffer.draw(settings.optimizer.batch)
        run.learn(batch)
        buffer.insert(batch.x, 0, batch.position)
        tokens += settings.optimizer.batch
    return (tokens - warm) / (time.monotonic() - began)


def together(seconds: float, device: str) -> tuple[float, float, float]:
    """(rows per second, MB of the producer, MB of the trainer) of both processes as the demo runs them."""
    with tempfile.TemporaryDirectory() as folder:
        _, overrides = settings_for(Path(folder), f"model.device={device}", f"optimizer.device={device}")
        processes = [start("trainer", overrides), start("producer", overrides)]
        directory = Path(folder) / "run"
        try:
            while (first := last_report(directory)) is None or first["tokens"] < WARM_TOKENS:
                time.sleep(0.1)
            time.sleep(seconds)
            last = last_report(directory) or first
            memory = [megabytes(process) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        rate = (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])
        return rate, memory[1], memory[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    given = parser.parse_args()
    console = Console()
    rounds: list[tuple[float, ...]] = []
    for number in range(1, given.rounds + 1):
        with console.status(f"round {number} of {given.rounds}: producer alone"):
            p, rows = producer_alone(given.seconds, given.device)
        with console.status(f"round {number} of {given.rounds}: trainer alone"):
            t = trainer_alone(given.seconds, given.device, rows)
        with console.status(f"round {number} of {given.rounds}: both together"):
            rounds.append((p, t, *together(given.seconds, given.device)))
    p, t, both, producer_mb, trainer_mb = (median(column) for column in zip(*rounds, strict=True))
    best = 1 / (1 / p + 1 / t)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}",
        "device": given.device,
        "producer_alone": p,
        "trainer_alone": t,
        "together": both,
        "best_possible": best,
        "fraction_of_best": both / best,
        "producer_mb": producer_mb,
        "trainer_mb": trainer_mb,
        "rounds": rounds,
    }
    Path("bench.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title=f"The demo's stream, tokens/s ({result['machine']}, {given.device})", title_justify="left")
    for column in (
        "producer alone",
        "trainer alone",
        "best possible 1/(1/p+1/t)",
        "together",
        "fraction",
        "MB producer / trainer",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        f"{p:,.0f}",
        f"{t:,.0f}",
        f"{best:,.0f}",
        f"{both:,.0f}",
        f"{both / best:.2f}",
        f"{producer_mb:.0f} / {trainer_mb:.0f}",
    )
    console.print(table)
    console.print("written to bench.json")


if __name__ == "__main__":
    main()
