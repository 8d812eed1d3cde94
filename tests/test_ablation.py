"""Ablation: on a model that is nothing but its unembedding, where effects can be counted, and on a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monitor.evaluation.ablation import POSITIONS, ablation_effects, effective_number
from monitor.evaluation.latents.activations import LatentActivations, gather_latents
from producer.corpus.rendering.windows import Windows
from tests.small_model import HOOK, WIDTH, load_model, write_model
from trainer.saes.inference import InferenceSae

WORDS = 20


@dataclass(frozen=True)
class _Hook:
    name: str
    width: int


class _Unembedding:
    """x is the token's one-hot vector, and so are the logits."""

    hooks = (_Hook(HOOK, WORDS),)
    device = torch.device("cpu")
    vocabulary = WORDS

    def logits(self, tokens: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        x = torch.eye(WORDS)[tokens]
        return replace[HOOK](x) if HOOK in replace else x


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_a_latent_that_writes_to_n_logits_has_n_effects(reach: int):
    """All by the same amount, at its own position alone; the ratio is their share of all logits that could change."""
    W_dec = torch.zeros(1, WORDS)
    W_dec[0, :reach] = 0.7
    effects = ablation_effects(_Unembedding(), _writing(W_dec), _always(20), count=8)  # type: ignore[arg-type]
    assert effects["ablation_effects"] == pytest.approx(reach)
    assert effects["ablation_effects_ratio"] == pytest.approx(reach / (POSITIONS * WORDS))


def test_what_shifts_all_logits_has_no_effect():
    """Probabilities stay as they are: there is nothing to count."""
    effects = ablation_effects(_Unembedding(), _writing(torch.ones(1, WORDS)), _always(20), count=8)  # type: ignore[arg-type]
    assert effects == {"ablation_effects": None, "ablation_effects_ratio": None}


def test_an_activation_at_the_end_of_its_window_is_not_chosen():
    """There is no room for the positions that it may change."""
    effects = ablation_effects(_Unembedding(), _writing(torch.eye(1, WORDS)), _always(POSITIONS - 1), 8)  # type: ignore[arg-type]
    assert effects["ablation_effects"] is None


def test_unequal_changes_count_less():
    """(1 + 3)² / (1 + 9) of two; positions are counted together."""
    changes = torch.zeros(2, 7)
    changes[0, 0], changes[1, 3] = 1.0, -3.0
    assert effective_number(changes) == pytest.approx(1.6)
    assert effective_number(changes + torch.tensor([[5.0], [-2.0]])) == pytest.approx(1.6)


def test_numbers_agree_with_ablation_by_hand(tmp_path: Path):
    """One latent of a real model that fires at one place: x without it, put in by hand."""
    model = load_model(write_model(tmp_path))
    ids = np.random.default_rng(0).integers(2, 40, (1, 20))
    mask = np.zeros((1, 20), bool)
    mask[0, 3] = True
    W_dec = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    sae = _writing(W_dec)
    latents = gather_latents(model, Windows(ids, mask, np.zeros_like(mask)), sae)
    effects = ablation_effects(model, sae, latents, count=8)
    value = float(latents.values[0])
    assert latents.positions.tolist() == [3] and value > 0

    def without(x: Tensor) -> Tensor:
        return torch.cat([x[:, :3], x[:, 3:4] - value * W_dec, x[:, 4:]], 1)

    tokens = torch.from_numpy(ids)
    changes = (model.logits(tokens) - model.logits(tokens, {HOOK: without}))[0, 3 : 3 + POSITIONS]
    expected: Any = effective_number(changes)
    assert effects["ablation_effects"] == pytest.approx(expected, rel=1e-3)
    assert expected > model.vocabulary  # attention carries it on


def _writing(W_dec: Tensor) -> InferenceSae:
    """One latent that is always active, at 1, and writes W_dec."""
    d_sae, width = W_dec.shape
    weights = {"W_enc": torch.zeros(width, d_sae), "b_enc": torch.ones(d_sae), "W_dec": W_dec}
    weights |= {"b_dec": torch.zeros(width)}
    return InferenceSae({"architecture": "standard", "metadata": {"hook_name": HOOK}}, weights, "s")


def _always(context: int) -> LatentActivations:
    """One latent that fires at the second place of three windows."""
    ids = np.random.default_rng(0).integers(0, WORDS, (3, context)).astype(np.uint32)
    everywhere = np.ones_like(ids, bool)
    return LatentActivations(
        ids=ids,
        shown=everywhere,
        streamed=everywhere,
        starts=np.array([0, 3], np.int64),
        positions=np.array([1, context + 1, 2 * context + 1], np.uint32),
        values=np.array([3.0, 2.0, 1.0], np.float32),
        born=np.zeros(1, np.int64),
        outliers=np.zeros(ids.shape, bool),
    )
