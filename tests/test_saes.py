"""What SAEs of every kind share: first weights, permutations, starting anew, repair, responses to settings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_saes import (
    D_SAE,
    FAMILY,
    NOBODY,
    UNSCALED,
    dead_latents,
    learn,
    make,
    publish_sae,
    rows_of,
    sae_trainer_of,
    settings_of,
    train_sae,
)
from trainer.saes.architectures.jumprelu import INITIAL_L0, JumpReLU
from trainer.saes.base import Sae
from trainer.saes.folding import side_by_side
from trainer.saes.inference import load_sae
from trainer.saes.initial import geometric_median, initial_bias
from trainer.saes.settings import SaeSettings
from trainer.saes.start import read_start
from trainer.training.sae_trainer import SaeTrainer

SHARED = ("b_dec", "W_skip")


# Beginning


def test_bug_38_the_seed_decides_the_weights() -> None:
    """Same seed, same weights; another seed, others."""
    for kind in FAMILY:
        sae, x, y = make(kind, torch.float32)

        def weights(sae: Sae, x: Tensor, y: Tensor, seed: int) -> Tensor:
            sae.initialise(x, y, torch.Generator().manual_seed(seed))
            return sae.W_enc.clone()

        assert torch.equal(weights(sae, x, y, 3), weights(sae, x, y, 3))
        assert not torch.equal(weights(sae, x, y, 3), weights(sae, x, y, 4))


def test_the_geometric_median_shrugs_off_outliers() -> None:
    """One activation a thousand times too large moves the mean, hardly the median."""
    torch.manual_seed(0)
    x = torch.randn(1000, 4) + 2.0
    x[0] = 1e4

    torch.testing.assert_close(geometric_median(x), torch.full((4,), 2.0), atol=0.2, rtol=0)


def test_b_dec_begins_where_it_is_told() -> None:
    """zero, the mean, or the geometric median, which of three points far apart is their Fermat point."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])

    assert initial_bias(x, "zero").tolist() == [0, 0]
    assert initial_bias(x, "mean").tolist() == [1, 1]
    # From (1, 1/√3) the three are seen at 120° of each other.
    torch.testing.assert_close(initial_bias(x, "geometric_median"), torch.tensor([1.0, 3**-0.5]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("topk", 1),
        ("relu l1", 1),
        ("gated", 1),
        ("jumprelu", 1),
        ("tied", 1),
        ("relu l1_norm", 0.1),
        ("relu tanh", 0.1),
    ],
)
def test_encoder_and_decoder_begin_alike(kind: str, norm: float) -> None:
    """Both matrices start with the same rows: of unit norm where that is kept, small where it is free (April 2024)."""
    settings = settings_of(kind)
    sae_trainer = sae_trainer_of(settings)
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)

    assert torch.equal(sae_trainer.sae.W_enc, sae_trainer.sae.W_dec)
    torch.testing.assert_close(sae_trainer.sae.W_dec.norm(dim=1), torch.full((D_SAE,), float(norm)))


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if "transcoder" in kind])
def test_a_transcoder_begins_as_the_mean_of_its_target(kind: str) -> None:
    """W_dec and W_skip are zero, so that b_dec alone speaks; the encoder has directions to learn in."""
    settings = settings_of(kind, initial_bias="mean")
    sae_trainer, rows = sae_trainer_of(settings), rows_of(settings, 512, 0)
    sae_trainer.initialise(rows, UNSCALED)
    gradients = sae_trainer.sae.gradients(rows["a"], rows["b"], NOBODY)

    torch.testing.assert_close(gradients.y_hat, rows["b"].mean(0).expand_as(rows["b"]))
    assert float(gradients.loss["reconstruction"]) == pytest.approx(1.0, rel=1e-5)
    assert sae_trainer.sae.W_enc.norm(dim=1).min() > 0.9


