"""Packing: the activations of one forward pass → chunks of the stream.

    per chunk:   drop outliers → copy the activations once, from the model's tensor into the message

Only what the trainer lacks is packed. An activation whose norm exceeds the bound of its hook is an outlier: the chunk
names it, and holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from producer.corpus.rendering.windows import Windows
from producer.link import PackedChunk
from producer.sources.base import Source
from producer.wire import DTYPE_BYTES, MAX_CHUNK_POSITIONS, TARGET_CHUNK_BYTES, pack_bits

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_CHUNK_ROWS = 4096
"""Most activations in a chunk, however narrow they are: a small buffer holds several chunks, whatever a pass takes."""
EXACT_ABOVE = 0.98
"""Share of its bound up to which a norm is within the bound, even if computed in bfloat16's three digits."""


@dataclass(frozen=True)
class LeasedShard:
    """A leased shard, and the activations of it that the trainer still lacks."""

    shard: int
    windows: Windows
    missing: np.ndarray
    """bool [windows, context]: the activations to send."""
    norm_bounds: list[float] | None
    """Per hook; an activation of a larger norm is an outlier. None: nothing is."""
    hooks: tuple[int, ...] = ()
    """Numbers of the hooks whose activations are asked for; empty for all."""


def chunk_windows(context: int, row_bytes: int, batch_windows: int) -> int:
    """Windows per chunk: about TARGET_CHUNK_BYTES, at most MAX_CHUNK_ROWS and one forward pass.

    `row_bytes` are the bytes of one activation of all hooks.
    """
    return max(1, min(batch_windows, MAX_CHUNK_ROWS // context, TARGET_CHUNK_BYTES // (context * row_bytes)))


def chunk_slices(indices: np.ndarray, windows: int, context: int) -> Iterator[slice]:
    """Cuts the ascending window indices of a pass into chunks of at most `windows`.

    A chunk names all positions between its first and last window. Where few activations of a shard are missing these
    lie far apart, and a chunk ends where it would name more than a message may.
    """
    start = 0
    while start < len(indices):
        limit = indices[start] + MAX_CHUNK_POSITIONS // context
        end = min(start + windows, int(np.searchsorted(indices, limit)))
        yield slice(start, end)
        start = end


def chunk_windows_of(source: Source, dtype: str) -> int:
    """`chunk_windows` for what `source` streams in the number format `dtype`."""
    row_bytes = DTYPE_BYTES[dtype] * sum(hook.width for hook in source.hooks)
    return chunk_windows(source.context, row_bytes, source.batch_windows)


class Packer:
    """Packs forward passes into chunks of at most `chunk_windows` windows, in the stream's number format."""

    def __init__(self, context: int, chunk_windows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._context = context
        self._chunk_windows = chunk_windows
        self._dtype = dtype
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(
        self, leased: LeasedShard, indices: np.ndarray, activations: list[Tensor], pass_end: torch.cuda.Event | None
    ) -> list[PackedChunk]:
        """The chunks of one pass over the windows with these indices.

        `activations` are [len(indices), context, width] per hook; `pass_end` is a GPU's event after the pass.
        """
        chunks: list[PackedChunk] = []
        for part in chunk_slices(indices, self._chunk_windows, self._context):
            chunk_indices = indices[part]
            missing = leased.missing[chunk_indices]
            if not missing.any():
                continue
            packed, payload = self._pack_activations(
                [x[part] for x in activations], missing, leased.norm_bounds, pass_end, leased.hooks
            )
            # The windows of a chunk are a range; those in between with nothing missing have no bits.
            first, count = int(chunk_indices[0]), int(chunk_indices[-1] - chunk_indices[0]) + 1
            packed_bits, outlier_bits = np.zeros((2, count, self._context), bool)
            packed_bits[chunk_indices - first] = packed
            outlier_bits[chunk_indices - first] = missing & ~packed
            outliers = int(outlier_bits.sum())
            chunks.append(
                PackedChunk(
                    first_window=first,
                    windows=count,
                    rows=int(packed.sum()),
                    kept_bits=pack_bits(packed_bits),
                    outlier_bits=pack_bits(outlier_bits) if outliers else b"",
                    outlier_count=outliers,
                    payload=payload,
                    hooks=leased.hooks,
                )
            )
        return chunks

    def _pack_activations(
        self,
        activations: list[Tensor],
        missing: np.ndarray,
        bounds: list[float] | None,
        pass_end: torch.cuda.Event | None,
        hooks: tuple[int, ...],
    ) -> tuple[np.ndarray, memoryview]:
        """Calls `pack_activations`; on a GPU in a CUDA stream of its own, so that it waits for its own pass alone."""
        if self._copy_stream is None or pass_end is None:
            return pack_activations(activations, missing, bounds, self._dtype, hooks)
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(pass_end)
            for x in activations:
                x.record_stream(self._copy_stream)
            return pack_activations(activations, missing, bounds, self._dtype, hooks)


def pack_activations(
    activations: list[Tensor],
    missing: np.ndarray,
    bounds: list[float] | None,
    dtype: torch.dtype,
    hooks: Sequence[int] = (),
) -> tuple[np.ndarray, memoryview]:
    """(packed [windows, context], payload): the missing activations within the bounds, as bytes, hook after hook.

    The payload holds those of `hooks`, by number, of all when there are none. Bounds hold at every hook, so that the
    activations of a run are the same ones whichever hooks are asked for.
    """
    hooks = hooks or range(len(activations))
    if activations[0].device.type == "cpu":
        return _pack_on_cpu(activations, missing, bounds, dtype, hooks)
    device = activations[0].device
    keep = torch.from_numpy(missing).to(device)
    if bounds is not None:
        for x, bound in zip(activations, bounds, strict=True):
            keep = keep & ~_is_outlier(x, bound)
    rows = int(keep.sum())
    wanted = [activations[hook] for hook in hooks]
    sizes = [rows * x.shape[-1] for x in wanted]
    payload = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
    for block, x in zip(payload.split(sizes), wanted, strict=True):
        block.view(rows, x.shape[-1]).copy_(x[keep], non_blocking=True)
    packed = keep.cpu().numpy()
    torch.cuda.current_stream(device).synchronize()
    return packed, payload.view(torch.uint8).numpy().data


def _pack_on_cpu(
    activations: list[Tensor],
    missing: np.ndarray,
    bounds: list[float] | None,
    dtype: torch.dtype,
    hooks: Sequence[int],
) -> tuple[np.ndarray, memoryview]:
    """The same in a fifth of the time: a norm is exact only near its bound, and each activation is copied once."""
    packed = missing
    flat = [x.reshape(-1, x.shape[-1]) for x in activations]
    for x, bound in zip(flat, bounds or [], strict=bounds is not None):
        norm = torch.linalg.vector_norm(x, dim=-1)
        uncertain = (~(norm <= EXACT_ABOVE * bound)).nonzero().view(-1)
        if len(uncertain):
            outlier = np.zeros(len(x), bool)
            outlier[uncertain.numpy()] = _is_outlier(x[uncertain], bound).numpy()
            packed = packed & ~outlier.reshape(packed.shape)
    flat = [flat[hook] for hook in hooks]
    index = torch.from_numpy(np.flatnonzero(packed))
    payload = torch.empty(len(index) * sum(x.shape[-1] for x in flat), dtype=dtype)
    for block, x in zip(payload.split([len(index) * x.shape[-1] for x in flat]), flat, strict=True):
        rows = block.view(len(index), x.shape[-1])
        if x.dtype == dtype:
            torch.index_select(x, 0, index, out=rows)
        else:
            rows.copy_(x.index_select(0, index))
    return packed, payload.view(torch.uint8).numpy().data


def _is_outlier(x: Tensor, bound: float) -> Tensor:
    # An activation that is not finite is no outlier: it must reach the trainer, which rejects it with a message.
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return (norm > bound) & norm.isfinite()
