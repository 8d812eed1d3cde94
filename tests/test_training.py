"""Statistics, optimizer, schedules, SAE trainers between two steps: numbers on paper and float64 references."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from producer.settings import ModelSettings, RunSettings
from producer.wire import Hello, Hook
from tests.small_run import by_key, checkpoint_of
from tests.small_saes import FAMILY, UNSCALED, learn, rows_of, sae_trainer_of, settings_of, train_sae
from trainer.kernels.select import largest
from trainer.kernels.sparse import Entries
from trainer.phases import SaePhase
from trainer.report import DENSITY_EDGES
from trainer.saes.hooks import SaeHooks
from trainer.saes.initial import normalise_rows
from trainer.saes.settings import SaeSettings
from trainer.settings import BufferSettings, OptimizerSettings, TrainerSettings
from trainer.state.checkpoint import load_newest, save
from trainer.state.format import CheckpointTensors, encode_tensors
from trainer.stream.buffer import Batch
from trainer.training.optimizers.adam import Adam
from trainer.training.run import Run, scale_of
from trainer.training.sae_trainer import SaeTrainer
from trainer.training.schedule import Cooldown, warmup_factor
from trainer.training.statistics import HALF_LIFE_TOKENS, Statistics, half_life_tokens


def nothing_fired(rows: int, d_sae: int) -> Entries:
    return Entries(torch.zeros(rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), d_sae)


def test_bug_21_predicting_the_mean_gives_fvu_one() -> None:
    """FVU is about the mean, not about zero, even where the mean dwarfs the spread."""
    torch.manual_seed(0)
    x = torch.randn(5000, 8) + 1000.0
    statistics = Statistics(4, torch.full((8,), 999.0))
    statistics.update(x, x.mean(0).expand_as(x), nothing_fired(len(x), 4))

    assert statistics.summary().fvu == pytest.approx(1.0, rel=1e-4)


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
    assert half_life_tokens(40 * 512) == 20_000
    weight = torch.cat([torch.full((512,), 0.5 ** (512 * age / 20_000)) for age in range(39, -1, -1)]).double()
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


@pytest.mark.parametrize("dense_above", [2.0, 0.0], ids=["sparse", "dense"])
def test_bug_1_l0_counts_entries_that_are_not_zero(dense_above: float) -> None:
    """TopK lists k entries a row; those clipped to zero are not active, negative ones of abs are."""
    pre_acts = torch.tensor([[1.0, -1, -2, -1], [1.0, 2.0, -1, -1]])
    plain, signed = Statistics(4, torch.zeros(2)), Statistics(4, torch.zeros(2))
    plain.update(torch.randn(2, 2), torch.zeros(2, 2), largest(pre_acts, 2, dense_above=dense_above))
    signed.update(torch.randn(2, 2), torch.zeros(2, 2), largest(pre_acts, 2, magnitude=True, dense_above=dense_above))

    assert plain.summary().l0 == 1.5
    assert plain.firings.tolist() == [2, 1, 0, 0]
    assert signed.summary().l0 == 2.0
    assert signed.tokens_since_fired[2] == 0


def test_bug_9_deadness_is_counted_in_tokens() -> None:
    """The same tokens in batches of another size give the same dead latents."""
    x = torch.zeros(600, 2)
    pre_acts = torch.full((600, 3), -1.0)
    pre_acts[:, 0] = 1.0
    pre_acts[100, 1] = 1.0
    dead_counts = []
    for size in (50, 100, 300):
        statistics = Statistics(3, torch.zeros(2))
        for start in range(0, 600, size):
            part = slice(start, start + size)
            statistics.update(x[part], x[part], largest(pre_acts[part], 2))
        dead_counts.append(statistics.count_dead(300))

    assert dead_counts == [2, 2, 2]


def test_deadness_is_unknown_until_enough_was_seen() -> None:
    """Before dead_tokens tokens, nobody can say; zero would be a claim."""
    statistics = Statistics(3, torch.zeros(2))
    statistics.update(torch.zeros(10, 2), torch.zeros(10, 2), nothing_fired(10, 3))

    assert statistics.count_dead(11) is None
    assert statistics.count_dead(10) == 3


def test_bug_23_reports_change_nothing() -> None:
    """An SAE trainer's neither: state before and after a report are the same bits."""
    sae_trainer = train_sae(settings_of("topk", ema_tokens=64), steps=3)
    before = {name: value.clone() for name, value in sae_trainer.state()[1].by_key().items()}
    first, second = sae_trainer.report(UNSCALED), sae_trainer.report(UNSCALED)

    assert first == second
    assert all(torch.equal(before[name], value) for name, value in sae_trainer.state()[1].by_key().items())