def test_jumprelu_begins_with_a_given_l0() -> None:
    """Every latent fires equally often: INITIAL_L0 times the target, together."""
    settings = settings_of("jumprelu", target_l0=2.0)
    sae_trainer, rows = sae_trainer_of(settings), rows_of(settings, 4096, 0)
    sae_trainer.initialise(rows, UNSCALED)
    firings = sae_trainer.sae.gradients(rows["a"], rows["a"], NOBODY).fired.firings() / 4096

    torch.testing.assert_close(
        firings.double(), torch.full((D_SAE,), INITIAL_L0 * 2.0 / D_SAE).double(), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "topk transcoder", "topk crosscoder"])
def test_topk_latents_begin_equally_likely(kind: str) -> None:
    """Each reaches 1 on k / d_sae of the activations, however little its direction varies; "free" leaves the biases."""
    settings = settings_of(kind)
    sae_trainer, rows = sae_trainer_of(settings), rows_of(settings, 4096, 0)
    sae_trainer.initialise(rows, UNSCALED)
    reached = (sae_trainer.sae.pre_acts(side_by_side(rows, sae_trainer.hooks.reads)) > 1.0).double().mean(0)
    free = sae_trainer_of(settings_of(kind, initial_rates="free"))
    free.initialise(rows, UNSCALED)

    assert settings.k is not None
    torch.testing.assert_close(reached, torch.full((D_SAE,), settings.k / D_SAE).double(), atol=1e-3, rtol=0)
    if settings.target is None:
        assert not free.sae.b_enc.any()


def test_directions_can_begin_at_the_data() -> None:
    """initial_directions = "data": activations closer to the data's directions than random ones are."""
    best = {}
    for how in ("data", "random"):
        settings = settings_of("topk", initial_directions=how)
        sae_trainer, rows = sae_trainer_of(settings), rows_of(settings, 512, 0)["a"]
        sae_trainer.initialise({"a": rows}, UNSCALED)
        centred = rows - rows.mean(0)
        best[how] = (sae_trainer.sae.W_enc @ (centred / centred.norm(dim=1, keepdim=True)).T).amax(1)

    assert best["data"].min() > 0.9
    assert best["random"].mean() < 0.9


# No latent is special


def shuffled(settings: SaeSettings) -> Tensor:
    """An order of the latents; with nested dictionaries each stays in its segment."""
    torch.manual_seed(2)
    ends = [0, *settings.levels]
    parts = [torch.randperm(end - begin) + begin for begin, end in pairwise(ends)]
    return torch.cat(parts)


def permuted(sae: Sae, order: Tensor) -> dict[str, Tensor]:
    return {name: value.clone() if name in SHARED else value[order] for name, value in sae.parameters.items()}


@pytest.mark.parametrize("kind", FAMILY)
def test_permuting_latents_permutes_everything(kind: str) -> None:
    """Gradients, reconstruction, losses, exported weights, and what a latent becomes when it starts anew."""
    sae, x, y = make(kind)
    dead, order = dead_latents(), shuffled(sae.settings)
    other, _, _ = make(kind)
    other.parameters = permuted(sae, order)
    plain, ours = sae.gradients(x, y, dead), other.gradients(x, y, dead[order])
    exported, ours_exported = sae.export()[1], other.export()[1]
    anew = torch.tensor([3, 8, 30])
    sae.reinitialise(anew, x[:3], y[:3])
    other.reinitialise(torch.argsort(order)[anew], x[:3], y[:3])

    def agree(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value if name in SHARED else value[order], rtol=1e-9, atol=1e-12)

    agree(plain.of, ours.of)
    agree(exported, ours_exported)
    agree(sae.parameters, other.parameters)
    torch.testing.assert_close(ours.y_hat, plain.y_hat, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.fired.firings(), plain.fired.firings()[order])
    assert {name: float(value) for name, value in ours.loss.items()} == pytest.approx(
        {name: float(value) for name, value in plain.loss.items()}
    )


