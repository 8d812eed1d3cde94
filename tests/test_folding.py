"""What is published does on raw activations what training did on scaled ones: scales, whitening, norms are folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.small_saes import FAMILY, NOBODY, UNSCALED, make, publish_sae, rows_of, settings_of, train_sae
from trainer.saes import folding
from trainer.saes.architectures.batchtopk import BatchTopK
from trainer.saes.folding import InputTransform, fold, fold_norms, side_by_side, unfold, whitening_of
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.selftest import agree
from trainer.snapshot import SnapshotError, read_sae
from trainer.training.sae_trainer import SaeTrainer

SCALES = {"a": 0.37, "b": 2.5}
"""Of the two hooks, far enough apart to notice when they are mixed up."""
AUTOENCODERS = [kind for kind in FAMILY if "coder" not in kind and kind not in ("repair", "matching_pursuit")]


def test_a_threshold_is_to_be_exceeded() -> None:
    """z at the threshold is off, as SAELens has it; just above it, all of z is on."""
    weights = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    sae = InferenceSae({"architecture": "jumprelu"}, weights | {"threshold": torch.ones(2)})
    assert sae.encode(torch.tensor([1.0, 1.5])).tolist() == [0.0, 1.5]


def test_a_self_test_of_nan_fails() -> None:
    """NaN differs from everything by an amount that is not more than the tolerance, nor less."""
    with pytest.raises(SnapshotError, match="self-test of latents differs by nan"):
        agree("latents", torch.tensor([float("nan")]), torch.tensor([1.0]))


def publish_and_load(sae_trainer: SaeTrainer, directory: Path) -> InferenceSae:
    """The SAE trainer's SAE through export, its self-test, and the files of a snapshot."""
    settings = sae_trainer.settings
    scaled = rows_of(settings, 512, 77)
    sae_trainer.calibrate(sae_trainer.sae, scaled)
    raw = raw_inputs(sae_trainer, scaled)
    transform, rate = sae_trainer.input_transform(SCALES), sae_trainer.statistics.firing_rate()
    return load_sae(publish_sae(directory, sae_trainer.sae, transform, rate, raw))


def raw_inputs(sae_trainer: SaeTrainer, scaled: dict[str, Tensor]) -> Tensor:
    """What the SAE reads, before it was scaled."""
    return side_by_side({hook: x / SCALES[hook] for hook, x in scaled.items()}, sae_trainer.hooks.reads)


def raw_and_expected(sae_trainer: SaeTrainer) -> tuple[Tensor, Tensor]:
    """(raw x, what training's forward pass makes of it in raw units), on activations nothing has seen."""
    scaled = rows_of(sae_trainer.settings, 256, 99)
    raw = raw_inputs(sae_trainer, scaled)
    transform, sae = sae_trainer.input_transform(SCALES), sae_trainer.sae
    x, y = sae_trainer.inputs_and_targets(scaled)
    whitened = x if transform.whitening is None else transform.whitening.apply(x)
    if isinstance(sae, BatchTopK):  # in training a row's latents depend on its batch; in use there is a threshold
        pre_acts = sae.pre_acts(whitened)
        y_hat = (pre_acts * (pre_acts > sae.threshold)) @ sae.W_dec + sae.b_dec
        y_hat = y_hat + whitened @ sae.parameters["W_skip"].T if "W_skip" in sae.parameters else y_hat
    else:
        y_hat = sae.gradients(whitened, whitened if not sae_trainer.hooks.is_transcoder else y, NOBODY).y_hat
    return raw, (y_hat if transform.whitening is None else transform.whitening.undo(y_hat)) / transform.s_out


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", FAMILY)
def test_bug_13_a_snapshot_reconstructs_raw_rows_as_training_did_scaled_ones(kind: str, tmp_path: Path) -> None:
    """To 1e-5, for every architecture: transcoders with two scales and a skip, crosscoders with unequal ones."""
    sae_trainer = train_sae(settings_of(kind), steps=12)
    sae = publish_and_load(sae_trainer, tmp_path)
    raw, expected = raw_and_expected(sae_trainer)

    assert relative_distance(sae(raw), expected) < 1e-5


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_whitening_is_undone_in_a_snapshot(kind: str, tmp_path: Path) -> None:
    """Learned from whitened activations, used on raw ones: to 1e-5, for every autoencoder of one hook."""
    sae_trainer = train_sae(settings_of(kind, whitening=True), steps=12)
    sae = publish_and_load(sae_trainer, tmp_path)
    raw, expected = raw_and_expected(sae_trainer)

    assert relative_distance(sae(raw), expected) < 1e-5