@pytest.mark.parametrize(("kind", "scale", "scaled_mse"), [("topk", 2.0, 1.719), ("topk transcoder", 4.0, 2.107)])
def test_errors_are_told_in_the_units_of_what_is_reconstructed(kind: str, scale: float, scaled_mse: float) -> None:
    """Hook 0 is learned times 2, hook 1 times 4: an error divided by the square of it is one of raw activations."""
    sae_trainer = train_sae(settings_of(kind), steps=2)
    mse = sae_trainer.statistics.summary().mse

    assert mse == pytest.approx(scaled_mse, rel=0.01)
    assert sae_trainer.report({"a": 2.0, "b": 4.0}).mse == pytest.approx(mse / scale**2)


def test_bug_23_reading_statistics_changes_nothing() -> None:
    """Logging is pure: two readings agree, and so does the state."""
    torch.manual_seed(0)
    statistics, x = Statistics(3, torch.zeros(2)), torch.randn(10, 2)
    statistics.update(x, 0.9 * x, nothing_fired(10, 3))
    before = deepcopy(vars(statistics.state()))
    first = statistics.summary(), statistics.density(), statistics.count_dead(5)

    assert first == (statistics.summary(), statistics.density(), statistics.count_dead(5))
    after = vars(statistics.state())
    assert before.pop("tokens") == after.pop("tokens")
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_density_sorts_latents_by_their_firing_rate() -> None:
    """One latent on every token, one on a tenth, one never."""
    statistics = Statistics(3, torch.zeros(2))
    pre_acts = torch.full((1000, 3), -1.0)
    pre_acts[:, 0] = 1.0
    pre_acts[::10, 1] = 1.0
    statistics.update(torch.zeros(1000, 2), torch.zeros(1000, 2), largest(pre_acts, 2))
    density = dict(zip((*DENSITY_EDGES, "never"), statistics.density(), strict=True))

    assert {edge: count for edge, count in density.items() if count} == {0.0: 1, -1.0: 1, "never": 1}


def test_the_numbers_of_a_short_run_are_not_its_past() -> None:
    """The window is a twentieth of the run, between 20,000 and 100,000 tokens: after 400,000 tokens at FVU 1 and half
    as many at FVU 0.25, it is 0.25 and not the 0.43 that a window of 100,000 tokens has."""
    assert [half_life_tokens(tokens) for tokens in (0, 400_000, 1_000_000, 9_000_000)] == [2e4, 2e4, 5e4, 1e5]
    statistics = Statistics(1, torch.zeros(1))
    x = torch.tensor([[1.0], [-1.0]]).repeat(5000, 1)
    for batch in range(60):
        statistics.update(x, torch.zeros_like(x) if batch < 40 else 0.5 * x, nothing_fired(len(x), 1))

    assert statistics.summary().fvu == pytest.approx(0.25, abs=0.01)


def test_a_latent_that_was_silent_for_long_has_not_fired_in_the_window() -> None:
    """One firing, ten half-lives ago, is a thousandth of one by now: too little to count, and no bin of its own."""
    statistics = Statistics(2, torch.zeros(1))
    statistics.update(torch.zeros(1, 1), torch.zeros(1, 1), largest(torch.tensor([[1.0, -1.0]]), 1))
    assert statistics.density()[-1] == 1
    rows = 10 * HALF_LIFE_TOKENS
    statistics.tokens = 20 * HALF_LIFE_TOKENS  # a run so old that the half-life is the longest
    statistics.update(torch.zeros(rows, 1), torch.zeros(rows, 1), nothing_fired(rows, 2))

    assert float(statistics.firings[0]) == pytest.approx(2**-10)
    assert statistics.density()[-1] == 2 and sum(statistics.density()) == 2


def test_the_decoder_gradient_is_tangent_to_its_unit_rows() -> None:
    """After projection no row's gradient has a component along the row."""
    torch.manual_seed(0)
    W, grad = torch.randn(6, 4), torch.randn(6, 4)
    normalise_rows(W)
    Adam({"W_dec": W}, OptimizerSettings()).step({"W_dec": grad}, 0.0)

    torch.testing.assert_close((grad * W).sum(1), torch.zeros(6), atol=1e-6, rtol=0)


def test_clipping_scales_the_whole_gradient() -> None:
    """A gradient of norm 10 is stepped as one of norm 1; the norm reported is the true one."""
    parameters = {"W_dec": torch.zeros(1, 2), "b_dec": torch.zeros(2)}
    optimizer = Adam(parameters, OptimizerSettings(betas=[0.0, 0.0], eps=1.0, clip=1.0))
    norm = optimizer.step({"W_dec": torch.zeros(1, 2), "b_dec": torch.tensor([6.0, 8.0])}, 1.0)

    assert norm == pytest.approx(10.0)
    # Adam without memory steps −g / (|g| + 1), here with g = (0.6, 0.8).
    torch.testing.assert_close(parameters["b_dec"], torch.tensor([-0.6 / 1.6, -0.8 / 1.8]))