# Rows and batches


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if "batchtopk" not in kind])
def test_bug_37_a_row_is_encoded_the_same_in_any_batch(kind: str) -> None:
    """An activation's latents do not depend on its neighbours, in training neither; BatchTopK's do there on purpose."""
    sae, x, y = make(kind)
    alone, together = sae.gradients(x[:1], y[:1], NOBODY), sae.gradients(x, y, NOBODY)

    torch.testing.assert_close(alone.y_hat, together.y_hat[:1], rtol=1e-12, atol=1e-12)


def test_batchtopk_spends_k_per_row_on_average() -> None:
    """Exactly batch · k are active, and activations differ in how many they get."""
    sae, x, y = make("batchtopk")
    active = (sae.gradients(x, y, NOBODY).fired.dense() != 0).sum(1)

    assert int(active.sum()) == 6 * len(x)
    assert int(active.max()) > 6 > int(active.min())


def test_the_same_batch_gives_the_same_bits() -> None:
    """Sums have a fixed order, in every architecture."""
    for kind in FAMILY:
        sae, x, y = make(kind, torch.float32)
        first, second = (sae.gradients(x, y, dead_latents()).of for _ in range(2))

        assert all(torch.equal(first[name], second[name]) for name in first)


def test_products_of_bfloat16_are_summed_in_float32() -> None:
    """Matrices are rounded, sums are not: gradients stay near those of float32."""
    for kind in FAMILY:
        sae, x, y = make(kind, torch.float32)
        exact = sae.gradients(x, y, NOBODY)
        sae.matmul_dtype = torch.bfloat16
        fast = sae.gradients(x, y, NOBODY)

        assert all(value.dtype == torch.float32 for value in (*fast.of.values(), *fast.loss.values(), fast.y_hat))
        assert float(sum(fast.loss.values())) == pytest.approx(float(sum(exact.loss.values())), rel=0.05)


# Starting anew


def test_a_latent_that_starts_anew_by_hand() -> None:
    """Encoder row a fifth of the mean norm of the others, decoder row a unit vector, bias zero: Bricken et al. 2023."""
    sae, _, _ = make("relu l1", torch.float32)
    sae.parameters["W_enc"] = torch.zeros(D_SAE, 12)
    sae.parameters["W_enc"][:, 0] = 10.0
    sae.parameters["W_enc"][5] = 1000.0
    before = {name: value.clone() for name, value in sae.parameters.items()}
    x, y = torch.zeros(1, 12), torch.zeros(1, 12)
    x[0, 1], y[0, :2] = 7.0, torch.tensor([3.0, 4.0])
    sae.reinitialise(torch.tensor([5]), x, y)
    others = torch.arange(D_SAE) != 5

    assert sae.W_enc[5, :3].tolist() == [0.0, 2.0, 0.0]
    torch.testing.assert_close(sae.W_dec[5, :3], torch.tensor([0.6, 0.8, 0.0]))
    assert sae.b_enc[5] == 0.0
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(sae.parameters[name][others], before[name][others])
    assert torch.equal(sae.b_dec, before["b_dec"])


@pytest.mark.parametrize("kind", FAMILY)
def test_all_latents_may_start_anew(kind: str) -> None:
    """With nobody left to take a norm from, weights stay finite."""
    sae, x, y = make(kind)
    sae.reinitialise(torch.arange(D_SAE), x.repeat(2, 1)[:D_SAE], y.repeat(2, 1)[:D_SAE])

    assert all(bool(value.isfinite().all()) for value in sae.parameters.values())


