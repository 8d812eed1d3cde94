"""What a run costs, from two numbers of a machine: its rate of the encoder product and its bandwidth. Pure arithmetic.

With batch B, widths d and latents n, of which k are active on a row, and with numbers of s bytes in products, a step is

    encoder product     2 B d n / F                        F: FLOP/s of a product of this shape
    pre-activations     B n bytes, several times / W       W: bytes/s of a copy, what is read and what is written
    choice of latents   by architecture
    sparse products     4 B k d s / W                      decode, its gradient, and one per weight matrix
    optimizer           88 d n / W                         two float32 matrices: gradients, norms, Adam, bfloat16 copies
    rows, entries       B d, B k

Sparse products are those of Gao et al. 2024 (arXiv 2406.04093, appendix D); bytes are counted from `optimizer.py`,
`saes/base.py` and the kernels. The constants of `CPU` stand for what two numbers cannot say; how well they do is
measured by tests/benchmarks/estimate.py. Latents that are dead, and early steps on which more of them are active, cost
more than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

FLOAT32 = 4
HALF = 2
MOMENTS = 2 * FLOAT32

GRADIENT_BYTES = 4
NORM_BYTES = 4
ADAM_BYTES = 28
"""Adam reads weight, gradient and two moments, and writes all but the gradient."""
B_DEC_BYTES = 4
"""b_dec's gradient goes through the encoder, all of which is read."""
TANGENT_BYTES = 8
"""A decoder row is read, and its gradient written back without the part along it."""
EMA_BYTES = 12
SECOND_LOSS_BYTES = 16
"""Multi-TopK: gradients of its own, added to the others."""
FORWARD_BYTES = 320
"""Of a language model, per element of its rows and block: all that is not a product. From the demo's model, whose pass
takes 8 µs a token where F is 2.7e12 and W 24e9; two thirds of it are not products."""
SLOT_BYTES = 24
"""Bookkeeping of the buffer, per row."""
TEMPORARY_BYTES = 26
"""Copies of a batch's rows that a step holds at its highest moment, per element: six in float32, one in bfloat16."""
ENTRY_MEMORY = 80
"""Places, orders and values that a step holds, per active latent."""


@dataclass(frozen=True)
class Kernels:
    """What two numbers do not say about our kernels, as the bytes that could be moved in the same time."""

    device: str
    pre_act_passes: float
    """How often the product touches a pre-activation: bias laid down, read, sum written."""
    choice_topk: float
    """Bytes per pre-activation and k."""
    choice_above: float
    """Bytes per pre-activation, for all that are above a threshold."""
    gather: float
    """Of the time in which gathered rows could be copied: some are still in a cache."""
    entry: float
    """Bytes per active latent: sorting, gathering, per-entry arithmetic."""
    row: float
    """Bytes per element of the batch: centring, casts, errors, statistics, fresh memory."""
    step_seconds: float
    """What a step takes beside all else: the interpreter, threads that start."""
    block_bytes: int
    """So much of the pre-activations is held at a time."""
    process_bytes: float
    """The interpreter and its libraries."""


CPU = Kernels("cpu", 3.0, 0.2, 13.0, 0.85, 1000.0, 90.0, 2e-3, 2**24, 0.4e9)
"""From profiles of TopK, BatchTopK and JumpReLU steps on two cores with bfloat16 units (F 2.7e12, W 25e9): d_in 256 to
1024, d_sae 2¹² to 2¹⁵, k 16 to 64, batch 1024 and 4096; one set for all."""
CUDA = Kernels("cuda", 1.0, 0.0, 4.0, 1.0, 100.0, 60.0, 1e-3, 2**30, 2e9)
"""Counted from the kernels, NOT measured: a product writes pre-activations once, a choice reads them once or twice."""


