"""Start training from published weights: an SAE of a Sluice snapshot, of SAELens, or of sparsify.

Each architecture says which published SAEs its training may start from (`Sae.startable`); a transcoder starts from a
transcoder. Only weights are taken over: optimizer, statistics and input scales are those of the new run.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform, fold_norms, recentre, require_almost_unit_rows, unfold
from trainer.saes.formats import read_published
from trainer.saes.hooks import SaeHooks
from trainer.saes.published import SaeWeights
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError

log = logging.getLogger("sluice.trainer")


def check_starts(settings: TrainerSettings) -> None:
    """Reads every `start_from` of a run file, before producers are waited for. Raises SnapshotError."""
    for sae in settings.sae:
        if (start := read_start(sae)) is None:
            continue
        trained_on, reads = SaeHooks.from_metadata(start.metadata).reads[:1], settings.hooks_of(sae).reads
        if not set(trained_on) <= set(reads):
            log.warning("sae %s: start_from was trained on %s, not on %s", sae.name, trained_on[0], ", ".join(reads))


def read_start(settings: SaeSettings) -> SaeWeights | None:
    """The SAE in the folder `start_from`; None without one. Raises SnapshotError when training cannot start there."""
    if settings.start_from is None:
        return None
    try:
        sae = read_published(Path(settings.start_from).absolute())
    except SnapshotError as error:
        raise SnapshotError(f"{_start_from(settings)}: {error}") from None
    if fault := _fault(settings, sae):
        raise SnapshotError(f"{_start_from(settings)} is a {sae.architecture} SAE; {fault}")
    return sae


def start_weights(start: SaeWeights, sae: Sae, transform: InputTransform) -> dict[str, Tensor]:
    """Published weights in the layout and scale of `sae`. Raises SnapshotError when it cannot hold them."""
    require_widths(start, sae)
    weights = unfold(start.weights, transform)
    try:
        if sae.unit_decoder:
            if not start.activation.unit_rows:
                require_almost_unit_rows(weights["W_dec"])
            weights = fold_norms(weights)
        weights = sae.adapt(weights)
    except SnapshotError as error:
        raise SnapshotError(f"{_start_from(sae.settings)}: {error}") from None
    return recentre(weights, start.cfg["apply_b_dec_to_input"], sae.centred)


def require_widths(start: SaeWeights, sae: Sae) -> None:
    """Raises SnapshotError unless the hooks of `sae` are as wide as those that `start` was trained on."""
    if (start.d_in, start.d_out) != (sae.d_in, sae.d_out):
        raise SnapshotError(
            f"{_start_from(sae.settings)} is for rows of {_widths(start)} numbers, its hooks have {_widths(sae)}: "
            "choose the hooks it was trained on"
        )


def _start_from(settings: SaeSettings) -> str:
    """The SAE and the folder that an error is about."""
    return f"sae {settings.name!r}: start_from = {Path(settings.start_from or '').absolute()}"


def _widths(sae: SaeWeights | Sae) -> str:
    return str(sae.d_in) if sae.d_in == sae.d_out else f"{sae.d_in} → {sae.d_out}"


def _fault(settings: SaeSettings, sae: SaeWeights) -> str | None:
    """The reason why training with these settings cannot start from `sae`, and what to change."""
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
