"""The birth of each latent of an SAE: the token count since which it has its direction, over a run's snapshots."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from monitor.evaluation.latents.activations import GONE, births, load_decoder, load_latents
from monitor.run_directory import LATENTS, newest_with_latents, snapshots_with
from trainer.snapshot import SnapshotError


@dataclass(frozen=True)
class _Directions:
    """The decoder rows of an SAE in one snapshot."""

    snapshot: str
    W_dec: Tensor
    """[d_sae, d_out]"""
    births: np.ndarray
    """Tokens since which each row has its direction, int64 [d_sae]."""


class BirthTracker:
    """Remembers the directions of each SAE of a run in the snapshot that was asked for last.

    So nothing is lost where retention has removed the snapshots before.
    """

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._directions: dict[str, _Directions] = {}
        """Decoder rows by SAE."""

    def births(self, snapshot: Path, sae: str) -> np.ndarray:
        """The token count since which each latent has its direction, from all earlier snapshots that are there.

        Raises SnapshotError when the snapshot is gone.
        """
        directions = self._directions.get(sae)
        if directions is None or directions.snapshot >= snapshot.name:  # the trainer may have resumed from before it
            directions = self._read_stored(snapshot, sae)
        for name in snapshots_with(self._directory, sae, after=directions.snapshot if directions else ""):
            if name <= snapshot.name:
                with suppress(*GONE):
                    W_dec = load_decoder(snapshot.parent / name / sae)
                    before = (directions.W_dec, directions.births) if directions else None
                    directions = _Directions(name, W_dec, births(W_dec, int(name), before))
        if directions is None or directions.snapshot != snapshot.name:
            raise SnapshotError(f"snapshot {snapshot.name} has just been retired")
        self._directions[sae] = directions
        return directions.births

    def _read_stored(self, snapshot: Path, sae: str) -> _Directions | None:
        """Directions and births that an earlier snapshot has on disk."""
        name = newest_with_latents(self._directory, sae)
        if name is None or name >= snapshot.name:
            return None
        folder = snapshot.parent / name / sae
        return _Directions(name, load_decoder(folder), load_latents(folder / LATENTS).born)
