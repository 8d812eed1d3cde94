"""The folder of a snapshot as it is published: the snapshot, and its model card.

    README.md                       the model card
    manifest.json                   as in the snapshot, without the settings of the machine that it ran on
    NAME/cfg.json, sae_weights.safetensors, sparsity.safetensors, selftest.safetensors, evaluation.json

Activations of latents (latents.safetensors) are left out: they hold the text that they were measured on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from monitor.evaluation.results import EVALUATION
from monitor.publishing.card import model_card, published_settings
from trainer.snapshot import FORMAT, NAME, Manifest, SnapshotError, is_complete, snapshot_names, verify
from trainer.state.durable import new_folder

OnProgress = Callable[[float], None]


def find_snapshot(path: Path) -> Path:
    """The snapshot in `path`: itself, or the newest one of a run directory. Raises SnapshotError."""
    if is_complete(path):
        return path
    if names := snapshot_names(path):
        return path / "snapshots" / names[-1]
    if is_complete(path.parent) and (path / "cfg.json").is_file():
        raise SnapshotError(f"{path} is one SAE of a snapshot; publish {path.parent}, with --sae {path.name}")
    if NAME.fullmatch(path.name) and path.is_dir():
        raise SnapshotError(f"{path} holds no manifest.json: it is not a complete snapshot")
    raise SnapshotError(f"{path} is no snapshot (manifest.json), and no run directory with a complete one (snapshots/)")


def write_folder(
    snapshot: Path, target: Path, repository: str, saes: list[str], license_name: str | None, on_progress: OnProgress
) -> None:
    """Writes `target`, whole or not at all, with these SAEs of a snapshot, or all. Raises SnapshotError."""
    manifest = _restricted(verify(snapshot), saes)
    with new_folder(target) as folder:
        for number, file in enumerate(manifest.files):
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / file.path, folder / file.path)
            on_progress((number + 1) / len(manifest.files))
        for sae in manifest.saes:
            if (snapshot / sae / EVALUATION).is_file():
                shutil.copyfile(snapshot / sae / EVALUATION, folder / sae / EVALUATION)
        document = {"format": FORMAT, **asdict(manifest)}
        (folder / "manifest.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        (folder / "README.md").write_text(model_card(folder, manifest, repository, license_name), encoding="utf-8")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


def _restricted(manifest: Manifest, saes: list[str]) -> Manifest:
    """The manifest with these SAEs alone, and the settings that are published."""
    if unknown := [sae for sae in saes if sae not in manifest.saes]:
        raise SnapshotError(f"the snapshot has no SAE {unknown[0]!r}; it has {', '.join(manifest.saes)}")
    names = saes or list(manifest.saes)
    settings = published_settings(manifest.run.get("settings") or {})
    if "sae" in settings:
        settings["sae"] = [sae for sae in settings["sae"] if sae.get("name") in names]
    return replace(
        manifest,
        saes={name: manifest.saes[name] for name in names},
        run={**manifest.run, "settings": settings},
        files=tuple(file for file in manifest.files if file.path.partition("/")[0] in names),
    )
