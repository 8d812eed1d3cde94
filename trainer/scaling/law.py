"""The law of loss by latents and sparsity: its fit to a grid, with uncertainties. Knows only arrays.

    L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)

Gao et al. 2024 (arXiv 2406.04093), section 3.1.4, equation 2; L is the squared error as a fraction of that of the mean.
They give α = −0.50, β_k = 0.26, β_n = −0.017, γ = −0.042, ζ = −1.32, η = −0.085 for GPT-4. The second term is what no
number of latents removes (section 3.1.3). The law holds for k far below the width of the activations.

Losses of a grid may not identify all of it. The law and those without some of its terms are fitted, and weighed by
Akaike's information criterion, corrected for few losses (Burnham and Anderson 2002, Model Selection and Multimodel
Inference, sections 2.4 and 4.3). Parameters are those of the form with the largest weight; predictions are means over
all forms, with an error for what the forms disagree about. Residuals are of ln L, that is relative errors. Standard
errors are those of linearised least squares, intervals are Student's t at 95 %, the form taken for true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_SIZES = 3
"""Different numbers of latents without which no curve can be told from a line."""
CONFIDENCE = 0.95
FLOOR_SHARES = (0.05, 0.4, 0.7, 0.9)
"""Shares of the least loss that the floor begins with; the best of the fits is taken."""


class FitError(ValueError):
    """These losses cannot be fitted. The message says what is missing."""


@dataclass(frozen=True)
class Form:
    """Which parameters a law has."""

    power: tuple[str, ...]
    """Those of the first term."""
    floor: tuple[str, ...]
    """Those of the second term."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.power, *self.floor)


FORMS = (
    Form(("alpha", "beta_k", "beta_n", "gamma"), ("zeta", "eta")),
    Form(("alpha", "beta_k", "beta_n", "gamma"), ("zeta",)),
    Form(("alpha", "beta_k", "beta_n", "gamma"), ()),
    Form(("alpha", "beta_k", "beta_n"), ("zeta", "eta")),
    Form(("alpha", "beta_k", "beta_n"), ("zeta",)),
    Form(("alpha", "beta_k", "beta_n"), ()),
)
"""Laws of a grid of several k, the whole one first."""
FORMS_OF_ONE_K = (Form(("alpha", "beta_n"), ("zeta",)), Form(("alpha", "beta_n"), ()))
"""Laws of one k: section 3.1.3."""


@dataclass(frozen=True)
class LawParameter:
    """One parameter of a law."""

    name: str
    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """The loss that the law predicts for an SAE, with the interval in which one SAE's loss is expected."""

    d_sae: int
    k: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class FormFit:
    """One form of the law, fitted."""

    form: Form
    parameters: tuple[LawParameter, ...]
    rms: float
    """Root mean square of relative errors, per degree of freedom."""
    degrees: int
    """Degrees of freedom: losses less parameters."""
    aicc: float
    covariance: tuple[tuple[float, ...], ...]
    """Of the parameters, in their order."""

    def predict(self, n: float, k: float) -> tuple[float, float]:
        """(ln L, variance of the ln L of one SAE)."""
        values = np.array([parameter.value for parameter in self.parameters])
        log_loss, gradient = _evaluate(self.form, values, np.array([n]), np.array([k]))
        return float(log_loss[0]), float(gradient[0] @ np.array(self.covariance) @ gradient[0]) + self.rms**2

    def value(self, name: str) -> float | None:
        """A parameter; None where this form has not got it."""
        return next((parameter.value for parameter in self.parameters if parameter.name == name), None)


