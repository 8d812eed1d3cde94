"""Our Signum and Muon beside those of sparsify, on the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.peers.compare import Peers
from trainer.settings import OptimizerSettings
from trainer.training.optimizers.registry import optimizer_class

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

STEPS, RATE = 20, 1e-2
TOLERANCE = {"signum": 1e-5, "muon": 0.08}
"""Of the change of W, relative to its norm: sparsify orthogonalises in bfloat16."""


@pytest.mark.parametrize("name", TOLERANCE)
def test_weights_are_those_of_sparsify(peers: Peers, name: str, tmp_path: Path) -> None:
    """Twenty steps with a matrix and a vector, without projection and clipping."""
    torch.manual_seed(0)
    tensors = {"W": torch.randn(48, 16), "b": torch.zeros(48)}
    for step in range(STEPS):
        tensors |= {f"W.{step}": torch.randn(48, 16) + 0.5, f"b.{step}": torch.randn(48)}
    save_file(tensors, tmp_path / "tensors.safetensors")
    job = {"optimizer": name, "rate": RATE, "tensors": str(tmp_path / "tensors.safetensors")}
    peers.optimize([job | {"out": str(tmp_path / "theirs.safetensors")}])
    theirs = load_file(tmp_path / "theirs.safetensors")

    settings = OptimizerSettings(clip=0.0, betas=[0.9, 0.999], eps=1e-8)
    parameters = {"W_enc": tensors["W"].clone(), "b_enc": tensors["b"].clone()}
    ours = optimizer_class(name)(parameters, settings, unit_decoder=False)
    for step in range(STEPS):
        ours.step({"W_enc": tensors[f"W.{step}"].clone(), "b_enc": tensors[f"b.{step}"].clone()}, RATE)
        change = theirs[f"W.{step}"] - tensors["W"]
        assert (parameters["W_enc"] - theirs[f"W.{step}"]).norm() < TOLERANCE[name] * change.norm()
        torch.testing.assert_close(parameters["b_enc"], theirs[f"b.{step}"], rtol=1e-4, atol=1e-5)
