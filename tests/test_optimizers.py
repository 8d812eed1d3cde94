"""Optimizers beside Adam: their steps on paper, and what a checkpoint keeps of them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.small_saes import UNSCALED, learn, rows_of, sae_trainer_of, settings_of, train_sae
from trainer.saes.settings import SaeSettings
from trainer.settings import OptimizerSettings
from trainer.training.optimizers.muon import Muon, orthogonaliser
from trainer.training.optimizers.registry import OPTIMIZERS, optimizer_class
from trainer.training.optimizers.signum import Signum


def test_the_settings_name_every_optimizer() -> None:
    """And the registry's classes keep as many tensors for a matrix as the estimate counts."""
    assert list(get_args(SaeSettings.model_fields["optimizer"].annotation)) == list(OPTIMIZERS)
    for name, entry in OPTIMIZERS.items():
        optimizer = optimizer_class(name)({"W_enc": torch.zeros(3, 2)}, OptimizerSettings())
        assert sum(len(of) for of in optimizer.state().moments.values()) == entry.moments, name


# Muon


def test_orthogonalising_makes_singular_values_equal() -> None:
    """Of a tall and of a wide matrix: singular vectors stay, values that lay a hundredfold apart lie near 1."""
    for shape in ((40, 6), (4, 10)):
        U, S, Vh = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
        X = U * torch.logspace(0, -2, len(S), dtype=torch.float64) @ Vh
        result = X @ orthogonaliser(X.T @ X)

        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(U.T @ result @ Vh.T, torch.diag(torch.diag(U.T @ result @ Vh.T)))


def test_muon_changes_matrices_by_equal_singular_values_and_vectors_by_adam() -> None:
    """At rate 1: W falls by a tenth and by 0.2 √4 · U Vᵀ; a vector of one sign moves by the rate."""
    torch.manual_seed(0)
    W, b = torch.zeros(4, 2), torch.zeros(4)
    grad = torch.randn(4, 2)
    U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
    muon = Muon({"W_enc": W, "b_enc": b}, OptimizerSettings(clip=0.0), unit_decoder=False)
    muon.step({"W_enc": grad.clone(), "b_enc": torch.ones(4)}, 1.0)

    along = (U.T @ W @ Vh.T / -0.4).diagonal()
    assert ((along > 0.6) & (along < 1.3)).all()
    torch.testing.assert_close(b, -torch.ones(4), rtol=1e-5, atol=1e-5)


# Signum


def test_signum_is_a_mean_of_steps_of_one_size() -> None:
    """Gradients of one sign at rate 1: z is −1, −2, −3; x their mean −1, −1.5, −2; y 0.95 x + 0.05 z."""
    W = torch.zeros(1)
    signum = Signum({"b_enc": W}, OptimizerSettings(), unit_decoder=False)
    weights = []
    for gradient in (0.5, 20.0, 1e-3):
        signum.step({"b_enc": torch.tensor([gradient])}, 1.0)
        weights.append(float(W))

    assert weights == pytest.approx([-1.0, 0.95 * -1.5 + 0.05 * -2, 0.95 * -2 + 0.05 * -3])
    assert signum.step({"b_enc": torch.tensor([0.0])}, 1.0) == 0.0 and float(signum.state().moments["z"]["b_enc"]) == -3


# Every optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_every_optimizer_learns(kind: str, name: str) -> None:
    """At its rate the loss halves, decoder rows have unit norm, and no weight runs away."""
    sae_trainer = train_sae(settings_of(kind, optimizer=name), steps=1)
    before = sae_trainer.report(UNSCALED).loss["reconstruction"]
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(100, 200)])

    assert sae_trainer.report(UNSCALED).loss["reconstruction"] < 0.5 * before
    torch.testing.assert_close(sae_trainer.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_has_the_same_bits(name: str) -> None:
    """After two steps, through the keys of a checkpoint, two more: weights, moments and averages."""
    settings = settings_of("topk", optimizer=name, ema_tokens=200)
    batches = [rows_of(settings, 64, seed) for seed in range(4)]
    straight = sae_trainer_of(settings)
    straight.initialise(rows_of(settings, 512, 0), UNSCALED)
    learn(straight, batches[:2])
    state, tensors = straight.state()
    keys = {key: value.clone() for key, value in tensors.by_key().items()}
    resumed = sae_trainer_of(settings)
    resumed.restore(state, type(tensors).from_keys(keys))
    for sae_trainer in (straight, resumed):
        learn(sae_trainer, batches[2:])

    ours, theirs = (sae_trainer.state()[1].by_key() for sae_trainer in (straight, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_latent_that_is_drawn_anew_has_no_past(name: str) -> None:
    """A step without a gradient leaves it where it was drawn, and moves latents with a past."""
    W = torch.zeros(2, 3)
    optimizer = optimizer_class(name)({"W_enc": W}, OptimizerSettings(), unit_decoder=False)
    for _ in range(3):
        optimizer.step({"W_enc": torch.tensor([[1.0, 2.0, 3.0], [3.0, -1.0, 2.0]])}, 0.01)
    W[0] = 1.0
    optimizer.reset_latents(torch.tensor([0]))
    before = W.clone()
    optimizer.step({"W_enc": torch.zeros(2, 3)}, 0.01)

    torch.testing.assert_close(W[0], before[0], atol=0.0015, rtol=0)  # Muon's decay alone
    assert (W[1] - before[1]).abs().max() > 1e-4


def test_an_optimizer_of_a_checkpoint_cannot_be_changed() -> None:
    """Another one would begin without what it needs: it belongs to the shape of an SAE."""
    assert settings_of("topk", optimizer="muon").shape()["optimizer"] == "muon"
    assert settings_of("topk").shape()["optimizer"] == "adam"
