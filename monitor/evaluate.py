"""How much of the language model's skill an SAE keeps: the model reads x_hat where it would read x, on held-out text.

    ce_delta      CE_sae − CE_clean, nats per token. The primary number ("delta LM loss", Gemma Scope, 2408.05147).
    ce_recovered  (CE_zero − CE_sae) / (CE_zero − CE_clean), against **zero** ablation (Gated SAEs, 2404.16014). A
                  residual stream of zeros is so bad that 0.99 may still hide a large ce_delta: never read it alone.
    kl            KL(P_clean ‖ P_sae), mean over predicted positions, nats per token.
    fvu           Σ‖x − x_hat‖² / Σ‖x − mean(x)‖² over the held-out rows, mean and sums over all of them, in float64.
    l0            mean number of latents above zero on a row.

Only rows such as the SAE was trained on are replaced (or set to zero): BOS, special tokens, padding and rows beyond the
stream's frozen norm bound stay as the model made them. Cross-entropy is counted wherever a real token follows a real
token, replaced or not, so ce_clean is the model's plain loss on this text. CE and KL are taken from logits in float32.

`Evaluator` follows a run directory: always the newest snapshot, so that a slow machine skips some instead of falling
behind, always the same rows, so that numbers compare.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.metrics import MonitorMetrics
from monitor.run_directory import manifest_of, read_json
from monitor.settings import MonitorSettings
from producer.activations import LanguageModel, ModelError, load_language_model
from producer.corpus import Corpus, CorpusError, open_corpus
from producer.settings import CorpusSettings
from producer.tokens import Windows, tokens_fingerprint, windows_of
from trainer.durable import replace_text
from trainer.saes.inference import InferenceSae
from trainer.snapshot import SnapshotError, finite, is_complete, read_sae, snapshot_names

log = logging.getLogger("sluice.monitor")

LOGITS_IN_MEMORY = 1 << 24
"""Elements of one logits tensor, of which a pass holds about six: 64 MB each in float32."""
LATENTS_IN_MEMORY = 1 << 24
SHARDS_SHARING = 8
"""Held-out windows come from so many shards, so that one odd file does not decide the numbers."""


class EvaluationError(ValueError):
    """The run cannot be evaluated, or a snapshot not with this model and text; `str(error)` says what to do."""


@dataclass(frozen=True)
class Subject:
    """One SAE to be measured."""

    name: str
    sae: InferenceSae
    hook: str
    norm_bound: float | None = None
    """Rows with a longer norm are left as they are: the stream drops them, so the SAE never saw any."""


@dataclass
class Baseline:
    """What does not depend on the SAE, once measured: CE with a hook's rows set to zero, by (hook, norm bound)."""

    ce_zero: dict[tuple[str, float | None], float] = field(default_factory=dict)


def evaluate_sae(
    model: LanguageModel, windows: Windows, sae_folder: Path, hook: str, norm_bound: float | None = None
) -> dict[str, Any]:
    """The numbers above for the SAE in one folder of a snapshot, and ce_clean, ce_sae, ce_zero, rows, predictions.

    Values that are not finite, and ratios without a denominator, are None. Raises SnapshotError for a folder that
    holds no SAE, EvaluationError for one that does not fit the hook.
    """
    subject = Subject(sae_folder.name, load_on(sae_folder, model.device), hook, norm_bound)
    return evaluate(model, windows, [subject], Baseline())[subject.name]