@pytest.mark.parametrize("kind", FAMILY)
def test_bug_12_published_decoder_rows_have_unit_norm(kind: str, tmp_path: Path) -> None:
    """In float32 to 1e-6, but for top-k where free norms or unequal scales decide what is chosen."""
    sae_trainer = train_sae(settings_of(kind), steps=5)
    norms = publish_and_load(sae_trainer, tmp_path).W_dec.norm(dim=1)

    if kind in ("topk transcoder", "topk skip transcoder", "topk crosscoder"):
        assert not torch.allclose(norms, torch.ones_like(norms), atol=1e-3)
    else:
        # A transcoder's latent that has never learned has a decoder row of zeros.
        torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu l1", "gated"])
def test_latents_come_out_in_the_units_of_the_raw_rows(kind: str, tmp_path: Path) -> None:
    """With unit rows a latent of 3 means that 3 of its direction are in x: training's latents divided by the scale."""
    sae_trainer = train_sae(settings_of(kind), steps=5)
    raw, _ = raw_and_expected(sae_trainer)
    fired = sae_trainer.sae.gradients(raw * SCALES["a"], raw * SCALES["a"], NOBODY).fired.dense()

    torch.testing.assert_close(
        publish_and_load(sae_trainer, tmp_path).encode(raw), fired / SCALES["a"], rtol=1e-4, atol=1e-5
    )


def test_bug_13_a_forgotten_threshold_is_caught_before_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test on disk fails when weights are not those of training in other units; nothing appears."""
    monkeypatch.setattr(folding, "IN_LATENT_UNITS", {"b_enc", "b_gate", "b_mag"})
    sae, x, _ = make("jumprelu", torch.float32)
    sae.after_step()
    transform = InputTransform(torch.full((12,), 0.5), torch.full((12,), 0.5))

    with pytest.raises(SnapshotError, match="self-test"):
        publish_sae(tmp_path, sae, transform, torch.full((32,), 0.1), x / 0.5)
    assert not (tmp_path / "snapshots" / "LATEST").exists()
    assert [path for path in (tmp_path / "snapshots").iterdir()] == []


def test_a_snapshot_holds_what_the_readers_of_its_layout_expect(tmp_path: Path) -> None:
    """W_enc [d_in, d_sae], W_dec [d_sae, d_in], float32, the threshold in raw units."""
    sae_trainer = train_sae(settings_of("jumprelu"), steps=5)
    publish_and_load(sae_trainer, tmp_path)
    cfg, weights = read_sae(tmp_path / "snapshots" / "000000001000" / "s")

    assert {name: array.shape for name, array in weights.items()} == {
        "W_enc": (12, 32), "W_dec": (32, 12), "b_enc": (32,), "b_dec": (12,), "threshold": (32,),
    }  # fmt: skip
    assert all(array.dtype == np.float32 for array in weights.values())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("jumprelu", 12, 32)
    np.testing.assert_allclose(weights["threshold"], sae_trainer.sae.parameters["threshold"] / SCALES["a"], rtol=1e-6)


# The parts of folding


def test_one_latent_folded_by_hand() -> None:
    """s_in = 2, s_out = 4, a decoder row of norm 5: every weight on paper."""
    weights = {
        "W_enc": torch.tensor([[3.0]]),
        "W_dec": torch.tensor([[3.0, 4.0]]),
        "b_enc": torch.tensor([8.0]),
        "b_dec": torch.tensor([4.0, 8.0]),
        "threshold": torch.tensor([2.0]),
        "W_skip": torch.tensor([[1.0], [2.0]]),
    }
    transform = InputTransform(torch.tensor([2.0]), torch.tensor([4.0, 4.0]))
    folded, unit = fold(weights, transform, unit_rows=False), fold(weights, transform, unit_rows=True)

    assert {name: value.tolist() for name, value in folded.items()} == {
        "W_enc": [[1.5]], "W_dec": [[3, 4]], "b_enc": [2], "b_dec": [1, 2], "threshold": [0.5],
        "W_skip": [[0.5], [1.0]],
    }  # fmt: skip
    assert unit["W_enc"].tolist() == [[7.5]]
    torch.testing.assert_close(unit["W_dec"], torch.tensor([[0.6, 0.8]]))
    assert (unit["b_enc"].tolist(), unit["threshold"].tolist()) == ([10], [2.5])


def test_unfolding_undoes_folding() -> None:
    """Published weights come back into any run's scales."""
    torch.manual_seed(0)
    sae, _, _ = make("topk skip transcoder", torch.float32)
    transform = InputTransform(torch.full((12,), 0.37), torch.full((9,), 2.5))
    _, weights = sae.export()
    again = unfold(fold(weights, transform, unit_rows=False), transform)

    for name, value in weights.items():
        torch.testing.assert_close(again[name], value)