def test_clipping_leaves_a_small_gradient_as_it_is() -> None:
    """A gradient of norm 0.5 is under the bound of 1: it is not scaled up to it."""
    parameters = {"b_dec": torch.zeros(2)}
    optimizer = Adam(parameters, OptimizerSettings(betas=[0.0, 0.0], eps=1.0, clip=1.0))
    norm = optimizer.step({"b_dec": torch.tensor([0.3, 0.4])}, 1.0)

    assert norm == pytest.approx(0.5)
    torch.testing.assert_close(parameters["b_dec"], torch.tensor([-0.3 / 1.3, -0.4 / 1.4]))


def test_a_parameter_that_does_not_learn_is_left_alone() -> None:
    """Gradients of others are passed over, in the update and in the norm."""
    parameters = {"scale": torch.ones(2)}
    optimizer = Adam(parameters, OptimizerSettings(learning_rate=0.1))
    norm = optimizer.step({"scale": torch.tensor([3.0, 4.0]), "W_dec": torch.full((2, 2), 100.0)}, 0.1)

    assert norm == pytest.approx(5.0)
    assert parameters["scale"].tolist() != [1.0, 1.0]


def test_forgetting_zeroes_the_moments_of_some_latents_only() -> None:
    """And of parameters that belong to a latent only."""
    parameters = {"W_dec": torch.zeros(3, 2), "b_enc": torch.zeros(3), "b_dec": torch.zeros(3)}
    optimizer = Adam(parameters, OptimizerSettings(), unit_decoder=False)
    optimizer.step({name: torch.ones_like(value) for name, value in parameters.items()}, 0.1)
    before = deepcopy(optimizer.state())
    optimizer.reset_latents(torch.tensor([1]))
    state = optimizer.state()

    for moment in ("exp_avg", "exp_avg_sq"):
        after, earlier = state.moments[moment], before.moments[moment]
        assert not after["W_dec"][1].any() and after["b_enc"][1] == 0
        assert torch.equal(after["W_dec"][[0, 2]], earlier["W_dec"][[0, 2]])
        assert torch.equal(after["b_dec"], earlier["b_dec"])


# Steps


@pytest.mark.parametrize("kind", FAMILY)
def test_bug_39_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(kind: str) -> None:
    """One NaN activation costs its step, not the run, and the count says so; the next step is as good as ever."""
    sae_trainer = train_sae(settings_of(kind, ema_tokens=64), steps=2)
    before = {name: value.clone() for name, value in sae_trainer.state()[1].by_key().items()}
    rows = rows_of(sae_trainer.settings, 64, 50)
    rows["a"][3, 2] = math.nan
    sae_trainer.step(rows)
    after = {name: value.clone() for name, value in sae_trainer.state()[1].by_key().items()}
    sae_trainer.step(rows_of(sae_trainer.settings, 64, 51))

    assert sae_trainer.skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert math.isfinite(sae_trainer.report(UNSCALED).grad_norm)
    assert sae_trainer.tokens == 4 * 64


@pytest.mark.parametrize("kind", FAMILY)
def test_bug_12_decoder_rows_have_unit_norm_after_every_step(kind: str) -> None:
    """Adam's update leaves the sphere; what anyone can see does not. Where norms are free they are used."""
    sae_trainer = sae_trainer_of(settings_of(kind), learning_rate=0.1)
    sae_trainer.initialise(rows_of(sae_trainer.settings, 512, 0), UNSCALED)
    for step in range(4):
        sae_trainer.step(rows_of(sae_trainer.settings, 64, step))
        norms = sae_trainer.sae.W_dec.norm(dim=1)

        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6) == sae_trainer.sae.unit_decoder


@pytest.mark.parametrize("kind", FAMILY)
def test_every_sae_learns(kind: str) -> None:
    """The reconstruction loss falls on activations nothing was trained on."""
    few, many = train_sae(settings_of(kind), steps=1), train_sae(settings_of(kind), steps=60)
    rows = rows_of(few.settings, 512, 999)

    def unexplained(sae_trainer: SaeTrainer) -> float:
        x, y = sae_trainer.inputs_and_targets(rows)
        nobody = torch.zeros(sae_trainer.settings.d_sae, dtype=torch.bool)
        return float(sae_trainer.sae.gradients(x, y, nobody).loss["reconstruction"])

    assert unexplained(many) < 0.8 * unexplained(few)


