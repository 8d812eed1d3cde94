"""What every trainer in the comparison is given: one file of activations, one order, one batch, one schedule.

Imported by our side and, in an environment with nothing of ours, by the peers' side: torch and safetensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BATCH = 2048
COOLDOWN = 0.3
"""The learning rate falls to zero over this last fraction, where a trainer has a say."""


def warmup_tokens(tokens: int) -> int:
    """Tokens over which the learning rate rises: 100,000 of 1,500,000."""
    return tokens // 15


def read(path: Path, name: str, rows: int | None = None) -> Tensor:
    """The first `rows` of `train`, `validation` or `test` [rows, d_in], bfloat16, as the language model made them."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        length = stored.get_shape()[0]
        return stored[: length if rows is None else min(rows, length)]


def batches(path: Path, tokens: int, seed: int) -> Iterator[Tensor]:
    """Batches [BATCH, d_in] in float32, `tokens` // BATCH of them; more tokens than the file has are another epoch."""
    rows = read(path, "train", tokens)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-tokens // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    for start in range(0, tokens - BATCH + 1, BATCH):
        yield rows[order[start : start + BATCH]].float()
