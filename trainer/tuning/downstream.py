"""What the language model makes of a reconstruction: the loss of end-to-end training, and its gradient.

    kl        L = α · KL(P ‖ P_sae)
    kl+mse    L = ½ · (|y − y_hat|² / variance + α · KL(P ‖ P_sae))

P is the distribution of the next token that the model predicts, P_sae the same with y_hat in the place of y at the
SAE's hook, and KL the mean over all predicted positions (Braun et al. 2024, arXiv 2405.12241). α is the ratio of the
squared error to KL in the batch, held constant: both terms have the same size then, and learning rate, clipping and
penalties keep the meaning that they had in training (Karvonen 2025, arXiv 2503.17272).

∂KL/∂y_hat comes from autograd through the blocks above the hook, a few windows at a time. From there on the SAE's own
gradients, written out by hand, go on: see `Sae.output_loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import (
    DEFAULT_MEMORY,
    MemoryLimits,
    NormBounds,
    WindowBatch,
    in_stream,
    log_probabilities,
    passes,
    recording,
    splicing,
)
from trainer.tuning.options import Loss

RECENT = 0.95
"""Weight of the past in the mean of recent batches, for display alone."""
SMALLEST_KL = 1e-12
"""A divergence below this is rounding, and no ratio is taken with it."""


@dataclass(frozen=True)
class CleanPass:
    """A few windows, and what the model computes for them with no SAE."""

    windows: WindowBatch
    streamed: Tensor
    """Positions that the SAE's reconstruction takes, bool [windows, context]."""
    log_probabilities: Tensor
    """Of the next token, [predictions, vocabulary]."""

    @property
    def activations(self) -> int:
        """Number of activations that the SAE reconstructs."""
        return int(self.streamed.sum())


class Downstream:
    """The loss of one SAE's reconstructions: `read` takes a batch of windows, and the next call is about these."""

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        bounds: NormBounds,
        loss: Loss,
        scale: float = 1.0,
        memory: MemoryLimits = DEFAULT_MEMORY,
    ) -> None:
        """`scale` is what the SAE multiplies the activations of `hook` with before it reads them."""
        self.kl = float("nan")
        """KL(P ‖ P_sae), in nats for each prediction, in the last batch"""
        self.mean_kl = float("nan")
        """and in the mean of recent batches."""
        self._model = model
        self._hook = hook
        self._bounds = bounds
        self._loss = loss
        self._scale = scale
        self._memory = memory
        self._passes: list[CleanPass] = []

    def read(self, windows: Windows) -> Tensor:
        """Runs the model with no SAE; returns the activations [n, width] that the SAE is to reconstruct."""
        hooks = [hook.name for hook in self._model.hooks]
        activations: list[Tensor] = []
        self._passes = []
        for batch in passes(self._model, windows, self._memory):
            recorded: dict[str, Tensor] = {}
            logits = self._model.logits(batch.tokens, recording(hooks, recorded))
            streamed = in_stream(recorded, batch.kept, self._bounds)
            # Clones, for autograd takes no inference tensors.
            self._passes.append(CleanPass(batch, streamed, log_probabilities(logits, batch.predicted).clone()))
            activations.append(recorded[self._hook][streamed].clone())
        return torch.cat(activations)

    def __call__(self, y_hat: Tensor, squared_error: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss, its gradient by y_hat) of scaled reconstructions of what `read` has returned."""
        kl, through_model = self._divergence(y_hat)
        self.kl = float(kl)
        is_first = math.isnan(self.mean_kl)
        self.mean_kl = self.kl if is_first else RECENT * self.mean_kl + (1 - RECENT) * self.kl
        alpha = squared_error / kl.clamp_min(SMALLEST_KL)
        if self._loss == "kl":
            return alpha * kl, alpha * through_model
        return 0.5 * (squared_error + alpha * kl), 0.5 * (gradient + alpha * through_model)

    def _divergence(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """(KL, its gradient by y_hat)"""
        predictions = sum(len(one.log_probabilities) for one in self._passes)
        total, gradients = y_hat.new_zeros(()), []
        for clean, part in zip(
            self._passes, y_hat.detach().split([one.activations for one in self._passes]), strict=True
        ):
            with torch.enable_grad():
                leaf = (part / self._scale).requires_grad_()
                logits = self._model.logits(
                    clean.windows.tokens, splicing(clean.streamed, {self._hook: leaf}), gradients=True
                )
                log_clean = clean.log_probabilities
                log_sae = log_probabilities(logits, clean.windows.predicted)
                kl = (log_clean.exp() * (log_clean - log_sae)).sum() / predictions
            (by_leaf,) = torch.autograd.grad(kl, leaf)
            total = total + kl.detach().to(total.dtype)
            gradients.append(by_leaf / self._scale)
        return total, torch.cat(gradients).to(y_hat.dtype)