@pytest.mark.parametrize("kind", FAMILY)
def test_products_see_the_weights_of_this_moment(kind: str) -> None:
    """Copies in bfloat16 follow every change: the optimizer's, which writes both, and those that torch makes."""
    settings = settings_of(kind)
    sae_trainer = sae_trainer_of(settings, dtype=torch.bfloat16)
    sae_trainer.initialise(rows_of(settings, 64, 0), UNSCALED)
    for seed in (1, 2):
        sae_trainer.step(rows_of(settings, 32, seed))
        for name in ("W_enc", "W_dec"):
            assert torch.equal(sae_trainer.sae.operand(name), getattr(sae_trainer.sae, name).bfloat16())
    sae_trainer.sae.W_dec[1] += 1.0

    assert torch.equal(sae_trainer.sae.operand("W_dec"), sae_trainer.sae.W_dec.bfloat16())


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated"])
def test_a_large_mean_changes_nothing(kind: str) -> None:
    """The same activations, thirty standard deviations away: b_dec takes the mean, all else is learned as before."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    rows = (torch.rand(40_000, 32) * (torch.rand(40_000, 32) < 0.1)) @ directions
    fvu = []
    for offset in (0.0, 30.0):
        x = rows + offset * rows.std()
        scale = scale_of(x)
        sae_trainer = SaeTrainer(
            settings_of(kind, d_sae=64, dead_tokens=10_000), OptimizerSettings(learning_rate=3e-3, warmup_tokens=2000),
            SaeHooks(("a",), ("a",)), {"a": 16}, torch.device("cpu"), torch.float32,
        )  # fmt: skip
        sae_trainer.initialise({"a": x[:8192] * scale}, {"a": scale})
        for batch in x.split(256):
            sae_trainer.step({"a": batch * scale})
        fvu.append(sae_trainer.statistics.summary().fvu)

    assert fvu[1] == pytest.approx(fvu[0], rel=0.1)


def test_an_sae_may_have_any_name() -> None:
    """Its tensors in a checkpoint cannot be taken for others, such as the ledger's."""
    settings = SaeSettings.of(name="ledger", architecture="topk", d_sae=16, k=2)
    sae_trainer = SaeTrainer(
        settings, OptimizerSettings(), SaeHooks(("a",), ("a",)), {"a": 4}, torch.device("cpu"), torch.float32
    )
    tensors = CheckpointTensors({"ledger": sae_trainer.state()[1]}, shards={}, buffer_names=None)

    assert all(key.startswith("sae/ledger/") for key in encode_tensors(tensors))


def test_bug_10_each_sae_counts_its_own_rows() -> None:
    """Every token once, whatever the size of the batches, and however late it joined."""
    settings = settings_of("topk")
    sae_trainer = SaeTrainer(
        settings,
        OptimizerSettings(),
        SaeHooks(("a",), ("a",)),
        {"a": 12},
        torch.device("cpu"),
        torch.float32,
        joined_at=5000,
    )
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    learn(sae_trainer, [rows_of(settings, count, 1) for count in (64, 10, 1)])

    assert (sae_trainer.tokens, sae_trainer.statistics.tokens, sae_trainer.schedule.joined_at) == (75, 75, 5000)


# Resuming

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema_tokens": 200},
    "own budget": {"tokens": 700},
    "last resort": {"revive_tokens": 96, "reinitialise_tokens": 128},
}


def resumable() -> list[tuple[str, str, dict[str, Any]]]:
    """Every architecture with whatever of these it may have."""
    cases = []
    for kind in FAMILY:
        extras = dict(EXTRAS)
        if "coder" not in kind and kind not in ("repair", "matching_pursuit"):
            extras["whitening"] = {"whitening": True, "ema_tokens": 200}
        if kind in ("tied", "repair", "matching_pursuit"):
            del extras["last resort"]
        if kind in ("relu l1", "gated", "relu l1_norm"):
            extras["resampling"] = {"revive": "resample", "revive_tokens": 96}
        if "sparsity_weight" in FAMILY[kind]:
            extras["penalty's warm-up"] = {"sparsity_warmup_tokens": 600}
        cases += [(kind, extra, options) for extra, options in extras.items()]
    return cases


