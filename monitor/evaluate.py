"""How much of the language model's skill an SAE keeps: the model reads x_hat where it would read x, on held-out text.

    ce_delta      CE_sae − CE_clean, nats per token. The primary number ("delta LM loss", Gemma Scope, 2408.05147).
    ce_recovered  (CE_zero − CE_sae) / (CE_zero − CE_clean), against **zero** ablation (Gated SAEs, 2404.16014). A
                  residual stream of zeros is so bad that 0.99 may still hide a large ce_delta: never read it alone.
    kl            KL(P_clean ‖ P_sae), mean over predicted positions, nats per token.
    fvu           Σ‖y − y_hat‖² / Σ‖y − mean(y)‖² over the held-out rows, mean and sums over all of them, in float64.
    l0            mean number of latents other than zero on a row.

An SAE *reads* hooks and *writes* hooks. An autoencoder writes what it reads. A transcoder (2406.11944) reads one hook
and writes another that the model computes later; y, its FVU and its zero ablation are the other's. A crosscoder reads
and writes several: all are replaced in one pass and all set to zero in another; its fvu weighs each hook by its mean
square, as its training does, and fvu_by_hook tells them apart.

What an SAE reads and should give are the rows of the clean pass: with one hook those are the rows that the pass with
its reconstruction has there, and with several no reconstruction answers to the errors of an earlier one.

Only rows such as the SAE was trained on are replaced (or set to zero): BOS, special tokens, padding and rows that the
stream drops because their norm at any of its hooks is beyond that hook's frozen bound stay as the model made them.
Cross-entropy is counted wherever a real token follows a real token, replaced or not, so ce_clean is the model's plain
loss on this text. CE and KL are taken from logits in float32.

Always over the same rows (`monitor.held_out`), so that the numbers of snapshots compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monitor.held_out import EvaluationError
from monitor.passes import (
    Act,
    NormBounds,
    Rows,
    in_stream,
    passes,
    recording,
    refuse_unknown_bounds,
    splicing,
)
from producer.activations import LanguageModel
from producer.tokens import Windows
from trainer.saes.inference import InferenceSae
from trainer.snapshot import finite, read_sae

LATENTS_IN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Subject:
    """One SAE to be measured, and the hooks it reads and writes, in the order of its input and output."""

    name: str
    sae: InferenceSae
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass
class Baseline:
    """What does not depend on the SAE, once measured: CE with the rows of hooks set to zero."""

    ce_zero: dict[tuple[tuple[str, ...], tuple[tuple[str, float], ...]], float] = field(default_factory=dict)
    """By (hooks, norm bounds)."""


def evaluate_sae(
    model: LanguageModel, windows: Windows, sae_folder: Path, norm_bounds: NormBounds | None = None
) -> dict[str, Any]:
    """The numbers above for the SAE in one folder of a snapshot, and ce_clean, ce_sae, ce_zero, rows, predictions.

    Values that are not finite, and ratios without a denominator, are None. Raises SnapshotError for a folder that
    holds no SAE, EvaluationError for one that does not fit the model's hooks.
    """
    subject = load_subject(sae_folder, model.device)
    return evaluate(model, windows, [subject], Baseline(), norm_bounds)[subject.name]


def load_subject(folder: Path, device: torch.device) -> Subject:
    """The SAE of one folder, on the language model's device. Raises SnapshotError when there is none."""
    cfg, weights = read_sae(folder)
    sae = InferenceSae(cfg, {name: torch.from_numpy(array).float().to(device) for name, array in weights.items()})
    reads = tuple(sae.hooks)
    return Subject(folder.name, sae, reads, reads if sae.target is None else (sae.target,))


