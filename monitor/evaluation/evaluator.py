"""How much of the language model's skill an SAE keeps: the model reads x_hat where it would read x, on held-out text.

    ce_delta      CE_sae − CE_clean, nats per token. The primary number ("delta LM loss", Gemma Scope, 2408.05147).
    ce_recovered  (CE_zero − CE_sae) / (CE_zero − CE_clean), against **zero** ablation (Gated SAEs, 2404.16014; SAELens'
                  ce_loss_score). A residual stream of zeros is so bad that 0.99 may still hide a large ce_delta: never
                  read it alone.
    ce_recovered_mean_ablation  the same with every row replaced by the mean of all rows; 0 is what a constant gives.
    kl            KL(P_clean ‖ P_sae), mean over predicted positions, nats per token.
    fvu           Σ‖y − y_hat‖² / Σ‖y − mean(y)‖² over the held-out rows, mean and sums over all of them, in float64
                  (1 − SAELens' explained_variance).
    cosine        of y and y_hat, not about their means, mean over rows (SAELens' cossim).
    norm_ratio    ‖y_hat‖ / ‖y‖, mean over rows (SAELens' l2_ratio). Below 1 it need not be shrinkage: the best linear
                  estimate of a noisy y is shorter than y.
    shrinkage     Σ‖y_hat − mean(y)‖² / Σ(y − mean(y))·(y_hat − mean(y)), as in training: 1 is unbiased, less is
                  suppressed (γ of Gated SAEs, 2404.16014 §4, which leaves the mean in, as SAELens'
                  relative_reconstruction_bias does).
    l0            mean number of latents other than zero on a row.
    density       latents by log10 of the share of rows on which they fire: by DENSITY_EDGES' bins, then the silent.
    dense_latents latents that fire on more than a tenth of the rows (the bound of JumpReLU SAEs, 2407.14435).
    dead_latents  latents that fire on no row. As many rows as are held out are few: rare latents are among them.

An SAE *reads* hooks and *writes* hooks. An autoencoder writes what it reads. A transcoder (2406.11944) reads one hook
and writes another that the model computes later; y, what is compared with it, and what is ablated are the other's. A
crosscoder reads and writes several: all are replaced in one pass, all set to zero in another and to their means in a
third. Its fvu and shrinkage weigh each hook by its mean square, as its training does, its cosine and norm_ratio are
means over hooks, and fvu_by_hook tells them apart.

What an SAE reads and should give are the rows of the clean pass: with one hook those are the rows that the pass with
its reconstruction has there, and with several no reconstruction answers to the errors of an earlier one.

Only rows such as the SAE was trained on are replaced (or ablated): BOS, special tokens, padding and rows that the
stream drops because their norm at any of its hooks is beyond that hook's frozen bound stay as the model made them.
Cross-entropy is counted wherever a real token follows a real token, replaced or not, so ce_clean is the model's plain
loss on this text. CE and KL are taken from logits in float32.

Always over the same rows (`held_out`), so that the numbers of snapshots compare. The text is read once: a pass
of the clean model and one with each SAE's reconstruction. What does not depend on the SAE is measured with the first,
the mean rows before it. Nothing is kept but sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from monitor.evaluation.held_out import EvaluationError
from monitor.evaluation.passes import (
    DEFAULT_MEMORY,
    Act,
    MemoryLimits,
    NormBounds,
    Rows,
    in_stream,
    passes,
    recording,
    refuse_unknown_bounds,
    splicing,
)
from monitor.evaluation.results import Evaluation, Value
from producer.corpus.windows import Windows
from producer.lm.model import LanguageModel
from trainer.report import DENSITY_EDGES
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import InferenceSae
from trainer.snapshot import finite, read_sae

DENSE = 0.1
"""Share of rows from which on a latent is a dense one."""

Bounds = tuple[tuple[str, float], ...]
Ablation = tuple[Literal["zero", "mean"], tuple[str, ...], Bounds]
"""What the rows of these hooks, within these norm bounds, are replaced by."""


@dataclass(frozen=True)
class Subject:
    """One SAE to be measured."""

    name: str
    sae: InferenceSae

    @property
    def hooks(self) -> SaeHooks:
        """The hooks it reads and writes."""
        return self.sae.hooks


@dataclass
class Baseline:
    """What does not depend on the SAE, once measured."""

    means: dict[Bounds, dict[str, Tensor]] = field(default_factory=dict)
    """By norm bounds and hook: the mean of the hook's rows, float64 [width]."""
    ce: dict[Ablation, float] = field(default_factory=dict)


def load_subject(folder: Path, device: torch.device) -> Subject:
    """The SAE of one folder, on the language model's device. Raises SnapshotError when there is none."""
    cfg, weights = read_sae(folder)
    sae = InferenceSae(cfg, {name: torch.from_numpy(array).float().to(device) for name, array in weights.items()})
    return Subject(folder.name, sae)