@pytest.mark.parametrize(("kind", "extra", "options"), resumable(), ids=lambda value: str(value).replace("{}", ""))
def test_bug_11_a_restored_sae_trainer_goes_on_bit_for_bit(kind: str, extra: str, options: dict[str, Any]) -> None:
    """Weights, moments, dead counters, averages, schedules: resuming in the middle equals not stopping."""
    settings = settings_of(kind, **options)
    batches = [rows_of(settings, 64, seed) for seed in range(1, 9)]

    def fresh() -> SaeTrainer:
        return sae_trainer_of(settings, warmup_tokens=128, run_tokens=1024)

    whole = fresh()
    whole.initialise(rows_of(settings, 512, 0), UNSCALED)
    # Latents that nothing wakes: they die, and are worked on before and after the interruption.
    whole.sae.b_enc[:4] = -50.0
    learn(whole, batches[:4])
    document, tensors = deepcopy(whole.state())
    learn(whole, batches[4:])
    resumed = fresh()
    resumed.restore(document, tensors)
    learn(resumed, batches[4:])

    our_state, their_state = resumed.state()[0], whole.state()[0]
    assert our_state == their_state
    ours, theirs = resumed.state()[1].by_key(), whole.state()[1].by_key()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert repr(resumed.report(UNSCALED)) == repr(whole.report(UNSCALED))
    assert resumed.statistics.tokens == whole.statistics.tokens == 512
    assert (resumed.ema_sae is None) == (whole.ema_sae is None) == (settings.ema_tokens is None)
    if resumed.ema_sae is not None and whole.ema_sae is not None:
        for name, value in whole.ema_sae.parameters.items():
            assert torch.equal(resumed.ema_sae.parameters[name], value)


def test_counts_survive_a_restart() -> None:
    """Tokens learned from, steps that were skipped, and when it joined: a counter never falls."""
    settings = settings_of("topk")
    before, after = train_sae(settings, steps=2), sae_trainer_of(settings)
    before.skipped_steps, before.schedule.joined_at = 3, 4096
    after.restore(*before.state())

    assert (after.tokens, after.schedule.joined_at, after.report(UNSCALED).skipped_steps) == (128, 4096, 3)


def test_an_interrupted_cooldown_goes_on() -> None:
    """One an operator asked for: the rate falls on, and ends where it would have."""
    settings = settings_of("topk")
    whole = train_sae(settings, steps=10)
    whole.cool_down()
    learn(whole, [rows_of(settings, 64, 20)])
    document, tensors = whole.state()
    resumed = sae_trainer_of(settings)
    resumed.restore(document, deepcopy(tensors))
    learn(resumed, [rows_of(settings, 64, 21)])

    # Ten batches seen, two to go: the second of them begins at half of the way.
    assert resumed.learning_rate == pytest.approx(1e-2 * 0.5)
    assert resumed.phase is SaePhase.FINISHED


@pytest.mark.parametrize(("before", "after"), [(None, 200), (200, None), (200, 400)])
def test_an_average_may_be_asked_for_or_given_up_when_a_run_is_resumed(before: int | None, after: int | None) -> None:
    """A new one begins with the weights as they are; one that nobody wants any more is dropped."""
    whole = train_sae(settings_of("topk", ema_tokens=before), steps=4)
    document, tensors = whole.state()
    resumed = sae_trainer_of(settings_of("topk", ema_tokens=after))
    resumed.restore(document, deepcopy(tensors))
    averaged = resumed.ema_sae
    learn(resumed, [rows_of(resumed.settings, 64, 9)])

    assert (averaged is None) == (after is None)
    if averaged is not None:
        expected = (whole.ema_sae or whole.sae).parameters
        assert all(torch.equal(value, expected[name]) for name, value in averaged.parameters.items())


HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp_out"]


def family_run(directory: Path) -> Run:
    """One SAE of every kind on a stream of two hooks."""
    roles: dict[str, dict[str, Any]] = {
        "transcoder": {"hook": HOOKS[0], "target": HOOKS[1]}, "crosscoder": {"hooks": HOOKS}, "": {"hook": HOOKS[0]}
    }  # fmt: skip
    saes = []
    for kind, options in FAMILY.items():
        role = next(role for name, role in roles.items() if kind.endswith(name))
        if kind != "repair":  # it needs files to begin from
            fields = {"name": kind.replace(" ", "-"), "d_sae": 32, "ema_tokens": 100, "revive_tokens": 64}
            saes.append(SaeSettings.of(**(options | role | fields)))
    settings = TrainerSettings(
        run=RunSettings(directory=str(directory), tokens=2000, threads=1),
        model=ModelSettings(name="m", hooks=HOOKS),
        buffer=BufferSettings(rows=256),
        optimizer=OptimizerSettings(batch=64, matmul="float32", learning_rate=1e-2, warmup_tokens=100),
        sae=saes,
    )
    hello = Hello(
        producer="p", session="s", name="n", fingerprint="f", shards=4, held_out=0.0, context=8, dtype="float32",
        hooks=[Hook(name=HOOKS[0], module="a", width=7), Hook(name=HOOKS[1], module="b", width=5)],
        chunk_rows=8, norm_bounds=None, provenance={},
    )  # fmt: skip
    return Run(settings, hello)


