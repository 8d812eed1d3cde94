"""Input scales and whitening folded into published weights, which take raw activations.

Training sees s_in ⊙ x and s_out ⊙ y (one scalar per hook), with whitening (s x − centre) P. A snapshot takes raw x:

    W_enc ← P W_enc s_in / u      b_enc, b_gate, b_mag, threshold ← / u      W_skip ← W_skip s_in / s_out
    W_dec ← W_dec P⁻¹ u / s_out   b_dec ← (b_dec P⁻¹ + centre) / s_out

u is the unit of the latents, s_out of the first hook: with one scale W_enc and the unit rows of W_dec do not change,
and latents are in the units of y (ReLU is homogeneous: every latent scales by 1/u). A forgotten threshold (SAELens
#763) would fail the self-test in each snapshot. Decoder norms are folded into the encoder where that does not change
which latents are active: everywhere but in top-k.
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
"""Least variance that a direction counts with, as a share of the mean: a sample measures smaller ones badly, and later
text may vary more there."""
UNIT_TOLERANCE = 1e-6
"""Difference from 1 up to which a norm makes a decoder row a unit row."""
ALMOST_UNIT_TOLERANCE = 1e-2
"""The same where top-k selects as if rows were unit rows: rounding to bfloat16, input scales of another sample."""


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
    """The whitening of a sample x [rows, d], computed in float64."""
    x = x.double()
    centre = x.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh((x - centre).T @ (x - centre) / len(x))
    deviation = (eigenvalues.clamp_min(0) + WHITENING_FLOOR * eigenvalues.mean()).sqrt()
    matrix, inverse = (eigenvectors / deviation) @ eigenvectors.T, (eigenvectors * deviation) @ eigenvectors.T
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
    """float32 weights for raw activations, from those of `Sae.export`; computed in float64.

    With `unit_rows`, decoder norms are folded into the encoder.
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
    """The inverse of `fold` without whitening: weights for scaled activations, from published ones."""
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
    """Weights with unit decoder rows, their norms moved into the latents; a row of zeros gives a latent of zeros."""
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
    """Weights for an encoder that does subtract b_dec from x, or does not: (x − b_dec) W + b = x W + (b − b_dec W)."""
    if was_centred == centred:
        return weights
    # In float64: b and b_dec W may be much larger than their difference.
    shift = (weights["W_enc"].double() @ weights["b_dec"].double()) * (1.0 if centred else -1.0)
    biases: dict[str, Tensor] = {
        name: (weights[name] + shift).float() for name in ("b_enc", "b_gate") if name in weights
    }
    if "b_mag" in weights:
        biases["b_mag"] = (weights["b_mag"] + weights["r_mag"].double().exp() * shift).float()
    return weights | biases


def has_unit_rows(W_dec: Tensor) -> bool:
    """Every decoder row has unit norm, up to rounding."""
    return are_unit(W_dec.norm(dim=1))


def are_unit(norms: Tensor) -> bool:
    """All norms [d_sae] are 1, up to rounding."""
    return not float((norms - 1).abs().max()) > UNIT_TOLERANCE


def require_almost_unit_rows(norms: Tensor) -> None:
    """Raises SnapshotError unless every decoder row has unit norm, or nearly enough for top-k; `norms` [d_sae]."""
    if float((norms - 1).abs().max()) > ALMOST_UNIT_TOLERANCE:
        raise SnapshotError(
            "its decoder rows have no unit norm, as after whitening, and to give them one would change which latents "
            "its top-k chooses: start from another"
        )