def evaluate(
    model: LanguageModel,
    windows: Windows,
    subjects: Sequence[Subject],
    baseline: Baseline,
    norm_bounds: NormBounds | None = None,
    between: Callable[[], None] = lambda: None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> dict[str, Evaluation]:
    """All `subjects` over one pass of the clean model. `between` is called after each forward pass and may raise.

    Values that are not finite, and ratios without a denominator, are None. Raises EvaluationError for a subject that
    does not fit the model (`misfit`), a bound of a hook that is not here, or bounds that no row is within.
    """
    bounds = dict(norm_bounds or {})
    hooks = [hook.name for hook in model.hooks]
    refuse_unknown_bounds(hooks, bounds)
    for subject in subjects:
        if reason := misfit(model, subject):
            raise EvaluationError(reason)
    within = tuple(sorted(bounds.items()))
    if within not in baseline.means:
        baseline.means[within] = _mean_rows(model, windows, bounds, between, memory)
    means = baseline.means[within]
    clean = _Mean()
    tallies = {subject.name: _Tally(subject, means) for subject in subjects}
    ablations: set[Ablation] = {(put, subject.hooks.writes, within) for subject in subjects for put in ("zero", "mean")}
    ablated = {ablation: _Mean() for ablation in sorted(ablations) if ablation not in baseline.ce}
    for tokens, kept, predicted in passes(model, windows, memory):
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
        for (put, ablated_hooks, _), ce in ablated.items():
            constant = {hook: means[hook] if put == "mean" else torch.zeros_like(means[hook]) for hook in ablated_hooks}
            ce.add(_cross_entropy(forward(splicing(streamed, constant)), following))
        for subject in subjects:
            tally = tallies[subject.name]
            log_sae = forward(splicing(streamed, _reconstruct(subject, rows, tally, memory)))
            tally.ce.add(_cross_entropy(log_sae, following))
            tally.kl.add((log_clean.exp() * (log_clean - log_sae)).sum(-1))
    if windows.kept.any() and not all(tally.rows for tally in tallies.values()):
        # Nothing was replaced: a ce_delta of 0 would look like a perfect SAE.
        told = ", ".join(f"{bound:.3g} at {hook}" for hook, bound in within)
        raise EvaluationError(
            f"none of the {int(windows.kept.sum()):,} held-out rows is in the stream, which drops norms beyond {told}; "
            "give the monitor the model, hooks and text that the producers have"
        )
    baseline.ce |= {ablation: ce.value for ablation, ce in ablated.items()}
    return {
        subject.name: _result(
            subject,
            clean,
            baseline.ce["zero", subject.hooks.writes, within],
            baseline.ce["mean", subject.hooks.writes, within],
            tallies[subject.name],
        )
        for subject in subjects
    }


def _mean_rows(
    model: LanguageModel, windows: Windows, bounds: NormBounds, between: Callable[[], None], memory: MemoryLimits
) -> dict[str, Tensor]:
    """By hook, the mean of its rows in float64; NaN where there are none."""
    hooks = [hook.name for hook in model.hooks]
    sums = {hook.name: torch.zeros(hook.width, dtype=torch.float64, device=model.device) for hook in model.hooks}
    count = 0
    for tokens, kept, _ in passes(model, windows, memory):
        seen = dict(zip(hooks, model.activations(tokens), strict=True))
        streamed = in_stream(seen, kept, bounds)
        for hook, x in seen.items():
            sums[hook] += x[streamed].double().sum(0)
        count += int(streamed.sum())
        between()
    return {hook: total / count for hook, total in sums.items()}


def _result(subject: Subject, clean: _Mean, ce_zero: float, ce_mean: float, tally: _Tally) -> Evaluation:
    ce_clean, ce_sae = clean.value, tally.ce.value
    numbers = {
        "ce_clean": ce_clean,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_mean_ablation": ce_mean,
        "ce_delta": ce_sae - ce_clean,
        "ce_recovered": _recovered(ce_zero, ce_sae, ce_clean),
        "ce_recovered_mean_ablation": _recovered(ce_mean, ce_sae, ce_clean),
        "kl": tally.kl.value,
        **tally.fit(),
        "l0": int(tally.firings.sum()) / tally.rows if tally.rows else None,
    }
    values: dict[str, Value] = {name: finite(value) for name, value in numbers.items()}
    if len(subject.hooks.writes) > 1:
        values["fvu_by_hook"] = {hook: finite(fit.fvu) for hook, fit in tally.fits.items()}
    values["dense_latents"] = int((tally.firings > DENSE * tally.rows).sum())
    values["dead_latents"] = int((tally.firings == 0).sum())
    return Evaluation(
        values=values,
        hooks=subject.hooks,
        density=tuple(tally.density()),
        rows=tally.rows,
        predictions=clean.count,
    )


def _recovered(ce_ablated: float, ce_sae: float, ce_clean: float) -> float | None:
    lost = ce_ablated - ce_clean
    return (ce_ablated - ce_sae) / lost if lost else None


# --- What is summed up -----------------------------------------------------------------------------------------------


def _reconstruct(subject: Subject, rows: Rows, tally: _Tally, memory: MemoryLimits) -> Rows:
    """What the SAE makes of the rows it reads, by the hooks it writes; `tally` compares it with what is there."""
    sae = subject.sae
    x = torch.cat([rows[hook] for hook in subject.hooks.reads], 1)
    parts = []
    for piece in x.split(memory.batch(sae.W_enc.shape[1])):
        latents = sae.encode(piece)
        parts.append(sae.decode(latents, piece))
        tally.firings += (latents != 0).sum(0)
    tally.rows += len(x)
    widths = [rows[hook].shape[1] for hook in subject.hooks.writes]
    y_hat = dict(zip(subject.hooks.writes, torch.cat(parts).split(widths, 1), strict=True))
    for hook, found in y_hat.items():
        tally.fits[hook].add(rows[hook], found)
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
    """How well y_hat fits y [rows, width] at one hook, in float64 over rows that arrive in parts; `mean` is y's."""

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean
        self.error = self.variance = self.spread = self.covariance = 0.0
        """Sums of ‖y − y_hat‖², and about the mean of ‖y‖², ‖y_hat‖² and y·y_hat"""
        self.cosine, self.norm_ratio = _Mean(), _Mean()
        self._square = 0.0

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        y, y_hat = y.double(), y_hat.double()
        self.error += float((y - y_hat).square().sum())
        self.cosine.add(torch.cosine_similarity(y, y_hat, dim=1))
        self.norm_ratio.add(y_hat.norm(dim=1) / y.norm(dim=1))
        self._square += float(y.square().sum())
        y, y_hat = y - self._mean, y_hat - self._mean
        self.variance += float(y.square().sum())
        self.spread += float(y_hat.square().sum())
        self.covariance += float((y * y_hat).sum())

    @property
    def fvu(self) -> float | None:
        return self.error / self.variance if self.variance > 0 else None

    @property
    def weight(self) -> float:
        """1 over the mean square of an element of y, up to a factor that all hooks share."""
        return len(self._mean) / self._square if self._square else 0.0


class _Tally:
    """What is summed up of one SAE."""

    def __init__(self, subject: Subject, means: Mapping[str, Tensor]) -> None:
        self.ce, self.kl = _Mean(), _Mean()
        self.rows = 0
        self.firings = torch.zeros(subject.sae.W_enc.shape[1], dtype=torch.int64, device=subject.sae.W_enc.device)
        self.fits = {hook: _Fit(means[hook]) for hook in subject.hooks.writes}
        """By the hooks it writes."""

    def fit(self) -> dict[str, float | None]:
        """Over all hooks; sums of squares in the scale in which an element of a hook's rows has a mean square of 1."""
        fits = self.fits.values()
        error, variance, spread, covariance = (
            sum(getattr(fit, name) * fit.weight for fit in fits)
            for name in ("error", "variance", "spread", "covariance")
        )
        return {
            "fvu": error / variance if variance > 0 else None,
            "cosine": sum(fit.cosine.value for fit in fits) / len(fits),
            "norm_ratio": sum(fit.norm_ratio.value for fit in fits) / len(fits),
            "shrinkage": spread / covariance if covariance > 0 else None,
        }

    def density(self) -> list[int]:
        """Latents per bin of DENSITY_EDGES by log10 of the share of rows on which they fire, then the silent ones."""
        fired = self.firings > 0
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64, device=fired.device)
        bins = torch.bucketize((self.firings[fired].double() / max(1, self.rows)).log10(), edges)
        return [*torch.bincount(bins, minlength=len(DENSITY_EDGES)).tolist(), int((~fired).sum())]


# --- What fits the model ---------------------------------------------------------------------------------------------


def misfit(model: LanguageModel, subject: Subject) -> str | None:
    """Why this SAE cannot be spliced into the model; None when it can."""
    widths = {hook.name: hook.width for hook in model.hooks}
    for verb, hooks, numbers in (
        ("reads", subject.hooks.reads, subject.sae.W_enc.shape[0]),
        ("writes", subject.hooks.writes, subject.sae.W_dec.shape[1]),
    ):
        if not set(hooks) <= widths.keys() or sum(widths[hook] for hook in hooks) != numbers:
            known = ", ".join(f"{name} ({width})" for name, width in widths.items())
            return (
                f"sae {subject.name!r} {verb} {numbers} numbers at {', '.join(map(repr, hooks))}; the model's hooks "
                f"are {known}: the run file's [model] is not the one of this snapshot"
            )
    if not subject.hooks.is_transcoder:
        return None
    order = _in_order(model)
    (written,), last = subject.hooks.writes, max(subject.hooks.reads, key=order.index)
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
