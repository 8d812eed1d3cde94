"""The latents that a rank holds, in blocks: over which latents a sum is formed before ranks exchange it.

Without fixed blocks a rank has one block of all its latents. With `Ranks.blocks` it has several, whose products have
the same shapes, and the same operands in the same order, on every number of ranks: their bits are the same too.

A block's latents are cut where a level of a Matryoshka SAE ends. `segments` are these pieces of all blocks of a rank:
entries split at their ends lie block by block.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trainer.kernels.select import Latents
from trainer.kernels.sparse import Entries


@dataclass(frozen=True)
class LatentBlock:
    """Latents of a rank over which a sum is formed; positions are among those that the rank holds."""

    latents: slice
    levels: slice
    """Levels that have latents here, one segment for each."""
    segments: slice
    """Its segments among those of the rank."""
    ends: tuple[int, ...]
    """Ends of its segments, from its first latent on."""

    def __len__(self) -> int:
        return int(self.latents.stop - self.latents.start)

    def rows_of(self, dlevels: Tensor, rows: int) -> Tensor:
        """The part for its levels of a matrix [levels × rows, d]."""
        return dlevels[self.levels.start * rows : self.levels.stop * rows]


def blocks_of(ranges: Sequence[range], ends: Sequence[int]) -> list[LatentBlock]:
    """Blocks of the latents in `ranges`, which follow each other; `ends` of the levels are among all latents."""
    blocks: list[LatentBlock] = []
    first, segments = ranges[0].start, 0
    for latents in ranges:
        levels = slice(bisect_right(ends, latents.start), bisect_left(ends, latents.stop) + 1)
        own_ends = tuple(min(end, latents.stop) - latents.start for end in ends[levels]) if len(latents) else ()
        blocks.append(
            LatentBlock(
                latents=slice(latents.start - first, latents.stop - first),
                levels=levels,
                segments=slice(segments, segments + len(own_ends)),
                ends=own_ends,
            )
        )
        segments += len(own_ends)
    return blocks


def blocks_of_subset(blocks: Sequence[LatentBlock], indices: Tensor) -> list[LatentBlock]:
    """Blocks of some latents of a rank, at one level; `indices` [n] ascend where there are several blocks."""
    cuts = [0, len(indices)]
    if len(blocks) > 1:
        ends = torch.tensor([block.latents.stop for block in blocks], device=indices.device)
        cuts = [0, *torch.searchsorted(indices, ends).tolist()]
    return blocks_of([range(*cut) for cut in pairwise(cuts)], [len(indices)])


def segment_ends(blocks: Sequence[LatentBlock]) -> tuple[int, ...]:
    """Ends of the segments of all blocks, among the latents of the rank."""
    return tuple(block.latents.start + end for block in blocks for end in block.ends)


def by_block(latents: Latents, blocks: Sequence[LatentBlock]) -> Iterator[tuple[LatentBlock, Latents, slice]]:
    """Each block, its latents, and the slice of the entries that these are.

    `latents` are split at `segment_ends`; only entries may lie in several blocks.
    """
    if len(blocks) == 1:
        yield blocks[0], latents, slice(None)
        return
    assert isinstance(latents, Entries)
    segments = blocks[-1].segments.stop
    rows = latents.rows // max(1, segments)
    bounds = latents.start[::rows].tolist() if segments else [0]
    for block in blocks:
        entries = slice(bounds[block.segments.start], bounds[block.segments.stop])
        start = latents.start[block.segments.start * rows : block.segments.stop * rows + 1] - entries.start
        column = latents.column[entries] - block.latents.start
        yield block, Entries(start, column, latents.value[entries], len(block)), entries
