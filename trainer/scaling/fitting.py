"""The cells of a grid → a report: the law of those that are not held out, what it predicts, and what it leaves open."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from trainer.scaling.cells import Cell, Grid, GridError
from trainer.scaling.law import LEAST_SIZES, FitError, Law, Prediction, fit_law
from trainer.scaling.report import CellFit, FormSummary, LawCurve, ParameterFit, PredictedLoss, ScalingReport
from trainer.scaling.tokens import CONVERGED_GAIN, fit_tokens

CURVE_POINTS = 40


def fit_grid(grid: Grid, hold_out: Collection[int] = (), predict: Collection[int] = ()) -> ScalingReport:
    """Fits the cells of other sizes than `hold_out`; predicts those, and the sizes `predict` or else the next one.

    Raises GridError where the cells do not suffice.
    """
    sizes = sorted({cell.d_sae for cell in grid.cells})
    if unknown := sorted(set(hold_out) - set(sizes)):
        listed = ", ".join(map(str, sizes))
        raise GridError(f"--hold-out {unknown[0]}: the grid has no SAE of that size; its d_sae are {listed}")
    fitted = [cell for cell in grid.cells if cell.d_sae not in hold_out]
    law = _fit(fitted, " without those held out" if hold_out else "")
    fitted_sizes = sorted({cell.d_sae for cell in fitted})
    ks = sorted({cell.k for cell in fitted})
    targets = sorted(set(predict) or ({_next_size(fitted_sizes)} if not hold_out else set()))
    held_out = [cell for cell in grid.cells if cell.d_sae in hold_out]
    fits = tuple(_cell_fit(cell, law, cell.d_sae in hold_out) for cell in grid.cells)
    predictions = (
        *(_predicted(law.predict(cell.d_sae, cell.k), cell.loss) for cell in held_out),
        *(_predicted(law.predict(size, k), None) for size in targets for k in ks),
    )
    largest = max([*sizes, *targets])
    return ScalingReport(
        snapshot=grid.snapshot,
        tokens=grid.tokens,
        architecture=grid.architecture,
        measured=grid.measured,
        rms=law.best.rms,
        parameters=tuple(
            ParameterFit(**vars(parameter), is_clear=parameter.name not in law.unclear)
            for parameter in law.best.parameters
        ),
        left_out=law.left_out,
        forms=tuple(
            FormSummary(fit.form.names, fit.rms, fit.aicc, weight)
            for fit, weight in zip(law.fits, law.weights, strict=True)
        ),
        cells=fits,
        predictions=predictions,
        backtest=tuple(_backtest(fitted, fitted_sizes)),
        curves=tuple(_curve(law, k, fitted_sizes[0], largest) for k in ks),
        notes=tuple(_notes(grid, fits)),
    )


def _fit(cells: list[Cell], which: str) -> Law:
    try:
        return fit_law([cell.d_sae for cell in cells], [cell.k for cell in cells], [cell.loss for cell in cells])
    except FitError as error:
        raise GridError(f"the grid{which} cannot be fitted: {error}") from None


def _next_size(sizes: list[int]) -> int:
    """The next size in the grid's own steps."""
    return round(sizes[-1] ** 2 / sizes[-2])


def _cell_fit(cell: Cell, law: Law, is_held_out: bool) -> CellFit:
    fit = fit_tokens([tokens for tokens, _ in cell.curve], [loss for _, loss in cell.curve])
    fitted = law.predict(cell.d_sae, cell.k).loss
    return CellFit(cell.name, cell.d_sae, cell.k, cell.loss, fitted, is_held_out, fit)


def _predicted(prediction: Prediction, measured: float | None) -> PredictedLoss:
    return PredictedLoss(**vars(prediction), measured=measured)


def _backtest(cells: list[Cell], sizes: list[int]) -> Iterator[PredictedLoss]:
    """The largest size, predicted from the smaller ones; nothing where these do not suffice."""
    smaller = [cell for cell in cells if cell.d_sae < sizes[-1]]
    if len(sizes) <= LEAST_SIZES:
        return
    try:
        law = _fit(smaller, "")
    except GridError:
        return
    for cell in cells:
        if cell.d_sae == sizes[-1]:
            yield _predicted(law.predict(cell.d_sae, cell.k), cell.loss)


def _curve(law: Law, k: int, first: int, last: int) -> LawCurve:
    sizes = np.geomspace(first, last, CURVE_POINTS)
    losses = tuple(law.predict(size, k).loss for size in sizes.round().astype(int).tolist())
    return LawCurve(k, tuple(map(float, sizes.round())), losses, law.floor(k))


def _notes(grid: Grid, cells: tuple[CellFit, ...]) -> Iterator[str]:
    for omission in grid.omissions:
        yield f"{omission.name} is left out: it {omission.reason}."
    if grid.measured == "training":
        yield (
            "The losses are of the last tokens of training: no SAE was evaluated on held-out text. The monitor "
            "measures them there."
        )
    unconverged = [cell.name for cell in cells if cell.tokens and not cell.tokens.is_converged]
    if unconverged:
        names = "all SAEs" if len(unconverged) == len(cells) else ", ".join(unconverged)
        yield (
            f"Not converged: {names}. Twice the tokens would lower their loss by more than {CONVERGED_GAIN:.0%}, so "
            f"that the law is one of {grid.tokens:,} tokens and not of what these sizes can reach."
        )
    if unknown := [cell.name for cell in cells if cell.tokens is None]:
        names = "any SAE" if len(unknown) == len(cells) else ", ".join(unknown)
        yield f"Whether {names} converged is unknown: too few reports at a constant learning rate."
