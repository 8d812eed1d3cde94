"""Activations whose features are known: do the SAEs find them, through the real stream, buffer, loop and snapshot?

Sharkey et al. 2022: 128 directions superposed in 64 dimensions, three of them active on average. The whole list, and
other variants of the truth, is run by `make proofs`; GROUND_TRUTH.md has its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import trainer.saes.architectures.topk
from producer.corpus.synthetic import SyntheticActivations
from tests.small_training import (
    ROWS,
    SHARKEY,
    TRUTHS,
    TruthScores,
    best_cosines,
    candidates,
    judge_newest,
    train_on_sharkey,
    train_on_truth,
    truth,
)
from trainer.saes.architectures.auxk import add_auxk
from trainer.saes.base import Sae
from trainer.saes.settings import SaeSettings
from trainer.training.run import Run

pytestmark = pytest.mark.timeout(600)  # whole runs, on machines that may have other work

QUICK = ["topk", "jumprelu", "matryoshka"]
QUICK_ROWS = 700_000


def assert_all_found(sae: TruthScores) -> None:
    """Every true feature has a latent of its own, and what is published reconstructs activations it never saw."""
    assert sae.mmcs >= 0.98
    assert sae.worst > 0.9
    assert sae.fvu <= 0.12


# Architectures


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Tensor]]:
    """Three SAEs after one stream of decaying features, and the decoders they began with."""
    began: dict[str, Tensor] = {}

    def remember(run: Run) -> None:
        began.update({sae_trainer.settings.name: sae_trainer.sae.W_dec.clone() for sae_trainer in run.sae_trainers})

    saes = [candidates()[name] for name in QUICK]
    corpus = truth(tokens=QUICK_ROWS, **TRUTHS["decay"])
    run = train_on_truth(saes, corpus, QUICK_ROWS, tmp_path_factory.mktemp("quick"), at_start=remember)
    return run, began


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_every_true_feature_is_found(quick: tuple[Run, dict[str, Tensor]], name: str) -> None:
    """Rare ones too: the last feature is a quarter as frequent as the first."""
    assert_all_found(judge_newest(quick[0], name))


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_random_directions_find_nothing(quick: tuple[Run, dict[str, Tensor]], name: str) -> None:
    """The control: before learning the mean best cosine is below 0.4."""
    run, began = quick
    assert best_cosines(began[name], SyntheticActivations(run.settings.corpus)).mean() < 0.4


@pytest.mark.long
def test_the_first_prefix_holds_the_most_frequent_features(quick: tuple[Run, dict[str, Tensor]]) -> None:
    """64 latents that must reconstruct alone learn what pays most."""
    run, _ = quick
    prefix = judge_newest(run, "matryoshka").sae.W_dec[:64]
    cosine = best_cosines(prefix, SyntheticActivations(run.settings.corpus))

    assert cosine[:32].mean() > cosine[-32:].mean() + 0.2


@pytest.fixture(scope="module", params=TRUTHS)
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All architectures on one variant of the truth, from one stream."""
    corpus = truth(tokens=ROWS, **TRUTHS[request.param])
    return train_on_truth([*candidates().values()], corpus, ROWS, tmp_path_factory.mktemp("all"))


@pytest.mark.parametrize("name", candidates())
@pytest.mark.proof
def test_every_architecture_finds_every_truth(everything: Run, name: str) -> None:
    """Features equally frequent, decaying, and correlated."""
    assert_all_found(judge_newest(everything, name))


@pytest.mark.proof
def test_sharkeys_full_recipe(tmp_path: Path) -> None:
    """512 features in 256 dimensions, five active, 1024 latents."""
    assert_all_found(judge_newest(train_on_sharkey(tmp_path), SHARKEY.name))


# Dead latents: 128 latents for 128 features, so that each is needed


def small(name: str, architecture: str = "topk", **more: Any) -> SaeSettings:
    kind: dict[str, Any] = {
        "topk": {"k": 3, "initial_rates": "free"},
        "relu": {"penalty": "l1", "sparsity_weight": 2.0},
        "gated": {"sparsity_weight": 5.0, "sparsity_warmup_tokens": 200_000},
    }[architecture]
    return SaeSettings.of(name=name, architecture=architecture, d_sae=128, dead_tokens=20_000, **(kind | more))


