"""Inference with a published SAE, and its self-test: raw activations → latents → reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform, fold
from trainer.saes.hooks import SaeHooks
from trainer.saes.published import TRANSCODER, activation_of, published_architectures, transcoder_name
from trainer.snapshot import SAELENS_LAYOUT, Export, SnapshotError, read_sae, read_selftest

SELFTEST_ROWS = 16
TOLERANCE = 1e-5
"""Relative difference up to which a self-test passes."""


class InferenceSae:
    """A published SAE to run: raw activations → latents in the same units → reconstruction, all float32.

    `W_enc` [d_in, d_sae] and `W_dec` [d_sae, d_out], as on disk. x is the activations at `hooks.reads` side by side.
    """

    def __init__(self, cfg: dict[str, Any], weights: dict[str, Tensor], name: str = "sae") -> None:
        self.name = name
        self.cfg = cfg
        self.weights = weights
        architecture = cfg["architecture"]
        if (activation := activation_of(architecture)) is None:
            raise SnapshotError(
                f"architecture {architecture!r} is not known; known are {', '.join(published_architectures())}"
            )
        self.activation = activation
        self.hooks = SaeHooks.from_metadata(cfg.get("metadata", {}))
        self.centred = bool(cfg.get("apply_b_dec_to_input", not architecture.endswith(TRANSCODER)))
        self.W_enc, self.W_dec, self.b_dec = weights["W_enc"], weights["W_dec"], weights["b_dec"]
        self.b_enc = weights[activation.vectors[0]]
        self.threshold, self.W_skip = weights.get("threshold"), weights.get("W_skip")

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def input(self, activations: Mapping[str, Tensor]) -> Tensor:
        """x [n, d_in] from the activations [n, width] of each hook."""
        return torch.cat([activations[hook] for hook in self.hooks.reads], 1)

    def pre_acts(self, x: Tensor) -> Tensor:
        """[..., d_in] → [..., d_sae]; of a gated SAE, those of the gate."""
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] → latents [..., d_sae]."""
        return self.activation.encode(self.pre_acts(x), self.weights, self.cfg)

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Latents [..., d_sae] → reconstruction [..., d_out]; a skip transcoder needs the x they came from."""
        y_hat = latents @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return y_hat
        if x is None:
            raise ValueError("a skip transcoder's reconstruction needs x: decode(latents, x)")
        return y_hat + x @ self.W_skip.T

    def __call__(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] → reconstruction [..., d_out]."""
        return self.decode(self.encode(x), x)


def load_sae(folder: Path, device: torch.device | str = "cpu") -> InferenceSae:
    """The SAE in one folder of a snapshot, in float32. Raises SnapshotError when it is not one this version knows."""
    cfg, arrays = read_sae(folder)
    weights = {name: torch.from_numpy(array).float().to(device) for name, array in arrays.items()}
    return InferenceSae(cfg, weights, folder.name)


def export(
    sae: Sae,
    transform: InputTransform,
    name: str,
    firing_rate: Tensor,
    x: Tensor,
    metadata: dict[str, Any],
    metrics: dict[str, Any],
    exported: tuple[dict[str, object], dict[str, Tensor]] | None = None,
) -> Export:
    """The files of an SAE: folded weights, and a self-test on some of the raw activations x [rows, d_in].

    `metadata` is free-form in SAELens' cfg.json; `metrics` go into the manifest. `exported` replaces `sae.export()`, of
    an SAE that has a rank's share of the latents. Raises SnapshotError when the folded weights do not reconstruct as
    those in training.
    """
    architecture, scaled = exported or sae.export()
    activation = activation_of(str(architecture["architecture"]))
    assert activation is not None
    weights = fold(scaled, transform, unit_rows=activation.unit_rows)
    if not activation.unit_rows and (transform.whitening is not None or len(sae.widths) > 1):
        architecture["rescale_acts_by_decoder_norm"] = False  # rows no longer have unit norm
    if sae.is_transcoder:
        architecture["architecture"] = transcoder_name(str(architecture["architecture"]), "W_skip" in weights)
        architecture["d_out"] = sae.d_out
    cfg = _cfg(sae, architecture, metadata)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    published = InferenceSae(cfg, weights)
    x = _widest_margins(published, x.float().cpu())
    latents = published.encode(x)
    y_hat = published.decode(latents, x)
    _agree("folded reconstruction", y_hat, _unfolded_reconstruction(cfg, scaled, transform, x))
    selftest = {"x": x, "latents": latents, "x_hat": y_hat}
    return Export(
        name=name,
        cfg=cfg,
        weights={name: _to_numpy(value) for name, value in weights.items()},
        firing_rate=_to_numpy(firing_rate).astype(np.float64),
        selftest={name: _to_numpy(value) for name, value in selftest.items()},
        metrics=metrics,
    )


def _cfg(sae: Sae, architecture: dict[str, object], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.settings.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT,
            "training_architecture": sae.settings.architecture,
            **metadata,
        },
    }


def margins(sae: InferenceSae, x: Tensor) -> Tensor:
    """The least change of a pre-activation that switches a latent, for each row of x [rows, d_in]; infinite if none.

    A pre-activation within rounding of its threshold, or of another one at the last place of a top-k, may switch with
    the order of summation in another library.
    """
    return sae.activation.margins(sae.pre_acts(x), sae.weights, sae.cfg)


def _widest_margins(sae: InferenceSae, x: Tensor) -> Tensor:
    """The SELFTEST_ROWS rows of x with the widest margins, whose latents do not depend on rounding."""
    return x[margins(sae, x).topk(min(SELFTEST_ROWS, len(x))).indices]


def _unfolded_reconstruction(
    cfg: dict[str, Any], scaled: dict[str, Tensor], transform: InputTransform, x: Tensor
) -> Tensor:
    """The reconstruction of raw x by the weights of training, in float64: what folded weights must give too."""
    weights = {name: value.detach().double().cpu() for name, value in scaled.items()}
    training = InferenceSae(cfg, weights | {"W_enc": weights["W_enc"].T})
    x = x.double() * transform.s_in.cpu()
    if (white := transform.whitening) is None:
        return (training(x) / transform.s_out.cpu()).float()
    centre, matrix, inverse = (part.double().cpu() for part in (white.centre, white.matrix, white.inverse))
    return ((training((x - centre) @ matrix) @ inverse + centre) / transform.s_out.cpu()).float()


def check(folder: Path) -> None:
    """Runs a snapshot's self-test with the weights on disk. Raises SnapshotError when they disagree."""
    sae, test = load_sae(folder), {name: torch.from_numpy(array) for name, array in read_selftest(folder).items()}
    latents = sae.encode(test["x"])
    _agree(f"{folder.name}: latents", latents, test["latents"])
    _agree(f"{folder.name}: reconstruction", sae.decode(latents, test["x"]), test["x_hat"])
    if sae.cfg.get("rescale_acts_by_decoder_norm", True):
        norms = sae.W_dec.norm(dim=1)
        norms = norms[norms > 0]
        _agree(f"{folder.name}: decoder norms", norms, torch.ones_like(norms))


def _agree(what: str, ours: Tensor, expected: Tensor) -> None:
    difference = float((ours - expected).norm() / expected.norm().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise SnapshotError(
            f"self-test of {what} differs by {difference:.2g} relative; at most {TOLERANCE:g} is allowed"
        )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
