"""Follows a run directory: each new snapshot is measured with the language model, and its latents are looked at.

Always the newest one, so that a slow machine skips some instead of falling behind, and always the same text. First the
numbers of every SAE (`evaluation.json`), then what each one's latents do (`latents.safetensors`), both beside the SAE.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.evaluation.ablation import ablation_effects
from monitor.evaluation.evaluator import Baseline, Subject, evaluate, load_subject, misfit
from monitor.evaluation.held_out import EvaluationError, held_out_windows
from monitor.evaluation.latents.activations import GONE, births, gather_latents, load_decoder, load_latents
from monitor.evaluation.latents.explanation import mean_f1
from monitor.evaluation.latents.explorer import Explorer
from monitor.evaluation.measures import Stage, measures
from monitor.evaluation.probing import LabelledTexts, probe_accuracy, read_labelled_texts
from monitor.evaluation.results import Evaluation, read_evaluation, write_evaluation
from monitor.history import append_evaluation
from monitor.http.explorer_handle import ExplorerHandle
from monitor.metrics import MonitorMetrics
from monitor.run_directory import (
    LATENTS,
    explained_in,
    is_finished,
    snapshots_with,
)
from monitor.settings import MonitorSettings
from monitor.snapshot_index import index_of, manifest_of
from producer.corpus import CorpusError, open_corpus
from producer.corpus.windows import Windows, check_packing, tokens_fingerprint
from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from trainer.snapshot import SnapshotError, is_complete

log = logging.getLogger("sluice.monitor")


_Stamp = tuple[str, int]
"""A snapshot's name, and when it was written, in nanoseconds."""


_Directions = tuple[str, Tensor, np.ndarray]
"""A snapshot's name, an SAE's W_dec in it, and since when each latent has its direction."""


class Stopped(Exception):
    """The monitor is asked to end in the middle of an evaluation."""


class _Overtaken(Exception):
    """The run has ended, and another snapshot is its last."""


@dataclass(frozen=True)
class _Instruments:
    """What every evaluation of a run uses, loaded once."""

    model: LanguageModel
    windows: Windows
    """The text that SAEs are measured on."""
    reading: Windows
    """The text on which their latents are looked at."""
    facts: dict[str, Any]
    """What must agree with the stream that a snapshot was trained on."""
    labelled: LabelledTexts | None
    """Texts of monitor.probe_file."""
    baseline: Baseline = field(default_factory=Baseline)


