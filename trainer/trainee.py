"""One SAE with all that a step changes and a checkpoint keeps: weights, Adam, statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.optimizer import RowAdam, default_learning_rate, learning_rate_factor
from trainer.report import SaeReport
from trainer.saes.base import Gradients, Sae
from trainer.saes.jumprelu import JumpReLU
from trainer.saes.topk import TopK
from trainer.settings import OptimizerSettings, SaeSettings
from trainer.statistics import Statistics

ARCHITECTURES: dict[str, type[Sae]] = {"topk": TopK, "jumprelu": JumpReLU}


class Trainee:
    """Learns from scaled rows, one `step` a batch. Reading `report` changes nothing."""

    def __init__(
        self,
        settings: SaeSettings,
        optimizer: OptimizerSettings,
        d_in: int,
        hook: int,
        device: torch.device,
        matmul_dtype: torch.dtype,
    ) -> None:
        self.settings = settings
        self.hook = hook
        self.sae = ARCHITECTURES[settings.architecture](settings, d_in)
        self.sae.matmul_dtype = matmul_dtype
        self.sae.parameters = {name: value.to(device) for name, value in self.sae.parameters.items()}
        self._optimizer_settings = optimizer
        self._peak = settings.learning_rate or optimizer.learning_rate or default_learning_rate(settings.d_sae)
        self._begin()
        self.learning_rate = 0.0
        self.skipped_steps = 0
        self._last: tuple[dict[str, Tensor], float] = ({}, math.nan)

    def _begin(self) -> None:
        self.optimizer = RowAdam(self.sae.parameters, self._optimizer_settings)
        self.statistics = Statistics(self.settings.d_sae, self.sae.parameters["b_dec"])

    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """First weights, from a sample of scaled rows [rows, d_in]."""
        self.sae.initialise(x, generator)
        self._begin()

    def step(self, x: Tensor, tokens: int, target_tokens: int | None) -> None:
        """Learns from one batch of scaled rows; `tokens` were trained on before it."""
        settings = self._optimizer_settings
        factor = learning_rate_factor(tokens, target_tokens, settings.warmup_tokens, settings.cooldown)
        self.learning_rate = self._peak * factor
        dead = self.statistics.silent_for(self.settings.revive_tokens or self.settings.dead_tokens)
        gradients: Gradients = self.sae.gradients(x, dead)
        norm = self.optimizer.step(gradients.of, self.learning_rate)
        if math.isfinite(norm):
            self.sae.after_step()
            self.statistics.update(x, gradients.x_hat, gradients.fired)
        else:
            self.skipped_steps += 1
        self._last = gradients.loss, norm

    def report(self, scale: float) -> SaeReport:
        """The window's numbers; `scale` turns the error back into the units of raw activations."""
        summary, losses, norm = self.statistics.summary(), *self._last
        dead = self.statistics.dead(self.settings.dead_tokens)
        return SaeReport(
            name=self.settings.name,
            l0=summary.l0,
            mse=summary.mse / scale**2,
            fvu=summary.fvu,
            dead_latents=dead,
            dead_latents_ratio=None if dead is None else dead / self.settings.d_sae,
            shrinkage=summary.shrinkage,
            loss={name: float(value) for name, value in losses.items()},
            learning_rate=self.learning_rate,
            grad_norm=norm,
            density=self.statistics.density(),
            skipped_steps=self.skipped_steps,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain JSON, tensors named with this SAE's name in front)."""
        parts = {
            "parameters": self.sae.parameters,
            "adam": self.optimizer.state(),
            "statistics": self.statistics.state(),
        }
        name = self.settings.name
        tensors = {f"{name}/{part}/{key}": value for part, values in parts.items() for key, value in values.items()}
        return {"variance": self.sae.variance, "skipped_steps": self.skipped_steps}, tensors

    def restore(self, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Becomes what `state` described."""
        self.sae.variance, self.skipped_steps = document["variance"], document["skipped_steps"]
        for name, value in self._part(tensors, "parameters").items():
            self.sae.parameters[name].copy_(value)
        self._begin()
        self.optimizer.restore(self._part(tensors, "adam"))
        self.statistics.restore(self._part(tensors, "statistics"))

    def _part(self, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        prefix = f"{self.settings.name}/{part}/"
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
