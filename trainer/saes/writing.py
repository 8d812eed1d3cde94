"""One SAE as files of a snapshot, written and tested by all ranks that share it, each its latents.

Weights are folded a few latents at a time and written to their place in the one file; columns of W_enc, which lie apart
there, are gathered in a slab first. So the memory this takes does not grow with the SAE: a slab, and what a few latents
need. The self-test reads back what was written and compares its reconstruction with that of the weights in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from trainer.parallel.environment import LATENTS_PER_UNIT
from trainer.parallel.ranks import Ranks
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform, fold
from trainer.saes.inference import require_activation
from trainer.saes.partwise import ActiveLatents, PartwiseSae
from trainer.saes.published import transcoder_name
from trainer.saes.selftest import agree, weights_on_disk, widest_margins
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.snapshot import LARGE_BYTES, PART_BYTES, SAELENS_LAYOUT, SPARSITY, WEIGHTS, FileParts, part_sha256
from trainer.state.tensor_file import TensorFile, create

NO_LATENTS = slice(0, 0)
LEAST_RATE = 1e-10
"""Firing rates in sparsity.safetensors are no smaller, so that their logarithm is a number."""


@dataclass(frozen=True)
class SizeLimits:
    """How much is in memory at a time, and what counts as large."""

    slab_latents: int = 65_536
    """Latents whose columns of W_enc are gathered before they are written: 256 KiB of each row of the file."""
    unit_latents: int = LATENTS_PER_UNIT
    """Latents that are folded at a time."""
    selftest_matrix_latents: int = 2**18
    """Latents up to which those of a self-test are kept as a matrix; beyond, those that are active."""
    large_bytes: int = LARGE_BYTES
    part_bytes: int = PART_BYTES


SIZE_LIMITS = SizeLimits()


class SaeFiles:
    """See the module's docstring."""

    def __init__(
        self,
        sae: Sae,
        transform: InputTransform,
        firing_rate: Tensor,
        metadata: dict[str, Any],
        ranks: Ranks | None = None,
        on_progress: Callable[[], None] = lambda: None,
        limits: SizeLimits = SIZE_LIMITS,
    ) -> None:
        """`firing_rate` of this rank's latents; `metadata` is free-form in SAELens' cfg.json.

        `ranks` are those of the SAE, for tensors on the host; `on_progress` is called after each slab.
        """
        self._sae = sae
        self._transform = transform
        self._firing_rate = firing_rate
        self._ranks = ranks or sae.ranks
        self._on_progress = on_progress
        self._limits = limits
        keys, shared = sae.export(NO_LATENTS)
        self._activation = activation = require_activation(keys)
        self._shared = {name: value.float().cpu() for name, value in shared.items() if name in SHARED_PARAMETERS}
        if not activation.unit_rows and (transform.whitening is not None or len(sae.widths) > 1):
            keys["rescale_acts_by_decoder_norm"] = False  # rows no longer have unit norm
        if sae.is_transcoder:
            keys["architecture"] = transcoder_name(str(keys["architecture"]), "W_skip" in shared)
            keys["d_out"] = sae.d_out
        self.cfg = _cfg(sae, keys, metadata)

    def write(self, folder: Path, x: Tensor) -> FileParts | None:
        """Writes the SAE into a new folder; x [rows, d_in] are raw activations for the self-test.

        Returns the parts of the weights' file where it is large. Collective. Raises OSError, and SnapshotError when
        the weights on disk do not reconstruct as those in training.
        """
        with self._ranks.agreement():
            if self._ranks.rank == 0:
                folder.mkdir()
                (folder / "cfg.json").write_text(json.dumps(self.cfg, indent=1, allow_nan=False))
                create(folder / WEIGHTS, self._shapes())
                create(folder / SPARSITY, {"sparsity": (self._sae.d_sae,)})
        with self._ranks.agreement():
            self._write_rows(folder)
        test = self._selftest(folder, x.float().cpu())
        with self._ranks.agreement():
            if self._ranks.rank == 0:
                save_file(test, folder / "selftest.safetensors")
        return self._parts(folder / WEIGHTS)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        sae = self._sae
        shapes: dict[str, tuple[int, ...]] = {"W_dec": (sae.d_sae, sae.d_out)}
        if not self._activation.is_tied:
            shapes["W_enc"] = (sae.d_in, sae.d_sae)
        shapes |= {name: (sae.d_sae,) for name in sorted(self._activation.vectors)}
        return shapes | {name: tuple(value.shape) for name, value in self._shared.items()}

    # Writing

    def _write_rows(self, folder: Path) -> None:
        own, rate = self._sae.latents, self._firing_rate.cpu().double().clamp_min(LEAST_RATE).log10().numpy()
        with TensorFile(folder / SPARSITY, "write") as file:
            file.write_rows("sparsity", own.start, rate)
        with TensorFile(folder / WEIGHTS, "write") as file:
            if self._ranks.rank == 0:
                folded = self._folded(range(0))
                for name in self._shared:
                    file.write_rows(name, 0, folded[name].numpy())
            for block in self._sae.ranks.latent_blocks(self._sae.d_sae):
                for slab in _cut(block, self._limits.slab_latents):
                    self._write_slab(file, slab)
                    self._on_progress()

    def _write_slab(self, file: TensorFile, slab: range) -> None:
        columns = np.empty((self._sae.d_in, len(slab)), np.float32)
        for unit in _cut(slab, self._limits.unit_latents):
            folded = self._folded(unit)
            columns[:, unit.start - slab.start : unit.stop - slab.start] = folded["W_enc"].numpy().T
            for name in ("W_dec", *self._activation.vectors):
                file.write_rows(name, unit.start, folded[name].numpy())
        if not self._activation.is_tied:
            file.write_columns("W_enc", slab.start, columns)

    def _scaled(self, latents: range) -> dict[str, Tensor]:
        """Weights of some latents of this rank as in training, for scaled activations; W_enc [n, d_in]."""
        first = self._sae.latents.start if len(latents) else latents.start
        return self._sae.export(slice(latents.start - first, latents.stop - first))[1]

    def _folded(self, latents: range) -> dict[str, Tensor]:
        """The same for raw activations; W_skip with no latents alone."""
        weights = self._scaled(latents)
        if len(latents):
            weights.pop("W_skip", None)
        return fold(weights, self._transform, unit_rows=self._activation.unit_rows)

    # Self-test

    def _selftest(self, folder: Path, candidates: Tensor) -> dict[str, np.ndarray]:
        """The contents of selftest.safetensors; on ranks other than 0 without those of other ranks. Collective."""
        sae = self._sae
        blocks = sae.ranks.latent_blocks(sae.d_sae)
        with self._ranks.agreement():
            file = TensorFile(folder / WEIGHTS)
        with file:
            on_disk = PartwiseSae(self.cfg, blocks, weights_on_disk(file, self.cfg), self._ranks, sae.d_sae)
            x = widest_margins(on_disk, candidates)
            latents = on_disk.encode(x)
            x_hat = on_disk.decode(latents, x)
        agree("folded reconstruction", x_hat, self._reconstruction_in_training(blocks, x))
        everyone = ActiveLatents(
            *(self._ranks.gather_rows(each, "publishing") for each in (latents.row, latents.latent, latents.value))
        )
        test = {"x": x, "x_hat": x_hat.float()}
        if sae.d_sae <= self._limits.selftest_matrix_latents:
            test["latents"] = everyone.among(range(sae.d_sae), len(x))
        else:
            order = (everyone.row * sae.d_sae + everyone.latent).argsort()
            test |= {"latents.row": everyone.row[order], "latents.index": everyone.latent[order]}
            test["latents.value"] = everyone.value[order]
        return {name: value.contiguous().numpy() for name, value in test.items()}

    def _reconstruction_in_training(self, blocks: list[range], x: Tensor) -> Tensor:
        """The reconstruction of raw x by the weights of training, in float64."""

        def weights_of(latents: range) -> dict[str, Tensor]:
            weights = {name: value.detach().double().cpu() for name, value in self._scaled(latents).items()}
            return weights | {"W_enc": weights["W_enc"].T}

        training = PartwiseSae(self.cfg, blocks, weights_of, self._ranks, self._sae.d_sae)
        transform = self._transform
        x = x.double() * transform.s_in.cpu()
        if (white := transform.whitening) is None:
            return training.decode(training.encode(x), x) / transform.s_out.cpu()
        centre, matrix, inverse = (part.double().cpu() for part in (white.centre, white.matrix, white.inverse))
        x = (x - centre) @ matrix
        return (training.decode(training.encode(x), x) @ inverse + centre) / transform.s_out.cpu()

    # Hashes

    def _parts(self, path: Path) -> FileParts | None:
        """Hashes of the parts of a large file, which the ranks share out. Collective."""
        with self._ranks.agreement():
            size = path.stat().st_size
        if size < self._limits.large_bytes:
            return None
        part_bytes = self._limits.part_bytes
        count = -(-size // part_bytes)
        rounds = -(-count // self._ranks.size)
        digests = torch.zeros(rounds, hashlib.sha256().digest_size, dtype=torch.uint8)
        with self._ranks.agreement():
            for turn in range(rounds):
                if (part := turn * self._ranks.size + self._ranks.rank) < count:
                    digest = bytes.fromhex(part_sha256(path, part * part_bytes, part_bytes))
                    digests[turn] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
                    self._on_progress()
        gathered = self._ranks.gather(digests, "publishing").transpose(0, 1).flatten(0, 1)[:count]
        return FileParts(part_bytes, tuple(bytes(digest.tolist()).hex() for digest in gathered))


def _cut(latents: range, size: int) -> Iterator[range]:
    return (latents[first : first + size] for first in range(0, len(latents), size))


def _cfg(sae: Sae, keys: dict[str, object], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        **keys,
        "d_in": sae.d_in,
        "d_sae": sae.settings.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT,
            "training_architecture": sae.settings.architecture,
            **metadata,
        },
    }
