"""From an SAE in training to the one that is published, and back from disk.

Folding: training sees s·x, readers have x. W_enc and the unit rows of W_dec stay; b_enc, b_dec and threshold are
divided by s, so that latents come out in the units of x (ReLU is homogeneous: every latent scales by 1/s). The
threshold is easily forgotten there (SAELens #763); the self-test in each snapshot would catch it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.saes.base import Sae, normalise_rows, to_numpy
from trainer.snapshot import SAELENS_LAYOUT, Export, SnapshotError, read_sae, read_selftest

SELFTEST_ROWS = 16
TOLERANCE = 1e-5


class InferenceSae:
    """A published SAE: raw activations in, latents in the same units out. float32, no training code.

    `W_enc` [d_in, d_sae] and `W_dec` [d_sae, d_in], as on disk.
    """

    def __init__(self, cfg: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.cfg = cfg
        self.W_enc, self.W_dec = weights["W_enc"], weights["W_dec"]
        self.b_enc, self.b_dec = weights["b_enc"], weights["b_dec"]
        self.threshold = weights.get("threshold")
        if cfg["architecture"] not in ("topk", "jumprelu"):
            raise SnapshotError(f"architecture {cfg['architecture']!r} is not known; known are topk and jumprelu")

    def encode(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] → latents [..., d_sae]."""
        pre_acts = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre_acts.relu() * (pre_acts > self.threshold)
        value, index = torch.topk(pre_acts, self.cfg["k"], dim=-1)
        return torch.zeros_like(pre_acts).scatter_(-1, index, value.relu())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [..., d_sae] → reconstruction [..., d_in]."""
        return latents @ self.W_dec + self.b_dec


def load_sae(folder: Path) -> InferenceSae:
    """The SAE in one folder of a snapshot. Raises SnapshotError when it is not one this version knows."""
    cfg, weights = read_sae(folder)
    return InferenceSae(cfg, {name: torch.from_numpy(array) for name, array in weights.items()})


def export(
    sae: Sae, scale: float, firing_rate: Tensor, x: Tensor, metadata: dict[str, Any], metrics: dict[str, Any]
) -> Export:
    """An SAE ready to publish: folded, with its self-test on the raw activations x [rows, d_in].

    `metadata` is what SAELens keeps free-form; `metrics` go into the manifest.
    """
    architecture, extra = sae.export()
    parameters = {name: value.detach().float().cpu() for name, value in (sae.parameters | extra).items()}
    W_dec = parameters["W_dec"].clone()
    normalise_rows(W_dec)
    weights = {
        "W_enc": parameters["W_enc"].T.contiguous(),
        "W_dec": W_dec,
        "b_enc": parameters["b_enc"] / scale,
        "b_dec": parameters["b_dec"] / scale,
    }
    if "threshold" in parameters:
        weights["threshold"] = parameters["threshold"] / scale
    cfg = {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT,
            "training_architecture": sae.settings.architecture,
            **metadata,
        },
    }
    published = InferenceSae(cfg, weights)
    x = _clear_cut(published, x.float().cpu())
    latents = published.encode(x)
    _agree("folded reconstruction", published.decode(latents), _unfolded_reconstruction(sae, x, scale))
    selftest = {"x": x, "latents": latents, "x_hat": published.decode(latents)}
    return Export(
        name=sae.settings.name,
        cfg=cfg,
        weights={name: to_numpy(value) for name, value in weights.items()},
        firing_rate=to_numpy(firing_rate).astype(np.float64),
        selftest={name: to_numpy(value) for name, value in selftest.items()},
        metrics=metrics,
    )


def _clear_cut(sae: InferenceSae, x: Tensor) -> Tensor:
    """The SELFTEST_ROWS rows on which no latent is a close call.

    A pre-activation within rounding of its threshold (or two that compete for the last place of a top-k) may fall
    either way in another library's summation order; such a row would test luck.
    """
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.threshold is not None:
        margin = ((pre_acts - sae.threshold).abs() / (1 + sae.threshold)).amin(1)
    else:
        best = torch.topk(pre_acts, min(sae.cfg["k"] + 1, pre_acts.shape[1])).values
        margin = best[:, -2] - best[:, -1] if best.shape[1] > sae.cfg["k"] else best[:, 0]
    return x[margin.topk(min(SELFTEST_ROWS, len(x))).indices]


def _unfolded_reconstruction(sae: Sae, x: Tensor, scale: float) -> Tensor:
    """What the SAE in training gives for raw x, in float32 throughout: the other side of the folding."""
    p = {name: value.detach().float().cpu() for name, value in sae.parameters.items()}
    architecture, _ = sae.export()
    training = InferenceSae({**architecture}, {**p, "W_enc": p["W_enc"].T})
    return training.decode(training.encode(x * scale)) / scale


def check(folder: Path) -> None:
    """Runs a snapshot's self-test with the weights on disk. Raises SnapshotError when they disagree."""
    sae, test = load_sae(folder), {name: torch.from_numpy(array) for name, array in read_selftest(folder).items()}
    latents = sae.encode(test["x"])
    _agree(f"{folder.name}: latents", latents, test["latents"])
    _agree(f"{folder.name}: reconstruction", sae.decode(latents), test["x_hat"])
    norms = sae.W_dec.norm(dim=1)
    _agree(f"{folder.name}: decoder norms", norms, torch.ones_like(norms))


def _agree(what: str, ours: Tensor, expected: Tensor) -> None:
    difference = float((ours - expected).norm() / expected.norm().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise SnapshotError(
            f"self-test of {what} differs by {difference:.2g} relative; at most {TOLERANCE:g} is allowed"
        )
