"""The prediction for a run: speed, memory, duration, what bounds them, and what to change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from producer.common.formatting import format_bytes
from trainer.defaults import LengthSettings, planned_tokens
from trainer.planning import cost
from trainer.planning.cost import Machine, StepCost
from trainer.planning.sae_cost import place_saes
from trainer.planning.sharding import USABLE, Group, GroupStep, ShardedStep, fewest_gpus
from trainer.planning.starting import Start
from trainer.planning.workload import LanguageModelSize
from trainer.saes.settings import ASSUMED_L0
from trainer.settings import TrainerSettings

HINTS = {
    "encoder product": "it grows with d_in × d_sae × batch: a smaller d_sae or a machine with faster products",
    "pre-activations": "they are batch × d_sae numbers: a smaller d_sae, or a wider model hides them",
    "choice of latents": "it reads every pre-activation: a smaller d_sae or, with topk, a smaller k",
    "sparse products": "they grow with batch × k × d_in: a smaller k",
    "optimizer": "its bytes are the same for every batch: a larger optimizer.batch spreads them over more activations",
    "rows and entries": "they are passes over the batch: little but the width of the model decides",
    "overhead": "the steps are tiny: a larger optimizer.batch",
    "activations": "they reach every GPU: a faster network between machines",
    "candidates": "each GPU tells k of them per activation: a smaller k",
    "thresholds": "they are few bytes: a larger optimizer.batch",
    "reconstructions": "they are batch × d_out numbers: fewer machines, or a faster network between them",
    "sums": "they are few bytes: a larger optimizer.batch",
    "scalars": "they are few bytes: a larger optimizer.batch",
}
"""For each part of a step: what it grows with, and what makes it smaller."""


@dataclass(frozen=True)
class Estimate:
    """The prediction for one run on one machine, or on several GPUs."""

    saes: list[StepCost]
    machine: Machine
    tokens: int | None
    """Tokens of the run; None when it ends with the data."""
    token_bytes: int
    """Size of the activations of all hooks for one token, on the wire and in the buffer."""
    buffer: float
    """Bytes."""
    forward: float | None
    """Seconds of the language model per token on such a machine; None when its size is unknown."""
    snapshot_every: int
    """Tokens."""
    checkpoint_every: float
    """Seconds."""
    shares_machine: bool
    """The run file puts the language model and the SAEs on the same device."""
    sharded: ShardedStep | None
    """The step on the number of GPUs given by `--gpus` or `--days`; None without them."""
    schedules: dict[str, LengthSettings]
    """Learning rate, warm-up and revival of each SAE, by its name."""
    groups: list[Group]
    """The placement groups, one without parallel.groups."""
    hooks: int
    start: Start
    warnings: list[str]
    """Warnings about the settings."""

    @classmethod
    def of(
        cls,
        settings: TrainerSettings,
        model: LanguageModelSize,
        machine: Machine,
        saes: list[StepCost],
        run_file: Path,
        sharded: ShardedStep | None = None,
    ) -> Estimate:
        """The estimate for a run file; `saes` are its SAEs on that machine."""
        widths = [model.width] * len(settings.hooks)
        forward = None if model.parameters is None else cost.forward_seconds(model.parameters, model.width, machine)
        rate = _rate(saes, machine, sharded)
        start = Start.of(
            settings,
            run_file,
            1 if sharded is None else sharded.gpus,
            machine.per_node,
            rate,
            token_bytes(settings, model),
            None if forward is None else rate * forward,
            sum(map(cost.checkpoint_bytes, saes)),
        )
        return cls(
            saes=saes,
            machine=machine,
            tokens=settings.run.tokens,
            token_bytes=token_bytes(settings, model),
            buffer=cost.buffer_bytes(settings.buffer.rows, widths, _stored_bytes(settings)),
            forward=forward,
            snapshot_every=settings.snapshots.every_tokens,
            checkpoint_every=settings.checkpoint.every_seconds,
            shares_machine=settings.model is not None and settings.model.device == settings.optimizer.device,
            sharded=sharded,
            schedules={
                sae.name: LengthSettings.of(sae, settings.optimizer, planned_tokens(sae.tokens, settings.run.tokens))
                for sae in settings.sae
            },
            groups=groups_of(settings, model, saes),
            hooks=len(settings.hooks),
            start=start,
            warnings=settings.warnings(),
        )

    @property
    def batch(self) -> int:
        return max(sae.batch for sae in self.saes)

    @property
    def step_seconds(self) -> float:
        """One step of all SAEs on one device."""
        return sum(cost.step_seconds(sae, self.machine) for sae in self.saes)

    @property
    def rate(self) -> float:
        """Tokens per second of the trainer: of one device, or of all GPUs that were asked for."""
        return _rate(self.saes, self.machine, self.sharded)

    @property
    def shared_rate(self) -> float | None:
        """Tokens per second where language model and SAEs take turns on one device; None where they do not."""
        if self.forward is None or not self.shares_machine or self.sharded is not None:
            return None
        return 1 / (1 / self.rate + self.forward)

    @property
    def run_rate(self) -> float:
        """Tokens per second of the run: those of the trainer, if producers, and the stream, bring as many."""
        return min(self.shared_rate or self.rate, self.start.intake_rate)

    @property
    def durations(self) -> dict[str, float]:
        """Seconds of the run, by what it is of; none for a run without an end."""
        if self.tokens is None:
            return {}
        alone = self.tokens / min(self.rate, self.start.intake_rate)
        if self.shared_rate is None:
            return {f"for {self.tokens:,} tokens": alone}
        return {
            f"for {self.tokens:,} tokens, on one machine": self.tokens / self.run_rate,
            "  with enough producers on others": alone,
        }

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, all SAEs together."""
        if self.sharded is not None:
            return self.sharded.seconds
        return _sums([cost.step_parts(sae, self.machine) for sae in self.saes])

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on one device by use; the buffer of a GPU's run is in the memory of its host."""
        parts = _sums([cost.memory_parts(sae, self.machine.kernels) for sae in self.saes])
        parts["process"] = self.machine.kernels.process_bytes
        return parts | ({"buffer": self.buffer} if self.machine.kernels is cost.CPU else {})

    @property
    def group_steps(self) -> list[GroupStep | None]:
        """The step of each placement group; None where they are not asked about."""
        steps = () if self.sharded is None else self.sharded.groups
        return list(steps) if steps else [None] * len(self.groups)

    @property
    def producers(self) -> float | None:
        """How many producers, each on such a machine of its own, keep the trainer busy."""
        return None if self.forward is None else self.rate * self.forward

    def as_json(self) -> dict[str, Any]:
        machine, sharded = self.machine, self.sharded
        return {
            "machine": {
                "name": machine.name,
                "matmul_flops": machine.matmul_flops,
                "bandwidth": machine.bandwidth,
                "memory": machine.memory if math.isfinite(machine.memory) else None,
            },
            "saes": {
                sae.name: {
                    "seconds": cost.step_parts(sae, machine),
                    "step_seconds": cost.step_seconds(sae, machine),
                    "parameters": sae.parameters,
                    "memory": cost.memory_parts(sae, machine.kernels),
                    "snapshot_bytes": cost.snapshot_bytes(sae),
                    "checkpoint_bytes": cost.checkpoint_bytes(sae),
                    **asdict(self.schedules[sae.name]),
                }
                for sae in self.saes
            },
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.rate,
            "days": None if self.tokens is None else self.tokens / self.run_rate / 86400,
            "start": self.start.as_json(),
            "memory": self.memory,
            "wire_bytes_per_token": self.token_bytes,
            "hooks": {
                "count": self.hooks,
                "wire_bytes_per_token": self.token_bytes // self.hooks,
                "buffer": self.buffer / self.hooks,
            },
            "groups": [
                {
                    "saes": [sae.name for sae in group.saes],
                    "wire_bytes_per_token": group.token_bytes,
                    "step_seconds": None if step is None else step.step_seconds,
                    "memory_per_gpu": None if step is None else step.memory,
                }
                for group, step in zip(self.groups, self.group_steps, strict=True)
            ],
            "producer_tokens_per_second": None if self.forward is None else 1 / self.forward,
            "producers": self.producers,
            "sharded": None
            if sharded is None
            else {
                "gpus": sharded.gpus,
                "seconds": sharded.seconds,
                "bytes": sharded.bytes,
                "memory_per_gpu": sharded.memory,
                "fits": sharded.fits,
            },
        }

    def sentences(self) -> list[str]:
        """Sentences on what bounds the run, and what to change."""
        parts = self.parts
        largest = max(parts, key=lambda name: parts[name])
        share = parts[largest] / sum(parts.values())
        sentences = [f"The largest part of a step: {largest}, {share:.0%}; {HINTS[largest]}."]
        if self.forward is not None and self.producers is not None:
            sentences.append(_balance(self.producers, self.rate, 1 / self.forward))
            if self.shared_rate is not None:
                sentences.append(f"Where the two share one machine: {self.shared_rate:,.0f} tokens/s.")
        sentences += self.start.sentences(self.rate)
        sentences += self._memory_sentences()
        if assumed := [sae.name for sae in self.saes if sae.l0_is_assumed]:
            sentences.append(
                f"How many latents of {', '.join(assumed)} are active is not set; {ASSUMED_L0:g} is assumed."
            )
        return sentences + [f"{warning}." for warning in self.warnings]

    def _memory_sentences(self) -> list[str]:
        """A sentence for a run that does not fit into memory."""
        if self.sharded is None:
            size = sum(self.memory.values())
            if size <= USABLE * self.machine.memory:
                return []
            return [f"It does not fit: {format_bytes(size)} of {format_bytes(self.machine.memory)}."]
        if self.sharded.fits:
            return []
        fewest = fewest_gpus(self.groups, self.machine, None, None)
        remedy = "" if fewest is None else f"; {fewest.gpus} GPUs hold it"
        return [f"It does not fit: {format_bytes(self.sharded.memory)} on each GPU{remedy}."]


