"""The encoder's product, in blocks of activations: latents are selected while a block is in reach of the caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels.select import Latents, joined

BLOCK_BYTES, BLOCK_BYTES_ON_CPU = 2**30, 2**24
"""Size of a block of pre_acts, on a GPU and on a CPU."""
LEAST_ROWS = 256
"""Rows of a block at least, however wide it is."""
AUX_MULTIPLE = 256
"""The number of latents in an auxiliary loss is rounded up to a multiple of it."""


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for a batch: what was selected of the pre_acts, which are not kept as a whole."""

    inputs: Tensor
    """[batch, d_in] in the type of products: x without b_dec."""
    latents: list[Latents]
    """The active latents, one set for each selection."""
    aux_latents: Tensor
    """Indices [n] of the latents of an auxiliary loss: those to revive."""
    aux_pre_acts: Tensor
    """[batch, n]"""

    def padded(self, fill: float) -> tuple[Tensor, Tensor]:
        """`aux_latents` and `aux_pre_acts` with columns of `fill` up to a round number; their index is that of another.

        A CPU's products in bfloat16 are compiled for each shape, and kept: if the number of dead latents were free,
        steps would take longer, and a run hundreds of megabytes more.
        """
        count = -len(self.aux_latents) % AUX_MULTIPLE
        indices = torch.cat([self.aux_latents, self.aux_latents[:1].expand(count)])
        return indices, torch.nn.functional.pad(self.aux_pre_acts, (0, count), value=fill)


class BlockwiseEncoder:
    """Computes pre_acts block by block in one buffer, so that the whole product is never in memory."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(
        self,
        inputs: Tensor,
        W_enc: Tensor,
        bias: Tensor,
        selections: Sequence[Callable[[Tensor], Latents]],
        aux_latents: Tensor,
        parts: Sequence[slice] = (slice(None),),
        row_latents: int | None = None,
    ) -> Encoded:
        """Applies `selections` to inputs W_encᵀ + bias [batch, latents]; all of one type, which pre_acts have too.

        `parts` of the latents get products of their own. The rows of a block follow from `row_latents`, the number of
        latents of a row of it; all latents of W_enc without.
        """
        block_bytes = BLOCK_BYTES_ON_CPU if inputs.device.type == "cpu" else BLOCK_BYTES
        rows = max(LEAST_ROWS, block_bytes // ((row_latents or len(W_enc)) * W_enc.element_size()))
        shape = (min(rows, len(inputs)), len(W_enc))
        if self._buffer.shape != shape or self._buffer.dtype != W_enc.dtype:
            self._buffer = inputs.new_empty(shape)
        selected: list[list[Latents]] = [[] for _ in selections]
        aux_pre_acts = inputs.new_empty(len(inputs), len(aux_latents))
        for begin in range(0, len(inputs), rows):
            block = inputs[begin : begin + rows]
            pre_acts = self._buffer[: len(block)]
            for part in parts:
                torch.addmm(bias[part], block, W_enc[part].T, out=pre_acts[:, part])
            for of_selection, select in zip(selected, selections, strict=True):
                of_selection.append(select(pre_acts))
            if len(aux_latents):
                aux_pre_acts[begin : begin + rows] = pre_acts[:, aux_latents]
        return Encoded(inputs, [joined(of_selection) for of_selection in selected], aux_latents, aux_pre_acts)
