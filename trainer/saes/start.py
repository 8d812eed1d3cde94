"""Weights that an SAE goes on from: a folder of a Sluice snapshot, of SAELens, or of sparsify.

Which published SAEs an architecture may go on from is its own fact (`Sae.startable`), transcoders of the same kind
included when there is a target. Optimizer and statistics begin anew, and so do the run's input scales: the weights are
brought into them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform, fold_norms, recentre, require_almost_unit_rows, unfold
from trainer.saes.formats import read_published
from trainer.saes.published import Published
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError

log = logging.getLogger("sluice.trainer")


@dataclass(frozen=True)
class Start:
    """Published weights, and the folder they are from."""

    path: Path
    sae: Published

    def weights_for(self, sae: Sae, transform: InputTransform) -> dict[str, Tensor]:
        """In the layout and the scale that `sae` learns in. Raises SnapshotError when it cannot hold them."""
        self.require_widths(sae)
        weights = unfold(self.sae.weights, transform)
        try:
            if sae.unit_decoder:
                if not self.sae.activation.unit_rows:
                    require_almost_unit_rows(weights["W_dec"])
                weights = fold_norms(weights)
            weights = sae.adapt(weights)
        except SnapshotError as error:
            raise SnapshotError(f"sae {sae.settings.name!r}: start_from = {self.path}: {error}") from None
        return recentre(weights, self.sae.cfg["apply_b_dec_to_input"], sae.centred)

    def require_widths(self, sae: Sae) -> None:
        """Raises SnapshotError unless the hooks of `sae` are as wide as those it was trained on."""
        if (self.sae.d_in, self.sae.d_out) != (sae.d_in, sae.d_out):
            raise SnapshotError(
                f"sae {sae.settings.name!r}: start_from = {self.path} is for rows of {_widths(self.sae)} numbers, its "
                f"hooks have {_widths(sae)}: choose the hooks it was trained on"
            )


def _widths(sae: Published | Sae) -> str:
    return str(sae.d_in) if sae.d_in == sae.d_out else f"{sae.d_in} → {sae.d_out}"


def check_starts(settings: TrainerSettings) -> None:
    """Reads what each `start_from` names before anything waits for it. Raises SnapshotError at the first of no use."""
    for sae in settings.sae:
        start = read_start(sae)
        told = start.sae.metadata.get("hook_name") if start else None
        reads = settings.hooks_of(sae).reads
        if start is not None and told not in (None, *reads):
            log.warning("sae %s: start_from was trained on %s, not on %s", sae.name, told, ", ".join(reads))


def read_start(settings: SaeSettings) -> Start | None:
    """What `start_from` names; None when it names nothing. Raises SnapshotError for what cannot be gone on from."""
    if settings.start_from is None:
        return None
    path = Path(settings.start_from).absolute()
    try:
        sae = read_published(path)
    except SnapshotError as error:
        raise SnapshotError(f"sae {settings.name!r}: start_from = {path}: {error}") from None
    if fault := _fault(settings, sae):
        raise SnapshotError(f"sae {settings.name!r}: start_from = {path} is a {sae.architecture} SAE; {fault}")
    return Start(path, sae)


def _fault(settings: SaeSettings, sae: Published) -> str | None:
    """Why these settings cannot go on from it, and what to change."""
    startable = registry.get(settings.architecture).startable(settings)
    if sae.activation.name not in startable:
        return f"architecture {settings.title} goes on from {' or '.join(sorted(startable))}"
    if sae.is_transcoder and settings.target is None:
        return "set target to the hook it reconstructs"
    if settings.target is not None and not sae.is_transcoder:
        return "remove target"
    if "W_skip" in sae.weights and not settings.skip:
        return "set skip = true"
    if sae.d_sae != settings.d_sae:
        return f"set d_sae = {sae.d_sae}"
    return settings.start_fault(sae.cfg)