def test_a_jumprelu_starts_anew_below_what_its_own_row_gives() -> None:
    """Halfway there, or two standard deviations of the others, whichever is less; others keep their thresholds."""
    for threshold in ("linear", "log"):
        sae, x, y = make("jumprelu", threshold=threshold)
        assert isinstance(sae, JumpReLU)
        before = sae.threshold.clone()
        sae.reinitialise(torch.tensor([2, 4]), x[:2], y[:2])
        W_enc = sae.W_enc[[2, 4]]
        expected = torch.minimum((W_enc * x[:2]).sum(1) / 2, 2 * W_enc.norm(dim=1))

        torch.testing.assert_close(sae.threshold[[2, 4]], expected)
        torch.testing.assert_close(sae.threshold[5:], before[5:])


def test_jumprelus_that_start_anew_are_quiet() -> None:
    """They do not fire on half of all activations, as with a threshold near zero: that would be an explosion."""
    torch.manual_seed(0)
    sae, _, _ = make("jumprelu", torch.float32)
    x = torch.randn(2000, 12)
    sae.parameters["b_dec"].zero_()
    sae.reinitialise(torch.arange(16), x[:16], x[:16])
    rate = sae.gradients(x, x, NOBODY).fired.firings()[:16] / 2000

    assert (rate > 0).all()
    assert float(rate.mean()) < 0.1


# Responses to settings


def l0_of(settings: SaeSettings, steps: int = 150) -> float:
    sae_trainer = train_sae(settings, steps=steps)
    x = rows_of(settings, 2048, 999)["a"]
    return float(sae_trainer.sae.gradients(x, x, NOBODY).fired.firings().sum()) / 2048


def test_bug_15b_l0_responds_to_its_target() -> None:
    """A sweep: what Adam divides out of a penalty's weight, it cannot divide out of a target."""
    l0 = {target: l0_of(settings_of("jumprelu", target_l0=target, l0_weight=1.0)) for target in (2.0, 4.0, 8.0)}

    for target, value in l0.items():
        assert value == pytest.approx(target, rel=0.3)


@pytest.mark.parametrize("kind", ["relu l1", "relu l1_norm", "relu tanh", "tied", "gated"])
def test_bug_15b_l0_responds_to_the_weight_of_the_penalty(kind: str) -> None:
    """Ten times the weight: clearly fewer active latents."""
    light, heavy = (l0_of(settings_of(kind, sparsity_weight=weight), steps=100) for weight in (0.3, 6.0))

    assert heavy < 0.8 * light


def test_thresholds_stay_above_zero() -> None:
    """A step that would take a threshold below the minimum stops there."""
    sae, _, _ = make("jumprelu")
    sae.parameters["threshold"].fill_(-1.0)
    sae.after_step()

    assert float(sae.parameters["threshold"].min()) == 1e-3


# Repair


def suppressed(directory: Path) -> tuple[Path, Tensor]:
    """(folder of a ReLU SAE whose L1 has shrunk its latents, fresh activations)."""
    settings = SaeSettings.of(name="s", architecture="relu", penalty="l1", sparsity_weight=4.0, d_sae=D_SAE)
    sae_trainer = train_sae(settings, steps=300)
    x = rows_of(settings, 1024, 77)["a"]
    transform, rate = sae_trainer.input_transform(UNSCALED), sae_trainer.statistics.firing_rate()
    return publish_sae(directory, sae_trainer.sae, transform, rate, x), x


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    return suppressed(tmp_path_factory.mktemp("shrunk"))


def repairing(folder: Path, train: str, steps: int, scale: float = 1.0) -> SaeTrainer:
    settings = SaeSettings.of(
        name="r",
        architecture="repair",
        start_from=str(folder),
        d_sae=D_SAE,
        **{"train": train},  # type: ignore[arg-type]
    )
    sae_trainer = sae_trainer_of(settings)
    sae_trainer.initialise({"a": scale * rows_of(settings, 512, 0)["a"]}, {"a": scale}, read_start(settings))
    learn(sae_trainer, [{"a": scale * rows_of(settings, 64, 1000 + step)["a"]} for step in range(steps)])
    return sae_trainer


