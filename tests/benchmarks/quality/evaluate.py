"""Every SAE measured the same way, from its plain weights, on text that no trainer saw.

fvu, l0           over all held-out rows: Σ‖x − x_hat‖² / Σ‖x − mean‖², and mean number of latents above zero
silent            fraction of latents that no held-out row makes fire; `silent_20k` on 20,000 of them
validation, test  fvu and l0 on each half of the held-out rows: choices look at the first alone, reports at the second
test only         ce_clean, ce_delta, ce_recovered, kl as monitor.evaluation.evaluator defines them
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from monitor.evaluation.evaluator import Baseline, evaluate
from producer.corpus import open_corpus
from producer.corpus.rendering.windows import Windows
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from tests.benchmarks.quality.activations import halves
from tests.benchmarks.quality.rows import read
from tests.benchmarks.quality.subjects import Subject
from trainer.saes.inference import InferenceSae

FEW_ROWS = 20_000
ROWS_AT_ONCE = 4096
PARTS = ("validation", "test")
LANGUAGE = ("ce_clean", "ce_delta", "ce_recovered", "kl")


def load(subject: Subject, folder: Path) -> InferenceSae:
    """The SAE of one cell."""
    report = json.loads((folder / "training.json").read_text())
    cfg = {
        "architecture": report["architecture"],
        "k": report["k"],
        "apply_b_dec_to_input": True,
        "metadata": {"hook_name": subject.hook},
    }
    return InferenceSae(cfg, load_file(folder / "sae.safetensors"))


class Examiner:
    """Loads held-out rows, language model and text when first needed, and measures one SAE at a time."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self._subject = subject
        self._path = path
        self._baseline = Baseline()

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        """[rows, d_in] of each part, in a fixed random order: neighbours in the text are not neighbours here."""
        generator = torch.Generator().manual_seed(0)
        parts = {name: read(self._path, name) for name in PARTS}
        return {name: rows[torch.randperm(len(rows), generator=generator)] for name, rows in parts.items()}

    @cached_property
    def _model_and_text(self) -> tuple[LanguageModel, Windows]:
        """The language model, and `lm_rows` rows of text from the test part."""
        model = load_language_model(self._subject.model, whole=True)
        _, test = halves(self._subject, open_corpus(self._subject.corpus), model)
        spread = np.random.default_rng(0).permutation(len(test))
        counts = test.kept[spread].sum(1).cumsum()
        some = np.sort(spread[: int(np.searchsorted(counts, self._subject.lm_rows)) + 1])
        return model, Windows(test.ids[some], test.kept[some], test.padded[some])

    @cached_property
    def _norm_bounds(self) -> dict[str, float]:
        with safe_open(self._path, framework="pt") as file:
            return {self._subject.hook: float(json.loads(file.metadata()["norm_bound"]))}

    def examine(self, folder: Path, with_language_model: bool) -> dict[str, Any]:
        """The numbers of the module's docstring; those of the language model only if asked."""
        sae = load(self._subject, folder)
        result = self.reconstruction(sae)
        if not with_language_model:
            return result
        model, text = self._model_and_text
        evaluation = evaluate(model, text, [sae], self._baseline, self._norm_bounds)["sae"]
        result["test"] |= {name: evaluation.values[name] for name in LANGUAGE}
        return result

    def reconstruction(self, sae: InferenceSae) -> dict[str, Any]:
        """What needs no language model."""
        d_sae = len(sae.W_dec)
        fired, fired_in_few = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae, dtype=np.int64)
        parts: dict[str, dict[str, float]] = {}
        few_rows_left = {name: FEW_ROWS // len(PARTS) for name in PARTS}
        error, active = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
        for name in PARTS:
            for x, on, x_hat in self._encoded(sae, name):
                error[name] += float((x - x_hat).double().square().sum())
                active[name] += int(on.sum())
                fired += on.sum(0).numpy()
                fired_in_few += on[: few_rows_left[name]].sum(0).numpy()
                few_rows_left[name] = max(0, few_rows_left[name] - len(x))
            parts[name] = {
                "fvu": _finite(error[name] / _spread(self._rows[name])),
                "l0": active[name] / len(self._rows[name]),
            }
        rows = torch.cat(list(self._rows.values()))
        return {
            "fvu": _finite(sum(error.values()) / _spread(rows)),
            "l0": sum(active.values()) / len(rows),
            "silent": float((fired == 0).mean()),
            "silent_20k": float((fired_in_few == 0).mean()),
            **parts,
        }

    def _encoded(self, sae: InferenceSae, part: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, which latents are on, x_hat) of some rows at a time."""
        for block in self._rows[part].split(ROWS_AT_ONCE):
            x = block.float()
            latents = sae.encode(x)
            yield x, latents > 0, sae.decode(latents)


def _spread(rows: Tensor) -> float:
    """Σ‖x − mean‖², in float64, some rows at a time."""
    mean = rows.double().mean(0)
    return sum(float((block.double() - mean).square().sum()) for block in rows.split(ROWS_AT_ONCE))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
