"""Products with the latents of a rank, block by block; those over the latents of all ranks are collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.kernels.select import Latents
from trainer.parallel.blocks import LatentBlock, by_block
from trainer.parallel.ranks import Ranks


def multiply(
    ranks: Ranks, latents: Latents, W_dec: Tensor, blocks: Sequence[LatentBlock], batch: int, levels: int = 1
) -> Tensor:
    """latents W_dec, the sum over the latents of all ranks: [levels, batch, d_out]. Collective.

    The rows of W_dec stand for the latents of `blocks`.
    """
    if len(blocks) == 1 and blocks[0].levels == slice(0, levels):
        parts = latents.multiply(W_dec)[None]
    else:
        parts = latents.value.new_zeros(len(blocks), levels * batch, W_dec.shape[1])
        for part, (block, own, _) in zip(parts, by_block(latents, blocks), strict=True):
            if len(block):
                block.rows_of(part, batch).copy_(own.multiply(W_dec[block.latents]))
    return ranks.total(parts, "reconstructions", ranks.reconstruction_dtype).view(levels, batch, -1)


def sample(latents: Latents, dlevels: Tensor, W_dec: Tensor, blocks: Sequence[LatentBlock], batch: int) -> Tensor:
    """dlevels W_decᵀ at the entries: [entries] or as `latents.value`, with dlevels [levels × batch, d_out]."""
    products = [
        own.sample(block.rows_of(dlevels, batch), W_dec[block.latents])
        for block, own, _ in by_block(latents, blocks)
        if len(block)
    ]
    return products[0] if len(products) == 1 else torch.cat([latents.value.new_empty(0), *products])


def weight_gradients(
    latents: Latents,
    dz: Tensor,
    inputs: Tensor,
    dlevels: Tensor,
    blocks: Sequence[LatentBlock],
    spare: dict[str, Tensor],
    sums: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients of W_enc and W_dec, and the sum over each latent of `sums`, which are values at the entries.

    dz at the entries, inputs [batch, d_in], dlevels [levels × batch, d_out]. `spare` gives up memory by name.
    """
    W_enc, W_dec = spare.pop("W_enc", None), spare.pop("W_dec", None)
    if len(blocks) > 1:  # each block writes its rows
        count = blocks[-1].latents.stop
        W_enc = dz.new_empty(count, inputs.shape[1]) if W_enc is None else W_enc
        W_dec = dz.new_empty(count, dlevels.shape[1]) if W_dec is None else W_dec
    by_name: dict[str, list[Tensor]] = {}
    for block, own, entries in by_block(latents, blocks):
        if not len(block):
            continue
        by_latent, rows = own.transpose(), block.rows_of(dlevels, len(inputs))
        grads = {
            "W_enc": by_latent.multiply(dz[entries], inputs, None if W_enc is None else W_enc[block.latents]),
            "W_dec": by_latent.multiply(own.value, rows, None if W_dec is None else W_dec[block.latents]),
            **{name: by_latent.sums(value[entries]) for name, value in sums.items()},
        }
        for name, value in grads.items():
            by_name.setdefault(name, []).append(value)
    if W_enc is not None and W_dec is not None and len(blocks) > 1:
        by_name |= {"W_enc": [W_enc], "W_dec": [W_dec]}
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in by_name.items()}


def sums(latents: Latents, value: Tensor, blocks: Sequence[LatentBlock]) -> Tensor:
    """The sum of `value` at the entries of each latent of this rank."""
    parts = [own.transpose().sums(value[entries]) for _, own, entries in by_block(latents, blocks)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mean_norms(
    ranks: Ranks, matrices: Sequence[Tensor], mask: Tensor, blocks: Sequence[LatentBlock]
) -> tuple[Tensor, ...]:
    """For each matrix the mean norm of the rows of some latents of all ranks; mask [latents here]. Collective."""
    parts = []
    for block in blocks:
        of_block = mask[block.latents]
        norms = [W[block.latents][of_block].norm(dim=1).sum().double() for W in matrices]
        parts.append(torch.stack([*norms, of_block.sum().double()]))
    *totals, count = ranks.total(torch.stack(parts), "scalars")
    return tuple((total / count).to(W.dtype) for total, W in zip(totals, matrices, strict=True))
