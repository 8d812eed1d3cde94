"""One SAE with everything that a step changes and a checkpoint keeps: weights, optimizer, schedule, statistics.

An SAE may join a stream that is already running and may leave it before the others do, so it counts the tokens that it
has trained on itself. Nothing here depends on which other SAEs there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from producer.lm.precision import dtype_name
from trainer.defaults import LengthSettings
from trainer.kernels.select import DENSE_ABOVE_ON_GPU
from trainer.parallel.ranks import ALONE, Ranks
from trainer.phases import SaePhase
from trainer.report import SaeReport
from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform, Whitening, side_by_side, whitening_of
from trainer.saes.formats import PublishedSae
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.saes.start import start_weights
from trainer.settings import OptimizerSettings
from trainer.state.format import SaeState, SaeTensors, WhiteningState
from trainer.training.averaging import AverageWeights
from trainer.training.optimizers.base import Optimizer
from trainer.training.optimizers.registry import optimizer_class
from trainer.training.revival import Revival
from trainer.training.schedule import Cooldown, Schedule, warmup_factor
from trainer.training.statistics import Statistics


class SaeTrainer:
    """Trains one SAE on scaled activations, one `step` a batch."""

    is_here = True
    """This rank holds latents of it; other ranks train the SAEs of other placement groups (`remote`)."""

    def __init__(
        self,
        settings: SaeSettings,
        optimizer: OptimizerSettings,
        hooks: SaeHooks,
        widths: Mapping[str, int],
        device: torch.device,
        matmul_dtype: torch.dtype,
        seed: int = 0,
        joined_at: int = 0,
        run_tokens: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """An SAE at `hooks`; `widths` are by the name of the hook, those of the whole stream or of `hooks`.

        `joined_at`: tokens that the run has trained on so far; `run_tokens`: those after which it ends. `ranks` share
        its latents.
        """
        self.settings = settings
        self.hooks = hooks
        self.has_weights = False
        """Its first weights are drawn, or restored."""
        self._widths = widths
        d_out = widths[hooks.writes[0]] if hooks.is_transcoder else None
        widths_in = tuple(widths[hook] for hook in hooks.reads)
        self.sae: Sae = registry.get(settings.architecture)(settings, widths_in, d_out, ranks)
        self.sae.matmul_dtype = matmul_dtype
        self.sae.parameters = {name: value.to(device) for name, value in self.sae.parameters.items()}
        if device.type == "cuda" and math.isfinite(self.sae.dense_above):
            self.sae.dense_above = DENSE_ABOVE_ON_GPU
        self.schedule = Schedule(
            peak=0.0,
            warmup_tokens=0,
            cooldown_fraction=optimizer.cooldown,
            budget=settings.tokens,
            run_tokens=run_tokens,
            joined_at=joined_at,
        )
        self.learning_rate = 0.0
        """That of the last step."""
        self.skipped_steps = 0
        self.sparsity_share = 1.0
        """Share of the penalty, beside its warm-up; tuning holds L0 with it."""
        self._optimizer_settings = optimizer
        self._plan(self.schedule.end)
        self._seed = seed
        self._whitening: Whitening | None = None
        self._average: AverageWeights | None = None
        self._losses: dict[str, Tensor] = {}
        self._grad_norm = math.nan
        self._reset_optimizer(self.sae.b_dec)

    def _plan(self, planned_tokens: int | None) -> None:
        """Takes the defaults of an SAE that trains on `planned_tokens`, where the settings leave them open."""
        self._planned_tokens = planned_tokens
        planned = LengthSettings.of(self.settings, self._optimizer_settings, planned_tokens)
        self.schedule.peak, self.schedule.warmup_tokens = planned.learning_rate, planned.warmup_tokens
        self._revive_tokens = planned.revive_tokens

    def _reset_optimizer(self, centre: Tensor) -> None:
        """Begins optimizer and statistics for the present parameters; `centre` [d_out] is near the mean of y."""
        names = self.sae.trainable or self.sae.parameters.keys()
        parameters = {name: value for name, value in self.sae.parameters.items() if name in names}
        sae = self.sae
        self.optimizer: Optimizer = optimizer_class(self.settings.optimizer)(
            parameters, self._optimizer_settings, sae.unit_decoder, sae.operands, sae.ranks, sae.blocks, sae.d_sae
        )
        self.statistics = Statistics(len(sae.latents), centre, sae.ranks)

    def initialise(
        self, sample: Mapping[str, Tensor], scales: Mapping[str, float], start: PublishedSae | None = None
    ) -> None:
        """Draws the first weights from scaled activations of every hook, on the CPU; `start` replaces the weights.

        All ranks are given the same activations, and draw from the same generator.
        """
        x, y = self.inputs_and_targets(sample)
        centre = y.mean(0)
        if self.settings.whitening:
            self._whitening = whitening_of(x)
            x, y = self._whiten(x, y)
            self._whitening = _to_device(self._whitening, self.sae.b_dec.device)
        self.sae.initialise(x, y, torch.Generator().manual_seed(self._seed))
        if start is not None:
            self.sae.adopt(start_weights(start, self.sae, self.input_transform(scales)))
            self.sae.after_step()
        self._reset_optimizer(centre.to(self.sae.b_dec.device))
        if self.settings.ema_tokens:
            self._average = AverageWeights(self.sae.parameters, self.settings.ema_tokens)
        self.has_weights = True

    def step(self, activations: Mapping[str, Tensor]) -> None:
        """Trains on one batch: scaled activations [batch, width] of every hook of the stream.

        Collective: all ranks that share the SAE call it, with the same batch.
        """
        x_scaled, y_scaled = self.inputs_and_targets(activations)
        x, y = self._whiten(x_scaled, y_scaled)
        cooldown = self.schedule.cooldown
        self.learning_rate = self.schedule.rate(self.tokens)
        dead = self.statistics.silent_for(self._revive_tokens)
        sparsity = self.sparsity_share * warmup_factor(
            self.tokens, self.settings.sparsity_warmup(self.schedule.warmup_tokens)
        )
        gradients = self.sae.gradients(x, y, dead, sparsity)
        self.sae.sum_shared(gradients.of)
        norm = self.optimizer.step(gradients.of, self.learning_rate)
        self.sae.recycle(gradients.of)
        before, self.tokens = self.tokens, self.tokens + len(x)
        if math.isfinite(norm):
            self.sae.after_step()
            y_hat = gradients.y_hat if self._whitening is None else self._whitening.undo(gradients.y_hat)
            self.statistics.update(y_scaled, y_hat, gradients.fired)
            if cooldown is None or self.tokens < cooldown.start:  # after that the rate is too low to train new weights
                self._revival().replace(before, self.tokens, x, y, gradients.y_hat)
            if self._average is not None:
                self._average.update(self.sae.parameters, len(x), self.tokens)
        else:
            self.skipped_steps += 1
        self._losses, self._grad_norm = gradients.loss, norm

    def _revival(self) -> Revival:
        return Revival(self.sae, self.optimizer, self.statistics, self._average, self._seed, self._revive_tokens)

    def inputs_and_targets(self, activations: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(x [batch, d_in], y [batch, d_out]): what the SAE reads, and what it is to reconstruct."""
        x = side_by_side(activations, self.hooks.reads)
        return x, side_by_side(activations, self.hooks.writes) if self.hooks.is_transcoder else x

    def _whiten(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled activations (x, y) as the SAE sees them."""
        if self._whitening is None:
            return x, y
        white = self._whitening.apply(x)
        return white, white  # an SAE on whitened activations reconstructs what it reads

    # Lifecycle

    @property
    def tokens(self) -> int:
        """Tokens that this SAE has trained on."""
        return self.sae.tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        self.sae.tokens = tokens

    @property
    def phase(self) -> SaePhase:
        return self.schedule.phase(self.tokens)

    def cool_down(self, now: bool = False) -> int:
        """Begins the cooldown, see `Schedule.cool_down`; returns its length in tokens."""
        return self.schedule.cool_down(self.tokens, now)

    # Reports and snapshots; none of them changes anything. `calibrate` and `report` are collective

    @property
    def ema_sae(self) -> Sae | None:
        """The SAE with the mean of its recent weights; None without ema_tokens."""
        return None if self._average is None else self._average.copy_of(self.sae)

    def input_transform(self, scales: Mapping[str, float]) -> InputTransform:
        """From raw activations to those that the SAE sees; `scales` by the name of the hook."""
        return InputTransform.of(self.hooks, self._widths, scales, self._whitening)

    def calibrate(self, sae: Sae, activations: Mapping[str, Tensor]) -> None:
        """Fits what inference needs of `sae`, this one or its EMA copy, to scaled activations of every hook.

        Collective.
        """
        x = side_by_side(activations, self.hooks.reads).to(sae.b_dec.device)
        sae.calibrate(x if self._whitening is None else self._whitening.apply(x))

    def report(self, scales: Mapping[str, float]) -> SaeReport:
        """The window's numbers; `scales` of every hook turn the error back into the units of raw activations.

        Collective.
        """
        summary = self.statistics.summary()
        dead = self.statistics.count_dead(self.settings.dead_tokens)
        return SaeReport(
            name=self.settings.name,
            l0=summary.l0,
            # A crosscoder's hooks have different scales; its error is in units of the first.
            mse=summary.mse / scales[self.hooks.writes[0]] ** 2,
            fvu=summary.fvu,
            dead_latents=dead,
            dead_latents_ratio=None if dead is None else dead / self.settings.d_sae,
            shrinkage=summary.shrinkage,
            loss=self._summed_losses(),
            learning_rate=self.learning_rate,
            grad_norm=self._grad_norm,
            density=self.statistics.density(),
            skipped_steps=self.skipped_steps,
            group=self.sae.ranks.group_index,
        )

    def _summed_losses(self) -> dict[str, float]:
        """The parts of the last loss; of sums over latents those of all ranks."""
        losses = {name: float(value) for name, value in self._losses.items()}
        names = self.sae.partial_losses
        if names and not self.sae.ranks.is_alone:
            # A rank without a loss, such as one without dead latents, adds nothing.
            parts = torch.tensor([[losses.get(name, 0.0), name in losses] for name in names], dtype=torch.float64)
            totals = self.sae.ranks.sum(parts.to(self.sae.ranks.device), "scalars").tolist()
            for name, (value, present) in zip(names, totals, strict=True):
                if present:
                    losses[name] = value
        return losses

    # Checkpoints

    def state(self) -> tuple[SaeState, SaeTensors]:
        """Counters, and the tensors themselves, which the next step changes; of per-latent ones this rank's rows."""
        return self.counters(), self.tensors()

    def counters(self) -> SaeState:
        cooldown = self.schedule.requested
        return SaeState(
            variance=self.sae.variance,
            skipped_steps=self.skipped_steps,
            tokens=self.tokens,
            joined_at=self.schedule.joined_at,
            cooldown=None if cooldown is None else (cooldown.start, cooldown.end),
            seed=self._seed,
            matmul=dtype_name(self.sae.matmul_dtype),
            planned_tokens=self._planned_tokens,
        )

    def tensors(self) -> SaeTensors:
        whitening = self._whitening
        return SaeTensors(
            parameters=self.sae.parameters,
            optimizer=self.optimizer.state(),
            statistics=self.statistics.state(),
            ema={} if self._average is None else self._average.parameters,
            whitening=None
            if whitening is None
            else WhiteningState(whitening.centre, whitening.matrix, whitening.inverse),
        )

    def restore(self, state: SaeState, tensors: SaeTensors) -> None:
        """Goes on from what `state` returned. Keeps none of `tensors`: they may be parts of one mapped file."""
        self.restore_counters(state)
        for name, value in tensors.parameters.items():
            self.sae.parameters[name].copy_(value)
        device = self.sae.b_dec.device
        if self.settings.ema_tokens:  # which may be new in the run file; an average begins with the weights then
            average = {name: value.to(device) for name, value in (tensors.ema or self.sae.parameters).items()}
            self._average = AverageWeights(average, self.settings.ema_tokens)
        if (whitening := tensors.whitening) is not None:
            copies = (part.to(device, copy=True) for part in (whitening.centre, whitening.matrix, whitening.inverse))
            self._whitening = Whitening(*copies)
        self._reset_optimizer(self.sae.b_dec)
        self.has_weights = True
        self.optimizer.restore(tensors.optimizer)
        self.statistics.restore(tensors.statistics)

    def restore_counters(self, state: SaeState) -> None:
        self.sae.variance, self.skipped_steps = state.variance, state.skipped_steps
        self.sae.matmul_dtype = getattr(torch, state.matmul)
        self.tokens, self._seed = state.tokens, state.seed
        self.schedule.joined_at = state.joined_at
        self._plan(state.planned_tokens)  # a run that is made longer keeps the learning rate that it has
        self.schedule.requested = None if state.cooldown is None else Cooldown(*state.cooldown)
        self.learning_rate = self.schedule.rate(self.tokens)  # a report may come before the first step


def _to_device(white: Whitening, device: torch.device) -> Whitening:
    return Whitening(*(part.to(device) for part in (white.centre, white.matrix, white.inverse)))
