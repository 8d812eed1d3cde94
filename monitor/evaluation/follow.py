"""Follows a run directory: measures the SAEs of its newest snapshot, and gathers what their latents do.

Always the newest snapshot, so that a slow machine skips some instead of falling behind, and always the same text. First
the numbers of every SAE (`evaluation.json`), then the activations of each one's latents (`latents.safetensors`) and the
measures that need them. Both files are beside the SAE.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace

from monitor.evaluation.ablation import ablation_effects
from monitor.evaluation.births import BirthTracker
from monitor.evaluation.compatibility import why_incompatible
from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.evaluator import Baseline, Progress, evaluate
from monitor.evaluation.inputs import EvaluationInputs, PublishedSnapshot, load_inputs
from monitor.evaluation.latents.activations import gather_latents, load_latents
from monitor.evaluation.latents.explanation import mean_f1
from monitor.evaluation.latents.explorer import Explorer
from monitor.evaluation.measures import Stage, measures
from monitor.evaluation.probing import probe_accuracy
from monitor.evaluation.results import Evaluation, read_evaluation, write_evaluation
from monitor.history import append_evaluation
from monitor.http.explorer_handle import ExplorerHandle
from monitor.metrics import MonitorMetrics
from monitor.run_directory import LATENTS, is_finished, newest_with_latents
from monitor.settings import MonitorSettings
from monitor.snapshot_index import index_of
from producer.corpus import CorpusError
from producer.lm.errors import ModelError
from producer.lm.passes import TimeLimit
from trainer.saes.inference import InferenceSae, load_sae
from trainer.snapshot import SnapshotError, is_complete

log = logging.getLogger("sluice.monitor")

SHOW_SECONDS = 10.0
"""Between two looks at the numbers of an evaluation under way."""
SnapshotId = tuple[str, int]
"""A snapshot's name, and when it was written, in nanoseconds: a trainer that resumes may publish a name again."""


class Stopped(Exception):
    """The monitor is asked to end during an evaluation."""


class _Outdated(Exception):
    """The run has ended, and another snapshot is its last."""


