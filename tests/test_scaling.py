"""Scaling laws: planted exponents are found again, and what cannot be fitted is refused with a reason."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small_grid import KS, PLANTED, SIZES, planted_loss, write_run
from trainer.scaling.cells import GridError, read_grid
from trainer.scaling.fit import main
from trainer.scaling.fitting import fit_grid
from trainer.scaling.law import FitError, Law, fit_law
from trainer.scaling.report import ScalingReport
from trainer.scaling.tokens import fit_tokens

pytest.importorskip("scipy", reason="the extra scaling is not installed")


def planted(noise: float = 0.0, seed: int = 0) -> tuple[list[int], list[int], list[float]]:
    """Sizes, sparsities and losses of a 4 × 4 grid, with relative errors of this standard deviation."""
    n, k = zip(*product(SIZES, KS), strict=True)
    errors = np.random.default_rng(seed).normal(0.0, noise, len(n))
    losses = [planted_loss(*cell) * math.exp(error) for *cell, error in zip(n, k, errors, strict=True)]
    return list(n), list(k), losses


def values(law: Law) -> dict[str, float]:
    return {parameter.name: parameter.value for parameter in law.best.parameters}


# The law


def test_planted_exponents_are_found_exactly_without_noise() -> None:
    law = fit_law(*planted())

    assert values(law) == pytest.approx(PLANTED, abs=1e-6)
    assert law.left_out == law.unclear == ()
    assert law.predict(16_384, 32).loss == pytest.approx(planted_loss(16_384, 32), rel=1e-6)
    assert law.floor(32) == pytest.approx(math.exp(-3.3 - 0.28 * math.log(32)), rel=1e-6)


def test_planted_exponents_are_within_their_errors() -> None:
    """With relative errors of 0.02 %, intervals at 95 % hold the truth in nine of ten grids or more, and are narrow."""
    laws = [fit_law(*planted(2e-4, seed)) for seed in range(20)]
    parameters = [parameter for law in laws for parameter in law.best.parameters]
    errors = {parameter.name: parameter.standard_error for parameter in laws[0].best.parameters}

    assert all(law.left_out == () for law in laws)
    assert np.mean([one.low < PLANTED[one.name] < one.high for one in parameters]) > 0.9
    assert errors["beta_n"] < 0.002 and errors["gamma"] < 5e-4 and errors["zeta"] < 0.1


def test_twice_the_largest_size_is_predicted_within_the_interval() -> None:
    """With relative errors of 0.5 % the forms disagree; intervals hold the truth in 85 % of predictions or more."""
    laws = [fit_law(*planted(5e-3, seed)) for seed in range(20)]
    predictions = [(law.predict(4096, k), planted_loss(4096, k)) for law in laws for k in KS]

    assert np.mean([one.low < truth < one.high for one, truth in predictions]) > 0.85
    assert all(one.loss == pytest.approx(truth, rel=0.03) for one, truth in predictions)


def test_a_floor_that_is_not_there_is_not_found() -> None:
    """Losses of a plain power law: ζ and η are left out, since they explain nothing."""
    n, k, _ = planted()
    errors = np.random.default_rng(2).normal(0.0, 5e-3, len(n))
    losses = [2.0 * nn**-0.3 * kk**-0.2 * math.exp(e) for nn, kk, e in zip(n, k, errors, strict=True)]
    law = fit_law(n, k, losses)

    assert set(law.left_out) >= {"zeta", "eta"}
    assert law.floor(8) is None
    assert values(law)["beta_n"] + values(law).get("gamma", 0.0) * math.log(22) == pytest.approx(-0.3, abs=0.02)


def test_one_k_has_the_law_of_sizes_alone() -> None:
    law = fit_law([64, 128, 256, 512, 1024, 2048], [8] * 6, [0.1 + n**-0.5 for n in (64, 128, 256, 512, 1024, 2048)])

    assert values(law) == pytest.approx({"alpha": 0.0, "beta_n": -0.5, "zeta": math.log(0.1)}, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "k", "losses", "sentence"),
    [
        ([64, 128] * 4, [4, 4, 8, 8] * 2, [0.1] * 8, "2 different d_sae; the law needs at least 3"),
        ([64, 128, 256], [8, 8, 8], [0.3, 0.2, 0.1], "3 SAEs; the law needs at least 4"),
        ([64, 128, 256, 512], [8, 16, 8, 16], [0.4, 0.3, 0.2, 0.1], "4 SAEs; the law needs at least 5"),
        ([64, 128, 256, 512], [8] * 4, [0.4, math.nan, 0.2, 0.1], "a loss is not a number above 0"),
        ([64, 128, 256, 512], [8] * 4, [0.4, 0.0, 0.2, 0.1], "a loss is not a number above 0"),
    ],
)
def test_losses_that_cannot_be_fitted_are_refused(n: Any, k: Any, losses: Any, sentence: str) -> None:
    with pytest.raises(FitError, match=sentence):
        fit_law(n, k, losses)


def test_an_sae_is_converged_when_more_tokens_would_not_help() -> None:
    """Of two losses by tokens, with exponent −0.5: one is almost at its floor, one is not."""
    tokens = list(range(10_000, 1_000_001, 10_000))
    flat = fit_tokens(tokens, [0.2 + 5 * t**-0.5 for t in tokens])
    steep = fit_tokens(tokens, [0.02 + 200 * t**-0.5 for t in tokens])

    assert flat is not None and steep is not None
    assert flat.exponent == pytest.approx(-0.5, abs=0.02) and flat.floor == pytest.approx(0.2, rel=0.02)
    assert flat.gain == pytest.approx(1 - (0.2 + 5 / 2e6**0.5) / 0.205, abs=1e-3)
    assert flat.is_converged and not steep.is_converged
    assert fit_tokens(tokens[:5], [0.2] * 5) is None, "too few reports"


# The command


def read_report(directory: Path) -> ScalingReport:
    return ScalingReport.from_json(json.loads((directory / "scaling.json").read_text()))


def test_the_losses_are_those_on_held_out_text(tmp_path: Path) -> None:
    """Where nothing was evaluated they are those of training, and a note says so."""
    evaluated, training = write_run(tmp_path / "a"), write_run(tmp_path / "b", evaluated=False)

    assert read_grid(evaluated).measured == "held-out"
    assert {cell.loss for cell in read_grid(evaluated).cells} == {planted_loss(*cell) for cell in product(SIZES, KS)}
    assert read_grid(training).measured == "training"
    assert "no SAE was evaluated on held-out text" in fit_grid(read_grid(training)).notes[0]


def test_curves_are_of_the_constant_rate(tmp_path: Path) -> None:
    assert [tokens for tokens, _ in read_grid(write_run(tmp_path)).cells[0].curve] == [*range(20_000, 800_001, 20_000)]


def test_a_held_out_size_is_predicted_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path, (*SIZES, 8192))

    assert main([str(directory), "--hold-out", "8192"]) == 0
    shown = capsys.readouterr().out
    report = read_report(directory)

    assert [(one.d_sae, one.k) for one in report.predictions] == [(8192, k) for k in KS]
    assert all(one.error == pytest.approx(0, abs=1e-5) for one in report.predictions)
    assert [cell.is_held_out for cell in report.cells] == [False] * 16 + [True] * 4
    assert {cell.tokens and cell.tokens.is_converged for cell in report.cells} == {False}
    assert "Not converged: all SAEs" in report.notes[0]
    assert "β_n" in shown and "topk-8192-64*" in shown


def test_the_next_size_is_predicted_without_being_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)

    assert [one["d_sae"] for one in document["predictions"]] == [4096] * 4
    assert [one["d_sae"] for one in document["backtest"]] == [2048] * 4
    report = read_report(tmp_path)
    assert json.loads(json.dumps(report.as_json())) == document


@pytest.mark.parametrize(
    ("options", "arguments", "sentence"),
    [
        ({"finished": False}, [], "has not ended: its SAEs have no cooldown behind them. Wait for its end, or fit"),
        ({"sizes": (256,)}, [], "there is no grid: all SAEs with the settings of topk-256-8 have the same d_sae"),
        ({"sizes": (256, 512)}, [], "cannot be fitted: 2 different d_sae; the law needs at least 3"),
        ({}, ["--hold-out", "1024", "2048"], "without those held out cannot be fitted: 2 different d_sae"),
        ({}, ["--hold-out", "99"], "--hold-out 99: the grid has no SAE of that size; its d_sae are 256, 512"),
        ({}, ["--sae", "nope-*"], "no SAE is named 'nope-*'; there are topk-256-8"),
        ({}, ["--snapshot", "000000000001"], "no snapshot '000000000001'"),
    ],
)
def test_a_run_without_a_grid_to_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Any, arguments: list[str], sentence: str
) -> None:
    assert main([str(write_run(tmp_path, **options)), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="holds no settings"):
        read_grid(tmp_path)
    (tmp_path / "settings.toml").write_text("")
    with pytest.raises(GridError, match="has published no snapshot yet"):
        read_grid(tmp_path)


def test_a_snapshot_of_a_run_that_goes_on_can_be_fitted(tmp_path: Path) -> None:
    assert read_grid(write_run(tmp_path, finished=False), "000001000000").tokens == 1_000_000


def test_cells_that_joined_late_or_are_missing_are_left_out_by_name(tmp_path: Path) -> None:
    present = tuple(f"topk-{n}-{k}" for n, k in product(SIZES, KS) if (n, k) != (256, 8))
    grid = read_grid(write_run(tmp_path, late="topk-512-8", names=present))

    assert len(grid.cells) == 14
    assert [(one.name, one.reason) for one in grid.omissions] == [
        ("topk-256-8", "is not in snapshot 000001000000"),
        ("topk-512-8", "has trained on 400,000 tokens, the others on 1,000,000"),
    ]


def test_a_grid_that_is_half_evaluated_is_refused(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    (directory / "snapshots/000001000000/topk-256-8/evaluation.json").unlink()

    with pytest.raises(GridError, match="not yet evaluated: topk-256-8"):
        read_grid(directory)