@dataclass(frozen=True)
class Law:
    """A law fitted to losses."""

    fits: tuple[FormFit, ...]
    """By weight, the largest first."""
    weights: tuple[float, ...]
    """Akaike's; their sum is 1."""
    whole: Form
    """The form with all parameters that such losses could have."""

    @property
    def best(self) -> FormFit:
        return self.fits[0]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parameters of the whole law that these losses do not identify."""
        return tuple(name for name in self.whole.names if name not in self.best.form.names)

    @property
    def unclear(self) -> tuple[str, ...]:
        """Parameters whose interval includes zero, or a floor whose interval spans more than a factor of four."""
        return tuple(parameter.name for parameter in self.best.parameters if _is_unclear(parameter))

    def predict(self, d_sae: int, k: int) -> Prediction:
        """The loss of an SAE of this size and sparsity."""
        each = [fit.predict(float(d_sae), float(k)) for fit in self.fits]
        mean = sum(weight * log_loss for weight, (log_loss, _) in zip(self.weights, each, strict=True))
        error = sum(
            weight * math.sqrt(variance + (log_loss - mean) ** 2)
            for weight, (log_loss, variance) in zip(self.weights, each, strict=True)
        )
        half = _student(self.best.degrees) * error
        return Prediction(d_sae, k, math.exp(mean), math.exp(mean - half), math.exp(mean + half))

    def floor(self, k: int) -> float | None:
        """The loss that no number of latents goes below; None where the data show none."""
        if (zeta := self.best.value("zeta")) is None:
            return None
        return math.exp(zeta + (self.best.value("eta") or 0.0) * math.log(k))


def fit_law(d_sae: Sequence[int], k: Sequence[int], losses: Sequence[float]) -> Law:
    """Fits the law to the losses of SAEs with these sizes and sparsities. Raises FitError."""
    n, ks, loss = (np.asarray(values, dtype=np.float64) for values in (d_sae, k, losses))
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise FitError("a loss is not a number above 0")
    if (sizes := len(set(n))) < LEAST_SIZES:
        raise FitError(f"{sizes} different d_sae; the law needs at least {LEAST_SIZES}")
    forms = FORMS if len(set(ks)) > 1 else FORMS_OF_ONE_K
    possible = [form for form in forms if len(loss) > len(form.names) + 1]
    if not possible:
        raise FitError(f"{len(loss)} SAEs; the law needs at least {min(len(form.names) for form in forms) + 2}")
    fits = sorted((_fit_form(form, n, ks, loss) for form in possible), key=lambda fit: fit.aicc)
    relative = [math.exp(-(fit.aicc - fits[0].aicc) / 2) for fit in fits]
    return Law(tuple(fits), tuple(one / sum(relative) for one in relative), forms[0])


def _is_unclear(parameter: LawParameter) -> bool:
    if parameter.name == "alpha":
        return False  # its sign means nothing
    if parameter.name == "zeta":
        return parameter.high - parameter.low > math.log(4)
    return parameter.low <= 0 <= parameter.high


def _fit_form(form: Form, n: Array, k: Array, loss: Array) -> FormFit:
    """Fits one form. Logarithms are taken about their means, where the parameters are nearly independent."""
    from scipy.optimize import least_squares

    n_mean, k_mean, log_loss = float(np.log(n).mean()), float(np.log(k).mean()), np.log(loss)
    centred_n, centred_k = n / math.exp(n_mean), k / math.exp(k_mean)

    def residuals(values: Array) -> Array:
        return _evaluate(form, values, centred_n, centred_k)[0] - log_loss

    def jacobian(values: Array) -> Array:
        return _evaluate(form, values, centred_n, centred_k)[1]

    starts = _starts(form, centred_n, centred_k, loss)
    results = [least_squares(residuals, start, jacobian, method="lm") for start in starts]
    best = min(results, key=lambda result: result.cost)
    count, parameters = len(loss), len(form.names)
    squares = 2.0 * best.cost
    variance = squares / (count - parameters)
    covariance = variance * np.linalg.pinv(best.jac.T @ best.jac)
    shift = _uncentre(form, n_mean, k_mean)
    values, covariance = shift @ best.x, shift @ covariance @ shift.T
    half = _student(count - parameters) * np.sqrt(np.diag(covariance))
    return FormFit(
        form=form,
        parameters=tuple(
            LawParameter(name, float(value), float(error), float(value - width), float(value + width))
            for name, value, error, width in zip(form.names, values, np.sqrt(np.diag(covariance)), half, strict=True)
        ),
        rms=math.sqrt(variance),
        degrees=count - parameters,
        aicc=_aicc(squares, count, parameters + 1),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
    )


def _evaluate(form: Form, values: Array, n: Array, k: Array) -> tuple[Array, Array]:
    """(ln L [cells], its derivatives [cells, parameters])."""
    log_n, log_k, ones = np.log(n), np.log(k), np.ones_like(n)
    terms = {"alpha": ones, "beta_k": log_k, "beta_n": log_n, "gamma": log_k * log_n, "zeta": ones, "eta": log_k}
    power = np.stack([terms[name] for name in form.power], axis=1)
    log_power = power @ values[: len(form.power)]
    if not form.floor:
        return log_power, power
    floor = np.stack([terms[name] for name in form.floor], axis=1)
    log_floor = floor @ values[len(form.power) :]
    log_loss = np.logaddexp(log_power, log_floor)
    gradient = np.concatenate(
        [power * np.exp(log_power - log_loss)[:, None], floor * np.exp(log_floor - log_loss)[:, None]], axis=1
    )
    return log_loss, gradient


def _starts(form: Form, n: Array, k: Array, loss: Array) -> list[Array]:
    """Parameters to begin with: a floor of some share of the least loss, and the power law of what is above it."""
    starts = []
    for share in FLOOR_SHARES if form.floor else (0.0,):
        floor = share * float(loss.min())
        power = _evaluate(Form(form.power, ()), np.zeros(len(form.power)), n, k)[1]
        above = np.linalg.lstsq(power, np.log(loss - floor), rcond=None)[0]
        starts.append(np.concatenate([above, [math.log(floor), 0.0][: len(form.floor)]] if form.floor else [above]))
    return starts


def _uncentre(form: Form, n_mean: float, k_mean: float) -> Array:
    """The linear map from parameters of logarithms about their means to those of plain logarithms."""
    terms = {
        "alpha": {"alpha": 1.0, "beta_k": -k_mean, "beta_n": -n_mean, "gamma": n_mean * k_mean},
        "beta_k": {"beta_k": 1.0, "gamma": -n_mean},
        "beta_n": {"beta_n": 1.0, "gamma": -k_mean},
        "gamma": {"gamma": 1.0},
        "zeta": {"zeta": 1.0, "eta": -k_mean},
        "eta": {"eta": 1.0},
    }
    return np.array([[terms[name].get(other, 0.0) for other in form.names] for name in form.names])


def _aicc(squares: float, count: int, parameters: int) -> float:
    """Akaike's criterion of least squares, corrected for few observations; `parameters` includes the variance."""
    if count <= parameters + 1:
        return math.inf
    aic = count * math.log(max(squares, 1e-300) / count) + 2 * parameters
    return aic + 2 * parameters * (parameters + 1) / (count - parameters - 1)


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees))