class Evaluator:
    """Evaluates the newest snapshot of a run, whenever `look` is called and it is not evaluated yet.

    A file beside an SAE is complete or absent; numbers go to the metrics too. As soon as the language model is loaded,
    the `handle` has an explorer. A snapshot that cannot be evaluated is logged, counted and not tried again. When the
    model or the text cannot be loaded, `broken` says why.
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
        self._inputs: EvaluationInputs | None = None
        self._births = BirthTracker(self._directory)
        self._processed: set[SnapshotId] = set()
        self._failed: set[SnapshotId] = set()
        self._current: SnapshotId | None = None
        self._passes = 0
        """Passes of the language model, or other pieces, in the work that `_begin` announced."""
        self._partial = ""
        """What is measured so far, in words,"""
        self._show_at = 0.0
        """and the monotonic time from which on it is put into words again."""
        self.broken: str | None = None
        self.moved_at: float | None = None
        """Monotonic time of the last forward pass while an evaluation runs, else None."""

    def look(self) -> None:
        """Brings the newest snapshot up to date; returns at once when it is. Raises nothing but Stopped."""
        if self._inputs is None:
            try:
                self._inputs = self._load()
            except (ModelError, CorpusError, EvaluationError) as error:
                self.broken = str(error)
                self._metrics.set_broken()
                self._handle.disable(f"{error}.")
                log.error("no evaluation: %s", error)
                return
        newest = self._newest()
        if newest is None or newest in self._processed:
            return
        name, _ = newest
        self._current, self.moved_at = newest, time.monotonic()
        try:
            self._process(self._inputs, name)
        except Stopped:
            raise
        except _Outdated:
            log.info("snapshot %s is not measured: the run is over, and a newer one is its last", name)
            return
        except Exception as error:
            if not is_complete(self._directory / "snapshots" / name):
                return  # retired meanwhile; the next look takes a newer one
            is_unexpected = not isinstance(error, SnapshotError | EvaluationError | ModelError)
            self._fail(name, f"snapshot {name} is not evaluated: {error}", is_unexpected)
        finally:
            self._current = self.moved_at = None
            self._handle.activity = ""
        self._processed.add(newest)

    def has_failed(self) -> bool:
        """Whether the newest snapshot could not be evaluated."""
        newest = self._newest()
        return self.broken is not None or (newest is not None and newest in self._failed)

    def is_up_to_date(self) -> bool:
        """Whether the newest snapshot, if there is one, has been processed."""
        newest = self._newest()
        return newest is None or newest in self._processed

    # --- Which snapshot ----------------------------------------------------------------------------------------------

    def _newest(self) -> SnapshotId | None:
        ids = (self._id(name) for name in reversed(index_of(self._directory).names()))
        return next((one for one in ids if one is not None), None)

    def _id(self, name: str) -> SnapshotId | None:
        try:
            return name, (self._directory / "snapshots" / name / "manifest.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None  # retired a moment ago

    def _is_newest(self, snapshot: PublishedSnapshot) -> bool:
        return index_of(self._directory).names()[-1:] == [snapshot.name]

    def _fail(self, name: str, message: str, is_unexpected: bool = False) -> None:
        if (snapshot_id := self._id(name)) is not None:
            self._failed.add(snapshot_id)
        self._metrics.count_failure()
        log.error("%s", message, exc_info=is_unexpected)

    # --- Its evaluation ----------------------------------------------------------------------------------------------

    def _load(self) -> EvaluationInputs:
        inputs = load_inputs(self._settings)
        # Only now: a tokenizer serves one thread at a time.
        self._handle.explorer = Explorer(self._directory, inputs.model, self._settings.corpus)
        return inputs

    def _process(self, inputs: EvaluationInputs, name: str) -> None:
        """Whatever is missing beside the SAEs of a snapshot. Newer snapshots take precedence over its latents."""
        snapshot = PublishedSnapshot.read(self._directory / "snapshots" / name)
        inputs = self._at_revision(inputs, snapshot)
        evaluations = {sae: read_evaluation(snapshot.folder, sae) for sae in snapshot.saes}
        self._metrics.retain(evaluations)
        for sae, evaluation in evaluations.items():
            if evaluation is not None:
                self._metrics.update(sae, evaluation)
        if missing := [sae for sae, evaluation in evaluations.items() if evaluation is None]:
            self._evaluate(inputs, snapshot, missing)
        if self._settings.monitor.latents_tokens:
            for sae in snapshot.saes:
                # The first latents of an SAE come first: a run whose snapshots come fast had none until its end.
                is_due = self._is_newest(snapshot) or newest_with_latents(self._directory, sae) is None
                if is_due and not (snapshot.folder / sae / LATENTS).is_file():
                    self._gather_latents(inputs, snapshot, sae)
            for sae in _saes_with_unmeasured_latents(snapshot):
                if self._is_newest(snapshot):
                    self._measure_latents(inputs, snapshot, sae)

    def _at_revision(self, inputs: EvaluationInputs, snapshot: PublishedSnapshot) -> EvaluationInputs:
        """The inputs with the checkpoint of the language model that a snapshot was trained on. Raises ModelError."""
        if snapshot.revision == inputs.revision:
            return inputs
        assert self._settings.model is not None
        log.info("loading checkpoint %s, which snapshot %s was trained on", snapshot.revision, snapshot.name)
        self._inputs = inputs.at_revision(self._settings.model, snapshot.revision)
        self._handle.explorer = Explorer(self._directory, self._inputs.model, self._settings.corpus)
        return self._inputs

    def _evaluate(self, inputs: EvaluationInputs, snapshot: PublishedSnapshot, saes: list[str]) -> None:
        """Measures SAEs with the language model, all in the same passes."""
        inputs.check_stream(snapshot)
        began = time.monotonic()
        compatible = self._load_compatible(inputs, snapshot, saes)
        if not compatible:
            return
        text = inputs.text
        self._begin(f"evaluating {', '.join(saes)} of {snapshot.name}")
        results = evaluate(
            inputs.model,
            text.windows,
            compatible,
            inputs.baseline,
            snapshot.norm_bounds,
            self._between,
            corpora=text.corpora,
            limit=TimeLimit(self._settings.monitor.evaluation_seconds),
            on_progress=self._show_progress,
        )
        results = self._narrow_text(inputs, results)
        seconds = round(time.monotonic() - began, 3)
        for sae, result in results.items():
            evaluation = replace(result, snapshot=snapshot.name, snapshot_tokens=snapshot.tokens, seconds=seconds)
            self._publish(snapshot, sae, evaluation)
            log.info("%s of %s: %s (%.1f s)", sae, snapshot.name, _in_words(evaluation), seconds)

    def _narrow_text(self, inputs: EvaluationInputs, results: dict[str, Evaluation]) -> dict[str, Evaluation]:
        """Reads, from now on, the part of the text that there was time for; notes the share of it in the results."""
        share = min((result.text_share or 1.0 for result in results.values()), default=1.0)
        text = inputs.text
        if share < 1:
            text = text.beginning(share)
            self._inputs = replace(inputs, text=text, baseline=Baseline())
            log.warning(
                "%.0f%% of the held-out text was read in monitor.evaluation_seconds = %g: numbers, those of later "
                "snapshots too, are of this part, which is spread over the text. Raise it, or lower "
                "monitor.evaluation_tokens = %d",
                100 * text.share, self._settings.monitor.evaluation_seconds,
                self._settings.monitor.evaluation_tokens,
            )  # fmt: skip
        text_share = text.share if text.share < 1 else None
        return {sae: replace(result, text_share=text_share) for sae, result in results.items()}

    def _show_progress(self, progress: Progress) -> None:
        """Shows, now and then, how much was read and what it says so far."""
        if time.monotonic() < self._show_at:
            return
        self._show_at = time.monotonic() + SHOW_SECONDS
        with suppress(EvaluationError):  # nothing of the stream was read yet
            numbers = "; ".join(f"{sae} {_in_words(one)}" for sae, one in progress.results().items())
            self._partial = f", {progress.share:.0%} of the text; so far {numbers}"

    def _load_compatible(
        self, inputs: EvaluationInputs, snapshot: PublishedSnapshot, saes: list[str]
    ) -> list[InferenceSae]:
        """The SAEs that fit the language model; the others are reported, and do not hold up the rest."""
        compatible = []
        for name in saes:
            sae = load_sae(snapshot.folder / name, inputs.model.device)
            if reason := why_incompatible(inputs.model, sae):
                self._handle.incompatible_saes[name] = reason
                self._fail(snapshot.name, f"{name} of {snapshot.name} is not evaluated: {reason}")
            else:
                compatible.append(sae)
        return compatible

    def _publish(self, snapshot: PublishedSnapshot, sae: str, evaluation: Evaluation) -> None:
        write_evaluation(snapshot.folder, sae, evaluation)
        append_evaluation(self._directory, sae, evaluation, time.time())
        self._metrics.update(sae, evaluation)

    def _gather_latents(self, inputs: EvaluationInputs, snapshot: PublishedSnapshot, sae: str) -> None:
        """Writes the activations of an SAE's latents, and since when each latent has its direction."""
        inputs.check_stream(snapshot)
        began = time.monotonic()
        folder = snapshot.folder / sae
        weights = load_sae(folder, inputs.model.device)
        if why_incompatible(inputs.model, weights):
            return
        self._begin(f"gathering the latents of {sae} of {snapshot.name}")
        latents = gather_latents(inputs.model, inputs.latent_windows, weights, snapshot.norm_bounds, self._between)
        latents = replace(latents, born=self._births.births(snapshot.folder, sae))
        latents.save(folder / LATENTS)
        log.info(
            "%s of %s: latents gathered on %s held-out activations (%.1f s)",
            sae,
            snapshot.name,
            f"{latents.rows:,}",
            time.monotonic() - began,
        )

    def _measure_latents(self, inputs: EvaluationInputs, snapshot: PublishedSnapshot, sae: str) -> None:
        """Adds the measures that need the activations of the latents to an SAE's evaluation."""
        began = time.monotonic()
        folder, model = snapshot.folder / sae, inputs.model
        self._begin(f"measuring the latents of {sae} of {snapshot.name}")
        evaluation = read_evaluation(snapshot.folder, sae) or Evaluation()
        weights, latents = load_sae(folder, model.device), load_latents(folder / LATENTS)
        values = {**evaluation.values, "explanation_f1": mean_f1(latents, self._between)}
        if (count := self._settings.monitor.ablated_latents) and model.predicts:
            values |= ablation_effects(model, weights, latents, count, self._between)
        if (texts := inputs.labelled_texts) is not None:
            values["probe_accuracy"] = probe_accuracy(model, weights, texts, snapshot.norm_bounds, self._between)
        self._publish(snapshot, sae, replace(evaluation, values=values))
        log.info("%s of %s: latents measured (%.1f s)", sae, snapshot.name, time.monotonic() - began)

    def _begin(self, activity: str) -> None:
        """Announces a piece of work, on the page and in the log."""
        self._handle.activity = activity
        self._passes, self._partial, self._show_at = 0, "", time.monotonic() + SHOW_SECONDS
        log.info("%s", activity)

    def _between(self) -> None:
        """Rests after each piece of work, so that the evaluation takes no more than its share of a run's time."""
        now = time.monotonic()
        self._passes += 1
        activity = self._handle.activity.partition(":")[0]
        self._handle.activity = f"{activity}: {self._passes:,} passes done{self._partial}"
        worked = 0.0 if self.moved_at is None else now - self.moved_at
        finished = is_finished(self._directory)
        if finished and self._current not in (None, self._newest()):
            raise _Outdated
        share = 1.0 if finished else self._settings.monitor.evaluation_share
        rest = worked * (1 / share - 1)
        self.moved_at = now + rest
        if self._stop.wait(rest):
            raise Stopped


def _saes_with_unmeasured_latents(snapshot: PublishedSnapshot) -> list[str]:
    """SAEs whose latents are gathered and not yet measured."""
    return [
        sae
        for sae in snapshot.saes
        if (snapshot.folder / sae / LATENTS).is_file()
        and "explanation_f1" not in (read_evaluation(snapshot.folder, sae) or Evaluation()).values
    ]


def _in_words(evaluation: Evaluation) -> str:
    """The numbers of the table of results, for the log."""
    columns = [(measure, measure.results_column) for measure in measures(Stage.HELD_OUT)]
    values = [(column.heading, evaluation.value(measure)) for measure, column in columns if column]
    return ", ".join(f"{heading} {value:.4g}" for heading, value in values if isinstance(value, int | float))