def evaluate(
    model: LanguageModel,
    windows: Windows,
    subjects: Sequence[Subject],
    baseline: Baseline,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """All `subjects` over one pass of the clean model. `between` is called after each forward pass and may raise."""
    _refuse_misfits(model, subjects)
    clean = _Mean()
    tallies = {subject.name: _Tally() for subject in subjects}
    missing = {(s.hook, s.norm_bound) for s in subjects} - set(baseline.ce_zero)
    zero = {key: _Mean() for key in missing}
    for tokens, kept, predicted in _passes(model, windows):
        target = tokens[:, 1:][predicted]

        def forward(replace: dict[str, Replacement], tokens: Tensor = tokens, predicted: Tensor = predicted) -> Tensor:
            logits = model.logits(tokens, replace)[:, :-1][predicted]
            between()
            return torch.log_softmax(logits.float(), -1)

        log_clean = forward({})
        clean.add(_cross_entropy(log_clean, target))
        for hook, bound in missing:
            log_zero = forward({hook: _replacing(kept, bound, torch.zeros_like)})
            zero[hook, bound].add(_cross_entropy(log_zero, target))
        for subject in subjects:
            tally = tallies[subject.name]
            log_sae = forward({subject.hook: _replacing(kept, subject.norm_bound, _reconstructing(subject.sae, tally))})
            tally.ce.add(_cross_entropy(log_sae, target))
            tally.kl.add((log_clean.exp() * (log_clean - log_sae)).sum(-1))
    baseline.ce_zero |= {key: mean.value for key, mean in zero.items()}
    return {
        subject.name: _result(subject, clean, baseline.ce_zero[subject.hook, subject.norm_bound], tallies[subject.name])
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
    return {
        "hook": subject.hook,
        **{name: finite(value) for name, value in numbers.items()},
        "ce_recovered_against": "zero ablation",
        "rows": tally.rows,
        "predictions": clean.count,
    }


# --- One forward pass ------------------------------------------------------------------------------------------------

Replacement = Callable[[Tensor], Tensor]


def _passes(model: LanguageModel, windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, kept, predicted) of as many windows as their logits fit into memory, on the model's device.

    `predicted` [windows, context − 1] is True where a token that is no padding follows one that is none.
    """
    count = max(1, LOGITS_IN_MEMORY // (windows.ids.shape[1] * model.vocabulary))
    for start in range(0, len(windows.ids), count):
        chosen = slice(start, start + count)
        real = ~windows.padded[chosen]
        parts = (windows.ids[chosen], windows.kept[chosen], real[:, :-1] & real[:, 1:])
        tokens, kept, predicted = (torch.from_numpy(part).to(model.device) for part in parts)
        yield tokens, kept, predicted


def _cross_entropy(log_probabilities: Tensor, target: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, target[:, None]).squeeze(-1)


def _replacing(kept: Tensor, norm_bound: float | None, function: Replacement) -> Replacement:
    """Applies `function` to the rows [rows, width] of an activation that belong to the stream, in float32."""

    def replace(activation: Tensor) -> Tensor:
        chosen = kept
        if norm_bound is not None:
            chosen = kept & (activation.float().norm(dim=-1) <= norm_bound)
        replaced = activation.clone()
        replaced[chosen] = function(activation[chosen].float()).to(activation.dtype)
        return replaced

    return replace


def _reconstructing(sae: InferenceSae, tally: _Tally) -> Replacement:
    def reconstruct(x: Tensor) -> Tensor:
        at_once = max(1, LATENTS_IN_MEMORY // sae.W_enc.shape[1])
        x_hat = torch.empty_like(x)
        for start in range(0, len(x), at_once):
            latents = sae.encode(x[start : start + at_once])
            x_hat[start : start + at_once] = sae.decode(latents)
            tally.active += int((latents > 0).sum())
        tally.add_rows(x, x_hat)
        return x_hat

    return reconstruct


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


class _Tally:
    """What is summed up of one SAE."""

    def __init__(self) -> None:
        self.ce, self.kl = _Mean(), _Mean()
        self.rows, self.active = 0, 0
        self._error = self._square = 0.0
        self._centre: Tensor | None = None
        self._offset: Tensor = torch.zeros(())

    def add_rows(self, x: Tensor, x_hat: Tensor) -> None:
        if not len(x):
            return
        x, x_hat = x.double(), x_hat.double()
        if self._centre is None:
            # Sums about the first rows' mean: about zero, Σ‖x‖² and ‖Σx‖² would cancel, the mean being far larger
            # than the spread.
            self._centre = x.mean(0)
            self._offset = torch.zeros_like(self._centre)
        centred = x - self._centre
        self._offset += centred.sum(0)
        self._square += float(centred.square().sum())
        self._error += float((x - x_hat).square().sum())
        self.rows += len(x)

    @property
    def fvu(self) -> float | None:
        if not self.rows:
            return None
        variance = self._square - float(self._offset.square().sum()) / self.rows
        return self._error / variance if variance > 0 else None


def load_on(folder: Path, device: torch.device) -> InferenceSae:
    """The SAE of one folder, on the language model's device."""
    cfg, weights = read_sae(folder)
    return InferenceSae(cfg, {name: torch.from_numpy(array).float().to(device) for name, array in weights.items()})


def _refuse_misfits(model: LanguageModel, subjects: Sequence[Subject]) -> None:
    widths = {hook.name: hook.width for hook in model.hooks}
    for subject in subjects:
        d_in = subject.sae.W_enc.shape[0]
        if widths.get(subject.hook) != d_in:
            known = ", ".join(f"{name} ({width})" for name, width in widths.items())
            raise EvaluationError(
                f"sae {subject.name!r} reads {d_in} numbers at {subject.hook!r}; the model's hooks are {known}: "
                "the run file's [model] is not the one of this snapshot"
            )


# --- Held-out text ---------------------------------------------------------------------------------------------------


def held_out_windows(corpus: Corpus, tokenizer: Any, settings: CorpusSettings, rows: int) -> Windows:
    """Windows of text never trained on, until they hold `rows` kept positions or the text ends; always the same ones.

    Equal shares come from the first few held-out shards, and what one lacks from the next.
    """
    held_out = corpus.held_out_shards
    chosen: list[Windows] = []
    missing = rows
    for index, shard in enumerate(held_out):
        share = -(-missing // max(1, min(SHARDS_SHARING, len(held_out)) - index))
        chosen.append(_beginning(windows_of(corpus.documents(shard), tokenizer, settings), share))
        missing -= int(chosen[-1].kept.sum())
        if missing <= 0:
            break
    if missing == rows:
        raise EvaluationError(
            f"{len(held_out)} held-out shards hold no text; raise corpus.held_out, or check the corpus"
        )
    parts = zip(*((windows.ids, windows.kept, windows.padded) for windows in chosen), strict=True)
    return Windows(*map(np.concatenate, parts))


def _beginning(windows: Windows, rows: int) -> Windows:
    """The first windows with kept positions, just enough of them for `rows`."""
    counts = windows.kept.sum(1)
    useful = np.flatnonzero(counts)
    chosen = useful[: np.searchsorted(counts[useful].cumsum(), rows) + 1]
    return Windows(windows.ids[chosen], windows.kept[chosen], windows.padded[chosen])


# --- Following a run -------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The monitor is asked to end in the middle of an evaluation."""


@dataclass(frozen=True)
class _Instruments:
    """What every evaluation of a run uses, loaded once."""

    model: LanguageModel
    windows: Windows
    facts: dict[str, Any]
    """What must agree with the stream that a snapshot was trained on."""
    baseline: Baseline = field(default_factory=Baseline)


class Evaluator:
    """Evaluates the newest snapshot of a run, whenever `look` is called and it is not evaluated yet.

    Writes `<sae>/evaluation.json` beside the SAE, whole or not at all, and tells the metrics. A snapshot that cannot be
    evaluated is logged, counted and not tried again. When the model or the text cannot be loaded, `broken` says why.
    """

    def __init__(self, settings: MonitorSettings, metrics: MonitorMetrics, stop: threading.Event) -> None:
        self._settings = settings
        self._metrics = metrics
        self._stop = stop
        self._directory = Path(settings.run.directory)
        self._instruments: _Instruments | None = None
        self._settled: set[str] = set()
        self._failed: set[str] = set()
        self.broken: str | None = None
        self.moved_at: float | None = None
        """Monotonic time of the last forward pass while an evaluation runs, else None."""

    def look(self) -> None:
        """Brings the newest snapshot up to date; returns at once when it is. Raises nothing but Stopped."""
        names = snapshot_names(self._directory)
        if not names or names[-1] in self._settled:
            return
        try:
            self._settle(names[-1])
        except Stopped:
            raise
        except (ModelError, CorpusError) as error:
            self.broken = str(error)
            log.error("no evaluation: %s", error)
        except Exception as error:
            if not is_complete(self._directory / "snapshots" / names[-1]):
                return  # retired under our hands; the next look takes a newer one
            self._failed.add(names[-1])
            self._metrics.count_failure()
            unexpected = not isinstance(error, SnapshotError | EvaluationError)
            log.error("snapshot %s is not evaluated: %s", names[-1], error, exc_info=unexpected)
        finally:
            self.moved_at = None
        self._settled.add(names[-1])

    def has_failed(self) -> bool:
        """True when the newest snapshot could not be evaluated."""
        names = snapshot_names(self._directory)
        return self.broken is not None or (bool(names) and names[-1] in self._failed)

    def is_up_to_date(self) -> bool:
        """True when the newest snapshot, if there is one, has been dealt with."""
        names = snapshot_names(self._directory)
        return not names or names[-1] in self._settled

    def _settle(self, name: str) -> None:
        folder = self._directory / "snapshots" / name
        manifest = manifest_of(folder)
        known = {sae: read_json(folder / sae / "evaluation.json") for sae in manifest["saes"]}
        for sae, evaluation in known.items():
            if evaluation is not None:
                self._metrics.update(sae, evaluation)
        if missing := [sae for sae, evaluation in known.items() if evaluation is None]:
            self._evaluate(folder, manifest, missing)

    def _evaluate(self, folder: Path, manifest: dict[str, Any], saes: list[str]) -> None:
        if self._instruments is None:
            self._instruments = self._load()
        _refuse_another_stream(self._instruments.facts, manifest)
        began = time.monotonic()
        model = self._instruments.model
        subjects = [_subject(folder / sae, manifest, model.device) for sae in saes]
        results = evaluate(model, self._instruments.windows, subjects, self._instruments.baseline, self._between)
        seconds = round(time.monotonic() - began, 3)
        for sae, result in results.items():
            evaluation = {"snapshot": folder.name, "snapshot_tokens": manifest["tokens"], **result, "seconds": seconds}
            replace_text(folder / sae / "evaluation.json", json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
            self._metrics.update(sae, evaluation)
            log.info("%s of %s: %s", sae, folder.name, _in_words(evaluation))

    def _between(self) -> None:
        if self._stop.is_set():
            raise Stopped
        self.moved_at = time.monotonic()

    def _load(self) -> _Instruments:
        settings = self._settings
        assert settings.model is not None, "why_not_evaluated() is asked first"
        torch.set_num_threads(settings.monitor.evaluation_threads)
        corpus = open_corpus(settings.corpus)
        model = load_language_model(settings.model, whole=True)
        if not model.causal:
            raise ModelError(f"{settings.model.name} does not predict the next token; set monitor.evaluate = false")
        windows = held_out_windows(corpus, model.tokenizer, settings.corpus, settings.monitor.evaluation_tokens)
        log.info(
            "evaluating with %s on %s held-out rows in %s windows",
            settings.model.name,
            f"{int(windows.kept.sum()):,}",
            f"{len(windows):,}",
        )
        facts = {
            "corpus_fingerprint": corpus.fingerprint,
            "tokens_fingerprint": tokens_fingerprint(model.tokenizer, settings.corpus),
            "held_out": settings.corpus.held_out,
        }
        return _Instruments(model, windows, facts)


def _subject(folder: Path, manifest: dict[str, Any], device: torch.device) -> Subject:
    sae = load_on(folder, device)
    hook = sae.cfg["metadata"]["hook_name"]
    bounds = manifest["run"].get("stream", {}).get("norm_bounds") or {}
    return Subject(folder.name, sae, hook, bounds.get(hook))


def _refuse_another_stream(facts: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Held-out text is held out only from a run that had the same text, cut the same way."""
    stream = manifest["run"].get("stream", {})
    if different := [name for name, value in facts.items() if name in stream and stream[name] != value]:
        raise EvaluationError(
            f"the snapshot's stream differs from the run file in {', '.join(different)}: what is held out here may "
            "have been trained on there; give the monitor the run file, and the text, that the producers have"
        )


def _in_words(evaluation: dict[str, Any]) -> str:
    words = {"ΔCE": "ce_delta", "CE recovered": "ce_recovered", "KL": "kl", "FVU": "fvu", "L0": "l0"}
    return (
        ", ".join(f"{word} {evaluation[name]:.4g}" for word, name in words.items() if evaluation[name] is not None)
        + f" ({evaluation['seconds']:.1f} s)"
    )