def _rate(saes: list[StepCost], machine: Machine, sharded: ShardedStep | None) -> float:
    """Tokens per second of the trainer."""
    seconds = sum(cost.step_seconds(sae, machine) for sae in saes) if sharded is None else sharded.step_seconds
    return max(sae.batch for sae in saes) / seconds


def groups_of(settings: TrainerSettings, model: LanguageModelSize, saes: list[StepCost]) -> list[Group]:
    """The placement groups of a run; `saes` are the costs of its SAEs."""
    hook_bytes = _stored_bytes(settings) * model.width
    if settings.parallel.groups == 1:
        return [Group(saes, hook_bytes * len(settings.hooks))]
    group_of = place_saes(settings, settings.sae, dict.fromkeys(settings.hooks, model.width))
    groups = []
    for index in range(settings.parallel.groups):
        names = {name for name, group in group_of.items() if group == index}
        hooks = {hook for sae in settings.sae if sae.name in names for hook in settings.hooks_of(sae).names}
        groups.append(Group([sae for sae in saes if sae.name in names], hook_bytes * len(hooks)))
    return groups


def token_bytes(settings: TrainerSettings, model: LanguageModelSize) -> int:
    """Size of the activations of all hooks for one token."""
    return _stored_bytes(settings) * model.width * len(settings.hooks)


def _stored_bytes(settings: TrainerSettings) -> int:
    """Size of a number on the wire and in the buffer."""
    return cost.HALF if settings.stream.dtype == "bfloat16" else cost.FLOAT32


def _sums(parts_of_saes: list[dict[str, float]]) -> dict[str, float]:
    """Parts by name, summed over SAEs."""
    return {name: sum(parts[name] for parts in parts_of_saes) for name in parts_of_saes[0]}


def _balance(producers: float, rate: float, producer_rate: float) -> str:
    """Which side is slower; rates are in tokens per second."""
    if producers >= 1:
        return (
            f"The language model is the slower side: a producer gives {producer_rate:,.0f} tokens/s on such a machine, "
            f"the trainer takes {rate:,.0f}; {math.ceil(producers)} producers balance it."
        )
    return (
        f"The trainer is the slower side: one producer on such a machine gives {producer_rate:,.0f} tokens/s, enough "
        f"for {1 / producers:.1f} trainers like it."
    )
