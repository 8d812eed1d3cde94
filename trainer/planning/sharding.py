"""Cost of a step whose latents are sharded over several ranks, each with a GPU of its own.

The collectives are counted from the links of one machine and from the network between machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.planning.cost import Machine, StepCost, memory_parts, step_parts
from trainer.planning.exchange import exchanged_bytes

MAX_GPUS = 4096
GATHERED, SUMMED = ("candidates", "thresholds"), ("reconstructions", "sums", "scalars")
"""What ranks tell each other, and what they add up, by purpose."""
USABLE = 0.9
"""Share of a GPU's memory; the rest is taken by the allocator, the collectives and the driver."""


@dataclass(frozen=True)
class Group:
    """The SAEs of a placement group."""

    saes: list[StepCost]
    token_bytes: int
    """Size of the activations of the hooks that they read, for one token."""


@dataclass(frozen=True)
class GroupStep:
    """The step of a placement group."""

    saes: tuple[str, ...]
    step_seconds: float
    memory: float
    """Bytes on each of its GPUs."""


@dataclass(frozen=True)
class ShardedStep:
    """A step in which each GPU owns d_sae / gpus rows of both matrices, with their gradients and moments.

    With several placement groups it is that of the slowest, for which the others wait.
    """

    gpus: int
    bytes: dict[str, float]
    """Received by every GPU in one step, by purpose; `rows in` comes from the producers, once for all GPUs."""
    seconds: dict[str, float]
    memory: float
    """Bytes on each GPU."""
    fits: bool
    groups: tuple[GroupStep, ...] = ()
    """One for each placement group; none where there is one."""

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def grouped_step(groups: Sequence[Group], machine: Machine, gpus: int) -> ShardedStep:
    """The parts of a step on `gpus`, of which each placement group has as many, a divisor of them."""
    each = gpus // len(groups)
    if len(groups) == 1:
        return sharded_step(groups[0].saes, machine, gpus, groups[0].token_bytes)
    steps = [sharded_step(group.saes, machine, each, group.token_bytes, is_one_of_many=True) for group in groups]
    of_each = tuple(
        GroupStep(tuple(sae.name for sae in group.saes), step.step_seconds, step.memory)
        for group, step in zip(groups, steps, strict=True)
    )
    slowest = max(steps, key=lambda step: step.step_seconds)
    memory = max(step.memory for step in steps)
    return replace(slowest, gpus=gpus, memory=memory, fits=all(step.fits for step in steps), groups=of_each)


def sharded_step(
    saes: list[StepCost], machine: Machine, gpus: int, token_bytes: int, is_one_of_many: bool = False
) -> ShardedStep:
    """The parts of a step on `gpus`; `token_bytes` is the size of the activations of all hooks for one token.

    Activations are broadcast; what else is exchanged, `exchange` says. `is_one_of_many`: the activations of a placement
    group come from a GPU of another.
    """
    parts: dict[str, float] = {}
    batch = max(sae.batch for sae in saes)
    received = {"rows in": float(batch * token_bytes), "activations": 0.0}
    received["activations"] = received["rows in"] if gpus > 1 or is_one_of_many else 0.0
    for sae in saes:
        for name, seconds in step_parts(sae.sharded(gpus), machine).items():
            parts[name] = parts.get(name, 0.0) + seconds
        for purpose, size in exchanged_bytes(sae, gpus).items():
            received[purpose] = received.get(purpose, 0.0) + size
    parts["activations"] = _broadcast(received["activations"], machine, gpus)
    if is_one_of_many:
        parts["activations"] += received["activations"] / machine.link
    for purpose in GATHERED:
        parts[purpose] = _gather(received[purpose], machine, gpus)
    for purpose in SUMMED:
        parts[purpose] = _all_reduce(received[purpose], machine, gpus)
    memory = sum(sum(memory_parts(sae.sharded(gpus), machine.kernels).values()) for sae in saes)
    return ShardedStep(gpus, received, parts, memory, memory <= USABLE * machine.memory)


def _nodes(machine: Machine, gpus: int) -> int:
    return -(-gpus // machine.per_node)


def _broadcast(size: float, machine: Machine, gpus: int) -> float:
    """Seconds of a broadcast of `size` bytes: in pieces over the adapters of each machine, then over its links."""
    across = size / (machine.network * machine.per_node) if _nodes(machine, gpus) > 1 else 0.0
    return across + (size / machine.link if gpus > 1 else 0.0)


def _gather(received: float, machine: Machine, gpus: int) -> float:
    """Seconds until each GPU has the `received` bytes of all others, through all adapters from other machines."""
    nodes = _nodes(machine, gpus)
    remote = received * (nodes - 1) / nodes if nodes > 1 else 0.0
    return remote / (machine.network * machine.per_node) + received / machine.link


def _all_reduce(received: float, machine: Machine, gpus: int) -> float:
    """Seconds of an all-reduce in which a single ring would bring `received` bytes to each GPU.

    There are rings within a machine, then each GPU's part goes between machines.
    """
    if gpus == 1:
        return 0.0
    size = received * gpus / (2 * (gpus - 1))
    nodes = _nodes(machine, gpus)
    per_node = math.ceil(gpus / nodes)
    within = 2 * (per_node - 1) / per_node * size / machine.link
    return within + 2 * (nodes - 1) / nodes * size / per_node / machine.network


def fewest_gpus(
    groups: Sequence[Group], machine: Machine, tokens: int | None, days: float | None
) -> ShardedStep | None:
    """The fewest GPUs, whole machines beyond the first, that hold the SAEs and end within `days`; None if none do."""
    counts = [*(2**power for power in range(4)), *range(2 * machine.per_node, MAX_GPUS + 1, machine.per_node)]
    saes = [sae for group in groups for sae in group.saes]
    for gpus in counts:
        if gpus % len(groups):
            continue
        step = grouped_step(groups, machine, gpus)
        if step.fits and (days is None or tokens is None or days_of(tokens, saes, step.step_seconds) <= days):
            return step
    return None


def days_of(tokens: int, saes: list[StepCost], seconds: float) -> float:
    """Days of training on `tokens`, at so many seconds a step."""
    return tokens / max(sae.batch for sae in saes) * seconds / 86400
