"""Every SAE measured the same way, from its plain weights, on text that no trainer saw.

fvu, l0           over all held-out rows: Σ‖x − x_hat‖² / Σ‖x − mean‖², and mean number of latents above zero
silent            fraction of latents that no held-out row makes fire; `silent_20k` on the first 20,000 of them
ce_delta, ce_recovered, kl   as monitor.evaluate defines them, with the demo LM
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from monitor.evaluation.evaluator import Baseline, evaluate
from producer.corpus import open_corpus
from producer.corpus.held_out import held_out_windows
from producer.lm.loading import load_language_model
from tests.benchmarks.quality import activations
from tests.benchmarks.quality.rows import D_SAE, read
from trainer.saes.inference import InferenceSae

FEW_ROWS = 20_000
LM_ROWS = 20_000
"""Held-out rows on which the language model reads reconstructions."""
ROWS_AT_ONCE = 4096


def load(folder: Path) -> InferenceSae:
    """The SAE of one cell."""
    report = json.loads((folder / "training.json").read_text())
    cfg = {
        "architecture": report["architecture"],
        "k": report["k"],
        "apply_b_dec_to_input": True,
        "metadata": {"hook_name": activations.HOOK},
    }
    return InferenceSae(cfg, load_file(folder / "sae.safetensors"))


class Examiner:
    """Loads held-out rows, language model and text when first needed, and measures one SAE at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._baseline = Baseline()

    @cached_property
    def _rows(self) -> Tensor:
        """[rows, d_in], in a fixed random order: neighbours in the text are not neighbours here."""
        rows = read(self._path, "held_out").float()
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    @cached_property
    def _model_and_text(self) -> tuple[Any, Any]:
        model = load_language_model(activations.MODEL, whole=True)
        return model, held_out_windows(open_corpus(activations.CORPUS), model.tokenizer, activations.CORPUS, LM_ROWS)

    def examine(self, folder: Path) -> dict[str, Any]:
        """The numbers of the module's docstring."""
        sae = load(folder)
        model, text = self._model_and_text
        evaluation = evaluate(model, text, [sae], self._baseline)["sae"]
        language = {name: evaluation.values[name] for name in ("ce_clean", "ce_delta", "ce_recovered", "kl")}
        return self.reconstruction(sae) | language

    def reconstruction(self, sae: InferenceSae) -> dict[str, float]:
        """What needs no language model."""
        error, active = 0.0, 0
        fired = np.zeros(D_SAE, dtype=np.int64)
        few = fired
        for start in range(0, len(self._rows), ROWS_AT_ONCE):
            x = self._rows[start : start + ROWS_AT_ONCE]
            latents = sae.encode(x)
            on = latents > 0
            error += float((x - sae.decode(latents)).double().square().sum())
            active += int(on.sum())
            if start <= FEW_ROWS < start + len(x):
                few = fired + on[: FEW_ROWS - start].sum(0).numpy()
            fired = fired + on.sum(0).numpy()
        spread = float((self._rows - self._rows.mean(0)).double().square().sum())
        return {
            "fvu": error / spread if math.isfinite(error) else math.nan,
            "l0": active / len(self._rows),
            "silent": float((fired == 0).mean()),
            "silent_20k": float((few == 0).mean()),
        }
