"""Start training from published weights: an SAE of a Sluice snapshot, of SAELens, or of sparsify.

Each architecture says which published SAEs its training may start from (`Sae.startable`); a transcoder starts from a
transcoder. Only weights are taken over: optimizer, statistics and input scales are those of the new run.

No process holds all weights of an SAE that ranks share: each reads those of its latents, and what looks at all reads
them a few latents at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import (
    InputTransform,
    are_unit,
    fold_norms,
    recentre,
    require_almost_unit_rows,
    unfold,
)
from trainer.saes.formats import PublishedSae
from trainer.saes.hooks import SaeHooks
from trainer.saes.published import SaeWeights
from trainer.saes.settings import SHARED_PARAMETERS, SaeSettings
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError

log = logging.getLogger("sluice.trainer")


LATENTS_AT_ONCE = 4096
"""Latents that are read at a time where one process looks at all of them."""

VectorOf = Callable[[range], Tensor]
"""A number of each of some latents."""


def check_starts(settings: TrainerSettings) -> None:
    """Reads every `start_from` of a run file, before producers are waited for. Raises SnapshotError."""
    for sae in settings.sae:
        if (start := read_start(sae)) is None:
            continue
        trained_on, reads = SaeHooks.from_metadata(start.cfg["metadata"]).reads[:1], settings.hooks_of(sae).reads
        if not set(trained_on) <= set(reads):
            log.warning("sae %s: start_from was trained on %s, not on %s", sae.name, trained_on[0], ", ".join(reads))


def open_start(settings: SaeSettings) -> PublishedSae | None:
    """The SAE in the folder `start_from`, whose weights are still to be read; None without one.

    Raises SnapshotError when training cannot start there.
    """
    if settings.start_from is None:
        return None
    with _folder_in_errors(settings):
        start = PublishedSae(Path(settings.start_from).absolute())
    if fault := _fault(settings, start):
        raise SnapshotError(f"{_start_from(settings)} is a {start.architecture} SAE; {fault}")
    return start


def read_start(settings: SaeSettings) -> PublishedSae | None:
    """As `open_start`, once all weights were read, a few latents at a time: raises SnapshotError for bad ones too."""
    start = open_start(settings)
    if start is not None:
        with _folder_in_errors(settings):
            for latents in _parts(start.d_sae):
                start.read(latents)
    return start


def check_start(start: PublishedSae, sae: Sae, transform: InputTransform) -> None:
    """Raises SnapshotError when `sae` cannot hold the weights; one process reads all, a few latents at a time."""
    parts = _StartWeights(start, sae, transform, lambda of: torch.cat([of(part) for part in _parts(start.d_sae)]))
    with _folder_in_errors(sae.settings):
        parts.adapted(range(0))


def start_weights(start: PublishedSae, sae: Sae, transform: InputTransform) -> dict[str, Tensor]:
    """Published weights of this rank's latents, in the layout and scale of `sae`. Collective.

    Raises SnapshotError, on all ranks, when it cannot hold them.
    """
    parts = _StartWeights(start, sae, transform, lambda of: sae.ranks.gather_rows(of(sae.latents), "start"))
    with _folder_in_errors(sae.settings):
        weights = parts.adapted(sae.latents)
    was_centred = bool(start.cfg["apply_b_dec_to_input"])
    # Block by block: the last digit of a product may depend on the number of its rows.
    blocks = [recentre(rows_of(weights, block.latents), was_centred, sae.centred) for block in sae.blocks]
    return {
        name: value if name in SHARED_PARAMETERS else torch.cat([block[name] for block in blocks])
        for name, value in blocks[0].items()
    }


class _StartWeights:
    """Published weights of some latents as an SAE in training has them.

    `of_all` answers what all latents decide together: it returns a number of each of them, [d_sae], from a function for
    some.
    """

    def __init__(
        self, start: PublishedSae, sae: Sae, transform: InputTransform, of_all: Callable[[VectorOf], Tensor]
    ) -> None:
        require_widths(start, sae)
        self._start = start
        self._sae = sae
        self._transform = transform
        self._of_all = of_all
        self._last: tuple[range, dict[str, Tensor]] = range(0), {}

    def adapted(self, latents: range) -> dict[str, Tensor]:
        sae = self._sae
        if sae.unit_decoder and not self._start.activation.unit_rows:
            require_almost_unit_rows(self._of_all(lambda part: self._scaled(part)["W_dec"].norm(dim=1)))
        return sae.adapt(self._folded(latents), lambda of: self._of_all(lambda part: of(self._folded(part))))

    def _folded(self, latents: range) -> dict[str, Tensor]:
        """For scaled activations, with decoder rows of unit norm where the SAE keeps them so."""
        weights = self._scaled(latents)
        return fold_norms(weights) if self._sae.unit_decoder else weights

    def _scaled(self, latents: range) -> dict[str, Tensor]:
        """For scaled activations; those of the last latents asked for are kept."""
        if self._last[0] != latents or not self._last[1]:
            weights = self._read(latents).weights
            if self._rescales:
                weights = fold_norms(weights)
            self._last = latents, unfold(weights, self._transform)
        return self._last[1]

    def _read(self, latents: range) -> SaeWeights:
        return self._start.read(latents)

    @cached_property
    def _rescales(self) -> bool:
        """Norms of decoder rows belong into the latents, and not all are 1."""
        if not self._start.may_need_folding:
            return False
        return not are_unit(self._of_all(lambda part: self._read(part).weights["W_dec"].norm(dim=1)))


def rows_of(weights: Mapping[str, Tensor], latents: slice) -> dict[str, Tensor]:
    """Weights of some latents, and those that belong to no latent."""
    return {name: value if name in SHARED_PARAMETERS else value[latents] for name, value in weights.items()}


def _parts(d_sae: int) -> Iterator[range]:
    return (range(d_sae)[first : first + LATENTS_AT_ONCE] for first in range(0, d_sae, LATENTS_AT_ONCE))


@contextmanager
def _folder_in_errors(settings: SaeSettings) -> Iterator[None]:
    """Puts the SAE and its `start_from` before what a SnapshotError says."""
    try:
        yield
    except SnapshotError as error:
        raise SnapshotError(f"{_start_from(settings)}: {error}") from None


def require_widths(start: PublishedSae, sae: Sae) -> None:
    """Raises SnapshotError unless the hooks of `sae` are as wide as those that `start` was trained on."""
    if (start.d_in, start.d_out) != (sae.d_in, sae.d_out):
        raise SnapshotError(
            f"{_start_from(sae.settings)} is for rows of {_widths(start)} numbers, its hooks have {_widths(sae)}: "
            "choose the hooks it was trained on"
        )


def _start_from(settings: SaeSettings) -> str:
    """The SAE and the folder that an error is about."""
    return f"sae {settings.name!r}: start_from = {Path(settings.start_from or '').absolute()}"


def _widths(sae: PublishedSae | Sae) -> str:
    return str(sae.d_in) if sae.d_in == sae.d_out else f"{sae.d_in} → {sae.d_out}"


def _fault(settings: SaeSettings, sae: PublishedSae) -> str | None:
    """The reason why training with these settings cannot start from `sae`, and what to change."""
    startable = registry.get(settings.architecture).startable(settings)
    if sae.activation.name not in startable:
        return f"architecture {settings.title} goes on from {' or '.join(sorted(startable))}"
    if sae.is_transcoder and settings.target is None:
        return "set target to the hook it reconstructs"
    if settings.target is not None and not sae.is_transcoder:
        return "remove target"
    if sae.has_skip and not settings.skip:
        return "set skip = true"
    if sae.d_sae != settings.d_sae:
        return f"set d_sae = {sae.d_sae}"
    return settings.start_fault(sae.cfg)
