"""The real producer's rows per second, beside the bare forward pass that it wraps and the peers' activation paths.

Sluice        `python -m producer` on all cores; its rows are taken in by a real intake here and thrown away. While
              others are measured it rests, because nobody takes its rows.
bare forward  the Hugging Face model, cut after the hooked block, on windows that are tokens already, in a process that
              does nothing else; the batch and the number format are the producer's, the rows counted are those that the
              producer would keep. Once as it is, once with freed memory kept for the next pass, which is faster.
peers         their own buffers of 16,384 rows on the same model, text and windows; see theirs.py.
"""

from __future__ import annotations

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
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from producer.common.run_file import read_run_file
from producer.sources.base import batches, training_shards
from producer.sources.language_model import LanguageModelSource
from tests.benchmarks.measure import WITHOUT_PEERS, Figure, Options, Peers, Result
from trainer.settings import TrainerSettings
from trainer.stream.buffer import ShuffleBuffer
from trainer.stream.intake import Intake
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.payload import TORCH_DTYPE

RUN_FILE = "deploy/demo.toml"
SECONDS, SETTLING_SECONDS = 2.5, 1.0
TEXT_BYTES = 8_000_000
"""Given to the peers; they read it again when it is used up."""
BARE, KEPT = "bare forward", "bare forward, memory kept"
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
        contenders = {"Sluice": partial(ours.rate, seconds)}
        for name, keep_memory in ((BARE, False), (KEPT, True)):
            alone = stack.enter_context(Peers(sys.executable))
            contenders[name] = bare_forward(source, alone, folder, seconds, keep_memory)
        theirs: dict[str, Callable[[], float]] = {}
        if options.peers:
            peers = stack.enter_context(Peers(options.peers))
            theirs = _peers_paths(source, peers, folder, seconds)
        else:
            result.notes.append(WITHOUT_PEERS)
        result.take_turns(options.rounds, contenders | theirs)
    best = result.most(theirs, "the best peer")
    result.figures = [
        Figure(f"producer / {BARE}", result.ratio("Sluice", BARE)),
        Figure(f"producer / {KEPT}", result.ratio("Sluice", KEPT), 0.95, at_least=True),
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
        rows, began = self._ledger.tokens_received, time.monotonic()
        self._take_for(seconds)
        return (self._ledger.tokens_received - rows) / (time.monotonic() - began)

    def rows(self) -> torch.Tensor:
        """Copies of the rows that wait, at most a bufferful."""
        return self._intake.peek(self._intake.ledger.limits.capacity)[0]

    def _take_for(self, seconds: float) -> None:
        """From the first batch on that can be had."""
        began = None
        while began is None or time.monotonic() - began < seconds:
            if self._process.poll() is not None:
                raise RuntimeError(f"the producer ended with code {self._process.returncode}")
            if self._intake.wait_until_ready(self._batch, self._stop, 0.2):
                began = began or time.monotonic()
                batch = self._intake.take(self._batch, self._stop)
                assert batch is not None
                self._intake.mark_trained(batch)


def bare_forward(
    source: LanguageModelSource, alone: Peers, folder: Path, seconds: float, keep_memory: bool
) -> Callable[[], float]:
    """Rows per second that the producer would keep of what the cut model gives, whole passes over one shard's text."""
    windows = source.windows(next(training_shards(source)))
    full_batches = [
        one for one in batches(windows, windows.kept, source.batch_windows) if len(one) == source.batch_windows
    ]
    rows_per_pass = sum(np.count_nonzero(windows.kept[one]) for one in full_batches) / len(full_batches)
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": torch.stack([torch.from_numpy(windows.ids[one]) for one in full_batches])}, tokens)
    dtype = str(source.model.dtype).removeprefix("torch.")
    request = _model(source) | {"tokens": str(tokens), "dtype": dtype, "seconds": seconds, "keep_memory": keep_memory}
    return lambda: rows_per_pass * alone.ask("forward", **request)["passes_per_second"]


def _model(source: LanguageModelSource) -> dict[str, Any]:
    settings = demo_settings().model
    assert settings is not None
    layer = int(settings.hooks[0].split(".")[1])
    return {"model": str(Path(settings.name).absolute()), "layer": layer, "device": str(source.device)}


def _peers_paths(
    source: LanguageModelSource, peers: Peers, folder: Path, seconds: float
) -> dict[str, Callable[[], float]]:
    texts = folder / "texts.json"
    texts.write_text(json.dumps(_texts(source)))
    common = _model(source) | {
        "texts": str(texts),
        "context": source.context,
        "windows": source.batch_windows,
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
    for shard in training_shards(source):
        for document in source._corpus.documents(shard):
            documents.append(document)
            size += len(document)
        if size > TEXT_BYTES:
            break
    return documents
