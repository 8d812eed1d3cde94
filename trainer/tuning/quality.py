"""ΔCE, KL, FVU and L0 of a published SAE on held-out text, as `monitor.evaluation.evaluator` defines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import (
    DEFAULT_MEMORY,
    MemoryLimits,
    NormBounds,
    in_stream,
    log_probabilities,
    passes,
    recording,
    splicing,
)
from trainer.saes.inference import InferenceSae


@dataclass(frozen=True)
class Quality:
    """The measures of one SAE. In nats for each predicted token: ce_clean, ce_sae, kl."""

    ce_clean: float
    ce_sae: float
    kl: float
    fvu: float
    l0: float
    activations: int

    @property
    def ce_delta(self) -> float:
        return self.ce_sae - self.ce_clean


def measure_quality(
    model: LanguageModel,
    windows: Windows,
    sae: InferenceSae,
    bounds: NormBounds,
    between: Callable[[], None] = lambda: None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> Quality:
    """Measures an autoencoder of one hook; `between` is called after each batch of windows and may raise."""
    (hook,) = sae.hooks.reads
    hooks = [each.name for each in model.hooks]
    width = sae.W_dec.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=model.device)
    sums = dict.fromkeys(("ce_clean", "ce_sae", "kl", "square", "error", "active"), 0.0)
    activations = predictions = 0
    for batch in passes(model, windows, memory):
        recorded: dict[str, Tensor] = {}
        targets = batch.tokens[:, 1:][batch.predicted]
        log_clean = log_probabilities(model.logits(batch.tokens, recording(hooks, recorded)), batch.predicted)
        streamed = in_stream(recorded, batch.kept, bounds)
        x = recorded[hook][streamed].float()
        parts = []
        for part in x.split(memory.batch(sae.d_sae)):
            latents = sae.encode(part)
            sums["active"] += int((latents != 0).sum())
            parts.append(sae.decode(latents, part))
        x_hat = torch.cat(parts)
        log_sae = log_probabilities(model.logits(batch.tokens, splicing(streamed, {hook: x_hat})), batch.predicted)
        sums["ce_clean"] -= _sum(log_clean.gather(-1, targets[:, None]))
        sums["ce_sae"] -= _sum(log_sae.gather(-1, targets[:, None]))
        sums["kl"] += _sum(log_clean.exp() * (log_clean - log_sae))
        sums["square"] += _sum(x.double().square())
        sums["error"] += _sum((x.double() - x_hat.double()).square())
        total += x.double().sum(0)
        activations += len(x)
        predictions += len(targets)
        between()
    variance = sums["square"] - float(total.square().sum()) / activations
    return Quality(
        ce_clean=sums["ce_clean"] / predictions,
        ce_sae=sums["ce_sae"] / predictions,
        kl=sums["kl"] / predictions,
        fvu=sums["error"] / variance,
        l0=sums["active"] / activations,
        activations=activations,
    )


def _sum(values: Tensor) -> float:
    return float(values.double().sum())
