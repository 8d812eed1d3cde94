"""Follows a run directory: each new snapshot is measured with the language model, beside the training.

Always the newest one, so that a slow machine skips some instead of falling behind, and always the same rows.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from monitor.evaluate import Baseline, Subject, evaluate, load_subject, misfit
from monitor.held_out import EvaluationError, held_out_windows
from monitor.metrics import MonitorMetrics
from monitor.run_directory import manifest_of, read_json
from monitor.settings import MonitorSettings
from producer.activations import LanguageModel, ModelError, load_language_model
from producer.corpus import CorpusError, open_corpus
from producer.tokens import Windows, tokens_fingerprint
from trainer.durable import replace_text
from trainer.snapshot import SnapshotError, is_complete, snapshot_names

log = logging.getLogger("sluice.monitor")


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
            unexpected = not isinstance(error, SnapshotError | EvaluationError)
            self._fail(names[-1], f"snapshot {names[-1]} is not evaluated: {error}", unexpected)
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
        self._metrics.keep(known)
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
        model, baseline = self._instruments.model, self._instruments.baseline
        subjects = self._fitting(folder, [load_subject(folder / sae, model.device) for sae in saes], model)
        if not subjects:
            return
        bounds = manifest["run"].get("stream", {}).get("norm_bounds")
        results = evaluate(model, self._instruments.windows, subjects, baseline, bounds, self._between)
        seconds = round(time.monotonic() - began, 3)
        for sae, result in results.items():
            evaluation = {"snapshot": folder.name, "snapshot_tokens": manifest["tokens"], **result, "seconds": seconds}
            replace_text(folder / sae / "evaluation.json", json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
            self._metrics.update(sae, evaluation)
            log.info("%s of %s: %s", sae, folder.name, _in_words(evaluation))

    def _fitting(self, folder: Path, subjects: list[Subject], model: LanguageModel) -> list[Subject]:
        """Those that can be spliced into the model; the others are told of, and do not hold up the rest."""
        faults = {subject.name: misfit(model, subject) for subject in subjects}
        for name, reason in faults.items():
            if reason is not None:
                self._fail(folder.name, f"{name} of {folder.name} is not evaluated: {reason}")
        return [subject for subject in subjects if faults[subject.name] is None]

    def _fail(self, snapshot: str, message: str, unexpected: bool = False) -> None:
        self._failed.add(snapshot)
        self._metrics.count_failure()
        log.error("%s", message, exc_info=unexpected)

    def _between(self) -> None:
        if self._stop.is_set():
            raise Stopped
        self.moved_at = time.monotonic()

    def _load(self) -> _Instruments:
        settings = self._settings
        assert settings.model is not None, "why_not_evaluated() is asked first"
        torch.set_num_threads(settings.monitor.evaluation_threads)
        log.info("loading %s and held-out text, to evaluate with", settings.model.name)
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