def batch_of(seed: int) -> Batch:
    torch.manual_seed(seed)
    names = np.zeros(64, np.int64)
    return Batch([torch.randn(64, 7) + 1, 5 * torch.randn(64, 5)], names, names)


def test_bug_11_a_run_of_every_architecture_resumes_from_disk_bit_for_bit(tmp_path: Path) -> None:
    """Through a checkpoint's files: everything every SAE has, as if it had never stopped."""
    whole = family_run(tmp_path)
    whole.initialise(batch_of(0).x)
    for seed in range(1, 5):
        whole.train_step(batch_of(seed))
    save(tmp_path, checkpoint_of(whole), keep=1)
    for seed in range(5, 9):
        whole.train_step(batch_of(seed))
    resumed, saved = family_run(tmp_path), load_newest(tmp_path)
    assert saved is not None
    resumed.restore(saved.document.run, saved.tensors.saes)
    for seed in range(5, 9):
        resumed.train_step(batch_of(seed))

    assert resumed.state()[0] == whole.state()[0]
    ours, theirs = by_key(resumed.state()[1]), by_key(whole.state()[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Schedules


def test_the_warm_up_counts_tokens() -> None:
    """Linear from the first token to the hundredth, then full; without one, full at once."""
    assert [warmup_factor(tokens, 100) for tokens in (0, 49, 99, 10**9)] == [0.01, 0.5, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


def test_a_cooldown_falls_linearly_to_zero() -> None:
    """Full until its start, half in the middle, zero at the end and after."""
    cooldown = Cooldown(800, 1000)

    assert [cooldown.factor(tokens) for tokens in (0, 800, 900, 950, 1000, 2000)] == [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]


def test_the_cooldown_of_a_budget() -> None:
    """The last fifth of whichever ends first: the SAE's own tokens, or the run's, counted from when it joined."""

    def planned(tokens: int | None, run_tokens: int | None, joined_at: int = 0) -> Cooldown | None:
        settings = settings_of("topk") if tokens is None else settings_of("topk", tokens=tokens)
        sae_trainer = sae_trainer_of(settings, run_tokens=run_tokens)
        sae_trainer.schedule.joined_at = joined_at
        return sae_trainer.schedule.cooldown

    assert planned(None, None) is None
    assert planned(1000, None) == Cooldown(800, 1000)
    assert planned(None, 1000) == Cooldown(800, 1000)
    assert planned(1000, 500) == Cooldown(400, 500)
    assert planned(None, 1000, joined_at=500) == Cooldown(400, 500)


def test_no_cooldown_at_all() -> None:
    """optimizer.cooldown = 0: the rate stays to the last token."""
    settings = settings_of("topk", tokens=1000)

    assert sae_trainer_of(settings, cooldown=0.0, run_tokens=1000).schedule.cooldown is None


def test_an_sae_with_a_budget_cools_down_and_is_finished() -> None:
    """640 tokens: full for 512, then 1 and a half of the last two batches; then it learns no more."""
    settings = settings_of("topk", tokens=640)
    sae_trainer = train_sae(settings, steps=7)
    rates = []
    for seed in range(3):
        assert sae_trainer.phase is not SaePhase.FINISHED
        learn(sae_trainer, [rows_of(settings, 64, seed)])
        rates.append(sae_trainer.learning_rate)

    assert rates == pytest.approx([1e-2, 1e-2, 0.5e-2])
    assert sae_trainer.phase is SaePhase.FINISHED


def test_an_operator_asks_for_a_cooldown() -> None:
    """Over a fifth of the tokens seen, from now on; asking twice changes nothing; then it is finished."""
    settings = settings_of("topk")
    sae_trainer = train_sae(settings, steps=10)
    first = sae_trainer.cool_down()
    learn(sae_trainer, [rows_of(settings, 64, 20)])
    again = sae_trainer.cool_down()
    learn(sae_trainer, [rows_of(settings, 64, 21)])

    assert (first, again) == (128, 64)
    assert sae_trainer.learning_rate == pytest.approx(0.5e-2)
    assert sae_trainer.phase is SaePhase.FINISHED


def test_an_sae_without_an_end_is_never_finished() -> None:
    """The end of the run is the run's own business."""
    sae_trainer = train_sae(settings_of("topk"), steps=3)

    assert sae_trainer.schedule.cooldown is None
    assert sae_trainer.phase is not SaePhase.FINISHED


@pytest.mark.parametrize(("kind", "part"), [("relu l1", "sparsity"), ("jumprelu", "sparsity"), ("gated", "sparsity")])
def test_the_penalty_warms_up(kind: str, part: str) -> None:
    """With 640 tokens of warm-up the first batch pays a 640th, the sixth (320 + 1) of 640 parts."""
    plain, warming = train_sae(settings_of(kind), 0), train_sae(settings_of(kind, sparsity_warmup_tokens=640), 0)
    rows = [rows_of(plain.settings, 64, 1)]
    paid = []
    for sae_trainer in (plain, warming):
        learn(sae_trainer, rows)
        paid.append(sae_trainer.report(UNSCALED).loss[part])
    warming.tokens = 320
    full = train_sae(settings_of(kind), 0)
    full.sae.parameters = {name: value.clone() for name, value in warming.sae.parameters.items()}
    learn(full, rows)
    learn(warming, rows)

    assert paid[1] == pytest.approx(paid[0] / 640, rel=1e-4)
    assert warming.report(UNSCALED).loss[part] == pytest.approx(full.report(UNSCALED).loss[part] * 321 / 640, rel=1e-4)


# Averages


def test_the_average_is_a_plain_mean_at_first() -> None:
    """While fewer tokens were seen than it spans, every step weighs the same."""
    settings = settings_of("topk", ema_tokens=10**9)
    sae_trainer = train_sae(settings, steps=0)
    weights: list[Tensor] = []
    for seed in range(4):
        learn(sae_trainer, [rows_of(settings, 64, seed)])
        weights.append(sae_trainer.sae.parameters["W_enc"].clone())
    averaged = sae_trainer.ema_sae

    assert averaged is not None
    torch.testing.assert_close(averaged.parameters["W_enc"], torch.stack(weights).mean(0))


def test_the_average_forgets_exponentially() -> None:
    """Over 640 tokens, a batch of 64 weighs 1 − exp(−1/10) once the plain mean would weigh less."""
    settings = settings_of("topk", ema_tokens=640)
    sae_trainer = train_sae(settings, steps=30)
    assert sae_trainer.ema_sae is not None
    before = sae_trainer.ema_sae.parameters["W_enc"]
    learn(sae_trainer, [rows_of(settings, 64, 99)])
    weight = 1 - math.exp(-0.1)
    expected = (1 - weight) * before + weight * sae_trainer.sae.parameters["W_enc"]

    assert sae_trainer.ema_sae is not None
    torch.testing.assert_close(sae_trainer.ema_sae.parameters["W_enc"], expected)


def test_reading_the_average_does_not_touch_training() -> None:
    """It is an SAE of its own, with tensors of its own; without ema_tokens there is none."""
    sae_trainer = train_sae(settings_of("topk", ema_tokens=640), steps=3)
    averaged, again = sae_trainer.ema_sae, sae_trainer.ema_sae
    assert averaged is not None and again is not None
    averaged.parameters["W_enc"].zero_()

    assert again.parameters["W_enc"].any()
    assert sae_trainer.sae.parameters["W_enc"].any()
    assert train_sae(settings_of("topk"), steps=1).ema_sae is None


# Starting anew


def dying(revive: str, **options: Any) -> SaeTrainer:
    """A ReLU SAE whose latents 0 … 3 nothing wakes."""
    settings = settings_of("relu l1", revive=revive, **options)
    sae_trainer = sae_trainer_of(settings)
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    sae_trainer.sae.b_enc[:4] = -50.0
    return sae_trainer


def test_bug_25_resampling_changes_the_weights_and_forgets_their_moments() -> None:
    """Every two spans of 128 tokens: at 256, and not before, silent latents move and begin without a history."""
    sae_trainer = dying("resample", revive_tokens=128)
    before = {name: value.clone() for name, value in sae_trainer.sae.parameters.items()}
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(3)])
    untouched = torch.equal(sae_trainer.sae.W_enc[:4], before["W_enc"][:4])
    adam = sae_trainer.optimizer.state()
    for name in ("W_enc", "W_dec", "b_enc"):
        for moment in adam.moments.values():
            moment[name][:4] = 1.0  # as of latents that have lived before
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, 3)])
    others = sae_trainer.sae.W_enc[4:].norm(dim=1).mean()

    assert untouched
    assert (sae_trainer.sae.W_enc[:4] != before["W_enc"][:4]).any(1).all()
    assert sae_trainer.sae.b_enc[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(sae_trainer.sae.W_enc[:4].norm(dim=1), (0.2 * others).expand(4))
    for name in ("W_enc", "W_dec", "b_enc"):
        for moment in adam.moments.values():
            assert not moment[name][:4].any()
            assert moment[name][4:].any()
    assert sae_trainer.statistics.tokens_since_fired[:4].tolist() == [0] * 4


def test_the_average_begins_anew_with_the_latents() -> None:
    """What they were before is no part of what is published of them; the others are averaged on."""
    sae_trainer = dying("resample", revive_tokens=128, ema_tokens=10**9)
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(4)])

    assert sae_trainer.ema_sae is not None
    for name in ("W_enc", "W_dec", "b_enc"):
        now, mean = sae_trainer.sae.parameters[name], sae_trainer.ema_sae.parameters[name]
        assert torch.equal(mean[:4], now[:4]) and not torch.equal(mean[4:], now[4:])


