"""Weights that an SAE goes on from: a folder of a Sluice snapshot, of SAELens, or of sparsify.

Read without running code: JSON and safetensors. Which of our architectures may adopt what:

    standard → relu, repair      topk → topk (and batchtopk)      abstopk → topk with abs      gated → gated
    jumprelu → jumprelu, batchtopk                    transcoders of these → the same with a target
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.saes.base import Sae
from trainer.saes.folding import Frame, fold_norms, recentre, require_unit_rows, unfold
from trainer.settings import SaeSettings
from trainer.snapshot import SnapshotError, read_sae

ADOPTS = {
    "relu": {"standard", "transcoder", "skip_transcoder"},
    "repair": {"standard"},
    "topk": {"topk", "topk_transcoder", "topk_skip_transcoder"},
    "batchtopk": {"topk", "jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"},
    "jumprelu": {"jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"},
    "gated": {"gated"},
}


@dataclass(frozen=True)
class Start:
    """Published weights, one row per latent, for raw activations."""

    path: Path
    cfg: dict[str, Any]
    weights: dict[str, Tensor]

    def weights_for(self, sae: Sae, frame: Frame) -> dict[str, Tensor]:
        """In the layout and the scale that `sae` learns in. Raises SnapshotError when the shapes differ."""
        shape, ours = tuple(self.weights["W_enc"].shape), (sae.d_sae, sae.d_in)
        if shape != ours or self.weights["W_dec"].shape[1] != sae.d_out:
            raise SnapshotError(
                f"start_from = {self.path} has {shape[0]} latents for rows of {shape[1]} numbers; "
                f"sae {sae.settings.name!r} has d_sae = {ours[0]} and its hook {ours[1]} numbers"
            )
        weights = unfold(self.weights, frame)
        if sae.unit_decoder:
            if "k" in self.cfg and not self.cfg.get("rescale_acts_by_decoder_norm", False):
                require_unit_rows(weights["W_dec"])
            weights = fold_norms(weights)
        return recentre(weights, bool(self.cfg.get("apply_b_dec_to_input", False)), sae.centred)


def read_start(settings: SaeSettings) -> Start | None:
    """What `start_from` names; None when it names nothing. Raises SnapshotError for what cannot be gone on from."""
    if settings.start_from is None:
        return None
    path = Path(settings.start_from)
    try:
        cfg, weights = _read_sparsify(path) if (path / "sae.safetensors").is_file() else _read_saelens(path)
    except SnapshotError as error:
        raise SnapshotError(f"sae {settings.name!r}: start_from = {path}: {error}") from None
    known = ADOPTS[settings.architecture] if not settings.abs else {"abstopk"}
    if cfg["architecture"] not in known:
        raise SnapshotError(
            f"sae {settings.name!r}: start_from = {path} is a {cfg['architecture']} SAE; architecture "
            f"{settings.architecture} goes on from {', '.join(sorted(known))}"
        )
    if ("transcoder" in cfg["architecture"]) != (settings.target is not None):
        raise SnapshotError(
            f"sae {settings.name!r}: start_from = {path} is a {cfg['architecture']}; "
            + ("remove target" if settings.target is not None else "set target to the hook it reconstructs")
        )
    return Start(path, cfg, weights)


def _read_saelens(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg, arrays = read_sae(path)
    if cfg.get("normalize_activations", "none") not in ("none", None):
        raise SnapshotError(
            f"it expects inputs normalised by {cfg['normalize_activations']!r}, which is not stored with it; "
            "fold that into its weights first"
        )
    weights = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    if missing := {"W_enc", "W_dec", "b_dec"} - weights.keys():
        raise SnapshotError(f"its weights lack {', '.join(sorted(missing))}")
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    return cfg, weights


def _read_sparsify(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        told = json.loads((path / "cfg.json").read_text("utf-8"))
        tensors = {name: value.float() for name, value in load_file(path / "sae.safetensors").items()}
        weights = {
            "W_enc": tensors["encoder.weight"],
            "W_dec": tensors["W_dec"],
            "b_enc": tensors["encoder.bias"],
            "b_dec": tensors["b_dec"],
        }
    except Exception as error:
        raise SnapshotError(f"no readable sparsify SAE: {error}") from None
    if told.get("activation", "topk") != "topk":
        raise SnapshotError(f"its activation is {told['activation']!r}; only topk can be gone on from")
    transcoder = bool(told.get("transcode"))
    if "W_skip" in tensors:
        weights["W_skip"] = tensors["W_skip"]
    name = "topk" if not transcoder else f"topk_{'skip_' if 'W_skip' in tensors else ''}transcoder"
    return {"architecture": name, "k": told["k"], "apply_b_dec_to_input": not transcoder}, weights