def quality(sae_trainer: SaeTrainer, x: Tensor) -> tuple[float, float]:
    """(FVU, shrinkage) on activations nothing was trained on."""
    x_hat = sae_trainer.sae.gradients(x, x, NOBODY).y_hat
    centred, decoded = x - x.mean(0), x_hat - x.mean(0)
    fvu = (x - x_hat).square().sum() / centred.square().sum()
    return float(fvu), float(decoded.square().sum() / (centred * decoded).sum())


@pytest.mark.parametrize("train", ["scale", "decoder", "scale+decoder"])
def test_repair_keeps_exactly_the_active_latents_and_mends_the_rest(
    train: str, shrunk: tuple[Path, Tensor], tmp_path: Path
) -> None:
    """From start to export every activation keeps its active latents; less is unexplained, less suppressed."""
    folder, x = shrunk
    initial, mended = repairing(folder, train, 0), repairing(folder, train, 150)
    transform, rate = mended.input_transform(UNSCALED), mended.statistics.firing_rate()
    after = load_sae(publish_sae(tmp_path, mended.sae, transform, rate, x))
    support = load_sae(folder).encode(x) > 0
    (fvu, shrinkage), (fvu_after, shrinkage_after) = quality(initial, x), quality(mended, x)

    assert torch.equal(after.encode(x) > 0, support)
    assert torch.equal(mended.sae.gradients(x, x, NOBODY).fired.dense() > 0, support)
    assert fvu_after < 0.9 * fvu
    assert shrinkage < 0.95
    assert abs(1 - shrinkage_after) < 0.5 * abs(1 - shrinkage)


@pytest.mark.parametrize(
    ("train", "learns"),
    [
        ("scale", {"scale"}),
        ("scale+decoder", {"scale", "W_dec", "b_dec"}),
        ("scale+encoder", {"scale", "W_enc", "b_enc"}),
        ("decoder", {"W_dec", "b_dec"}),
        ("encoder", {"W_enc", "b_enc"}),
        ("decoder+encoder", {"W_dec", "b_dec", "W_enc", "b_enc"}),
        ("all", {"scale", "W_dec", "b_dec", "W_enc", "b_enc"}),
    ],
)
def test_repair_changes_what_it_may_and_nothing_else(train: str, learns: set[str], shrunk: tuple[Path, Tensor]) -> None:
    """`train` is kept to the bit, but for the last digit of unit decoder rows."""
    before, after = repairing(shrunk[0], train, 0).sae.parameters, repairing(shrunk[0], train, 3).sae.parameters
    changed = {name for name in before if not torch.allclose(before[name], after[name], rtol=1e-6, atol=1e-7)}

    assert changed == learns


def test_repair_begins_where_the_other_ended(shrunk: tuple[Path, Tensor]) -> None:
    """Also on a stream with another input scale, and though the SAE it repairs subtracted b_dec from x."""
    folder, x = shrunk
    for scale in (1.0, 0.3):
        initial = repairing(folder, "scale", 0, scale)
        x_hat = initial.sae.gradients(x * scale, x * scale, NOBODY).y_hat / scale

        torch.testing.assert_close(x_hat, load_sae(folder)(x), rtol=1e-4, atol=1e-4)


def test_a_scale_that_would_be_negative_or_zero_stays_above(shrunk: tuple[Path, Tensor]) -> None:
    """At zero the latent would be gone from every activation, and below it would write backwards."""
    sae_trainer = repairing(shrunk[0], "scale", 0)
    sae_trainer.sae.parameters["scale"].fill_(-1.0)
    before = sae_trainer.sae.gradients(shrunk[1], shrunk[1], NOBODY).fired.firings()
    sae_trainer.sae.after_step()
    after: Any = sae_trainer.sae.gradients(shrunk[1], shrunk[1], NOBODY).fired

    assert torch.equal(after.firings(), before)
    assert float(after.value.min()) >= 0
