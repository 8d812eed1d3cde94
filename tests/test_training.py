"""Statistics, optimizer and schedules: hand-computed values and float64 references."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.kernels.sparse import Entries, topk_entries
from trainer.optimizer import RowAdam, default_learning_rate, learning_rate_factor, make_tangent
from trainer.report import DENSITY_EDGES
from trainer.saes.base import normalise_rows
from trainer.settings import OptimizerSettings, SaeSettings
from trainer.statistics import HALF_LIFE_TOKENS, Statistics
from trainer.trainee import Trainee


def nothing_fired(rows: int, d_sae: int) -> Entries:
    return Entries(torch.zeros(rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), d_sae)


def test_bug_21_predicting_the_mean_gives_fvu_one() -> None:
    """FVU is about the mean, not about zero, even where the mean dwarfs the spread."""
    torch.manual_seed(0)
    x = torch.randn(5000, 8) + 1000.0
    statistics = Statistics(4, torch.full((8,), 999.0))
    statistics.update(x, x.mean(0).expand_as(x), nothing_fired(len(x), 4))

    assert pytest.approx(statistics.summary().fvu, rel=1e-4) == 1.0


def test_statistics_equal_a_two_pass_computation_in_float64() -> None:
    """FVU, MSE, shrinkage over many batches with ‖mean‖² a million times the variance, window weights included."""
    torch.manual_seed(0)
    mean = 3000.0 * torch.randn(16, dtype=torch.float64)
    statistics = Statistics(4, mean.float())
    xs, x_hats = [], []
    for _ in range(40):
        x = torch.randn(512, 16, dtype=torch.float64) + mean
        x_hat = mean + 0.8 * (x - mean) + 0.1 * torch.randn(512, 16, dtype=torch.float64) + 0.05
        x, x_hat = x.float(), x_hat.float()
        xs.append(x.double())
        x_hats.append(x_hat.double())
        statistics.update(x, x_hat, nothing_fired(512, 4))
    weight = torch.cat(
        [torch.full((512,), 0.5 ** (512 * age / HALF_LIFE_TOKENS)) for age in range(39, -1, -1)]
    ).double()
    x, x_hat = torch.cat(xs), torch.cat(x_hats)
    centre = (weight[:, None] * x).sum(0) / weight.sum()
    error = (weight * (x - x_hat).square().sum(1)).sum()
    variance = (weight * (x - centre).square().sum(1)).sum()
    shrinkage = (weight * (x_hat - centre).square().sum(1)).sum() / (
        weight * ((x - centre) * (x_hat - centre)).sum(1)
    ).sum()
    summary = statistics.summary()

    assert float(error / variance) == pytest.approx(summary.fvu, rel=1e-4)
    assert float(error / weight.sum() / 16) == pytest.approx(summary.mse, rel=1e-4)
    assert float(shrinkage) == pytest.approx(summary.shrinkage, rel=1e-4)


def test_a_constant_error_is_an_error() -> None:
    """FVU counts a constant offset of the reconstruction; var(x − x_hat) would not."""
    torch.manual_seed(0)
    x = torch.randn(1000, 4)
    statistics = Statistics(2, torch.zeros(4))
    statistics.update(x, x + 1.0, nothing_fired(1000, 2))

    assert statistics.summary().fvu > 0.9


def test_l0_counts_positive_entries_only() -> None:
    """TopK lists k entries a row; those clipped to zero are not active."""
    statistics = Statistics(4, torch.zeros(2))
    fired = topk_entries(torch.tensor([[1.0, -1, -1, -1], [1.0, 2.0, -1, -1]]), 2)
    statistics.update(torch.randn(2, 2), torch.zeros(2, 2), fired)

    assert statistics.summary().l0 == 1.5


def test_bug_9_deadness_is_counted_in_tokens() -> None:
    """The same rows in batches of another size give the same dead latents."""
    x = torch.zeros(600, 2)
    pre_acts = torch.full((600, 3), -1.0)
    pre_acts[:, 0] = 1.0
    pre_acts[100, 1] = 1.0
    counted = []
    for size in (50, 100, 300):
        statistics = Statistics(3, torch.zeros(2))
        for start in range(0, 600, size):
            part = slice(start, start + size)
            statistics.update(x[part], x[part], topk_entries(pre_acts[part], 2))
        counted.append(statistics.dead(300))

    assert counted == [2, 2, 2]


def test_deadness_is_unknown_until_enough_was_seen() -> None:
    """Before dead_tokens rows, nobody can say; zero would be a claim."""
    statistics = Statistics(3, torch.zeros(2))
    statistics.update(torch.zeros(10, 2), torch.zeros(10, 2), nothing_fired(10, 3))

    assert statistics.dead(11) is None
    assert statistics.dead(10) == 3


def test_bug_23_reading_statistics_changes_nothing() -> None:
    """Logging is pure: two readings agree, and so does the state."""
    statistics = Statistics(3, torch.zeros(2))
    statistics.update(torch.randn(10, 2), torch.randn(10, 2), nothing_fired(10, 3))
    before = {name: value.clone() for name, value in statistics.state().items()}
    first = statistics.summary(), statistics.density(), statistics.dead(5)

    assert first == (statistics.summary(), statistics.density(), statistics.dead(5))
    assert all(torch.equal(before[name], value) for name, value in statistics.state().items())


def test_density_sorts_latents_by_their_firing_rate() -> None:
    """One latent on every row, one on a tenth, one never."""
    statistics = Statistics(3, torch.zeros(2))
    pre_acts = torch.full((1000, 3), -1.0)
    pre_acts[:, 0] = 1.0
    pre_acts[::10, 1] = 1.0
    statistics.update(torch.zeros(1000, 2), torch.zeros(1000, 2), topk_entries(pre_acts, 2))
    density = dict(zip((*DENSITY_EDGES, "never"), statistics.density(), strict=True))

    assert {edge: count for edge, count in density.items() if count} == {0.0: 1, -1.0: 1, "never": 1}


def test_the_decoder_gradient_is_tangent_to_its_unit_rows() -> None:
    """After projection no row's gradient has a component along the row."""
    torch.manual_seed(0)
    W, grad = torch.randn(6, 4), torch.randn(6, 4)
    normalise_rows(W)
    make_tangent(grad, W)

    torch.testing.assert_close((grad * W).sum(1), torch.zeros(6), atol=1e-6, rtol=0)


