"""The published SAE that a tuning begins with, and the settings that it is tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from producer.common.run_file import read_run_file
from producer.common.toml import show_value
from producer.settings import ModelSettings
from trainer.defaults import LengthSettings, planned_tokens
from trainer.saes import registry
from trainer.saes.formats import PublishedSae
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.snapshot import Manifest, describe_names, read_manifest, snapshot_names
from trainer.tuning.options import TuningError


@dataclass(frozen=True)
class TuningSource:
    """One SAE of a snapshot."""

    run: TrainerSettings
    """Settings of the run that trained it."""
    manifest: Manifest
    """Of the snapshot."""
    folder: Path
    """Of the SAE."""
    metadata: dict[str, Any]
    """Those of its cfg.json."""
    settings: SaeSettings
    """[[sae]] to tune it with."""
    hook: str
    input_scale: float
    """What it multiplies raw activations with in training."""
    training_rate: float
    """Peak of the learning rate in its training."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def model(self) -> ModelSettings:
        assert self.run.model is not None
        return self.run.model

    @property
    def stream(self) -> dict[str, Any]:
        """Facts about the stream that it was trained on."""
        return self.manifest.run.get("stream", {})

    @property
    def norm_bounds(self) -> dict[str, float]:
        """By hook, the norm beyond which the stream drops an activation."""
        return self.stream.get("norm_bounds") or {}


def read_run(directory: Path, overrides: list[str]) -> TrainerSettings:
    """The settings of a run directory. Raises TuningError or SettingsError."""
    path = directory / "settings.toml"
    if not path.is_file():
        raise TuningError(
            f"{directory} holds no settings.toml: name the directory of a run, [run] directory of its file"
        )
    settings = read_run_file(TrainerSettings, path, overrides)
    if settings.model is None:
        raise TuningError(f"{directory} is a run on synthetic activations: there is no language model to tune with")
    return settings


def read_source(directory: Path, run: TrainerSettings, name: str, snapshot: str | None) -> TuningSource:
    """The SAE `name` of a snapshot, of the newest that has it by default. Raises TuningError or SnapshotError."""
    folder = directory / "snapshots" / (snapshot or _newest_with(directory, name))
    if snapshot is not None and snapshot not in (names := snapshot_names(directory)):
        raise TuningError(f"no snapshot {show_value(snapshot)} in {directory}; {describe_names(names)}")
    manifest = read_manifest(folder)
    if name not in manifest.saes:
        raise TuningError(f"snapshot {folder.name} has no SAE {show_value(name)}; it has {', '.join(manifest.saes)}")
    metadata = PublishedSae(folder / name).cfg["metadata"]
    hooks = SaeHooks.from_metadata(metadata)
    if fault := _fault(name, metadata, hooks):
        raise TuningError(fault)
    trained_with = _trained_with(name, metadata["settings"])
    tokens = planned_tokens(trained_with.tokens, run.run.tokens)
    return TuningSource(
        run=run,
        manifest=manifest,
        folder=folder / name,
        metadata=metadata,
        settings=_settings(name, folder / name, trained_with),
        hook=hooks.reads[0],
        input_scale=float(metadata["input_scale"]),
        training_rate=LengthSettings.of(trained_with, run.optimizer, tokens).learning_rate,
    )


def _newest_with(directory: Path, name: str) -> str:
    """The newest snapshot that has an SAE of this name. Raises TuningError or SnapshotError."""
    others: set[str] = set()
    for snapshot in reversed(snapshot_names(directory)):
        saes = read_manifest(directory / "snapshots" / snapshot).saes
        if name in saes:
            return snapshot
        others |= saes.keys()
    if not others:
        raise TuningError(f"{directory} has no snapshot yet: there is nothing to tune")
    raise TuningError(
        f"no snapshot in {directory} has an SAE {show_value(name)}; there are {', '.join(sorted(others))}"
    )


def _fault(name: str, metadata: dict[str, Any], hooks: SaeHooks) -> str | None:
    """Why this SAE cannot be tuned; None when it can."""
    raw = metadata.get("settings")
    if not isinstance(raw, dict) or not metadata.get("input_scale"):
        return (
            f"sae {show_value(name)}: its cfg.json holds no settings of a training by Sluice; tune one that it trained"
        )
    if hooks.is_transcoder or hooks.is_crosscoder:
        kind = "transcoder" if hooks.is_transcoder else "crosscoder"
        return (
            f"sae {show_value(name)} is a {kind}: its reconstruction takes the place of other activations than the one "
            "hook it reads, and tuning is for autoencoders of one hook"
        )
    tunable = [name for name in registry.names() if registry.get(name).Settings.IS_TUNABLE]
    if raw.get("architecture") not in tunable:
        return (
            f"sae {show_value(name)} has architecture {show_value(raw.get('architecture'))}; "
            f"tuning is for {', '.join(tunable)}"
        )
    if raw.get("matryoshka"):
        return (
            f"sae {show_value(name)} is nested (matryoshka), and each level would need passes of its own; tune another"
        )
    return None


def _trained_with(name: str, raw: dict[str, Any]) -> SaeSettings:
    """The settings of the training. Raises TuningError for those of another version."""
    try:
        return SaeSettings.of(**raw)
    except ValidationError as error:
        raise TuningError(
            f"sae {show_value(name)}: the settings in its cfg.json are not those of this version "
            f"({error.errors()[0]['msg']}); tune it with the version that trained it"
        ) from None


def _settings(name: str, folder: Path, trained_with: SaeSettings) -> SaeSettings:
    """Settings to tune with: those of the training, with nothing that replaces weights or averages them."""
    changes: dict[str, Any] = {
        "name": name,
        "start_from": str(folder),
        "revive": "none",
        "reinitialise_tokens": 0,
        "whitening": False,
        "ema_tokens": None,
        "tokens": None,
        "learning_rate": None,
        "sparsity_warmup_tokens": 0,
        "anneal_tokens": 0,
        "anneal_from": None,
    }
    fields = type(trained_with).model_fields
    return trained_with.model_copy(update={key: value for key, value in changes.items() if key in fields})
