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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.saes.hooks import SaeHooks
from trainer.snapshot import SnapshotError

IN_LATENT_UNITS = ("b_enc", "b_gate", "b_mag", "threshold")
"""Weights in the units of the latents."""
WHITENING_FLOOR = 1e-2
"""Directions with less than this times the mean variance are not blown up further: how little they vary is known badly
from a sample, and later text may vary more there."""
UNIT = 1e-6
"""How far from 1 the norm of a decoder row may be to be a unit row."""
ALMOST_UNIT = 1e-2
"""How far it may be for top-k to choose as if it were: rounding to bfloat16, input scales of another sample."""


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
class InputTransform:
    """From raw activations to those an SAE learns from: a scale for each element, then whitening."""

    s_in: Tensor
    """[d_in]"""
    s_out: Tensor
    """[d_out]"""
    whitening: Whitening | None = None

    @classmethod
    def of(
        cls,
        hooks: SaeHooks,
        widths: Mapping[str, int],
        scales: Mapping[str, float],
        whitening: Whitening | None = None,
    ) -> InputTransform:
        """The transform for an SAE at `hooks`; `widths` and `scales` are by the name of the hook."""
        s_in, s_out = (
            torch.cat([torch.full((widths[hook],), scales[hook]) for hook in side])
            for side in (hooks.reads, hooks.writes)
        )
        return cls(s_in, s_out, whitening)


def side_by_side(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """Rows of some hooks as one matrix [rows, sum of their widths]; those of one hook are not copied."""
    return rows[hooks[0]] if len(hooks) == 1 else torch.cat([rows[hook] for hook in hooks], 1)


def fold(weights: dict[str, Tensor], transform: InputTransform, unit_rows: bool) -> dict[str, Tensor]:
    """Weights for raw activations, from `Sae.export`'s; `unit_rows` folds decoder norms into the encoder.

    float64 on the way, float32 at the end.
    """
    w = {name: value.detach().double().cpu() for name, value in weights.items()}
    s_in, s_out, unit = transform.s_in.cpu(), transform.s_out.cpu(), float(transform.s_out[0])
    if (white := transform.whitening) is not None:
        matrix, inverse = white.matrix.double().cpu(), white.inverse.double().cpu()
        w["W_enc"], w["W_dec"] = w["W_enc"] @ matrix, w["W_dec"] @ inverse
        w["b_dec"] = w["b_dec"] @ inverse + white.centre.cpu()
    w["W_enc"] = w["W_enc"] * (s_in / unit)
    w["W_dec"] = w["W_dec"] * (unit / s_out)
    w["b_dec"] = w["b_dec"] / s_out
    for name in IN_LATENT_UNITS & w.keys():
        w[name] = w[name] / unit
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"] * s_in / s_out[:, None]
    w = fold_norms(w) if unit_rows else w
    return {name: value.float() for name, value in w.items()}


def unfold(weights: dict[str, Tensor], transform: InputTransform) -> dict[str, Tensor]:
    """The other way: published weights for an SAE that learns from scaled rows, without whitening."""
    w = dict(weights)
    s_in, s_out, unit = transform.s_in.cpu(), transform.s_out.cpu(), float(transform.s_out[0])
    w["W_enc"] = w["W_enc"] * (unit / s_in)
    w["W_dec"] = w["W_dec"] * (s_out / unit)
    w["b_dec"] = w["b_dec"] * s_out
    for name in IN_LATENT_UNITS & w.keys():
        w[name] = w[name] * unit
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"] / s_in * s_out[:, None]
    return w


def fold_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows, each latent grown by what its row had; a row of zeros gives a latent that is always zero."""
    norm = weights["W_dec"].norm(dim=1)
    w = grow(weights, norm)
    w["W_dec"] = weights["W_dec"] / norm.clamp_min(1e-12)[:, None]
    return w


def grow(weights: dict[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    """Latents `factor` [d_sae] times as large, with the same reconstruction."""
    w = dict(weights)
    w["W_enc"] = w["W_enc"] * factor[:, None]
    w["W_dec"] = w["W_dec"] / factor[:, None]
    for name in IN_LATENT_UNITS & w.keys():
        w[name] = w[name] * factor
    return w


def recentre(weights: dict[str, Tensor], was_centred: bool, centred: bool) -> dict[str, Tensor]:
    """Moves b_dec out of, or into, what the encoder reads: (x − b_dec) W + b = x W + (b − b_dec W)."""
    if was_centred == centred:
        return weights
    # b and b_dec W may be much larger than what is left of them.
    shift = (weights["W_enc"].double() @ weights["b_dec"].double()) * (1.0 if centred else -1.0)
    moved: dict[str, Tensor] = {}
    for name in ("b_enc", "b_gate"):
        if name in weights:
            moved[name] = (weights[name] + shift).float()
    if "b_mag" in weights:
        moved["b_mag"] = (weights["b_mag"] + weights["r_mag"].double().exp() * shift).float()
    return weights | moved


def has_unit_rows(W_dec: Tensor) -> bool:
    return not float((W_dec.norm(dim=1) - 1).abs().max()) > UNIT


def require_almost_unit_rows(W_dec: Tensor) -> None:
    """Raises SnapshotError unless every decoder row has unit norm, or so nearly that top-k does not notice."""
    if float((W_dec.norm(dim=1) - 1).abs().max()) > ALMOST_UNIT:
        raise SnapshotError(
            "its decoder rows have no unit norm, as after whitening, and to give them one would change which latents "
            "its top-k chooses: start from another"
        )