def test_clipping_scales_the_whole_gradient() -> None:
    """A gradient of norm 10 is stepped as one of norm 1; the norm reported is the true one."""
    parameters = {"W_dec": torch.zeros(1, 2), "b_dec": torch.zeros(2)}
    optimizer = RowAdam(parameters, OptimizerSettings(betas=[0.0, 0.0], eps=1.0, clip=1.0))
    norm = optimizer.step({"W_dec": torch.zeros(1, 2), "b_dec": torch.tensor([6.0, 8.0])}, 1.0)

    assert pytest.approx(float(norm)) == 10.0
    # Adam without memory steps −g / (|g| + 1), here with g = (0.6, 0.8).
    torch.testing.assert_close(parameters["b_dec"], torch.tensor([-0.6 / 1.6, -0.8 / 1.8]))


def test_bug_39_a_gradient_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    """One NaN row costs its step, not the run, and the count says so."""
    settings = SaeSettings(name="s", architecture="topk", d_sae=16, k=2)
    trainee = Trainee(settings, OptimizerSettings(), 4, 0, torch.device("cpu"), torch.float32)
    trainee.initialise(torch.randn(64, 4), torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in trainee.sae.parameters.items()}
    x = torch.randn(8, 4)
    x[3, 2] = math.nan
    trainee.step(x, 0, None)

    assert trainee.skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in trainee.sae.parameters.items())


def test_bug_12_decoder_rows_have_unit_norm_after_every_step() -> None:
    """Adam's update leaves the sphere; what anyone can see does not."""
    settings = SaeSettings(name="s", architecture="topk", d_sae=16, k=2)
    trainee = Trainee(settings, OptimizerSettings(learning_rate=0.1), 4, 0, torch.device("cpu"), torch.float32)
    trainee.initialise(torch.randn(64, 4), torch.Generator().manual_seed(0))
    for _ in range(5):
        trainee.step(torch.randn(8, 4), 2_000_000, None)

        torch.testing.assert_close(trainee.sae.parameters["W_dec"].norm(dim=1), torch.ones(16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_bug_11_a_restored_trainee_goes_on_bit_for_bit(architecture: str) -> None:
    """Weights, moments, dead counters, statistics: resuming in the middle equals not stopping."""
    options = {"k": 2} if architecture == "topk" else {"target_l0": 2.0}
    settings = SaeSettings(name="s", architecture=architecture, d_sae=16, revive_tokens=16, **options)
    torch.manual_seed(0)
    batches = [torch.randn(8, 4) for _ in range(12)]

    def fresh() -> Trainee:
        return Trainee(settings, OptimizerSettings(learning_rate=0.01), 4, 0, torch.device("cpu"), torch.float32)

    whole = fresh()
    whole.initialise(torch.randn(64, 4), torch.Generator().manual_seed(0))
    for number, batch in enumerate(batches):
        if number == 6:
            document, tensors = whole.state()
            tensors = {name: value.clone() for name, value in tensors.items()}
        whole.step(batch, 8 * number, 96)
    resumed = fresh()
    resumed.restore(document, tensors)
    for number, batch in enumerate(batches[6:], start=6):
        resumed.step(batch, 8 * number, 96)

    ours, theirs = resumed.state()[1], whole.state()[1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_schedule_counts_tokens() -> None:
    """Warm-up over the first rows, full, then linear to zero over the last fifth; endless runs never cool down."""

    def factor(tokens: int, target: int | None = 1000) -> float:
        return learning_rate_factor(tokens, target, warmup_tokens=100, cooldown=0.2)

    assert factor(49) == 0.5
    assert 1.0 == factor(500) == factor(800)
    assert pytest.approx(factor(900)) == 0.5
    assert factor(1000) == 0.0
    assert factor(10**12, None) == 1.0


def test_the_default_learning_rate_falls_with_the_root_of_the_width() -> None:
    """2e-4 at 2¹⁴ latents, half of it at 2¹⁶."""
    assert (default_learning_rate(2**14), default_learning_rate(2**16)) == (2e-4, 1e-4)