@dataclass(frozen=True)
class Machine:
    """Where a trainer runs."""

    name: str
    matmul_flops: float
    """Of the encoder product, FLOP/s."""
    bandwidth: float
    """Of a copy larger than all caches, bytes/s, read and written ones counted."""
    memory: float
    """Bytes; infinite where it is not known."""
    kernels: Kernels = CPU
    number: int = HALF
    """Bytes of a number in its encoder product."""
    link: float = math.inf
    """Between GPUs of one machine, bytes/s in one direction."""
    network: float = math.inf
    """Between machines, for each GPU, bytes/s in one direction."""
    per_node: int = 8
    """GPUs in one machine."""


PRODUCT_EFFICIENCY, COPY_EFFICIENCY = 0.65, 0.85
"""Shares of a data sheet's figures that large bfloat16 products and copies reach; assumed, NOT measured."""


def _gpu(name: str, flops: float, bandwidth: float, memory: float, link: float, network: float) -> Machine:
    reached = PRODUCT_EFFICIENCY * flops, COPY_EFFICIENCY * bandwidth
    return Machine(name, *reached, memory, CUDA, HALF, link, network)


MACHINES = {
    "h200": _gpu("h200", 989e12, 4.8e12, 141e9, 450e9, 50e9),
    "h100": _gpu("h100", 989e12, 3.35e12, 80e9, 450e9, 50e9),
    "a100": _gpu("a100", 312e12, 2.04e12, 80e9, 300e9, 25e9),
}
"""Data sheets of the SXM variants: dense bfloat16, HBM, NVLink one way; an adapter of 400 or 200 Gbit/s per GPU."""