def shrink_encoders(sae: Sae) -> None:
    """Half the encoder is shrunk a hundredfold: those latents lose against all others.

    With no bias at the start: beside one below zero, what is left of their rows would lift them on no activation.
    """
    sae.W_enc[64:] *= 0.01


def lower_biases(sae: Sae) -> None:
    """Half the latents begin where no activation lifts them above zero."""
    sae.b_enc[64:] = -20.0


def train_spoiled(
    saes: list[SaeSettings], how: dict[str, Callable[[Sae], None]], directory: Path
) -> dict[str, TruthScores]:
    """Trains SAEs that begin badly, each in its own way."""

    def spoil(run: Run) -> None:
        for sae_trainer in run.sae_trainers:
            how[sae_trainer.settings.name](sae_trainer.sae)

    run = train_on_truth(saes, truth(tokens=600_000), 600_000, directory, at_start=spoil)
    return {sae.name: judge_newest(run, sae.name) for sae in saes}


def without_encoder_gradient(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The SAE of this name has sparsify's AuxK: what it learns from the residual does not reach the encoder."""

    def without_encoder(sae: Sae, grads: dict[str, Tensor], *rest: Any) -> None:
        before = {parameter: grads[parameter].clone() for parameter in ("W_enc", "b_enc", "b_dec")}
        add_auxk(sae, grads, *rest)
        if sae.settings.name == name:
            grads.update(before)

    monkeypatch.setattr(trainer.saes.architectures.topk, "add_auxk", without_encoder)


@pytest.fixture(scope="module")
def revived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TruthScores]:
    """TopK SAEs with half their latents dead from the start, helped in several ways on one stream."""
    saes = [
        small("auxk"),
        small("none", revive="none"),
        small("broken"),
        small("buried"),
        small("last-resort", reinitialise_tokens=60_000),
    ]
    how = {
        "auxk": shrink_encoders,
        "none": shrink_encoders,
        "broken": shrink_encoders,
        "buried": lower_biases,
        "last-resort": lower_biases,
    }
    with pytest.MonkeyPatch.context() as patch:
        without_encoder_gradient(patch, "broken")
        return train_spoiled(saes, how, tmp_path_factory.mktemp("revived"))


def is_revived(sae: TruthScores) -> bool:
    """The latents that were dead are in use and have found the features that nobody else had."""
    return sae.mmcs > 0.95 and sae.dead < 0.05


@pytest.mark.proof
def test_auxk_rescues_latents_that_were_born_dead(revived: dict[str, TruthScores]) -> None:
    """With AuxK nearly all features are found although half the latents never win on their own."""
    assert is_revived(revived["auxk"])


@pytest.mark.proof
@pytest.mark.parametrize("name", ["none", "broken"])
def test_without_auxk_or_with_a_broken_one_they_stay_dead(revived: dict[str, TruthScores], name: str) -> None:
    """The test above can fail: turned off, or without the encoder's gradient, AuxK rescues nothing."""
    assert not is_revived(revived[name])
    assert revived[name].mmcs < 0.88
    assert revived[name].dead > 0.2


@pytest.mark.proof
def test_what_auxk_cannot_reach_begins_anew(revived: dict[str, TruthScores]) -> None:
    """AuxK's ReLU needs an activation that lifts the latent above zero; `reinitialise_tokens` needs none."""
    assert revived["buried"].mmcs < 0.88
    assert revived["buried"].dead > 0.3
    assert is_revived(revived["last-resort"])


@pytest.mark.parametrize("architecture", ["relu", "gated"])
@pytest.mark.proof
def test_resampling_brings_dead_latents_back(architecture: str, tmp_path: Path) -> None:
    """Latents that are moved onto activations with a large error find the features that are missing."""
    saes = [small("none", architecture, revive="none"), small("resample", architecture, revive="resample")]
    after = train_spoiled(saes, {"none": lower_biases, "resample": lower_biases}, tmp_path)

    assert after["none"].dead > 0.3
    assert after["resample"].dead < 0.05
    assert after["resample"].mmcs > after["none"].mmcs + 0.15
