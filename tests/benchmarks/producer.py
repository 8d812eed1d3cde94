"""The real producer's rows per second, beside the bare forward pass that it wraps and the peers' activation paths.

Sluice        `python -m producer` on all cores; its rows are taken in by a real intake here and thrown away. While
              others are measured it rests, because nobody takes its rows.
bare forward  the Hugging Face model, cut after the hooked block, on windows that are tokens already; the batch and
              the number format are the producer's, the rows counted are those that the producer would keep.
peers         their own buffers of 16,384 rows on the same model, text and windows; see theirs.py.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from producer.settings import read_run_file
from producer.source import LanguageModelSource, batches
from producer.wire import held_out_shards
from tests.benchmarks.measure import WITHOUT_PEERS, Figure, Options, Peers, Result, synchronise
from trainer.buffer import ShuffleBuffer
from trainer.intake import TORCH_DTYPE, Intake
from trainer.ledger import Ledger, Limits
from trainer.settings import TrainerSettings

RUN_FILE = "deploy/demo.toml"
SECONDS, SETTLING_SECONDS = 2.5, 1.0
TEXT_BYTES = 8_000_000
"""Given to the peers; they read it again when it is used up."""
PATHS = {
    "saelens": "SAELens' ActivationsStore",
    "dictionary_learning": "dictionary_learning's ActivationBuffer",
    "sparsify": "sparsify's loop",
}


def run(options: Options) -> Iterator[Result]:
    seconds = 1.0 if options.quick else SECONDS
    settings = demo_settings(f"model.device={options.device}")
    source = LanguageModelSource(settings)  # type: ignore[arg-type]
    result = Result(f"Activations of the demo's model, {source.batch_windows} windows of {source.context}", "rows/s")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(RunningProducer(folder, source, options.device))
        contenders = {
            "Sluice": partial(ours.rate, seconds),
            "bare forward": partial(_rate, bare_forward(source), seconds, options.device),
        }
        theirs: dict[str, Callable[[], float]] = {}
        if options.peers:
            peers = stack.enter_context(Peers(options.peers))
            theirs = _peers_paths(source, peers, folder, seconds)
        else:
            result.notes.append(WITHOUT_PEERS)
        result.take_turns(options.rounds, contenders | theirs)
    best = result.most(theirs, "the best peer")
    result.figures = [
        Figure("producer / bare forward", result.ratio("Sluice", "bare forward"), 0.95, at_least=True),
        Figure(f"producer / {best}", result.ratio("Sluice", best), 1.5, at_least=True),
    ]
    result.notes.append(f"the language model computes in {source.model.dtype}")
    yield result


def demo_settings(*overrides: str) -> TrainerSettings:
    return read_run_file(TrainerSettings, RUN_FILE, list(overrides))


class RunningProducer:
    """`python -m producer` at work for a trainer that learns nothing."""

    def __init__(self, folder: Path, source: LanguageModelSource, device: str) -> None:
        dtype = str(source.model.dtype).removeprefix("torch.")
        overrides = [
            f"run.directory={folder}/run",
            f"run.threads={os.cpu_count()}",
            f"stream.endpoint=ipc://{folder}/stream",
            f"model.device={device}",
            f"model.dtype={dtype}",
            f"model.batch_windows={source.batch_windows}",
            "monitor.producer_port=0",
            "corpus.epochs=1000",
        ]
        settings = demo_settings(*overrides)
        self._batch = settings.optimizer.batch
        limits = Limits(settings.buffer.rows, 0, None, 1.0, 10.0, 120.0)
        self._ledger = Ledger(limits, "bench", "bench", [settings.stream.endpoint])
        self._intake = Intake(
            settings.stream,
            self._ledger,
            lambda hello: ShuffleBuffer(
                settings.buffer.rows, [hook.width for hook in hello.hooks], TORCH_DTYPE[hello.dtype], 0
            ),
        )
        self._command = [sys.executable, "-m", "producer", RUN_FILE, *overrides]
        self._stop = threading.Event()

    def __enter__(self) -> RunningProducer:
        self._intake.__enter__()
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._intake.__exit__()

    def rate(self, seconds: float) -> float:
        """Rows per second that arrive while they are taken as they come."""
        self._take_for(SETTLING_SECONDS)
        rows, began = self._ledger.rows_received, time.monotonic()
        self._take_for(seconds)
        return (self._ledger.rows_received - rows) / (time.monotonic() - began)

    def rows(self) -> torch.Tensor:
        """Copies of the rows that wait, at most a bufferful."""
        return self._intake.peek(self._intake.ledger.limits.capacity_rows)[0]

    def _take_for(self, seconds: float) -> None:
        """From the first batch on that can be had."""
        began = None
        while began is None or time.monotonic() - began < seconds:
            if self._process.poll() is not None:
                raise RuntimeError(f"the producer ended with code {self._process.returncode}")
            if self._intake.wait_until_filled(self._batch, self._stop, 0.2):
                began = began or time.monotonic()
                batch = self._intake.take(self._batch, self._stop)
                assert batch is not None
                self._intake.trained(batch)


def bare_forward(source: LanguageModelSource) -> Callable[[], int]:
    """One pass of the cut model; returns how many of its rows the producer would keep."""
    settings = demo_settings().model
    assert settings is not None
    layer = int(settings.hooks[0].split(".")[1])
    disable_progress_bar()
    model = AutoModel.from_pretrained(settings.name, dtype=source.model.dtype).to(source.device).eval()
    model.layers, model.norm = model.layers[: layer + 1], nn.Identity()
    passes = itertools.cycle(_passes(source))

    def act() -> int:
        tokens, rows = next(passes)
        with torch.inference_mode():
            model(input_ids=tokens.to(source.device), use_cache=False)
        return rows

    return act


def _passes(source: LanguageModelSource) -> list[tuple[torch.Tensor, int]]:
    """(tokens [windows, context], rows to keep) of the first training shard, a pass at a time; whole passes only."""
    windows = source.windows(_training_shards(source)[0])
    chosen = [one for one in batches(windows, windows.kept, source.batch_windows) if len(one) == source.batch_windows]
    return [(torch.from_numpy(windows.ids[one]), int(np.count_nonzero(windows.kept[one]))) for one in chosen]


def _training_shards(source: LanguageModelSource) -> list[int]:
    held_out = held_out_shards(source.shards, demo_settings().corpus.held_out)
    return [shard for shard in range(source.shards) if shard not in held_out]


def _rate(act: Callable[[], int], seconds: float, device: str) -> float:
    """Rows per second of passes that follow each other for about `seconds`."""
    act()
    synchronise(device)
    rows, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        rows += act()
        synchronise(device)
    return rows / (time.perf_counter() - began)


def _peers_paths(
    source: LanguageModelSource, peers: Peers, folder: Path, seconds: float
) -> dict[str, Callable[[], float]]:
    settings = demo_settings()
    assert settings.model is not None
    texts = folder / "texts.json"
    texts.write_text(json.dumps(_texts(source)))
    common = {
        "model": str(Path(settings.model.name).absolute()),
        "layer": int(settings.model.hooks[0].split(".")[1]),
        "texts": str(texts),
        "context": source.context,
        "windows": source.batch_windows,
        "device": str(source.device),
        "seconds": seconds,
    }

    def rate(library: str, dtype: str) -> float:
        return peers.ask("activations", library=library, dtype=dtype, **common)["rows_per_second"]

    return {
        f"{name}, {dtype}": partial(rate, library, dtype)
        for library, name in PATHS.items()
        for dtype in ("float32", "bfloat16")
    }


def _texts(source: LanguageModelSource) -> list[str]:
    """Documents of the training shards, up to TEXT_BYTES."""
    documents: list[str] = []
    size = 0
    for shard in _training_shards(source):
        for document in source._corpus.documents(shard):
            documents.append(document)
            size += len(document)
        if size > TEXT_BYTES:
            break
    return documents
