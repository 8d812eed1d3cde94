"""Time and memory of a training step, from two numbers of a machine. Pure arithmetic.

The two numbers are its rate of the encoder product and its bandwidth.

With batch B, width d and n latents, of which k are active on an activation, and s bytes per number in products, the
parts of a step take

    encoder product     2 B d n / F                        F: FLOP/s of a product of this shape
    pre-activations     B n bytes, several times / W       W: bytes/s of a copy, what is read and what is written
    choice of latents   by architecture
    sparse products     4 B k d s / W                      decode, its gradient, and one per weight matrix
    optimizer           88 d n / W                         two float32 matrices: gradients, norms, Adam, bfloat16 copies
    rows, entries       B d, B k

Sparse products are those of Gao et al. 2024 (arXiv 2406.04093, appendix D); bytes are counted from
`saes/base.py`, the kernels and `training/optimizers`, whose registry has those of other optimizers than Adam. The
constants of `CPU` stand for what two numbers cannot say; tests/benchmarks/estimate.py measures how well they do.
Reviving dead latents, and early steps on which more latents are active, take longer than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from trainer.training.optimizers.registry import OPTIMIZERS, OptimizerEntry

FLOAT32 = 4
HALF = 2

GRADIENT_BYTES = 4
NORM_BYTES = 4
B_DEC_BYTES = 4
"""b_dec's gradient goes through the encoder, all of which is read."""
TANGENT_BYTES = 8
"""A decoder row is read, and its gradient written back without the part along it."""
EMA_BYTES = 12
"""The average is read and written, the weight read."""
SECOND_LOSS_BYTES = 16
"""Multi-TopK: gradients of its own, added to the others."""
FORWARD_BYTES = 320
"""Moved by a language model beside its products, per element of its hidden states and per block. From the demo's
model, whose forward pass takes 8 µs a token where F is 2.7e12 and W 24e9; two thirds of that are not products."""
SLOT_BYTES = 24
"""Bookkeeping of the buffer, per activation."""
TEMPORARY_BYTES = 26
"""Copies of a batch that a step holds at its peak, per element: six in float32, one in bfloat16."""
ENTRY_MEMORY = 80
"""Indices, orders and values that a step holds, per active latent."""


@dataclass(frozen=True)
class Kernels:
    """Constants of the kernels of one kind of device, as the bytes that could be moved in the same time."""

    device: str
    pre_act_passes: float
    """How often the product touches a pre-activation: bias written, read, sum written."""
    top_k_bytes: float
    """Selection of the k largest: bytes per pre-activation and k."""
    threshold_bytes: float
    """Selection of all above a threshold: bytes per pre-activation."""
    gather_share: float
    """Time of gathering rows of a matrix, as a share of copying them: some are still in a cache."""
    entry_bytes: float
    """Per active latent: sorting, gathering, arithmetic."""
    element_bytes: float
    """Per element of the batch: centring, casts, errors, statistics, allocation."""
    step_seconds: float
    """Seconds per step of the interpreter and of starting threads."""
    block_bytes: int
    """Pre-activations that are held at a time."""
    process_bytes: float
    """Memory of the interpreter and its libraries."""


CPU = Kernels("cpu", 3.0, 0.2, 13.0, 0.85, 1000.0, 90.0, 2e-3, 2**24, 0.4e9)
"""From profiles of TopK, BatchTopK and JumpReLU steps on two cores with bfloat16 units (F 2.7e12, W 25e9): d_in 256 to
1024, d_sae 2¹² to 2¹⁵, k 16 to 64, batch 1024 and 4096; one set of constants for all of them."""
CUDA = Kernels("cuda", 1.0, 0.0, 4.0, 1.0, 100.0, 60.0, 1e-3, 2**30, 2e9)
"""Counted from the kernels, NOT measured: a product writes pre-activations once, a selection reads them up to twice."""


