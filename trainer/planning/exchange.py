"""Bytes that a rank receives in a step while ranks share an SAE, by purpose. Pure arithmetic.

With P ranks, batch B, width d, b = ⌈B / P⌉ and K the sum of all k that are selected:

    candidates         8 b K (P − 1)                  keys of value and latent; each rank merges those of b activations
    thresholds         8 b (P − 1) for each k         the key of the k-th largest, to all
    reconstructions    S(B levels, e d)               for each decoding: the sum of latents W_dec; e is 4, or 2
    sums               S(1, 4 d)                      b_dec's gradient through the encoder
                       S(d, 4 d) for each matrix      with Muon: the products of momentum with itself
    scalars            S(1, 8) each                   the norm's squares, active latents, what a loss counts

S(rows, bytes) is an all-reduce, 2 (P − 1) / P · rows · bytes. With V blocks of latents that are added in order it is an
exchange of every block's sums and a gather of the results, (P − 1) · (V / P + 1) · ⌈rows / P⌉ · bytes. Reconstructions
in bfloat16 are exchanged so without blocks too, with V = P: half the bytes of an all-reduce. BatchTopK counts values in
two histograms of 2¹⁶ bins and ties in B rows instead of exchanging candidates. `tests/test_sharded_saes.py` compares
all this with what a step receives, to the byte.

Reviving dead latents, equal values at the threshold of a BatchTopK batch, and reports exchange more.
"""

from __future__ import annotations

from trainer.planning.cost import FLOAT32, StepCost

KEY_BYTES = 8
"""Of a value with its latent, of a count, and of a float64 number."""
HISTOGRAM_BINS = 2**16


def exchanged_bytes(sae: StepCost, ranks: int, blocks: int = 1) -> dict[str, int]:
    """By purpose; nothing for one rank. Purposes are those of `trainer.parallel.ranks.Traffic`."""
    share = -(-sae.batch // ranks)
    selections = sae.losses if sae.total_k else 0
    counted = HISTOGRAM_BINS * KEY_BYTES
    of_batch = 2 * all_reduce_bytes(counted, ranks) + all_reduce_bytes(sae.batch * KEY_BYTES, ranks)
    sums = sum_bytes(sae.d_out, FLOAT32, ranks, blocks) if sae.centred and not sae.tied else 0
    if sae.optimizer.products:
        widths = [width for width, matrix in ((sae.d_in, sae.encoder), (sae.d_out, sae.decoder)) if matrix]
        sums += sum(sum_bytes(width, FLOAT32 * width, ranks, blocks) for width in widths)
    parts = blocks if sae.exchange_bytes == FLOAT32 else max(blocks, ranks)
    norm = sum_bytes(sae.latent_parameters, KEY_BYTES, ranks, blocks)
    return {
        "candidates": int((ranks - 1) * share * sae.total_k * KEY_BYTES),
        "thresholds": (ranks - 1) * share * selections * KEY_BYTES + sae.batch_selections * of_batch,
        "reconstructions": sae.decodings
        * sae.losses
        * sum_bytes(sae.batch * sae.levels, sae.d_out * sae.exchange_bytes, ranks, parts),
        "sums": sums,
        "scalars": norm + (1 + sae.scalars) * all_reduce_bytes(KEY_BYTES, ranks),
    }


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Received in a ring, of a tensor of `size` bytes."""
    return 2 * (ranks - 1) * size // ranks


def sum_bytes(rows: int, row_bytes: int, ranks: int, blocks: int) -> int:
    """Received for a sum over the latents of all ranks, of `rows` rows."""
    if blocks == 1 or ranks == 1:
        return all_reduce_bytes(rows * row_bytes, ranks)
    return (ranks - 1) * (blocks // ranks + 1) * -(-rows // ranks) * row_bytes