def test_resampled_latents_point_at_rows_of_the_batch_with_a_large_loss() -> None:
    """One activation is far from everything: the first latent to move reads and writes its direction."""
    sae_trainer = dying("resample", revive_tokens=128)
    sae_trainer.sae.b_enc[1:4] = 5.0  # only latent 0 is dead
    rows = rows_of(sae_trainer.settings, 64, 9)["a"]
    rows[17] = 0.0
    rows[17, 5] = 40.0
    sae_trainer.tokens, sae_trainer.statistics.tokens_since_fired[0] = 192, 192
    sae_trainer.step({"a": rows})
    expected_direction = rows[17] - sae_trainer.sae.b_dec

    torch.testing.assert_close(sae_trainer.sae.W_dec[0], expected_direction / expected_direction.norm())
    torch.testing.assert_close(
        sae_trainer.sae.W_enc[0] / sae_trainer.sae.W_enc[0].norm(), expected_direction / expected_direction.norm()
    )


def test_resampling_leaves_living_latents_alone() -> None:
    """With nobody silent, the step at which it is due is a step like others."""
    batches = [rows_of(settings_of("relu l1"), 64, seed) for seed in range(4)]
    resampling, plain = (
        sae_trainer_of(settings_of("relu l1", revive=revive, revive_tokens=128)) for revive in ("resample", "none")
    )
    for sae_trainer in (resampling, plain):
        sae_trainer.initialise(rows_of(sae_trainer.settings, 512, 0), UNSCALED)
        sae_trainer.sae.b_enc.fill_(1.0)
        learn(sae_trainer, batches)

    assert torch.equal(resampling.sae.W_enc, plain.sae.W_enc)