@dataclass(frozen=True)
class Work:
    """One SAE's share of a step."""

    name: str
    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    batch: int
    active: float
    """Entries per row that products see: k, with Multi-TopK 5 k."""
    chosen: float = 0.0
    """The sum of all k that are chosen; 0 where a threshold decides."""
    levels: int = 1
    """Of a Matryoshka."""
    decodings: int = 1
    """How often latents are decoded: gated twice."""
    losses: int = 1
    """How many write gradients of their own: Multi-TopK two."""
    tied: bool = False
    unit_decoder: bool = True
    centred: bool = True
    skip: bool = False
    whitening: bool = False
    ema: bool = False
    number: int = HALF
    """Bytes of a number in products: 2 in bfloat16, 4 in float32."""
    l0_is_assumed: bool = False

    @property
    def encoder(self) -> int:
        """Elements of the encoder; none when the decoder is the encoder too."""
        return 0 if self.tied else self.d_sae * self.d_in

    @property
    def decoder(self) -> int:
        return self.d_sae * self.d_out

    @property
    def parameters(self) -> int:
        """Numbers that are learned. Beside the matrices one bias per latent and per output."""
        return self.encoder + self.decoder + self.d_sae + self.d_out + self.skip * self.d_in * self.d_out

    def sharded(self, gpus: int) -> Work:
        """What one of `gpus` has of it, when each owns a part of the latents."""
        part = -(-self.d_sae // gpus)
        return replace(self, d_sae=part, active=self.active / gpus, chosen=min(self.chosen, part))


# Time -----------------------------------------------------------------------------------------------------------------


def product_flops(work: Work) -> float:
    """FLOPs of the one dense product of a step, and of the dense maps beside it."""
    dense = 2.0 * work.batch * work.d_in * work.d_sae
    beside = work.skip * 4.0 * work.batch * work.d_in * work.d_out + work.whitening * 4.0 * work.batch * work.d_in**2
    return dense + beside


def optimizer_bytes(work: Work) -> float:
    """Bytes that gradients, norms, Adam, projections and the copies for products move in a step."""
    each = GRADIENT_BYTES + NORM_BYTES + ADAM_BYTES + work.ema * EMA_BYTES + (work.losses > 1) * SECOND_LOSS_BYTES
    each += HALF if work.number == HALF else 0
    encoder = each + work.centred * B_DEC_BYTES
    decoder = each + work.unit_decoder * TANGENT_BYTES
    return work.encoder * encoder + work.decoder * decoder


def sparse_bytes(work: Work) -> float:
    """Bytes that are gathered: rows of W_dec, again for the latents' gradient, and rows of x and of the error."""
    entries = work.batch * work.active
    return entries * work.number * (2 * work.decodings * work.d_out + work.d_out + work.d_in)


def choice_bytes(work: Work, kernels: Kernels) -> float:
    """Bytes that could be moved while latents are chosen; the first look at each pre-activation is in it."""
    pre_acts = float(work.batch) * work.d_sae
    if work.chosen:
        return pre_acts * (work.number + kernels.choice_topk * work.chosen)
    return pre_acts * kernels.choice_above


def step_parts(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of each part of one SAE's step."""
    kernels, W = machine.kernels, machine.bandwidth
    elements = work.batch * (work.d_in + work.d_out) / 2 * work.levels
    return {
        "encoder product": product_flops(work) / machine.matmul_flops,
        "pre-activations": kernels.pre_act_passes * work.number * work.batch * work.d_sae / W,
        "choice of latents": choice_bytes(work, kernels) / W,
        "sparse products": kernels.gather * sparse_bytes(work) / W,
        "optimizer": optimizer_bytes(work) / W,
        "rows and entries": (kernels.row * elements + kernels.entry * work.batch * work.active) / W,
        "overhead": kernels.step_seconds,
    }


def step_seconds(work: Work, machine: Machine) -> float:
    return sum(step_parts(work, machine).values())


def forward_seconds(parameters: float, width: int, machine: Machine) -> float:
    """Seconds in which a language model of so many weights in its blocks, cut after the last hook, passes one token.

    Its products, and what else a block of 12 width² weights moves.
    """
    blocks = parameters / (12 * width**2)
    return 2 * parameters / machine.matmul_flops + FORWARD_BYTES * width * blocks / machine.bandwidth


# Memory and what crosses wires ----------------------------------------------------------------------------------------


def memory_parts(work: Work, kernels: Kernels) -> dict[str, float]:
    """Bytes that one SAE holds while it learns."""
    P, matrices = work.parameters, work.encoder + work.decoder
    rows = min(work.batch, max(256, kernels.block_bytes // (work.d_sae * work.number)))
    elements = work.batch * (work.d_in + work.d_out) / 2 * work.levels
    return {
        "parameters": FLOAT32 * P * (2 if work.ema else 1),
        "two moments": MOMENTS * P,
        "bfloat16 copies": HALF * matrices if work.number == HALF else 0.0,
        "gradients": FLOAT32 * P * work.losses,
        "pre-activations": float(work.number) * rows * work.d_sae,
        "rows and entries": TEMPORARY_BYTES * elements + ENTRY_MEMORY * work.batch * work.active,
    }


def buffer_bytes(rows: int, widths: Iterable[int], number: int) -> float:
    """Of the shuffling buffer: one row of every hook per slot, and its bookkeeping."""
    return rows * (number * sum(widths) + SLOT_BYTES)


def snapshot_bytes(work: Work) -> float:
    """Published weights in float32: both matrices, also of an SAE that is tied; the averaged copy beside them."""
    weights = work.d_sae * (work.d_in + work.d_out) + 2 * work.d_sae + work.d_out
    return FLOAT32 * (weights + work.skip * work.d_in * work.d_out) * (2 if work.ema else 1)


def checkpoint_bytes(work: Work) -> float:
    """Weights and both moments, the averaged copy, and two counters of 8 bytes per latent."""
    return (FLOAT32 * (2 if work.ema else 1) + MOMENTS) * work.parameters + 16 * work.d_sae


# Latents over several GPUs: what a sharded trainer would need. Sluice's does not shard. -------------------------------

CANDIDATE_BYTES = 8
"""Value and index of one candidate: exact, ties included."""
USABLE = 0.9
"""Of a GPU's memory; the rest is the allocator's, the collectives' and the driver's."""


@dataclass(frozen=True)
class Sharded:
    """One step with each GPU owning d_sae / gpus rows of both matrices, with their gradients and moments."""

    gpus: int
    bytes: dict[str, float]
    """What every GPU receives in one step, by purpose; `rows in` comes from the producers, once for all."""
    seconds: dict[str, float]
    memory: float
    """Bytes on each GPU."""
    fits: bool

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def sharded(works: list[Work], machine: Machine, gpus: int, row_bytes: int, buffer: float = 0.0) -> Sharded:
    """The parts of a step on `gpus`; `row_bytes` of one row of all hooks, `buffer` is held by the host of the first.

    x goes to all; each finds its own k best; the candidates of all are gathered, so that each knows which of its own
    are among the k best of all; each decodes those; the partial reconstructions are summed.
    """
    parts: dict[str, float] = {}
    moved = {"rows in": 0.0, "x to all": 0.0, "candidates": 0.0, "reconstruction summed": 0.0}
    batch = max(work.batch for work in works)
    moved["rows in"] = float(batch * row_bytes)
    for work in works:
        for name, seconds in step_parts(work.sharded(gpus), machine).items():
            parts[name] = parts.get(name, 0.0) + seconds
        candidates = min(work.active, work.sharded(gpus).d_sae) * work.batch * CANDIDATE_BYTES if work.chosen else 0.0
        moved["candidates"] += (gpus - 1) * candidates
        moved["reconstruction summed"] += FLOAT32 * work.batch * work.d_out * work.levels * work.decodings
    moved["x to all"] = moved["rows in"] if gpus > 1 else 0.0
    if gpus == 1:
        moved["reconstruction summed"] = 0.0
    parts["x to all"] = _broadcast(moved["x to all"], machine, gpus)
    parts["candidates"] = _gather(moved["candidates"], machine, gpus)
    parts["reconstruction summed"] = _all_reduce(moved["reconstruction summed"], machine, gpus)
    memory = sum(sum(memory_parts(work.sharded(gpus), machine.kernels).values()) for work in works)
    return Sharded(gpus, moved, parts, memory, memory <= USABLE * machine.memory)


def _nodes(machine: Machine, gpus: int) -> int:
    return -(-gpus // machine.per_node)


def _broadcast(size: float, machine: Machine, gpus: int) -> float:
    """Seconds to bring `size` bytes to all: in pieces over the adapters of each machine, then over its links."""
    across = size / (machine.network * machine.per_node) if _nodes(machine, gpus) > 1 else 0.0
    return across + (size / machine.link if gpus > 1 else 0.0)


def _gather(received: float, machine: Machine, gpus: int) -> float:
    """Seconds until each has the `received` bytes of all others; those of other machines come through all adapters."""
    nodes = _nodes(machine, gpus)
    foreign = received * (nodes - 1) / nodes if nodes > 1 else 0.0
    return foreign / (machine.network * machine.per_node) + received / machine.link


def _all_reduce(size: float, machine: Machine, gpus: int) -> float:
    """Seconds of a sum of `size` bytes on each: rings within a machine, each GPU's part then between machines."""
    nodes = _nodes(machine, gpus)
    here = math.ceil(gpus / nodes)
    within = 2 * (here - 1) / here * size / machine.link
    return within + 2 * (nodes - 1) / nodes * size / here / machine.network


def fewest(
    works: list[Work], machine: Machine, row_bytes: int, tokens: int | None, days: float | None, at_most: int = 4096
) -> Sharded | None:
    """The fewest GPUs, whole machines beyond the first, that hold the SAEs and end within `days`; None if none do."""
    counts = [*(2**power for power in range(4)), *range(2 * machine.per_node, at_most + 1, machine.per_node)]
    for gpus in counts:
        found = sharded(works, machine, gpus, row_bytes)
        if found.fits and (days is None or tokens is None or days_of(tokens, works, found.step_seconds) <= days):
            return found
    return None


def days_of(tokens: int, works: list[Work], seconds: float) -> float:
    """Days in which `tokens` are learned from, at so many seconds a step."""
    return tokens / max(work.batch for work in works) * seconds / 86400
