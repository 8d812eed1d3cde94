"""How much of the language model's skill an SAE keeps: the model reads x_hat where it would read x, on held-out text.

    ce_delta      CE_sae − CE_clean, nats per token. The primary number ("delta LM loss", Gemma Scope, 2408.05147).
    ce_recovered  (CE_zero − CE_sae) / (CE_zero − CE_clean), against **zero** ablation (Gated SAEs, 2404.16014; SAELens'
                  ce_loss_score). A residual stream of zeros is so bad that 0.99 may still hide a large ce_delta: never
                  read it alone.
    ce_recovered_mean_ablation  the same with every activation replaced by the mean of all; 0 is what a constant gives.
    kl            KL(P_clean ‖ P_sae), mean over predicted positions, nats per token.
    fvu           Σ‖y − y_hat‖² / Σ‖y − mean(y)‖², mean and sums over all held-out activations, in float64
                  (1 − SAELens' explained_variance).
    fvu_typical   the same over activations whose norm is at most 3 × the median, about their own mean. In some models a
                  few heavy activations, such as those of one frequent token, hold half of the variance: fvu is then
                  mostly about them.
    fvu_per_activation  mean over activations of ‖y − y_hat‖² / ‖y − mean(y)‖² (1 − SAELens' explained_variance_legacy):
                  each counts once, whatever its norm.
    fvu_by_norm, activations_by_norm, variance_by_norm  by bands of the norm in multiples of its median: FVU about the
                  mean of all, so that errors add up, and the shares of the activations and of the variance.
    cosine        of y and y_hat, not about their means, mean over activations (SAELens' cossim).
    norm_ratio    ‖y_hat‖ / ‖y‖, mean over activations (SAELens' l2_ratio). Below 1 it need not be shrinkage: the best
                  linear estimate of a noisy y is shorter than y.
    shrinkage     Σ‖y_hat − mean(y)‖² / Σ(y − mean(y))·(y_hat − mean(y)), as in training: 1 is unbiased, less is
                  suppressed (γ of Gated SAEs, 2404.16014 §4, which leaves the mean in, as SAELens'
                  relative_reconstruction_bias does).
    l0            mean number of latents other than zero.
    density       latents by log10 of the share of activations on which they fire: by DENSITY_EDGES' bins, then the
                  silent ones.
    dense_latents latents that fire on more than a tenth of the activations (the bound of JumpReLU SAEs, 2407.14435).
    dead_latents  latents that never fire. The held-out activations are few: rare latents are among them.

An SAE *reads* hooks and *writes* hooks. An autoencoder writes what it reads. A transcoder (2406.11944) reads one hook
and writes another that the model computes later; y, what is compared with it, and what is ablated are the other's. A
crosscoder reads and writes several: all are replaced in one pass, all set to zero in another and to their means in a
third. Its fvu and shrinkage weigh each hook by its mean square, as its training does, its cosine and norm_ratio are
means over hooks, and fvu_by_hook tells them apart.

What an SAE reads and should reconstruct are activations of the clean pass: with one hook those are the activations that
the pass with its reconstruction has there, and with several no reconstruction answers to the errors of an earlier one.

Only activations such as the SAE was trained on are replaced (or ablated): BOS, special tokens, padding and those that
the stream drops because their norm at any of its hooks is beyond that hook's frozen bound stay as the model made them.
Cross-entropy is counted wherever a real token follows a real token, replaced or not, so ce_clean is the model's plain
loss on this text. CE and KL are taken from logits in float32.

A model that does not predict the next token (an encoder, a model without a head) has no CE and no KL: reconstructions
and latents are measured all the same.

The text of a mixture is measured corpus by corpus too: ce_delta_by_corpus, fvu_by_corpus and l0_by_corpus. The variance
in fvu_by_corpus is about the mean of all activations, so that the corpora compare, and their errors add up.

The text is always the same (`held_out`), so that the numbers of snapshots compare. It is read once: a pass of the clean
model and one with each SAE's reconstruction. What does not depend on the SAE is measured with the first, the means
before it. Nothing but sums is stored. Where the time ends before the text, all numbers are of the part that was read,
which is spread over the whole, and `text_share` says how much that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from monitor.evaluation.compatibility import refuse_unknown_bounds, why_incompatible
from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.results import Evaluation, Value
from monitor.evaluation.tallies import Mean, Tally
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import (
    DEFAULT_MEMORY,
    MemoryLimits,
    NormBounds,
    Replacement,
    TimeLimit,
    WindowBatch,
    activations_by_hook,
    in_stream,
    log_probabilities,
    recording,
    splicing,
    spread_passes,
)
from trainer.saes.inference import InferenceSae
from trainer.snapshot import finite

BoundsKey = tuple[tuple[str, float], ...]
"""Norm bounds as (hook, bound), sorted."""
Ablation = tuple[Literal["zero", "mean"], tuple[str, ...], BoundsKey]
"""An ablation: the replacement of the activations of these hooks within these norm bounds."""


@dataclass(frozen=True)
class ActivationFacts:
    """Facts about all activations of each hook."""

    means: dict[str, Tensor]
    """Their means, float64 [width]."""
    median_norms: dict[str, float]
    windows: int
    """Number of windows that they are of: the first in the order of `spread_passes`."""


SURVEY_SHARE = 0.2
"""Share of the time in which means are taken, before anything is measured."""


@dataclass(frozen=True)
class Progress:
    """An evaluation under way."""

    share: float
    """Share of the text that was read."""
    results: Callable[[], dict[str, Evaluation]]
    """Computes the numbers of that part."""


@dataclass
class Baseline:
    """Measurements that do not depend on the SAE."""

    activations: dict[BoundsKey, ActivationFacts] = field(default_factory=dict)
    """By norm bounds."""
    ce: dict[Ablation, float] = field(default_factory=dict)


def evaluate(
    model: LanguageModel,
    windows: Windows,
    saes: Sequence[InferenceSae],
    baseline: Baseline,
    norm_bounds: NormBounds | None = None,
    between: Callable[[], None] = lambda: None,
    memory: MemoryLimits = DEFAULT_MEMORY,
    corpora: Mapping[str, slice] | None = None,
    limit: TimeLimit | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Evaluation]:
    """Measures all `saes` over one pass of the clean model; returns their evaluations by name.

    `between` is called after each forward pass and may raise; `corpora` are the windows of each corpus of a mixture,
    and together all of them. Where `limit` ends it before all windows were read, `baseline` is of this evaluation
    alone. Values that are not finite, and ratios without a denominator, are None. Raises EvaluationError for a sae that
    does not fit the model, a bound of a hook that is not here, or bounds that no activation is within.
    """
    limit = limit or TimeLimit()
    bounds = dict(norm_bounds or {})
    hooks = [hook.name for hook in model.hooks]
    refuse_unknown_bounds(hooks, bounds)
    for sae in saes:
        if reason := why_incompatible(model, sae):
            raise EvaluationError(reason)
    key = tuple(sorted(bounds.items()))
    parts = corpora or {"": slice(None)}
    if key not in baseline.activations:
        baseline.activations[key] = _survey(model, spread_passes(model, windows, parts, memory), bounds, between, limit)
    facts = baseline.activations[key]
    means = facts.means
    zeros = {hook: torch.zeros_like(mean) for hook, mean in means.items()}
    clean_ce = {corpus: Mean() for corpus in parts}
    tallies = {sae.name: {corpus: Tally(sae, means, facts.median_norms) for corpus in parts} for sae in saes}
    ablations: set[Ablation] = {
        (kind, sae.hooks.writes, key) for sae in saes for kind in ("zero", "mean") if model.predicts
    }
    ablation_ce = {ablation: Mean() for ablation in sorted(ablations) if ablation not in baseline.ce}
    windows_read = 0

    def results() -> dict[str, Evaluation]:
        clean, totals = Mean(), {sae.name: Tally(sae, means, facts.median_norms) for sae in saes}
        for corpus in parts:
            clean.include(clean_ce[corpus])
            for name, total in totals.items():
                total.include(tallies[name][corpus])
        if windows.kept.any() and not all(tally.activations for tally in totals.values()):
            raise EvaluationError(_nothing_within(windows, bounds))  # a ce_delta of 0 would look like a perfect SAE
        ce = baseline.ce | {ablation: ce.value for ablation, ce in ablation_ce.items()}
        return {
            sae.name: _evaluation(
                sae,
                totals[sae.name],
                clean.count,
                _predictions(clean.value, ce, sae.hooks.writes, key, totals[sae.name]) if model.predicts else {},
                _by_corpus(tallies[sae.name], clean_ce if model.predicts else None) if corpora else {},
                windows_read / max(1, len(windows)),
            )
            for sae in saes
        }

    for corpus, batch in spread_passes(model, windows, parts, memory):
        if windows_read and (limit.is_over() or windows_read >= facts.windows):
            break
        windows_read += len(batch.tokens)
        if not model.predicts:
            activations = activations_by_hook(model, batch)
            streamed = in_stream(activations, batch.kept, bounds)
            activations = {hook: x[streamed].float() for hook, x in activations.items()}
            for sae in saes:
                _reconstruct(sae, activations, tallies[sae.name][corpus], memory)
            limit.rest(between)
            on_progress(Progress(windows_read / len(windows), results))
            continue
        targets = batch.tokens[:, 1:][batch.predicted]

        def run_model(replacements: dict[str, Replacement], batch: WindowBatch = batch) -> Tensor:
            result = log_probabilities(model.logits(batch.tokens, replacements), batch.predicted)
            limit.rest(between)
            return result

        recorded: dict[str, Tensor] = {}
        log_clean = run_model(recording(hooks, recorded))
        clean_ce[corpus].add(_cross_entropy(log_clean, targets))
        streamed = in_stream(recorded, batch.kept, bounds)
        activations = {hook: x[streamed].float() for hook, x in recorded.items()}
        for (kind, ablated_hooks, _), ce in ablation_ce.items():
            constants = {hook: means[hook] if kind == "mean" else zeros[hook] for hook in ablated_hooks}
            ce.add(_cross_entropy(run_model(splicing(streamed, constants)), targets))
        for sae in saes:
            tally = tallies[sae.name][corpus]
            log_sae = run_model(splicing(streamed, _reconstruct(sae, activations, tally, memory)))
            tally.ce.add(_cross_entropy(log_sae, targets))
            tally.kl.add((log_clean.exp() * (log_clean - log_sae)).sum(-1))
        on_progress(Progress(windows_read / len(windows), results))
    evaluations = results()
    baseline.ce |= {ablation: ce.value for ablation, ce in ablation_ce.items()}
    return evaluations


def _by_corpus(tallies: Mapping[str, Tally], clean_ce: Mapping[str, Mean] | None) -> dict[str, Value]:
    """The measures of each corpus of a mixture."""
    values: dict[str, Value] = {
        "fvu_by_corpus": {corpus: finite(tally.fit()["fvu"]) for corpus, tally in tallies.items()},
        "l0_by_corpus": {corpus: finite(tally.l0) for corpus, tally in tallies.items()},
    }
    if clean_ce is not None:
        values["ce_delta_by_corpus"] = {
            corpus: finite(tally.ce.value - clean_ce[corpus].value) for corpus, tally in tallies.items()
        }
    return values


def _nothing_within(windows: Windows, bounds: NormBounds) -> str:
    limits = ", ".join(f"{bound:.3g} at {hook}" for hook, bound in sorted(bounds.items()))
    return (
        f"none of the {int(windows.kept.sum()):,} held-out activations is in the stream, which drops norms beyond "
        f"{limits}; give the monitor the model, hooks and text that the producers have"
    )


def _survey(
    model: LanguageModel, batches: Iterable[tuple[str, WindowBatch]], bounds: NormBounds, between: Callable[[], None],
    limit: TimeLimit,
) -> ActivationFacts:  # fmt: skip
    """Facts about the activations in the stream, as far as there is time; NaN where there are none."""
    norms: dict[str, list[Tensor]] = {hook.name: [] for hook in model.hooks}
    sums = {hook.name: torch.zeros(hook.width, dtype=torch.float64, device=model.device) for hook in model.hooks}
    count = windows = 0
    for _, batch in batches:
        if windows and limit.is_over(SURVEY_SHARE):
            break
        windows += len(batch.tokens)
        activations = activations_by_hook(model, batch)
        streamed = in_stream(activations, batch.kept, bounds)
        for hook, x in activations.items():
            selected = x[streamed]
            sums[hook] += selected.double().sum(0)
            norms[hook].append(selected.float().norm(dim=1).cpu())
        count += int(streamed.sum())
        limit.rest(between)
    means = {hook: total / count for hook, total in sums.items()}
    medians = {hook: float(torch.cat(parts).median()) if count else float("nan") for hook, parts in norms.items()}
    return ActivationFacts(means, medians, windows)


def _reconstruct(
    sae: InferenceSae, activations: dict[str, Tensor], tally: Tally, memory: MemoryLimits
) -> dict[str, Tensor]:
    """The SAE's reconstructions [n, width] by the hooks it writes; `tally` compares them with the activations."""
    x = sae.input(activations)
    parts = []
    for part in x.split(memory.batch(sae.d_sae)):
        latents = sae.encode(part)
        parts.append(sae.decode(latents, part))
        tally.firings += (latents != 0).sum(0)
    tally.activations += len(x)
    widths = [activations[hook].shape[1] for hook in sae.hooks.writes]
    reconstructions = dict(zip(sae.hooks.writes, torch.cat(parts).split(widths, 1), strict=True))
    for hook, y_hat in reconstructions.items():
        tally.fits[hook].add(activations[hook], y_hat)
    return reconstructions


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each predicted token, in nats."""
    return -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)


def _predictions(
    ce_clean: float, ce: Mapping[Ablation, float], writes: tuple[str, ...], bounds: BoundsKey, tally: Tally
) -> dict[str, float | None]:
    """The measures of the language model's predictions."""
    ce_sae, ce_zero, ce_mean = tally.ce.value, ce["zero", writes, bounds], ce["mean", writes, bounds]
    return {
        "ce_clean": ce_clean,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_mean_ablation": ce_mean,
        "ce_delta": ce_sae - ce_clean,
        "ce_recovered": _recovered(ce_zero, ce_sae, ce_clean),
        "ce_recovered_mean_ablation": _recovered(ce_mean, ce_sae, ce_clean),
        "kl": tally.kl.value,
    }


def _evaluation(
    sae: InferenceSae,
    tally: Tally,
    predictions: int,
    prediction_measures: dict[str, float | None],
    corpus_measures: dict[str, Value],
    text_share: float,
) -> Evaluation:
    numbers = {**prediction_measures, **tally.fit(), "l0": tally.l0}
    values: dict[str, Value] = {name: finite(value) for name, value in numbers.items()}
    if len(sae.hooks.writes) > 1:
        values["fvu_by_hook"] = {hook: finite(fit.fvu) for hook, fit in tally.fits.items()}
    values |= {name: {band: finite(share) for band, share in bands.items()} for name, bands in tally.by_norm().items()}
    values |= corpus_measures
    values["dense_latents"], values["dead_latents"] = tally.dense_latents, tally.dead_latents
    return Evaluation(
        values=values,
        hooks=sae.hooks,
        density=tuple(tally.density()),
        rows=tally.activations,
        predictions=predictions or None,
        text_share=text_share if text_share < 1 else None,
    )


def _recovered(ce_ablated: float, ce_sae: float, ce_clean: float) -> float | None:
    lost = ce_ablated - ce_clean
    return (ce_ablated - ce_sae) / lost if lost else None
