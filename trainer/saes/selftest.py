"""The self-test of a published SAE: raw activations with the latents and the reconstruction that they must give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from producer.common.parsing import ParseError, read_object
from trainer.parallel.ranks import ALONE
from trainer.saes.inference import require_activation
from trainer.saes.partwise import ActiveLatents, PartwiseSae, WeightsOf
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.snapshot import WEIGHTS, SnapshotError, read_selftest
from trainer.state.tensor_file import TensorFile, TensorFileError

SELFTEST_ROWS = 16
TOLERANCE = 1e-5
"""Relative difference up to which a self-test passes."""


def check(folder: Path) -> None:
    """Runs a snapshot's self-test with the weights on disk, a few latents at a time.

    Raises SnapshotError when they disagree.
    """
    try:
        cfg, file = read_object(folder / "cfg.json"), TensorFile(folder / WEIGHTS)
    except (OSError, ParseError, TensorFileError) as error:
        raise SnapshotError(f"{folder} holds no readable SAE: {error}") from None
    with file:
        test = {name: torch.from_numpy(array) for name, array in read_selftest(folder).items()}
        x, d_sae = test["x"], file.shape("W_dec")[0]
        sae = PartwiseSae(cfg, [range(d_sae)], weights_on_disk(file, cfg), ALONE, d_sae)
        latents, expected = sae.encode(x), expected_latents(test)
        _agree(f"{folder.name}: latents", distance(latents, expected), float(expected.value.norm()))
        agree(f"{folder.name}: reconstruction", sae.decode(latents, x), test["x_hat"])
        if cfg.get("rescale_acts_by_decoder_norm", True):
            norms = sae.decoder_norms()
            norms = norms[norms > 0]
            agree(f"{folder.name}: decoder norms", norms, torch.ones_like(norms))


def weights_on_disk(file: TensorFile, cfg: Mapping[str, Any]) -> WeightsOf:
    """Reads the weights of some latents; those that belong to no single latent are read once."""
    activation = require_activation(cfg)
    shared = {name: torch.from_numpy(file.read_rows(name)) for name in SHARED_PARAMETERS if name in file.names}

    def weights_of(latents: range) -> dict[str, Tensor]:
        first, end = latents.start, latents.stop
        rows = {name: torch.from_numpy(file.read_rows(name, first, end)) for name in ("W_dec", *activation.vectors)}
        if activation.is_tied:
            return shared | rows
        return shared | rows | {"W_enc": torch.from_numpy(file.read_columns("W_enc", first, end))}

    return weights_of


def widest_margins(sae: PartwiseSae, x: Tensor) -> Tensor:
    """The SELFTEST_ROWS rows of x with the widest margins, whose latents do not depend on rounding. Collective."""
    return x[sae.margins(x).topk(min(SELFTEST_ROWS, len(x))).indices]


def expected_latents(test: Mapping[str, Tensor]) -> ActiveLatents:
    """The active latents in a selftest.safetensors."""
    if (latents := test.get("latents")) is None:
        return ActiveLatents(test["latents.row"], test["latents.index"], test["latents.value"])
    row, latent = latents.nonzero(as_tuple=True)
    return ActiveLatents(row, latent, latents[row, latent])


def distance(ours: ActiveLatents, expected: ActiveLatents) -> float:
    """The norm of the difference of two matrices of latents."""
    places = torch.stack([torch.cat([ours.row, expected.row]), torch.cat([ours.latent, expected.latent])], 1)
    _, place = places.unique(dim=0, return_inverse=True)
    difference = ours.value.new_zeros(len(places)).index_add_(0, place, torch.cat([ours.value, -expected.value]))
    return float(difference.norm())


def agree(what: str, ours: Tensor, expected: Tensor) -> None:
    """Raises SnapshotError unless the two differ by rounding alone."""
    _agree(what, float((ours - expected).norm()), float(expected.norm()))


def _agree(what: str, distance: float, size: float) -> None:
    difference = distance / max(size, 1e-12)
    if not difference <= TOLERANCE:
        raise SnapshotError(
            f"self-test of {what} differs by {difference:.2g} relative; at most {TOLERANCE:g} is allowed"
        )
