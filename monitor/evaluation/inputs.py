"""Inputs of every evaluation of a run: the language model and the texts, loaded once, and the snapshot."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.evaluator import Baseline
from monitor.evaluation.probing import LabelledTexts, read_labelled_texts
from monitor.settings import MonitorSettings
from monitor.snapshot_index import manifest_of
from producer.corpus import open_text
from producer.corpus.held_out import HeldOutText, held_out_text
from producer.corpus.rendering.windows import Windows
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.lm.passes import NormBounds
from producer.lm.revisions import first_settings, settings_of
from producer.settings import ModelSettings
from trainer.snapshot import Manifest

log = logging.getLogger("sluice.monitor")


@dataclass(frozen=True)
class PublishedSnapshot:
    """One snapshot of the run."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> PublishedSnapshot:
        """Reads the manifest. Raises SnapshotError."""
        return cls(folder, manifest_of(folder))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def saes(self) -> list[str]:
        return list(self.manifest.saes)

    @property
    def stream(self) -> dict[str, Any]:
        """Facts about the stream that the SAEs were trained on."""
        return self.manifest.run.get("stream", {})

    @property
    def revision(self) -> str:
        """The checkpoint of a language model under training whose activations were trained on last."""
        return str(self.stream.get("revision", ""))

    @property
    def norm_bounds(self) -> NormBounds | None:
        """For each hook, the norm beyond which that stream drops an activation."""
        return self.stream.get("norm_bounds")


@dataclass(frozen=True)
class EvaluationInputs:
    """The language model and the texts."""

    model: LanguageModel
    text: HeldOutText
    """Text that SAEs are measured on."""
    latent_windows: Windows
    """Text on which the activations of their latents are gathered."""
    stream_facts: dict[str, Any]
    """Facts that the stream of a snapshot must agree with."""
    labelled_texts: LabelledTexts | None
    """Texts of monitor.probe_file."""
    baseline: Baseline = field(default_factory=Baseline)
    revision: str = ""
    """Of a language model under training: the checkpoint that `model` is."""

    def at_revision(self, settings: ModelSettings, revision: str) -> EvaluationInputs:
        """Loads another checkpoint of a language model under training; the texts stay. Raises ModelError."""
        model = load_language_model(settings_of(settings, revision), whole=True, tokenizer=self.model.tokenizer)
        return replace(self, model=model, baseline=Baseline(), revision=revision)

    def check_stream(self, snapshot: PublishedSnapshot) -> None:
        """Raises EvaluationError for another stream: text is held out only from the same text, cut the same way."""
        stream = snapshot.stream
        different = [name for name, value in self.stream_facts.items() if name in stream and stream[name] != value]
        if different:
            raise EvaluationError(
                f"the snapshot's stream differs from the run file in {', '.join(different)}: what is held out here may "
                "have been trained on there; give the monitor the run file, and the text, that the producers have"
            )


def load_inputs(settings: MonitorSettings) -> EvaluationInputs:
    """Loads the model and the texts, which takes a while. Raises ModelError, CorpusError or EvaluationError."""
    assert settings.model is not None, "why_not_evaluated() comes first"
    corpus_settings, monitor = settings.corpus, settings.monitor
    torch.set_num_threads(monitor.evaluation_threads)
    log.info("loading %s and held-out text, to evaluate with", settings.model.name)
    text = open_text(corpus_settings)
    model = load_language_model(first_settings(settings.model), whole=True)
    if not model.predicts:
        log.info(
            "%s %s: its SAEs are measured by what they reconstruct (FVU, cosine, L0, density, latents), and not by "
            "cross-entropy, KL and effects of ablation",
            settings.model.name,
            "has no head that gives logits" if model.causal else "does not predict the next token",
        )
    text.check_packing(model.tokenizer, model.vocabulary)
    model.check_context(corpus_settings.context)
    held_out, latents_text = (
        held_out_text(text, model.tokenizer, max(1, tokens))
        for tokens in (monitor.evaluation_tokens, monitor.latents_tokens)
    )
    windows, latent_windows = held_out.windows, latents_text.windows
    model.check_ids(torch.from_numpy(np.concatenate([windows.ids, latent_windows.ids])), "held-out window")
    log.info(
        "evaluating with %s on %s held-out activations in %s windows",
        settings.model.name,
        f"{int(windows.kept.sum()):,}",
        f"{len(windows):,}",
    )
    stream_facts = {
        "corpus_fingerprint": text.fingerprint,
        "tokens_fingerprint": text.tokens_fingerprint(model.tokenizer),
        "held_out": text.held_out,
    }
    labelled_texts = _load_labelled_texts(settings, model)
    first = settings.model.revisions[0] if settings.model.revisions else ""
    return EvaluationInputs(model, held_out, latent_windows, stream_facts, labelled_texts, revision=first)


def _load_labelled_texts(settings: MonitorSettings, model: LanguageModel) -> LabelledTexts | None:
    if settings.monitor.probe_file is None:
        return None
    path = Path(settings.monitor.probe_file).absolute()
    texts = read_labelled_texts(path, model.tokenizer, settings.corpus)
    model.check_ids(torch.from_numpy(texts.windows.ids), "monitor.probe_file, window")
    return texts