def test_a_decoder_row_of_zeros_folds_to_a_silent_latent() -> None:
    """Not to NaN: a transcoder's latent that has never learned writes nothing and fires never."""
    folded = fold_norms(
        {"W_enc": torch.ones(1, 2), "W_dec": torch.zeros(1, 2), "b_enc": torch.ones(1), "b_dec": torch.zeros(2)}
    )

    assert not folded["W_enc"].any() and not folded["W_dec"].any() and not folded["b_enc"].any()


def test_whitened_rows_have_the_identity_as_covariance() -> None:
    """Of strongly correlated activations, but for the floor that keeps empty directions from being blown up."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 6) @ torch.randn(6, 6) + 5.0
    white = whitening_of(x)
    whitened = white.apply(x)

    torch.testing.assert_close(whitened.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(whitened.T), torch.eye(6), atol=0.1, rtol=0)
    torch.testing.assert_close(white.undo(whitened), x, atol=1e-4, rtol=1e-4)


def test_a_direction_without_variance_does_not_explode() -> None:
    """Activations in a plane of three dimensions: the third is left small, not divided by zero."""
    torch.manual_seed(0)
    x = torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 0.0])

    assert float(whitening_of(x).apply(x).abs().max()) < 10


# Thresholds that inference needs


def test_gated_is_exactly_a_jumprelu() -> None:
    """π_mag where it exceeds max(θ, 0), θ = b_mag − exp(r_mag) b_gate: the same latents, in float64."""
    sae, x, y = make("gated")
    b_mag, rate = sae.parameters["b_mag"], sae.parameters["r_mag"].exp()
    magnitude = sae.encoder_input(x) @ (rate[:, None] * sae.W_enc).T + b_mag
    theta = (b_mag - rate * sae.parameters["b_gate"]).clamp_min(0)
    latents = magnitude * (magnitude > theta)

    torch.testing.assert_close(latents, sae.gradients(x, y, NOBODY).fired.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["batchtopk", "batchtopk matryoshka", "batchtopk transcoder"])
def test_the_calibrated_threshold_gives_the_trained_l0(kind: str, tmp_path: Path) -> None:
    """On fresh activations of the same distribution the mean L0 of the published SAE is k within 5 %."""
    settings = settings_of(kind)
    sae_trainer = train_sae(settings, steps=60)
    sae_trainer.calibrate(sae_trainer.sae, rows_of(settings, 8192, 5))
    fresh = rows_of(settings, 8192, 6)
    transform, rate = sae_trainer.input_transform(UNSCALED), sae_trainer.statistics.firing_rate()
    sae = load_sae(publish_sae(tmp_path, sae_trainer.sae, transform, rate, fresh["a"][:512]))
    l0 = float((sae.encode(fresh["a"]) > 0).sum(1).double().mean())

    assert settings.k is not None
    assert l0 == pytest.approx(settings.k, rel=0.05)


def test_a_threshold_worked_out_on_paper() -> None:
    """Ten activations, k = 1, identity encoder: the threshold is the eleventh largest value, which ten exceed."""
    sae, _, _ = make("batchtopk", torch.float32, d_sae=12, k=1)
    assert isinstance(sae, BatchTopK)
    sae.parameters |= {"W_enc": torch.eye(12), "b_enc": torch.zeros(12), "b_dec": torch.zeros(12)}
    x = torch.zeros(10, 12)
    x.view(-1)[:30] = torch.arange(30.0)
    sae.calibrate(x)

    assert sae.threshold == 19.0


def test_too_few_positive_values_give_a_threshold_of_zero() -> None:
    """When less than k per activation is above zero everything above zero is kept."""
    sae, x, _ = make("batchtopk", torch.float32)
    assert isinstance(sae, BatchTopK)
    sae.parameters["b_enc"] -= 100.0
    sae.calibrate(x)

    assert sae.threshold == 0.0


@pytest.mark.parametrize("kind", FAMILY)
def test_bug_37_a_published_sae_encodes_a_row_the_same_in_any_batch(kind: str, tmp_path: Path) -> None:
    """Latents of an activation do not depend on its neighbours; BatchTopK's neither."""
    sae_trainer = train_sae(settings_of(kind), steps=5)
    sae = publish_and_load(sae_trainer, tmp_path)
    raw, _ = raw_and_expected(sae_trainer)

    torch.testing.assert_close(sae.encode(raw[:1]), sae.encode(raw)[:1], rtol=1e-5, atol=1e-6)
