"""One SAE with all that a step changes and a checkpoint keeps: weights, Adam, statistics, its own count of rows.

An SAE may join a stream that is already running and may leave it before the others do; schedules therefore count the
rows that this SAE has learned from. Nothing here depends on which other SAEs there are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.report import SaeReport
from trainer.saes import registry
from trainer.saes.base import SHARED, Sae
from trainer.saes.folding import Frame, Whitening, whitening_of
from trainer.saes.settings import SaeSettings
from trainer.saes.start import Start
from trainer.settings import OptimizerSettings
from trainer.training.optimizer import Cooldown, RowAdam, default_learning_rate, warmup_factor
from trainer.training.statistics import Statistics


@dataclass(frozen=True)
class Wiring:
    """Where an SAE sits on the stream: hooks by their index, their widths in the stream's order."""

    inputs: tuple[int, ...]
    target: int | None
    widths: tuple[int, ...]
    """Of every hook of the stream."""

    @property
    def hooks(self) -> set[int]:
        """All hooks whose rows it needs."""
        return {*self.inputs} | (set() if self.target is None else {self.target})

    def read(self, rows: Sequence[Tensor]) -> Tensor:
        """x [batch, d_in] from the rows of every hook."""
        return rows[self.inputs[0]] if len(self.inputs) == 1 else torch.cat([rows[hook] for hook in self.inputs], 1)

    def pair(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(x [batch, d_in], y [batch, d_out]): what is read and what is to be reconstructed."""
        x = self.read(rows)
        return x, x if self.target is None else rows[self.target]

    def frame(self, scales: Sequence[float]) -> Frame:
        """The scales of every element it reads and writes; `scales` of every hook of the stream."""
        s_in = torch.cat([torch.full((self.widths[hook],), scales[hook]) for hook in self.inputs])
        return Frame(
            s_in, s_in if self.target is None else torch.full((self.widths[self.target],), scales[self.target])
        )


class SaeTrainer:
    """Learns from scaled rows, one `step` a batch. Reading `report` changes nothing."""

    def __init__(
        self,
        settings: SaeSettings,
        optimizer: OptimizerSettings,
        wiring: Wiring,
        device: torch.device,
        matmul_dtype: torch.dtype,
        seed: int = 0,
        joined_at: int = 0,
    ) -> None:
        self.settings = settings
        self.wiring = wiring
        self.joined_at = joined_at
        """Rows the run had trained on when this SAE began."""
        self.tokens = 0
        """Rows this SAE has learned from."""
        d_out = None if wiring.target is None else wiring.widths[wiring.target]
        widths = tuple(wiring.widths[hook] for hook in wiring.inputs)
        self.sae: Sae = registry.get(settings.architecture)(settings, widths, d_out)
        self.sae.matmul_dtype = matmul_dtype
        self.sae.parameters = {name: value.to(device) for name, value in self.sae.parameters.items()}
        self._optimizer_settings = optimizer
        self._seed = seed
        self._peak = settings.learning_rate or optimizer.learning_rate or default_learning_rate(settings.d_sae)
        self._whitening: Whitening | None = None
        self._ema: dict[str, Tensor] = {}
        self._cooldown: Cooldown | None = None
        self._begin(self.sae.b_dec)
        self.learning_rate = 0.0
        self.skipped_steps = 0
        self._last: tuple[dict[str, Tensor], float] = ({}, math.nan)

    def _begin(self, centre: Tensor) -> None:
        """Optimizer and statistics for the parameters as they are; `centre` is near the mean of y."""
        learning = self.sae.trained or self.sae.parameters.keys()
        parameters = {name: value for name, value in self.sae.parameters.items() if name in learning}
        self.optimizer = RowAdam(parameters, self._optimizer_settings, self.sae.unit_decoder, self.sae.operands)
        self.statistics = Statistics(self.settings.d_sae, centre)

    def initialise(self, rows: Sequence[Tensor], scales: Sequence[float], start: Start | None = None) -> None:
        """First weights, from a sample of scaled rows of every hook, on the CPU; `start` are weights to go on from."""
        x, y = self.wiring.pair(rows)
        centre = y.mean(0)
        if self.settings.whitening:
            self._whitening = whitening_of(x)
            x, y = self._whitened(x, y)
            self._whitening = _moved(self._whitening, self.sae.b_dec.device)
        self.sae.initialise(x, y, torch.Generator().manual_seed(self._seed))
        if start is not None:
            self.sae.adopt(start.weights_for(self.sae, self.wiring.frame(scales)))
            self.sae.after_step()
        self._begin(centre.to(self.sae.b_dec.device))
        if self.settings.ema_tokens:
            self._ema = {name: value.clone() for name, value in self.sae.parameters.items()}

    def step(self, rows: Sequence[Tensor], run_tokens: int | None = None) -> None:
        """Learns from one batch of scaled rows, those of every hook of the stream; `run_tokens` ends the run."""
        x, y = self.wiring.pair(rows)
        x_seen, y_seen = self._whitened(x, y)
        cooldown = self.cooldown(run_tokens)
        self.learning_rate = self._rate(cooldown)
        dead = self.statistics.silent_for(self._revive_tokens)
        sparsity = warmup_factor(self.tokens, self.settings.sparsity_warmup(self.warmup_tokens))
        gradients = self.sae.gradients(x_seen, y_seen, dead, sparsity)
        norm = self.optimizer.step(gradients.of, self.learning_rate)
        self.sae.recycle(gradients.of)
        before, self.tokens = self.tokens, self.tokens + len(x)
        if math.isfinite(norm):
            self.sae.after_step()
            y_hat = gradients.y_hat if self._whitening is None else self._whitening.undo(gradients.y_hat)
            self.statistics.update(y, y_hat, gradients.fired)
            if cooldown is None or self.tokens < cooldown.start:  # what begins later has no rate left to learn at
                self._start_anew(before, x_seen, y_seen, gradients.y_hat)
            self._average(len(x))
        else:
            self.skipped_steps += 1
        self._last = gradients.loss, norm

    def _whitened(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and y as the SAE sees them."""
        if self._whitening is None:
            return x, y
        white = self._whitening.apply(x)
        return white, white  # what is whitened reconstructs what it reads

    @property
    def _revive_tokens(self) -> int:
        return self.settings.revive_tokens or self.settings.dead_tokens

    # Schedule

    @property
    def warmup_tokens(self) -> int:
        """Rows over which its learning rate rises."""
        return self._optimizer_settings.warmup_tokens

    def _rate(self, cooldown: Cooldown | None) -> float:
        """The learning rate of the next step."""
        factor = warmup_factor(self.tokens, self.warmup_tokens)
        return self._peak * (factor if cooldown is None else min(factor, cooldown.factor(self.tokens)))

    def cooldown(self, run_tokens: int | None) -> Cooldown | None:
        """When its learning rate falls to zero: asked for by an operator, by its own budget, or by the run's."""
        if self._cooldown is not None:
            return self._cooldown
        ends = [self.settings.tokens, None if run_tokens is None else run_tokens - self.joined_at]
        end = min((end for end in ends if end is not None), default=None)
        fraction = self._optimizer_settings.cooldown
        return Cooldown(round((1 - fraction) * end), end) if end is not None and fraction else None

    def cool_down(self, run_tokens: int | None = None, now: bool = False) -> int:
        """Begins to cool down, over a fifth (optimizer.cooldown) of the rows seen; returns over how many.

        A cooldown that has begun already goes on as it is: the rate never rises again. `now`: finished at once.
        """
        if now:
            self._cooldown = Cooldown(self.tokens, self.tokens)
        elif self._cooldown is None:
            rows = max(1, round(self._optimizer_settings.cooldown * self.tokens))
            planned = self.cooldown(run_tokens)
            begun = planned is not None and planned.start <= self.tokens
            self._cooldown = planned if begun else Cooldown(self.tokens, self.tokens + rows)
        assert self._cooldown is not None
        return max(0, self._cooldown.end - self.tokens)

    @property
    def finished(self) -> bool:
        """Its own budget or its cooldown is over: it learns no more, and costs nothing."""
        ends = [self.settings.tokens, None if self._cooldown is None else self._cooldown.end]
        return any(end is not None and self.tokens >= end for end in ends)

    # Dead latents that start anew

    def _start_anew(self, before: int, x: Tensor, y: Tensor, y_hat: Tensor) -> None:
        """Resampling (Bricken et al. 2023) when it is due, and the last resort for what nothing else reaches."""
        span = 2 * self._revive_tokens
        if self.settings.revival == "resample" and before // span < self.tokens // span:
            latents = self.statistics.silent_for(self._revive_tokens).nonzero().squeeze(1)
            # A transcoder has no bias at what it reads; about zero, a large mean would make all moved latents alike.
            centre = self.sae.b_dec if self.sae.centred else x.mean(0)
            self._move(latents, x, y, y_hat, x - centre, y - self.sae.b_dec)
        if limit := self.settings.reinitialise_tokens:
            latents = self.statistics.silent_for(limit).nonzero().squeeze(1)
            if len(latents):
                pre_acts = self.sae.in_float32(x, latents)
                out_of_reach = latents[(pre_acts.abs() if self.sae.magnitude else pre_acts).amax(0) <= 0]
                error = y - y_hat
                towards = error if self.wiring.target is None else x - x.mean(0)
                self._move(out_of_reach, x, y, y_hat, towards, error)

    def _move(self, latents: Tensor, x: Tensor, y: Tensor, y_hat: Tensor, towards: Tensor, decoded: Tensor) -> None:
        """Points `latents` at rows drawn with a probability that grows as the square of their loss."""
        latents = latents[: len(x)]
        if not len(latents):
            return
        loss = (y - y_hat).double().square().sum(1).cpu()
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.tokens) % 2**63)
        rows = torch.multinomial(loss.square() + 1e-30, len(latents), generator=generator).to(x.device)
        self.sae.reinitialise(latents, towards[rows], decoded[rows])
        self.optimizer.forget(latents)
        self.statistics.tokens_since_fired[latents] = 0
        for name in self._ema.keys() - set(SHARED):
            self._ema[name][latents] = self.sae.parameters[name][latents]

    # The averaged copy

    def _average(self, rows: int) -> None:
        if not self._ema:
            return
        assert self.settings.ema_tokens is not None
        # A plain mean at first, so that the first weights do not linger.
        weight = max(1 - math.exp(-rows / self.settings.ema_tokens), rows / self.tokens)
        for name, value in self._ema.items():
            value.lerp_(self.sae.parameters[name], min(1.0, weight))

    @property
    def averaged(self) -> Sae | None:
        """The SAE with the mean of its recent weights; None without ema_tokens."""
        if not self._ema:
            return None
        twin = copy.copy(self.sae)
        twin.parameters = {name: value.clone() for name, value in self._ema.items()}
        return twin

    # What others see

    def frame(self, scales: Sequence[float]) -> Frame:
        """How the rows it learns from relate to raw ones."""
        return replace(self.wiring.frame(scales), whitening=self._whitening)

    def calibrate(self, sae: Sae, rows: Sequence[Tensor]) -> None:
        """Lets `sae`, this one or its averaged copy, learn from scaled rows of every hook what inference needs."""
        x = self.wiring.read(rows).to(sae.b_dec.device)
        sae.calibrate(x if self._whitening is None else self._whitening.apply(x))

    def report(self, scales: Sequence[float]) -> SaeReport:
        """The window's numbers; `scales` of every hook turn the error back into the units of raw activations."""
        summary, losses, norm = self.statistics.summary(), *self._last
        dead = self.statistics.dead(self.settings.dead_tokens)
        written = self.wiring.inputs if self.wiring.target is None else (self.wiring.target,)
        return SaeReport(
            name=self.settings.name,
            l0=summary.l0,
            # Crosscoders: each hook has its own scale, and errors are told in those of the first.
            mse=summary.mse / scales[written[0]] ** 2,
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

    # Checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain JSON, tensors named with this SAE's name in front)."""
        white = self._whitening
        parts = {
            "parameters": self.sae.parameters,
            "adam": self.optimizer.state(),
            "statistics": self.statistics.state(),
            "ema": self._ema,
            "whitening": {} if white is None else vars(white),
        }
        tensors = {
            f"{self._prefix(part)}{key}": value for part, values in parts.items() for key, value in values.items()
        }
        return {
            "variance": self.sae.variance,
            "skipped_steps": self.skipped_steps,
            "tokens": self.tokens,
            "joined_at": self.joined_at,
            "cooldown": None if self._cooldown is None else [self._cooldown.start, self._cooldown.end],
            "seed": self._seed,
        }, tensors

    def restore(self, document: dict[str, Any], tensors: dict[str, Tensor], run_tokens: int | None = None) -> None:
        """Becomes what `state` described; `run_tokens` ends the run."""
        self.sae.variance, self.skipped_steps = document["variance"], document["skipped_steps"]
        self.tokens, self.joined_at, self._seed = document["tokens"], document["joined_at"], document["seed"]
        self._cooldown = None if document["cooldown"] is None else Cooldown(*document["cooldown"])
        self.learning_rate = self._rate(self.cooldown(run_tokens))  # a report may come before the first step
        for name, value in self._part(tensors, "parameters").items():
            self.sae.parameters[name].copy_(value)
        if self.settings.ema_tokens:  # which may be new in the run file; an average begins with the weights then
            self._ema = self._part(tensors, "ema") or {
                name: value.clone() for name, value in self.sae.parameters.items()
            }
        if white := self._part(tensors, "whitening"):
            self._whitening = Whitening(**white)
        self._begin(self.sae.b_dec)
        self.optimizer.restore(self._part(tensors, "adam"))
        self.statistics.restore(self._part(tensors, "statistics"))

    def _prefix(self, part: str) -> str:
        return f"sae/{self.settings.name}/{part}/"

    def _part(self, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Copies, where the parameters are: what was loaded is one mapped file, which each piece of it would keep."""
        prefix, device = self._prefix(part), self.sae.b_dec.device
        return {
            key.removeprefix(prefix): value.to(device, copy=True)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def _moved(white: Whitening, device: torch.device) -> Whitening:
    return Whitening(*(part.to(device) for part in (white.centre, white.matrix, white.inverse)))
