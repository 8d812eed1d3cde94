"""Cost of a step whose latents are sharded over several GPUs, which Sluice's trainer does not do.

The collectives are counted from the links of one machine and from the network between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.planning.cost import FLOAT32, Machine, StepCost, memory_parts, step_parts

MAX_GPUS = 4096
CANDIDATE_BYTES = 8
"""Value and index of one candidate."""
USABLE = 0.9
"""Share of a GPU's memory; the rest is taken by the allocator, the collectives and the driver."""


@dataclass(frozen=True)
class ShardedStep:
    """A step in which each GPU owns d_sae / gpus rows of both matrices, with their gradients and moments."""

    gpus: int
    bytes: dict[str, float]
    """Received by every GPU in one step, by purpose; `rows in` comes from the producers, once for all GPUs."""
    seconds: dict[str, float]
    memory: float
    """Bytes on each GPU."""
    fits: bool

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def sharded_step(saes: list[StepCost], machine: Machine, gpus: int, token_bytes: int) -> ShardedStep:
    """The parts of a step on `gpus`; `token_bytes` is the size of the activations of all hooks for one token.

    x is broadcast; each GPU selects its own k largest; these candidates are gathered by all, so that each knows which
    of its own are among the k largest of all; each decodes those; the partial reconstructions are summed.
    """
    parts: dict[str, float] = {}
    received = {"rows in": 0.0, "x to all": 0.0, "candidates": 0.0, "reconstruction summed": 0.0}
    batch = max(sae.batch for sae in saes)
    received["rows in"] = float(batch * token_bytes)
    for sae in saes:
        for name, seconds in step_parts(sae.sharded(gpus), machine).items():
            parts[name] = parts.get(name, 0.0) + seconds
        candidates = min(sae.active, sae.sharded(gpus).d_sae) * sae.batch * CANDIDATE_BYTES if sae.total_k else 0.0
        received["candidates"] += (gpus - 1) * candidates
        received["reconstruction summed"] += FLOAT32 * sae.batch * sae.d_out * sae.levels * sae.decodings
    received["x to all"] = received["rows in"] if gpus > 1 else 0.0
    if gpus == 1:
        received["reconstruction summed"] = 0.0
    parts["x to all"] = _broadcast(received["x to all"], machine, gpus)
    parts["candidates"] = _gather(received["candidates"], machine, gpus)
    parts["reconstruction summed"] = _all_reduce(received["reconstruction summed"], machine, gpus)
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


def _all_reduce(size: float, machine: Machine, gpus: int) -> float:
    """Seconds of an all-reduce of `size` bytes: rings within a machine, then each GPU's part between machines."""
    nodes = _nodes(machine, gpus)
    per_node = math.ceil(gpus / nodes)
    within = 2 * (per_node - 1) / per_node * size / machine.link
    return within + 2 * (nodes - 1) / nodes * size / per_node / machine.network


def fewest_gpus(
    saes: list[StepCost], machine: Machine, token_bytes: int, tokens: int | None, days: float | None
) -> ShardedStep | None:
    """The fewest GPUs, whole machines beyond the first, that hold the SAEs and end within `days`; None if none do."""
    counts = [*(2**power for power in range(4)), *range(2 * machine.per_node, MAX_GPUS + 1, machine.per_node)]
    for gpus in counts:
        step = sharded_step(saes, machine, gpus, token_bytes)
        if step.fits and (days is None or tokens is None or days_of(tokens, saes, step.step_seconds) <= days):
            return step
    return None


def days_of(tokens: int, saes: list[StepCost], seconds: float) -> float:
    """Days of training on `tokens`, at so many seconds a step."""
    return tokens / max(sae.batch for sae in saes) * seconds / 86400