class Evaluator:
    """Evaluates the newest snapshot of a run, whenever `look` is called and it is not evaluated yet.

    What it writes beside an SAE is there whole or not at all; numbers go to the metrics too. As soon as the language
    model is loaded, the `handle` has an explorer. A snapshot that cannot be evaluated is logged, counted and not tried
    again. When the model or the text cannot be loaded, `broken` says why.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        metrics: MonitorMetrics,
        stop: threading.Event,
        handle: ExplorerHandle | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._stop = stop
        self._handle = handle or ExplorerHandle()
        self._directory = settings.run.folder
        self._instruments: _Instruments | None = None
        self._settled: set[_Stamp] = set()
        self._failed: set[_Stamp] = set()
        self._working_on: _Stamp | None = None
        self._directions: dict[str, _Directions] = {}
        """Of each SAE, in the last snapshot that was looked at."""
        self.broken: str | None = None
        self.moved_at: float | None = None
        """Monotonic time of the last forward pass while an evaluation runs, else None."""

    def look(self) -> None:
        """Brings the newest snapshot up to date; returns at once when it is. Raises nothing but Stopped."""
        if self._instruments is None:
            try:
                self._instruments = self._load()
            except (ModelError, CorpusError, EvaluationError) as error:
                self.broken = str(error)
                self._metrics.set_broken()
                self._handle.disable(f"{error}.")
                log.error("no evaluation: %s", error)
                return
        newest = self._newest()
        if newest is None or newest in self._settled:
            return
        name, _ = newest
        self._working_on, self.moved_at = newest, time.monotonic()
        try:
            self._settle(self._instruments, name)
        except Stopped:
            raise
        except _Overtaken:
            log.info("snapshot %s is not measured: the run is over, and a newer one is its last", name)
            return
        except Exception as error:
            if not is_complete(self._directory / "snapshots" / name):
                return  # retired under our hands; the next look takes a newer one
            unexpected = not isinstance(error, SnapshotError | EvaluationError)
            self._fail(name, f"snapshot {name} is not evaluated: {error}", unexpected)
        finally:
            self._working_on = self.moved_at = None
        self._settled.add(newest)

    def has_failed(self) -> bool:
        """True when the newest snapshot could not be evaluated."""
        newest = self._newest()
        return self.broken is not None or (newest is not None and newest in self._failed)

    def is_up_to_date(self) -> bool:
        """True when the newest snapshot, if there is one, has been dealt with."""
        newest = self._newest()
        return newest is None or newest in self._settled

    def _newest(self) -> _Stamp | None:
        """The newest snapshot. A trainer that has gone back may publish another one under a name that was settled."""
        for name in reversed(index_of(self._directory).names()):
            if (stamp := self._stamp(name)) is not None:
                return stamp
        return None

    def _stamp(self, name: str) -> _Stamp | None:
        try:
            return name, (self._directory / "snapshots" / name / "manifest.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None  # retired a moment ago

    def _is_newest(self, name: str) -> bool:
        return index_of(self._directory).names()[-1:] == [name]

    def _settle(self, instruments: _Instruments, name: str) -> None:
        folder = self._directory / "snapshots" / name
        manifest = manifest_of(folder)
        evaluations = {sae: read_evaluation(folder, sae) for sae in manifest["saes"]}
        self._metrics.retain(evaluations)
        for sae, evaluation in evaluations.items():
            if evaluation is not None:
                self._metrics.update(sae, evaluation)
        if missing := [sae for sae, evaluation in evaluations.items() if evaluation is None]:
            self._evaluate(instruments, folder, manifest, missing)
        if self._settings.monitor.latents_tokens:
            for sae in manifest["saes"]:
                if self._is_newest(name) and not (folder / sae / LATENTS).is_file():
                    self._look_into(instruments, folder, manifest, sae)
            for sae in _to_be_measured(folder, manifest):
                if self._is_newest(name):
                    self._measure_latents(instruments, folder, manifest, sae)

    def _evaluate(self, instruments: _Instruments, folder: Path, manifest: dict[str, Any], saes: list[str]) -> None:
        _refuse_another_stream(instruments.facts, manifest)
        began = time.monotonic()
        model = instruments.model
        subjects = self._fitting(folder, [load_subject(folder / sae, model.device) for sae in saes], model)
        if not subjects:
            return
        results = evaluate(model, instruments.windows, subjects, instruments.baseline, _bounds(manifest), self._between)
        seconds = round(time.monotonic() - began, 3)
        for sae, result in results.items():
            evaluation = replace(result, snapshot=folder.name, snapshot_tokens=manifest["tokens"], seconds=seconds)
            self._publish(folder, sae, evaluation)
            log.info("%s of %s: %s (%.1f s)", sae, folder.name, _in_words(evaluation), seconds)

    def _publish(self, folder: Path, sae: str, evaluation: Evaluation) -> None:
        write_evaluation(folder, sae, evaluation)
        append_evaluation(self._directory, sae, evaluation, time.time())
        self._metrics.update(sae, evaluation)

    def _look_into(self, instruments: _Instruments, folder: Path, manifest: dict[str, Any], sae: str) -> None:
        """Writes down what the SAE's latents do, and since when each one has its direction."""
        _refuse_another_stream(instruments.facts, manifest)
        began = time.monotonic()
        model = instruments.model
        subject = load_subject(folder / sae, model.device)
        if misfit(model, subject):
            return
        latents = gather_latents(model, instruments.reading, subject, _bounds(manifest), self._between)
        born = self._births(folder, sae)
        replace(latents, born=born).save(folder / sae / LATENTS)
        log.info(
            "%s of %s: what its latents do on %s held-out rows (%.1f s)",
            sae,
            folder.name,
            f"{latents.rows:,}",
            time.monotonic() - began,
        )

    def _births(self, folder: Path, sae: str) -> np.ndarray:
        """Since when each latent has its direction: followed through all earlier snapshots that are still there.

        Where retention has taken them, the last that was looked at is remembered.
        """
        known = self._directions.get(sae)
        if known is None or known[0] >= folder.name:  # nothing is remembered, or what a trainer has gone back behind
            looked_at = explained_in(self._directory, sae)
            known = self._read_directions(looked_at, sae) if looked_at and looked_at < folder.name else None
        for name in snapshots_with(self._directory, sae, after=known[0] if known else ""):
            if name <= folder.name:
                with suppress(*GONE):
                    W_dec = load_decoder(folder.parent / name / sae)
                    known = name, W_dec, births(W_dec, int(name), known and known[1:])
        if known is None or known[0] != folder.name:
            raise SnapshotError(f"snapshot {folder.name} has just been retired")
        self._directions[sae] = known
        return known[2]

    def _read_directions(self, name: str, sae: str) -> _Directions:
        folder = self._directory / "snapshots" / name / sae
        return name, load_decoder(folder), load_latents(folder / LATENTS).born

    def _measure_latents(self, instruments: _Instruments, folder: Path, manifest: dict[str, Any], sae: str) -> None:
        """Adds what its latents are worth, one by one, to the numbers of an SAE whose latents have been looked at."""
        began = time.monotonic()
        model, sampled = instruments.model, self._settings.monitor.ablated_latents
        evaluation = read_evaluation(folder, sae) or Evaluation()
        values = dict(evaluation.values)
        subject, latents = load_subject(folder / sae, model.device), load_latents(folder / sae / LATENTS)
        values["explanation_f1"] = mean_f1(latents, self._between)
        if sampled:
            values |= ablation_effects(model, subject, latents, sampled, self._between)
        if (texts := instruments.labelled) is not None:
            values["probe_accuracy"] = probe_accuracy(model, subject, texts, _bounds(manifest), self._between)
        self._publish(folder, sae, replace(evaluation, values=values))
        log.info(
            "%s of %s: what its latents are worth, in evaluation.json (%.1f s)",
            sae,
            folder.name,
            time.monotonic() - began,
        )

    def _fitting(self, folder: Path, subjects: list[Subject], model: LanguageModel) -> list[Subject]:
        """Those that can be spliced into the model; the others are told of, and do not hold up the rest."""
        faults = {subject.name: misfit(model, subject) for subject in subjects}
        for name, reason in faults.items():
            if reason is not None:
                self._handle.incompatible_saes[name] = reason
                self._fail(folder.name, f"{name} of {folder.name} is not evaluated: {reason}")
        return [subject for subject in subjects if faults[subject.name] is None]

    def _fail(self, snapshot: str, message: str, unexpected: bool = False) -> None:
        if (stamp := self._stamp(snapshot)) is not None:
            self._failed.add(stamp)
        self._metrics.count_failure()
        log.error("%s", message, exc_info=unexpected)

    def _between(self) -> None:
        """Rests after each piece of work, so that all work takes no more than its share of the time of a run."""
        now = time.monotonic()
        worked = 0.0 if self.moved_at is None else now - self.moved_at
        finished = is_finished(self._directory)
        if finished and self._working_on not in (None, self._newest()):
            raise _Overtaken
        share = 1.0 if finished else self._settings.monitor.evaluation_share
        rest = worked * (1 / share - 1)
        self.moved_at = now + rest
        if self._stop.wait(rest):
            raise Stopped

    def _load(self) -> _Instruments:
        settings = self._settings
        assert settings.model is not None, "why_not_evaluated() is asked first"
        torch.set_num_threads(settings.monitor.evaluation_threads)
        log.info("loading %s and held-out text, to evaluate with", settings.model.name)
        corpus = open_corpus(settings.corpus)
        model = load_language_model(settings.model, whole=True)
        if not model.causal:
            raise ModelError(f"{settings.model.name} does not predict the next token; set monitor.evaluate = false")
        check_packing(model.tokenizer, settings.corpus, model.vocabulary)
        model.check_context(settings.corpus.context)
        windows, reading = (
            held_out_windows(corpus, model.tokenizer, settings.corpus, max(1, rows))
            for rows in (settings.monitor.evaluation_tokens, settings.monitor.latents_tokens)
        )
        model.check_ids(torch.from_numpy(np.concatenate([windows.ids, reading.ids])), "held-out window")
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
        # Before there is an explorer: a tokenizer serves one thread at a time.
        probes = settings.monitor.probe_file
        labelled = (
            None if probes is None else read_labelled_texts(Path(probes).absolute(), model.tokenizer, settings.corpus)
        )
        if labelled is not None:
            model.check_ids(torch.from_numpy(labelled.windows.ids), "monitor.probe_file, window")
        self._handle.explorer = Explorer(self._directory, model, settings.corpus)
        return _Instruments(model, windows, reading, facts, labelled)