def test_the_last_resort_is_for_what_nothing_else_reaches() -> None:
    """Silent for 192 tokens and below zero on the whole batch: anew. Silent, but above zero somewhere: not."""
    settings = settings_of("jumprelu", revive_tokens=64, reinitialise_tokens=192, learning_rate=1e-9)
    sae_trainer = sae_trainer_of(settings)
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    sae_trainer.sae.b_enc[0] = -50.0
    sae_trainer.sae.parameters["threshold"][1] = 50.0  # above zero, below its threshold: the pre-act loss reaches it
    before, last = sae_trainer.sae.W_enc.clone(), rows_of(settings, 64, 2)
    learn(sae_trainer, [rows_of(settings, 64, seed) for seed in range(2)])
    waited = bool((sae_trainer.sae.W_enc[0] - before[0]).norm() < 1e-3)
    learn(sae_trainer, [last])

    assert waited
    assert (sae_trainer.sae.W_enc[0] - before[0]).norm() > 0.1
    assert (sae_trainer.sae.W_enc[1] - before[1]).norm() < 1e-3
    assert sae_trainer.sae.pre_acts(last["a"], torch.tensor([0])).amax() > sae_trainer.sae.parameters["threshold"][0]
    assert sae_trainer.statistics.tokens_since_fired[:2].tolist() == [0, 192]


def test_more_dead_latents_than_rows() -> None:
    """As many move as there are activations to point at; the others wait for the next time."""
    sae_trainer = dying("resample", revive_tokens=4)
    sae_trainer.sae.b_enc.fill_(-50.0)
    learn(sae_trainer, [rows_of(sae_trainer.settings, 4, seed) for seed in range(2)])

    assert (sae_trainer.sae.b_enc == 0).sum() == 4


def test_what_started_anew_lives() -> None:
    """A few steps later the latents that were moved fire and have left their first weights."""
    sae_trainer = dying("resample", revive_tokens=128)
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(6)])

    assert (sae_trainer.statistics.tokens_since_fired[:4] < 128).all()


def test_nothing_starts_anew_in_the_cooldown() -> None:
    """With the rate on its way to zero it would never learn, and the last snapshot would hold it half born."""
    sae_trainer = dying("resample", revive_tokens=64, reinitialise_tokens=128, tokens=640)
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(7)])
    sae_trainer.sae.b_enc[:4] = -50.0
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(3)])

    assert sae_trainer.phase is SaePhase.FINISHED
    assert (sae_trainer.sae.b_enc[:4] < -49).all()