@dataclass(frozen=True)
class Machine:
    """The machine that a trainer runs on."""

    name: str
    matmul_flops: float
    """Rate of the encoder product, FLOP/s."""
    bandwidth: float
    """Bandwidth of a copy larger than all caches, bytes/s; bytes read and bytes written both count."""
    memory: float
    """Bytes; infinite when unknown."""
    kernels: Kernels = CPU
    number_bytes: int = HALF
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
class StepCost:
    """The sizes that the cost of one SAE's share of a step depends on."""

    name: str
    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    batch: int
    active: float
    """Latents per activation that the sparse products see: k, with Multi-TopK 5 k."""
    total_k: float = 0.0
    """The sum of all k that are selected; 0 where a threshold decides."""
    levels: int = 1
    """Nested reconstructions of a Matryoshka SAE."""
    decodings: int = 1
    """How often latents are decoded: gated twice."""
    losses: int = 1
    """How many losses write gradients of their own: Multi-TopK two."""
    batch_selections: int = 0
    """Selections among all values of a batch."""
    latent_parameters: int = 3
    """Trained parameters with a row or a number per latent."""
    scalars: int = 0
    """Numbers that a step sums over latents for its losses alone."""
    tied: bool = False
    unit_decoder: bool = True
    centred: bool = True
    skip: bool = False
    whitening: bool = False
    ema: bool = False
    number_bytes: int = HALF
    """Bytes of a number in products: 2 in bfloat16, 4 in float32."""
    exchange_bytes: int = FLOAT32
    """Bytes of a number of a reconstruction that ranks exchange."""
    l0_is_assumed: bool = False
    first_active: float = 0.0
    """Latents per activation at the start, where k is annealed: memory must hold them."""
    encodings: float = 1.0
    """Number of times that all pre-activations are computed."""
    optimizer: OptimizerEntry = OPTIMIZERS["adam"]

    @property
    def encoder(self) -> int:
        """Elements of the encoder; 0 when it shares its matrix with the decoder."""
        return 0 if self.tied else self.d_sae * self.d_in

    @property
    def decoder(self) -> int:
        return self.d_sae * self.d_out

    @property
    def parameters(self) -> int:
        """Trained numbers: the matrices, and one bias per latent and per output."""
        return self.encoder + self.decoder + self.d_sae + self.d_out + self.skip * self.d_in * self.d_out

    def sharded(self, gpus: int) -> StepCost:
        """The share of one GPU when each of `gpus` owns a part of the latents."""
        part = -(-self.d_sae // gpus)
        return replace(
            self,
            d_sae=part,
            active=self.active / gpus,
            first_active=self.first_active / gpus,
            total_k=min(self.total_k, part),
        )


# Time -----------------------------------------------------------------------------------------------------------------


def product_flops(sae: StepCost) -> float:
    """FLOPs of the one dense product of a step, and of the dense maps beside it."""
    dense = 2.0 * sae.encodings * sae.batch * sae.d_in * sae.d_sae
    beside = sae.skip * 4.0 * sae.batch * sae.d_in * sae.d_out + sae.whitening * 4.0 * sae.batch * sae.d_in**2
    return dense + beside


def optimizer_bytes(sae: StepCost) -> float:
    """Bytes that gradients, norms, the update, projections and the copies for products move in a step."""
    each = (
        GRADIENT_BYTES + NORM_BYTES + sae.optimizer.bytes + sae.ema * EMA_BYTES + (sae.losses > 1) * SECOND_LOSS_BYTES
    )
    each += HALF if sae.number_bytes == HALF else 0
    encoder = each + sae.centred * B_DEC_BYTES
    decoder = each + sae.unit_decoder * TANGENT_BYTES
    return sae.encoder * encoder + sae.decoder * decoder


def optimizer_flops(sae: StepCost) -> float:
    """FLOPs of the products in an update, which do not depend on the batch."""
    return sae.optimizer.products * 2.0 * (sae.encoder * sae.d_in + sae.decoder * sae.d_out)


def sparse_bytes(sae: StepCost) -> float:
    """Bytes that are gathered: rows of W_dec, the same rows for the latents' gradient, rows of x and of the error."""
    entries = sae.batch * sae.active
    return entries * sae.number_bytes * (2 * sae.decodings * sae.d_out + sae.d_out + sae.d_in)


def selection_bytes(sae: StepCost, kernels: Kernels) -> float:
    """Bytes that could be moved while latents are selected, the first read of each pre-activation included."""
    pre_acts = float(sae.batch) * sae.d_sae
    if sae.total_k:
        return pre_acts * (sae.number_bytes + kernels.top_k_bytes * sae.total_k)
    return pre_acts * kernels.threshold_bytes


def step_parts(sae: StepCost, machine: Machine) -> dict[str, float]:
    """Seconds of each part of one SAE's step."""
    kernels, W = machine.kernels, machine.bandwidth
    elements = sae.batch * (sae.d_in + sae.d_out) / 2 * sae.levels
    return {
        "encoder product": product_flops(sae) / machine.matmul_flops,
        "pre-activations": sae.encodings * kernels.pre_act_passes * sae.number_bytes * sae.batch * sae.d_sae / W,
        "choice of latents": sae.encodings * selection_bytes(sae, kernels) / W,
        "sparse products": kernels.gather_share * sparse_bytes(sae) / W,
        "optimizer": optimizer_bytes(sae) / W + optimizer_flops(sae) / machine.matmul_flops,
        "rows and entries": (kernels.element_bytes * elements + kernels.entry_bytes * sae.batch * sae.active) / W,
        "overhead": kernels.step_seconds,
    }


def step_seconds(sae: StepCost, machine: Machine) -> float:
    return sum(step_parts(sae, machine).values())


def forward_seconds(parameters: float, width: int, machine: Machine) -> float:
    """Seconds per token of a language model with so many weights in its blocks up to the last hook.

    The time of its products, and of what else a block of 12 width² weights moves.
    """
    blocks = parameters / (12 * width**2)
    return 2 * parameters / machine.matmul_flops + FORWARD_BYTES * width * blocks / machine.bandwidth


# Memory and what crosses wires ----------------------------------------------------------------------------------------


def memory_parts(sae: StepCost, kernels: Kernels) -> dict[str, float]:
    """Bytes that one SAE holds while it is trained."""
    P, matrices = sae.parameters, sae.encoder + sae.decoder
    rows = min(sae.batch, max(256, kernels.block_bytes // (sae.d_sae * sae.number_bytes)))
    elements = sae.batch * (sae.d_in + sae.d_out) / 2 * sae.levels
    return {
        "parameters": FLOAT32 * P * (2 if sae.ema else 1),
        "moments": FLOAT32 * sae.optimizer.moments * P,
        "bfloat16 copies": HALF * matrices if sae.number_bytes == HALF else 0.0,
        "gradients": FLOAT32 * P * sae.losses,
        "pre-activations": float(sae.number_bytes) * rows * sae.d_sae,
        "rows and entries": TEMPORARY_BYTES * elements + ENTRY_MEMORY * sae.batch * max(sae.active, sae.first_active),
    }


def buffer_bytes(rows: int, widths: Iterable[int], number_bytes: int) -> float:
    """Size of the shuffling buffer: an activation of every hook per slot, and its bookkeeping."""
    return rows * (number_bytes * sum(widths) + SLOT_BYTES)


def snapshot_bytes(sae: StepCost) -> float:
    """Size of published weights, float32: both matrices, even of a tied SAE, and those of the averaged copy."""
    weights = sae.d_sae * (sae.d_in + sae.d_out) + 2 * sae.d_sae + sae.d_out
    return FLOAT32 * (weights + sae.skip * sae.d_in * sae.d_out) * (2 if sae.ema else 1)


def checkpoint_bytes(sae: StepCost) -> float:
    """Size of weights, both moments, the averaged copy, and two counters of 8 bytes per latent."""
    return FLOAT32 * ((2 if sae.ema else 1) + sae.optimizer.moments) * sae.parameters + 16 * sae.d_sae
