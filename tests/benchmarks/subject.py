"""What is measured: sizes, rows to learn from, an SAE that is ready to take a step on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from producer.wire import Hello, Hook
from trainer.saes.architectures.jumprelu import MINIMUM_THRESHOLD
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.settings import OptimizerSettings
from trainer.training.sae_trainer import SaeTrainer

HOOK = "synthetic"
"""Of every SAE that is timed."""
SAMPLE_ROWS = 4096
BATCHES = 4
"""Batches that take turns."""


@dataclass(frozen=True)
class Size:
    """Of one training step."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    def but(self, **changes: int) -> Size:
        return replace(self, **changes)

    def __str__(self) -> str:
        return f"d_in {self.d_in}, d_sae {self.d_sae}, k {self.k}, batch {self.batch}"

    @property
    def parameters(self) -> int:
        """Numbers in an SAE of this size, thresholds aside."""
        return 2 * self.d_in * self.d_sae + self.d_in + self.d_sae

    @property
    def optimizer_bytes(self) -> int:
        """What Adam must read (weight, gradient, two moments) and write (weight, two moments), in float32."""
        return 7 * 4 * self.parameters


CPU_SIZE = Size(d_in=768, d_sae=12288, k=32, batch=4096)
CUDA_SIZE = Size(d_in=2304, d_sae=65536, k=64, batch=16384)
QUICK_SIZE = Size(d_in=256, d_sae=2048, k=32, batch=1024)


def size_for(device: str, quick: bool) -> Size:
    return QUICK_SIZE if quick else CPU_SIZE if device == "cpu" else CUDA_SIZE


def correlated_rows(rows: int, d_in: int, seed: int = 0) -> Tensor:
    """[rows, d_in] of mean 0 and variance 1: about 30 of 2 d_in directions each, which come in topics."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * d_in, d_in, generator=random))
    topics = torch.randn(32, 2 * d_in, generator=random) / 32**0.5
    threshold = torch.distributions.Normal(0.0, 2**0.5).icdf(torch.tensor(1 - 30 / (2 * d_in)))
    parts = []
    for count in [min(4096, rows - start) for start in range(0, rows, 4096)]:
        of_topics = torch.randn(count, 32, generator=random) @ topics
        active = (of_topics + torch.randn(count, 2 * d_in, generator=random) - threshold).relu_()
        parts.append(active @ directions)
    x = torch.cat(parts)
    return (x - x.mean(0)) / x.std()


def hello_of(hook: str, width: int) -> Hello:
    """What a producer of one hook would say."""
    return Hello(
        producer="p", session="s", name="bench", fingerprint="f", shards=1, held_out=0.0, context=256,
        hooks=[Hook(name=hook, module="m", width=width)], dtype="bfloat16", chunk_rows=4096, norm_bounds=None,
        provenance={},
    )  # fmt: skip


def sae_trainer(architecture: str, size: Size, device: str, sample: Tensor, **more: Any) -> SaeTrainer:
    """An SAE of this size, initialised from a sample of rows; JumpReLU's thresholds let k latents per row through."""
    sparsity: dict[str, Any] = {"target_l0": float(size.k)} if architecture == "jumprelu" else {"k": size.k}
    settings = SaeSettings.of(name=architecture, architecture=architecture, d_sae=size.d_sae, **sparsity, **more)  # type: ignore[arg-type]
    optimizer = OptimizerSettings(batch=size.batch, device=device)
    subject = SaeTrainer(
        settings, optimizer, SaeHooks((HOOK,), (HOOK,)), {HOOK: size.d_in}, torch.device(device), torch.bfloat16
    )
    sample = sample[:SAMPLE_ROWS].cpu()
    subject.initialise({HOOK: sample}, {HOOK: 1.0})
    if architecture == "jumprelu":
        _settle(subject, sample.to(device), size.k / size.d_sae)
    return subject


def _settle(sae_trainer: SaeTrainer, x: Tensor, rate: float) -> None:
    """Sets every threshold to the quantile that its latent exceeds on the fraction `rate` of the rows."""
    rank, own = max(1, round(rate * len(x))), sae_trainer.sae.parameters
    for latents in torch.arange(sae_trainer.sae.d_sae, device=x.device).split(2048):
        pre_acts = own["W_enc"][latents] @ (x - own["b_dec"]).T + own["b_enc"][latents, None]
        own["threshold"][latents] = pre_acts.topk(rank, dim=1).values[:, -1].clamp_min(MINIMUM_THRESHOLD)
