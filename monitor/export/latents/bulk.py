"""All latents of a run's SAEs, in files of one batch each.

SAE/batch-0.json …          `neuronpedia`: bodies for Neuronpedia's API
SAE/batch-0.json …          `saedashboard`: as SAEDashboard writes them for Neuronpedia's importer, and
SAE/sae_vis_data-0.json …   as it draws them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.evaluation.latents.logit_lens import LogitLens
from monitor.evaluation.latents.snapshot_saes import SnapshotSae, SnapshotSaes
from monitor.evaluation.latents.texts import Texts
from monitor.export.errors import ExportError
from monitor.export.latents.dashboards import Dashboard, Dashboards
from monitor.export.latents.neuronpedia import NeuronpediaSource, upload_batch
from monitor.export.latents.saedashboard import batch, sae_vis_data
from monitor.export.records import OnProgress
from monitor.run_directory import NotFoundError, saes_with_latents
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from producer.common.toml import SettingsError
from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model

BATCH = 128
"""Latents of a file; Neuronpedia takes no more at a time."""
LAYER = re.compile(r"\.(\d+)(?:\.|$)")

Files = dict[str, dict[str, Any]]
"""Documents, by the beginning of their file's name."""


@dataclass(frozen=True)
class Naming:
    """Names in Neuronpedia; None for names that are made of the run's own."""

    model_id: str | None = None
    set_name: str | None = None


def write_latents(
    run_directory: Path, folder: Path, format_name: str, saes: Sequence[str], naming: Naming, on_progress: OnProgress
) -> list[Path]:
    """Writes these SAEs of a run, or all, from the newest snapshot whose latents are measured.

    Returns the folders of the SAEs. Raises ExportError.
    """
    settings = _settings(run_directory)
    sources = _open(run_directory, saes)
    assert settings.model is not None
    try:
        model = load_language_model(settings.model, whole=True)
    except ModelError as error:
        raise ExportError(str(error)) from None
    texts, lens = Texts(model.tokenizer), LogitLens(model)
    model_id = naming.model_id or Path(settings.model.name).name.lower()
    total, written, folders = sum(sae.latents.d_sae for sae in sources), 0, []
    for sae in sources:
        source = NeuronpediaSource(
            model_id, _layer(sae), naming.set_name or f"{run_directory.resolve().name}-{sae.name}"
        )
        format_batch = _formats(sae, source)[format_name]
        dashboards = Dashboards(sae, lens, texts)
        target = folder / sae.name
        target.mkdir(parents=True)
        folders.append(target)
        for number, first in enumerate(range(0, sae.latents.d_sae, BATCH)):
            latents = range(first, min(first + BATCH, sae.latents.d_sae))
            for name, document in format_batch([dashboards.of(latent) for latent in latents]).items():
                text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                (target / f"{name}-{number}.json").write_text(text, encoding="utf-8")
            written += len(latents)
            on_progress(written / total)
    return folders


def _formats(sae: SnapshotSae, source: NeuronpediaSource) -> dict[str, Callable[[list[Dashboard]], Files]]:
    windows = (len(sae.latents.ids), sae.latents.context)
    text_name = str(sae.cfg.get("metadata", {}).get("dataset_path", ""))
    return {
        "neuronpedia": lambda latents: {"batch": upload_batch(source, latents)},
        "saedashboard": lambda latents: {
            "batch": batch(source, latents, text_name, windows),
            "sae_vis_data": sae_vis_data(latents),
        },
    }


def _settings(run_directory: Path) -> MonitorSettings:
    """The settings that the trainer has written down, which name the language model. Raises ExportError."""
    path = run_directory / "settings.toml"
    if not path.is_file():
        raise ExportError(f"{run_directory} holds no settings.toml: name a run directory, such as runs/gpt2")
    try:
        settings = read_run_file(MonitorSettings, path, [])
    except SettingsError as error:
        raise ExportError(str(error)) from None
    if settings.model is None:
        raise ExportError(f"{path} has no [model]: there is no language model whose text could be shown")
    return settings


def _open(run_directory: Path, names: Sequence[str]) -> list[SnapshotSae]:
    """SAEs with the activations of their latents. Raises ExportError."""
    measured = [str(entry["name"]) for entry in saes_with_latents(run_directory) if entry["snapshot"] is not None]
    if not measured:
        raise ExportError(
            f"{run_directory} has no snapshot whose latents were measured yet (latents.safetensors): the monitor does "
            "it, with monitor.latents_tokens above 0"
        )
    saes = SnapshotSaes(run_directory)
    try:
        return [saes.open(name) for name in names or measured]
    except NotFoundError as error:
        raise ExportError(str(error)) from None


def _layer(sae: SnapshotSae) -> int:
    """The number of the block at whose hook the SAE writes; 0 where the hook names none."""
    match = LAYER.search(sae.inference.hooks.writes[-1])
    return int(match[1]) if match else 0
