"""A tuning from beginning to end: load, measure, train, publish, measure again."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from producer.common.formatting import format_duration
from producer.common.run_file import show_settings
from producer.corpus import Text, open_text
from producer.corpus.held_out import held_out_text
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.lm.revisions import first_settings, settings_of
from trainer.saes.inference import load_sae
from trainer.state.durable import replace_text
from trainer.tuning.options import TuningError, TuningOptions
from trainer.tuning.quality import Quality, measure_quality
from trainer.tuning.saving import FORMAT, SavedTuning, TuningState, load, save
from trainer.tuning.source import TuningSource
from trainer.tuning.text import TuningText
from trainer.tuning.tuner import Tuner

log = logging.getLogger("sluice.trainer")

LOG_SECONDS = 10.0
SAVE_SECONDS = 60.0


class _Stopped(Exception):
    """The process is asked to end while it measures."""


@dataclass(frozen=True)
class TuningResult:
    """What a tuning has come to."""

    before: Quality
    after: Quality
    folder: Path
    """Of the published SAE."""


class TuningSession:
    """One tuning in a directory of its own; `run` returns None when it was stopped."""

    def __init__(
        self,
        source: TuningSource,
        options: TuningOptions,
        directory: Path,
        stop: threading.Event,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        """`directory` becomes a run directory, which the monitor reads like any other."""
        self._source = source
        self._options = options
        self._directory = directory
        self._stop = stop
        self._save_seconds = save_seconds

    def run(self) -> TuningResult | None:
        """Begins, or goes on. Raises TuningError, ModelError, CorpusError, SnapshotError or OSError."""
        try:
            return self._run(self._load())
        except _Stopped:
            return None

    def _run(self, saved: SavedTuning | None) -> TuningResult | None:
        source, options = self._source, self._options
        text = open_text(source.run.corpus)
        model = _load_model(source)
        _check_text(source, text, model)
        held_out = held_out_text(text, model.tokenizer, options.evaluation_tokens).windows

        def measure(folder: Path) -> Quality:
            sae = load_sae(folder, model.device)
            return measure_quality(model, held_out, sae, source.norm_bounds, self._raise_if_stopped)

        if saved is None:
            log.info("measuring %s of %s on held-out text", source.name, source.manifest.name)
            before = measure(source.folder)
            log.info("before: %s", in_words(before))
        else:
            before = saved.state.before
        windows = max(1, options.batch // source.run.corpus.context)
        tuner = Tuner(source, options, model, TuningText(text, model.tokenizer, source.run.run.seed, windows))
        seconds = 0.0
        if saved is not None:
            tuner.restore(saved.state.tuner, saved.tensors)
            seconds = saved.state.seconds
            log.info("going on after %s of %s tokens", f"{tuner.tokens:,}", f"{options.tokens:,}")
        write_settings(source, self._directory)

        def store(seconds: float) -> None:
            state, tensors = tuner.state()
            save(self._directory, SavedTuning(
                TuningState(FORMAT, str(source.folder), options, before, seconds, state), tensors
            ))  # fmt: skip

        seconds = self._train(tuner, seconds, store)
        if tuner.tokens < options.tokens:
            return None
        folder = tuner.publish(self._directory, *self._facts())
        log.info("published %s; measuring it", folder)
        after = measure(folder)
        self._write_summary(tuner, seconds, before, after)
        return TuningResult(before, after, folder)

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _load(self) -> SavedTuning | None:
        """The tuning that is already in the directory. Raises TuningError when it is another one."""
        saved = load(self._directory)
        if saved is None:
            return None
        theirs, ours = asdict(saved.state.options), asdict(self._options)
        differences = [f"{key} {theirs[key]}" for key in ours if theirs[key] != ours[key]]
        if saved.state.source != str(self._source.folder):
            differences.insert(0, f"the SAE {saved.state.source}")
        if differences:
            raise TuningError(
                f"{self._directory} holds a tuning with {', '.join(differences)}: go on with these, choose another "
                "--to, or remove the folder"
            )
        return saved

    def _train(self, tuner: Tuner, seconds: float, store: Callable[[float], None]) -> float:
        """Steps until the tokens are trained or a signal has come; returns the seconds that it took in all."""
        total = self._options.tokens
        began = logged = stored = time.monotonic()
        at_start = tuner.tokens
        while tuner.tokens < total and not self._stop.is_set():
            tuner.step()
            now = time.monotonic()
            if now - logged >= LOG_SECONDS or tuner.tokens >= total:
                logged = now
                log.info("%s", _progress(tuner, total, at_start, now - began))
            if now - stored >= self._save_seconds:
                stored = now
                store(seconds + now - began)
        seconds += time.monotonic() - began
        store(seconds)
        return seconds

    def _facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the manifest's part on the run, what the SAE was tuned from and how)"""
        source = self._source
        facts = source.manifest.run
        tuned = {
            "from": {"run": facts.get("id"), "snapshot": source.manifest.name, "sae": source.name},
            "loss": self._options.loss,
            "tokens": self._options.tokens,
            "learning_rate": self._options.learning_rate,
            "batch": self._options.batch,
        }
        identity = f"{facts.get('id')}-{source.name}-{self._options.loss}"
        return facts | {"id": identity, "tuned": tuned}, tuned

    def _write_summary(self, tuner: Tuner, seconds: float, before: Quality, after: Quality) -> None:
        """Writes summary.json, by which the monitor knows that the run is over."""
        name, numbers = self._source.name, tuner.numbers()
        summary = {
            "outcome": "finished",
            "fault": None,
            "tokens": numbers["tokens"],
            "target_tokens": numbers["tokens"],
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tuner.tokens / max(seconds, 1e-9), 1),
            "rows_trained": tuner.tokens,
            "rows_set_aside": 0,
            "shards_set_aside": [],
            "quarantined_ratio": 0.0,
            "saes": {name: numbers},
            "tuning": {"before": asdict(before), "after": asdict(after)},
        }
        replace_text(self._directory / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")


def write_settings(source: TuningSource, directory: Path) -> None:
    """Writes settings.toml: those of the run, with this directory and this SAE alone."""
    run = source.run.run.model_copy(update={"directory": str(directory)})
    settings = source.run.model_copy(update={"run": run, "sae": [source.settings]})
    replace_text(directory / "settings.toml", show_settings(settings) + "\n")


def in_words(quality: Quality) -> str:
    return (
        f"ΔCE {quality.ce_delta:.4g}, KL {quality.kl:.4g}, FVU {quality.fvu:.4g}, L0 {quality.l0:.4g} on "
        f"{quality.activations:,} held-out activations"
    )


def _load_model(source: TuningSource) -> LanguageModel:
    """The whole language model that the SAE was trained on. Raises ModelError or TuningError."""
    revision = str(source.stream.get("revision") or "")
    settings = settings_of(source.model, revision) if revision else first_settings(source.model)
    if (threads := source.run.run.threads) is not None:
        torch.set_num_threads(threads)
    log.info("loading %s", settings.name)
    model = load_language_model(settings, whole=True)
    if not model.predicts:
        raise TuningError(
            f"{settings.name} does not predict the next token: there are no predictions that a reconstruction changes"
        )
    if source.hook not in [hook.name for hook in model.hooks]:
        raise TuningError(f"model.hooks lacks {source.hook}, which the SAE reads; add it, as model.hooks=[…]")
    return model


def _check_text(source: TuningSource, text: Text, model: LanguageModel) -> None:
    """Raises TuningError for another text than the run's: what was held out of that is not held out of this."""
    facts = {
        "corpus_fingerprint": text.fingerprint,
        "tokens_fingerprint": text.tokens_fingerprint(model.tokenizer),
        "held_out": text.held_out,
    }
    different = [name for name, value in facts.items() if source.stream.get(name, value) != value]
    if different:
        raise TuningError(
            f"the text differs from the one that the run was trained on in {', '.join(different)}: what is held out "
            "here may have been trained on there; bring back the corpus of the run"
        )


def _progress(tuner: Tuner, total: int, at_start: int, seconds: float) -> str:
    rate = (tuner.tokens - at_start) / max(seconds, 1e-9)
    report = tuner.report()
    left = format_duration(max(0, total - tuner.tokens) / max(rate, 1e-9))
    return (
        f"tuned {tuner.tokens:,} of {total:,} tokens · KL {tuner.kl:.4f} · FVU {report.fvu:.4f} · L0 {report.l0:.1f} "
        f"· {rate:,.0f} tokens/s · {left} left"
    )
