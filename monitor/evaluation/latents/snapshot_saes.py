"""SAEs of a run's snapshots whose latents' activations are on disk; all of it mapped, so that it occupies no memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from monitor.evaluation.latents.activations import GONE, LatentActivations, load_latents
from monitor.evaluation.latents.views import Order
from monitor.files import is_within
from monitor.run_directory import LATENTS, NotFoundError, has_latents, newest_with_latents, read_json, saes_with_latents
from trainer.saes.inference import InferenceSae
from trainer.snapshot import SnapshotError


@dataclass(frozen=True)
class SnapshotSae:
    """One SAE of one snapshot, with the activations of its latents on held-out text."""

    folder: Path
    tokens: int
    """Tokens trained."""
    cfg: dict[str, Any]
    weights: dict[str, Tensor]
    latents: LatentActivations

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def snapshot(self) -> str:
        return self.folder.parent.name

    @cached_property
    def norms(self) -> np.ndarray:
        """Lengths of the rows of W_dec, float32 [d_sae]."""
        return torch.linalg.vector_norm(self.weights["W_dec"].float(), dim=1).numpy()

    @cached_property
    def inference(self) -> InferenceSae:
        """The SAE to run, whose weights are a copy in memory."""
        return InferenceSae(self.cfg, {name: weight.float() for name, weight in self.weights.items()}, self.name)

    def decoder_row(self, latent: int) -> Tensor:
        """float32 [d_out]"""
        return self.weights["W_dec"][latent].float()

    def sort_keys(self, order: Order) -> np.ndarray:
        """One number for each latent, [d_sae]; activations by how far they are from zero."""
        match order:
            case "index":
                return np.arange(self.latents.d_sae)
            case "density":
                return self.latents.density
            case "strongest":
                return np.abs(self.latents.strongest)
            case "norm":
                return self.norms
            case "age":
                return self.tokens - self.latents.born


class SnapshotSaes:
    """Opens the SAEs of one run, each once. Any thread may ask."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._lock = threading.Lock()
        self._cache: dict[Path, tuple[int, SnapshotSae]] = {}
        """For each folder, the time at which its activations were written, and the SAE."""

    def open(self, name: str, snapshot: str | None = None) -> SnapshotSae:
        """Opens one SAE of the newest snapshot that has its latents, or of `snapshot`. Raises NotFoundError."""
        newest = newest_with_latents(self._directory, name)
        if newest is None:
            names = ", ".join(repr(sae["name"]) for sae in saes_with_latents(self._directory)) or "none yet"
            raise NotFoundError(f"the latents of SAE {name!r} are not measured yet; the run's SAEs are {names}")
        if snapshot is not None and not has_latents(self._directory, snapshot, name):
            raise NotFoundError(
                f"no measured latents of SAE {name!r} in snapshot {snapshot!r}; the newest are in {newest}"
            )
        snapshot = snapshot or newest
        try:
            return self.open_folder(self._directory / "snapshots" / snapshot / name)
        except (*GONE, SnapshotError):
            raise NotFoundError(f"snapshot {snapshot} has just been retired; ask again") from None

    def open_folder(self, folder: Path) -> SnapshotSae:
        """Maps the files of `snapshots/SNAPSHOT/SAE`, unless they are mapped already. Raises SnapshotError or GONE.

        A trainer that has resumed from an earlier checkpoint may publish another snapshot under the same name: a file
        that was written anew is mapped anew.
        """
        path = folder / LATENTS
        if not is_within(path, folder):
            raise SnapshotError(f"{path} is a link out of its folder")
        written_ns = path.stat().st_mtime_ns
        with self._lock:
            cached_ns, sae = self._cache.get(folder, (None, None))
            if sae is None or cached_ns != written_ns:
                # Retired snapshots occupy the disk for as long as they are mapped.
                self._cache = {path: entry for path, entry in self._cache.items() if path.is_dir()}
                sae = _map_files(folder)
                self._cache[folder] = written_ns, sae
        return sae


def _map_files(folder: Path) -> SnapshotSae:
    cfg = read_json(folder / "cfg.json", folder)
    if cfg is None:
        raise SnapshotError(f"{folder} holds no cfg.json")
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return SnapshotSae(folder, int(folder.parent.name), cfg, weights, load_latents(folder / LATENTS))