def evaluate(
    model: LanguageModel,
    windows: Windows,
    subjects: Sequence[Subject],
    baseline: Baseline,
    norm_bounds: NormBounds | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """All `subjects` over one pass of the clean model. `between` is called after each forward pass and may raise.

    Raises EvaluationError when `misfit` has something to say about a subject, or a bound is of a hook not here.
    """
    bounds = dict(norm_bounds or {})
    hooks = [hook.name for hook in model.hooks]
    refuse_unknown_bounds(hooks, bounds)
    for subject in subjects:
        if reason := misfit(model, subject):
            raise EvaluationError(reason)
    clean = _Mean()
    tallies = {subject.name: _Tally() for subject in subjects}
    keys = {subject.name: (subject.writes, tuple(sorted(bounds.items()))) for subject in subjects}
    zero = {key: _Mean() for key in keys.values() if key not in baseline.ce_zero}
    for tokens, kept, predicted in passes(model, windows):
        following = tokens[:, 1:][predicted]

        def forward(replace: dict[str, Act], tokens: Tensor = tokens, predicted: Tensor = predicted) -> Tensor:
            logits = model.logits(tokens, replace)[:, :-1][predicted]
            between()
            return torch.log_softmax(logits.float(), -1)

        seen: dict[str, Tensor] = {}
        log_clean = forward(recording(hooks, seen))
        clean.add(_cross_entropy(log_clean, following))
        streamed = in_stream(seen, kept, bounds)
        rows = {hook: x[streamed].float() for hook, x in seen.items()}
        for key, mean in zero.items():
            nothing = {hook: torch.zeros_like(rows[hook]) for hook in key[0]}
            mean.add(_cross_entropy(forward(splicing(streamed, nothing)), following))
        for subject in subjects:
            tally = tallies[subject.name]
            log_sae = forward(splicing(streamed, _reconstruct(subject, rows, tally)))
            tally.ce.add(_cross_entropy(log_sae, following))
            tally.kl.add((log_clean.exp() * (log_clean - log_sae)).sum(-1))
    baseline.ce_zero |= {key: mean.value for key, mean in zero.items()}
    return {
        subject.name: _result(subject, clean, baseline.ce_zero[keys[subject.name]], tallies[subject.name])
        for subject in subjects
    }


def _result(subject: Subject, clean: _Mean, ce_zero: float, tally: _Tally) -> dict[str, Any]:
    ce_clean, ce_sae = clean.value, tally.ce.value
    lost = ce_zero - ce_clean
    numbers = {
        "ce_clean": ce_clean,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_delta": ce_sae - ce_clean,
        "ce_recovered": (ce_zero - ce_sae) / lost if lost else None,
        "kl": tally.kl.value,
        "fvu": tally.fvu,
        "l0": tally.active / tally.rows if tally.rows else None,
    }
    result: dict[str, Any] = {"hook": subject.reads[0]}
    if len(subject.reads) > 1:
        result["hooks"] = list(subject.reads)
    if subject.writes != subject.reads:
        result["target"] = subject.writes[0]
    result |= {name: finite(value) for name, value in numbers.items()}
    if len(subject.writes) > 1:
        result["fvu_by_hook"] = {hook: finite(fit.fvu) for hook, fit in tally.fits.items()}
    return result | {
        "ce_recovered_against": "zero ablation",
        "rows": tally.rows,
        "predictions": clean.count,
    }


# --- What is summed up -------------------------------------------------------------------------------------------------


def _reconstruct(subject: Subject, rows: Rows, tally: _Tally) -> Rows:
    """What the SAE makes of the rows it reads, by the hooks it writes; `tally` compares it with what is there."""
    sae = subject.sae
    x = torch.cat([rows[hook] for hook in subject.reads], 1)
    parts = []
    for piece in x.split(max(1, LATENTS_IN_MEMORY // sae.W_enc.shape[1])):
        latents = sae.encode(piece)
        parts.append(sae.decode(latents, piece))
        tally.active += int((latents != 0).sum())
    tally.rows += len(x)
    widths = [rows[hook].shape[1] for hook in subject.writes]
    y_hat = dict(zip(subject.writes, torch.cat(parts).split(widths, 1), strict=True))
    for hook, found in y_hat.items():
        tally.fits.setdefault(hook, _Fit()).add(rows[hook], found)
    return y_hat


def _cross_entropy(log_probabilities: Tensor, following: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, following[:, None]).squeeze(-1)


class _Mean:
    """A mean in float64 over values that arrive in parts."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.sum += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.sum / self.count if self.count else float("nan")


class _Fit:
    """How well y_hat fits y [rows, width] at one hook, in float64 over rows that arrive in parts."""

    def __init__(self) -> None:
        self.error = 0.0
        """Σ‖y − y_hat‖²"""
        self.weight = 0.0
        """1 over the mean square of an element of y, up to a factor that all hooks share."""
        self._square = 0.0
        self._rows = 0
        self._about_centre = 0.0
        self._centre: Tensor | None = None
        self._offset: Tensor = torch.zeros(())

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        if not len(y):
            return
        y, y_hat = y.double(), y_hat.double()
        if self._centre is None:
            # Sums about the first rows' mean: about zero, Σ‖y‖² and ‖Σy‖² would cancel, the mean being far larger
            # than the spread.
            self._centre = y.mean(0)
            self._offset = torch.zeros_like(self._centre)
        centred = y - self._centre
        self._offset += centred.sum(0)
        self._about_centre += float(centred.square().sum())
        self.error += float((y - y_hat).square().sum())
        self._square += float(y.square().sum())
        self.weight = y.shape[1] / self._square if self._square else 0.0
        self._rows += len(y)

    @property
    def variance(self) -> float:
        """Σ‖y − mean(y)‖²"""
        return self._about_centre - float(self._offset.square().sum()) / max(1, self._rows)

    @property
    def fvu(self) -> float | None:
        return self.error / self.variance if self.variance > 0 else None


class _Tally:
    """What is summed up of one SAE."""

    def __init__(self) -> None:
        self.ce, self.kl = _Mean(), _Mean()
        self.rows, self.active = 0, 0
        self.fits: dict[str, _Fit] = {}
        """By the hooks it writes."""

    @property
    def fvu(self) -> float | None:
        """Over all hooks, each in the scale in which an element of its rows has a mean square of 1."""
        variance = sum(fit.variance * fit.weight for fit in self.fits.values())
        return sum(fit.error * fit.weight for fit in self.fits.values()) / variance if variance > 0 else None


# --- What fits the model ---------------------------------------------------------------------------------------------


def misfit(model: LanguageModel, subject: Subject) -> str | None:
    """Why this SAE cannot be spliced into the model; None when it can."""
    widths = {hook.name: hook.width for hook in model.hooks}
    for verb, hooks, numbers in (
        ("reads", subject.reads, subject.sae.W_enc.shape[0]),
        ("writes", subject.writes, subject.sae.W_dec.shape[1]),
    ):
        if not set(hooks) <= widths.keys() or sum(widths[hook] for hook in hooks) != numbers:
            known = ", ".join(f"{name} ({width})" for name, width in widths.items())
            return (
                f"sae {subject.name!r} {verb} {numbers} numbers at {', '.join(map(repr, hooks))}; the model's hooks "
                f"are {known}: the run file's [model] is not the one of this snapshot"
            )
    if subject.writes == subject.reads:
        return None
    order = _in_order(model)
    (written,), last = subject.writes, max(subject.reads, key=order.index)
    if order.index(written) < order.index(last):
        return (
            f"sae {subject.name!r} reads {last!r}, which the model computes after {written!r}, the hook that the SAE "
            "writes: spliced in, it would read what it has changed itself. Its l0 and fvu in training stand"
        )
    return None


def _in_order(model: LanguageModel) -> list[str]:
    """The model's hooks as a pass computes them one after the other, seen in a pass over one token."""
    seen: dict[str, Tensor] = {}
    model.logits(torch.zeros(1, 1, dtype=torch.int64), recording([hook.name for hook in model.hooks], seen))
    return list(seen)
