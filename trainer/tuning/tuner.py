"""One SAE in tuning: a step, its state, and what is published of it.

The SAE trains as in the stream (`SaeTrainer`: scaled activations, Adam, decoder rows on the unit sphere), with another
loss of its reconstruction. L0 stays what it was: TopK and BatchTopK have it from k, a JumpReLU with a target gets its
own L0 as the target, and for the other penalties the weight follows L0, a little in each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from producer.corpus import CorpusError
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.precision import product_dtype
from trainer.report import SaeReport
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.settings import SaeSettings
from trainer.saes.start import read_start
from trainer.saes.writing import SaeFiles
from trainer.snapshot import finite, new_snapshot, snapshot_folder
from trainer.state.format import SaeState, SaeTensors
from trainer.training.publishing import SELFTEST_CANDIDATES
from trainer.training.sae_trainer import SaeTrainer
from trainer.tuning.downstream import Downstream
from trainer.tuning.options import TuningOptions
from trainer.tuning.source import TuningSource
from trainer.tuning.text import Cursor, TuningText

SAMPLE_TOKENS = 8192
"""Activations from which L0, the variance and thresholds are estimated."""
WARMUP = 0.05
"""Share of the tokens over which the learning rate rises; then it falls to zero."""
PENALTY_GAIN = 0.1
"""How strongly the weight of a penalty follows L0: by this power of its ratio to what it should be, in each step."""
PENALTY_RANGE = (1e-2, 1e2)


@dataclass(frozen=True)
class TunerState:
    """All of a tuner that is no tensor."""

    sae: SaeState
    cursor: Cursor
    sparsity_share: float


class Tuner:
    """See the module's docstring."""

    def __init__(self, source: TuningSource, options: TuningOptions, model: LanguageModel, text: TuningText) -> None:
        """Begins with the published weights. Raises SnapshotError, CorpusError or ModelError."""
        self.source = source
        self.options = options
        self.cursor = Cursor()
        self._text = text
        self._scales = {source.hook: source.input_scale}
        self._downstream = Downstream(model, source.hook, source.norm_bounds, options.loss, source.input_scale)
        self._sample = self._read_sample()
        published = load_sae(source.folder, model.device)
        self.l0 = _mean_l0(published, self._sample)
        """Active latents of the published SAE, for each activation of the sample."""
        settings = _with_target(source.settings, self.l0)
        hooks = SaeHooks((source.hook,), (source.hook,))
        widths = {source.hook: self._sample.shape[1]}
        optimizer = source.run.optimizer.model_copy(
            update={
                "learning_rate": options.learning_rate,
                "warmup_tokens": round(WARMUP * options.tokens),
                "cooldown": 1 - WARMUP,
            }
        )
        d_in = self._sample.shape[1]
        matmul = product_dtype(optimizer.matmul, options.batch, d_in, settings.d_sae, model.device)
        self.sae_trainer = SaeTrainer(
            settings, optimizer, hooks, widths, model.device, matmul, run_tokens=options.tokens
        )
        self.sae_trainer.initialise({source.hook: self._scaled(self._sample).cpu()}, self._scales, read_start(settings))
        self.sae_trainer.sae.output_loss = self._downstream
        self._batches = text.batches(self.cursor)

    # Training

    @property
    def tokens(self) -> int:
        """Activations trained on."""
        return self.sae_trainer.tokens

    @property
    def kl(self) -> float:
        """KL in the mean of recent batches."""
        return self._downstream.mean_kl

    def step(self) -> None:
        """Trains on one batch of windows. Raises CorpusError."""
        windows, self.cursor = self._next()
        activations = self._downstream.read(windows)
        if len(activations):
            self.sae_trainer.step({self.source.hook: self._scaled(activations)})
            self._hold_l0()

    def report(self) -> SaeReport:
        """Numbers of recent batches."""
        return self.sae_trainer.report(self._scales)

    def _next(self) -> tuple[Windows, Cursor]:
        batch = next(self._batches, None)
        if batch is None:
            raise CorpusError("the text that the run trains on has no activations: check [corpus] of its settings.toml")
        return batch

    def _hold_l0(self) -> None:
        """Raises the weight of the penalty while more latents are active than at first, and lowers it while fewer."""
        share = self.sae_trainer.sparsity_share * (self.report_l0() / self.l0) ** PENALTY_GAIN
        self.sae_trainer.sparsity_share = min(PENALTY_RANGE[1], max(PENALTY_RANGE[0], share))

    def report_l0(self) -> float:
        """L0 of recent batches, never zero."""
        return max(self.sae_trainer.statistics.summary().l0, 1e-3)

    def _scaled(self, activations: Tensor) -> Tensor:
        return activations.float() * self.source.input_scale

    def _read_sample(self) -> Tensor:
        """Activations of the first windows: always the same ones."""
        parts, count = [], 0
        for windows, _ in self._text.batches(Cursor()):
            parts.append(self._downstream.read(windows).float())
            count += len(parts[-1])
            if count >= SAMPLE_TOKENS:
                break
        if not count:
            raise CorpusError("the text that the run trains on has no activations: check [corpus] of its settings.toml")
        return torch.cat(parts)[:SAMPLE_TOKENS]

    # State

    def state(self) -> tuple[TunerState, SaeTensors]:
        state, tensors = self.sae_trainer.state()
        return TunerState(state, self.cursor, self.sae_trainer.sparsity_share), tensors

    def restore(self, state: TunerState, tensors: SaeTensors) -> None:
        self.sae_trainer.restore(state.sae, tensors)
        self.sae_trainer.sparsity_share = state.sparsity_share
        self.cursor = state.cursor
        self._batches = self._text.batches(self.cursor)

    # Publishing

    def publish(self, directory: Path, facts: dict[str, Any], tuned: dict[str, Any]) -> Path:
        """Writes a snapshot with this SAE alone into a run directory; returns the folder of the SAE.

        `facts` is the manifest's part on the run; `tuned` says what the SAE was tuned from, and how.
        """
        trainer, name = self.sae_trainer, self.source.name
        trainer.calibrate(trainer.sae, {self.source.hook: self._scaled(self._sample)})
        numbers = self.numbers()
        metadata = self.source.metadata | {
            "tokens_trained": numbers["tokens"],
            "l0": numbers["l0"],
            "fvu": numbers["fvu"],
            "num_dead_features": None,
            "tuned": tuned,
        }
        files = SaeFiles(trainer.sae, trainer.input_transform(self._scales), trainer.statistics.firing_rate(), metadata)
        with new_snapshot(directory, numbers["tokens"], facts) as draft:
            weights = files.write(draft.folder / name, self._sample[:SELFTEST_CANDIDATES])
            draft.add(name, numbers, weights)
        return snapshot_folder(directory, numbers["tokens"]) / name

    def numbers(self) -> dict[str, Any]:
        """Numbers of the SAE for the manifest."""
        report, source = self.report(), self.source
        return {
            **source.manifest.saes[source.name],
            "tokens": int(source.manifest.saes[source.name].get("tokens") or source.manifest.tokens) + self.tokens,
            "l0": finite(report.l0),
            "mse": finite(report.mse),
            "fvu": finite(report.fvu),
            "dead_latents": None,
            "dead_latents_ratio": None,
            "shrinkage": finite(report.shrinkage),
        }


def _with_target(settings: SaeSettings, l0: float) -> SaeSettings:
    """The settings, with the SAE's own L0 as the target of a penalty that has one."""
    if getattr(settings, "target_l0", None) is None:
        return settings
    return settings.model_copy(update={"target_l0": l0})


def _mean_l0(sae: InferenceSae, x: Tensor) -> float:
    """Mean number of active latents on raw activations x [n, d_in]."""
    return sum(int((sae.encode(part) != 0).sum()) for part in x.split(1024)) / len(x)