def _to_be_measured(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The SAEs whose latents have been looked at but not yet measured."""
    return [
        sae
        for sae in manifest["saes"]
        if (folder / sae / LATENTS).is_file()
        and "explanation_f1" not in (read_evaluation(folder, sae) or Evaluation()).values
    ]


def _bounds(manifest: dict[str, Any]) -> dict[str, float] | None:
    """By hook, the norm beyond which the stream that the snapshot learned from drops a row."""
    return manifest["run"].get("stream", {}).get("norm_bounds")


def _refuse_another_stream(facts: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Held-out text is held out only from a run that had the same text, cut the same way."""
    stream = manifest["run"].get("stream", {})
    if different := [name for name, value in facts.items() if name in stream and stream[name] != value]:
        raise EvaluationError(
            f"the snapshot's stream differs from the run file in {', '.join(different)}: what is held out here may "
            "have been trained on there; give the monitor the run file, and the text, that the producers have"
        )


def _in_words(evaluation: Evaluation) -> str:
    """The numbers of the table of results, for the log."""
    columns = [(measure, measure.results_column) for measure in measures(Stage.HELD_OUT)]
    values = [(column.heading, evaluation.value(measure)) for measure, column in columns if column]
    return ", ".join(f"{heading} {value:.4g}" for heading, value in values if isinstance(value, int | float))
