"""The activations that every trainer in the comparison learns from, collected with the producer's own code.

Training rows come from training shards in a fixed random order, held-out rows from held-out shards; rows that the
stream would drop (BOS, special tokens, padding) are dropped here too. Collected once, into one file.
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

from producer.corpus import open_corpus
from producer.corpus.held_out import held_out_windows
from producer.corpus.rendering.windows import Windows, windows_of
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings, ModelSettings

HOOK = "blocks.1.hook_resid_post"
MODEL = ModelSettings(name="producer/demo_lm", hooks=[HOOK])
CORPUS = CorpusSettings(kind="stdlib")
TRAIN_ROWS = 3_000_000
HELD_OUT_ROWS = 60_000
WINDOWS = 16
"""Windows in one forward pass."""


def collect(path: Path) -> None:
    """Writes `path`, safetensors with `train` and `held_out` [rows, d_in] in bfloat16, unless it is there.

    A machine with less text gives fewer training rows; what is missing from a run's tokens is a second epoch.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    model, corpus = load_language_model(MODEL), open_corpus(CORPUS)
    rows: list[Tensor] = []
    missing = TRAIN_ROWS
    shards = np.random.default_rng(0).permutation(corpus.training_shards)
    for shard in track(shards, f"activations of {HOOK}"):
        rows += _rows(model, _parts(windows_of(corpus.documents(int(shard)), model.tokenizer, CORPUS)))
        missing = TRAIN_ROWS - sum(map(len, rows))
        if missing <= 0:
            break
    held_out = held_out_windows(corpus, model.tokenizer, CORPUS, HELD_OUT_ROWS)
    tensors = {
        "train": torch.cat(rows)[:TRAIN_ROWS],
        "held_out": torch.cat(_rows(model, _parts(held_out))),
    }
    about = {"hook": HOOK, "model": MODEL.name, "corpus": corpus.fingerprint}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, {name: json.dumps(value) for name, value in about.items()})
    unfinished.rename(path)


def _parts(windows: Windows) -> Iterable[tuple[Tensor, Tensor]]:
    """(ids, kept) of a few windows each."""
    for start in range(0, len(windows), WINDOWS):
        part = slice(start, start + WINDOWS)
        yield torch.from_numpy(windows.ids[part]), torch.from_numpy(windows.kept[part])


def _rows(model: LanguageModel, parts: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [model.activations(ids)[0][mask].bfloat16() for ids, mask in parts]
