"""The activations that every trainer in the comparison learns from, collected with the producer's own code.

Training rows come from training shards in a fixed random order, held-out rows from held-out shards; rows that the
stream would drop (BOS, special tokens, padding, norms beyond the bound) are dropped here too. Collected once, into one
file per subject.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from producer.corpus import Corpus, open_corpus
from producer.corpus.held_out import held_out_windows
from producer.corpus.rendering.windows import Windows, windows_of
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from tests.benchmarks.quality.subjects import Subject

WINDOWS = 16
"""Windows in one forward pass."""
BOUND_ROWS = 4096
"""First training rows, whose median norm times corpus.outlier_factor is the bound."""


def collect(subject: Subject, path: Path) -> None:
    """Writes `path`, safetensors with `train`, `validation` and `test` [rows, d_in] in bfloat16, unless it is there.

    A machine with less text gives fewer training rows; what is missing from a run's tokens is a second epoch.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    model, corpus = load_language_model(subject.model), open_corpus(subject.corpus)
    train: list[Tensor] = []
    bound = float("inf")
    shards = np.random.default_rng(0).permutation(corpus.training_shards)
    for shard in track(shards, f"activations of {subject.name}, {subject.hook}"):
        train += _rows(model, windows_of(corpus.documents(int(shard)), model.tokenizer, subject.corpus), bound)
        if bound == float("inf") and sum(map(len, train)) >= BOUND_ROWS:
            norms = torch.cat(train)[:BOUND_ROWS].float().norm(dim=1)
            bound = subject.corpus.outlier_factor * float(norms.median())
            train = [rows[rows.float().norm(dim=1) <= bound] for rows in train]
        if sum(map(len, train)) >= subject.train_rows:
            break
    validation, test = halves(subject, corpus, model)
    tensors = {
        "train": torch.cat(train)[: subject.train_rows],
        "validation": torch.cat(_rows(model, validation, bound)),
        "test": torch.cat(_rows(model, test, bound)),
    }
    about = {"hook": subject.hook, "model": subject.model.name, "corpus": corpus.fingerprint, "norm_bound": bound}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, {name: json.dumps(value) for name, value in about.items()})
    unfinished.rename(path)


def halves(subject: Subject, corpus: Corpus, model: LanguageModel) -> tuple[Windows, Windows]:
    """Held-out windows for choices, and those for reports: equal shares of tokens, from different shards."""
    windows = held_out_windows(corpus, model.tokenizer, subject.corpus, subject.held_out_rows)
    middle = int(np.searchsorted(windows.kept.sum(1).cumsum(), subject.held_out_rows // 2)) + 1
    return _part(windows, slice(None, middle)), _part(windows, slice(middle, None))


def _part(windows: Windows, part: slice) -> Windows:
    return Windows(windows.ids[part], windows.kept[part], windows.padded[part])


def _rows(model: LanguageModel, windows: Windows, bound: float) -> list[Tensor]:
    return [rows[rows.float().norm(dim=1) <= bound] for rows in _batches(model, windows)]


def _batches(model: LanguageModel, windows: Windows) -> Iterable[Tensor]:
    for start in range(0, len(windows), WINDOWS):
        part = _part(windows, slice(start, start + WINDOWS))
        yield model.activations(torch.from_numpy(part.ids))[0][torch.from_numpy(part.kept)].bfloat16()
