"""CONTRACT: what `python -m trainer fit` found, as scaling.json in the run directory. Light: no scipy, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trainer.state.durable import replace_text

FILE = "scaling.json"
FORMAT = 1
EQUATION = "L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)"
SYMBOLS = {"alpha": "α", "beta_k": "β_k", "beta_n": "β_n", "gamma": "γ", "zeta": "ζ", "eta": "η"}
"""Parameters as the equation has them, by their name."""


@dataclass(frozen=True)
class TokenFit:
    """The law of one SAE's loss by tokens: L(T) = exp(α + β ln T) + exp(ζ)."""

    exponent: float
    """β."""
    standard_error: float
    floor: float | None
    """exp(ζ); None where the losses show none."""
    gain: float
    """The share by which twice the tokens would lower the loss, at a constant learning rate."""
    is_converged: bool


@dataclass(frozen=True)
class CellFit:
    """One SAE of the grid beside the law."""

    name: str
    d_sae: int
    k: int
    loss: float
    fitted: float
    is_held_out: bool
    """The law was fitted without it."""
    tokens: TokenFit | None
    """None where too little was reported at a constant learning rate."""

    @property
    def error(self) -> float:
        """The law's loss against the measured one, as a share of that."""
        return self.fitted / self.loss - 1


@dataclass(frozen=True)
class ParameterFit:
    """One parameter of the law."""

    name: str
    value: float
    standard_error: float
    low: float
    """As `high`: of the interval at 95 %."""
    high: float
    is_clear: bool
    """The interval excludes zero; of ζ, the floor is known within a factor of four."""


@dataclass(frozen=True)
class FormSummary:
    """One form of the law, and how well it fits."""

    parameters: tuple[str, ...]
    rms: float
    """Spread of the fitted losses about it, as a share of the loss."""
    aicc: float
    weight: float
    """Akaike's, in the mean that predicts."""


@dataclass(frozen=True)
class PredictedLoss:
    """The loss that the law predicts for an SAE."""

    d_sae: int
    k: int
    loss: float
    low: float
    """As `high`: of the interval at 95 % for the loss of one SAE, the law taken for true."""
    high: float
    measured: float | None
    """The loss of the SAE that was trained and held out; None where there is none."""

    @property
    def error(self) -> float | None:
        """The prediction against the measured loss, as a share of that."""
        return None if self.measured is None else self.loss / self.measured - 1


@dataclass(frozen=True)
class LawCurve:
    """The law's line of one k."""

    k: int
    d_sae: tuple[float, ...]
    loss: tuple[float, ...]
    floor: float | None
    """What no number of latents goes below; None where the data show none."""


@dataclass(frozen=True)
class ScalingReport:
    """A fitted grid; the names of the fields are the keys of scaling.json, beside `format`."""

    snapshot: str
    tokens: int
    architecture: str
    measured: str
    """Where the losses are from: "held-out" or "training"."""
    rms: float
    """Spread of the fitted losses about the law, as a share of the loss."""
    parameters: tuple[ParameterFit, ...]
    left_out: tuple[str, ...]
    """Parameters of the whole law that these losses do not identify."""
    forms: tuple[FormSummary, ...]
    cells: tuple[CellFit, ...]
    predictions: tuple[PredictedLoss, ...]
    backtest: tuple[PredictedLoss, ...]
    """The largest size, predicted from the smaller ones alone; empty where these are too few."""
    curves: tuple[LawCurve, ...]
    notes: tuple[str, ...]
    """Sentences on what was left out and what these numbers do not say."""

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ScalingReport:
        """The reverse of `as_json`. Raises ValueError for anything else."""
        if document.get("format") != FORMAT:
            raise ValueError(f"format {document.get('format')}; this version reads {FORMAT}")
        fields = {key: value for key, value in document.items() if key != "format"}
        return TypeAdapter(cls).validate_python(fields)


def write_report(directory: Path, report: ScalingReport) -> None:
    """Writes scaling.json, whole or not at all."""
    replace_text(directory / FILE, json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
