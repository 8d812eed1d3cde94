"""Between the rows an SAE learns from and the rows others have: scales and whitening folded into the weights.

Training sees s_in ⊙ x and s_out ⊙ y (one scalar per hook), with whitening (s x − centre) P. A snapshot takes raw x:

    W_enc ← P W_enc s_in / u      b_enc, b_gate, b_mag, threshold ← / u      W_skip ← W_skip s_in / s_out
    W_dec ← W_dec P⁻¹ u / s_out   b_dec ← (b_dec P⁻¹ + centre) / s_out

u is the unit of the latents, s_out of the first hook: with one scale W_enc and the unit rows of W_dec stay as they are
and the latents come out in the units of y (ReLU is homogeneous: every latent scales by 1/u). The threshold is easily
forgotten there (SAELens #763); the self-test in each snapshot would catch it. Decoder norms are folded into the
encoder where that changes no choice of latents: everywhere but in top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.snapshot import SnapshotError

PER_LATENT = ("b_enc", "b_gate", "b_mag", "threshold")
"""Weights in the units of the latents."""
WHITENING_FLOOR = 1e-3
"""Directions with less than this times the mean variance are not blown up further."""
UNIT = 1e-4
"""How far from 1 the norm of a decoder row may be to count as a unit row."""


@dataclass(frozen=True)
class Whitening:
    """x → (x − centre) matrix, whose covariance is the identity (ZCA)."""

    centre: Tensor
    """[d]"""
    matrix: Tensor
    """[d, d], symmetric"""
    inverse: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.centre) @ self.matrix

    def undo(self, x: Tensor) -> Tensor:
        return x @ self.inverse + self.centre


def whitening_of(x: Tensor) -> Whitening:
    """From a sample of rows [rows, d], in float64."""
    x = x.double()
    centre = x.mean(0)
    eigenvalue, vector = torch.linalg.eigh((x - centre).T @ (x - centre) / len(x))
    spread = (eigenvalue.clamp_min(0) + WHITENING_FLOOR * eigenvalue.mean()).sqrt()
    matrix, inverse = (vector / spread) @ vector.T, (vector * spread) @ vector.T
    return Whitening(centre.float(), matrix.float(), inverse.float())


@dataclass(frozen=True)
class Frame:
    """How the rows of training relate to raw ones: element by element scales, and whitening of what is scaled."""

    s_in: Tensor
    """[d_in]"""
    s_out: Tensor
    """[d_out]"""
    whitening: Whitening | None = None


def fold(weights: dict[str, Tensor], frame: Frame, unit_rows: bool) -> dict[str, Tensor]:
    """Weights for raw activations, from `Sae.export`'s; `unit_rows` folds decoder norms into the encoder."""
    w = {name: value.detach().float().cpu() for name, value in weights.items()}
    s_in, s_out, unit = frame.s_in.cpu(), frame.s_out.cpu(), float(frame.s_out[0])
    if (white := frame.whitening) is not None:
        matrix, inverse = white.matrix.cpu(), white.inverse.cpu()
        w["W_enc"], w["W_dec"] = w["W_enc"] @ matrix, w["W_dec"] @ inverse
        w["b_dec"] = w["b_dec"] @ inverse + white.centre.cpu()
    w["W_enc"] = w["W_enc"] * (s_in / unit)
    w["W_dec"] = w["W_dec"] * (unit / s_out)
    w["b_dec"] = w["b_dec"] / s_out
    for name in PER_LATENT & w.keys():
        w[name] = w[name] / unit
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"] * s_in / s_out[:, None]
    return fold_norms(w) if unit_rows else w


def unfold(weights: dict[str, Tensor], frame: Frame) -> dict[str, Tensor]:
    """The other way: published weights for an SAE that learns from scaled rows, without whitening."""
    w = dict(weights)
    s_in, s_out, unit = frame.s_in.cpu(), frame.s_out.cpu(), float(frame.s_out[0])
    w["W_enc"] = w["W_enc"] * (unit / s_in)
    w["W_dec"] = w["W_dec"] * (s_out / unit)
    w["b_dec"] = w["b_dec"] * s_out
    for name in PER_LATENT & w.keys():
        w[name] = w[name] * unit
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"] / s_in * s_out[:, None]
    return w


def fold_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows, each latent grown by what its row had; a row of zeros gives a latent that is always zero."""
    norm = weights["W_dec"].norm(dim=1)
    w = dict(weights)
    w["W_dec"] = w["W_dec"] / norm.clamp_min(1e-12)[:, None]
    w["W_enc"] = w["W_enc"] * norm[:, None]
    for name in PER_LATENT & w.keys():
        w[name] = w[name] * norm
    return w


def recentre(weights: dict[str, Tensor], was_centred: bool, centred: bool) -> dict[str, Tensor]:
    """Moves b_dec out of, or into, what the encoder reads: (x − b_dec) W + b = x W + (b − b_dec W)."""
    if was_centred == centred:
        return weights
    shift = weights["W_enc"] @ weights["b_dec"]
    return weights | {
        name: weights[name] + (shift if centred else -shift) for name in ("b_enc", "b_gate", "b_mag") if name in weights
    }


def require_unit_rows(W_dec: Tensor) -> None:
    """Raises SnapshotError unless every decoder row has unit norm."""
    if float((W_dec.norm(dim=1) - 1).abs().max()) > UNIT:
        raise SnapshotError(
            "its decoder rows have no unit norm, and bringing them to it would change which latents a top-k chooses; "
            "rescale the file so that they have"
        )
