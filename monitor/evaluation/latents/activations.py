"""All activations of one SAE's latents on held-out text, stored by latent.

    ids        uint32 [windows, context]  the text, as token ids
    shown      bool   [windows, context]  positions that are text, not padding
    streamed   bool   [windows, context]  positions that the SAE reads: no BOS, no special token, no outlier
    starts     int64  [d_sae + 1]         latent i's activations are starts[i]:starts[i + 1] of the next two:
    positions  uint32 [activations]       where it fires, window · context + place, and
    values     float32 [activations]      how strongly, in the units of the raw activations
    born       int64  [d_sae]             tokens trained when the latent was first seen with its present direction
    outliers   bool   [windows, context]  positions on which most latents that fire are far beyond what they usually are

This is a sparse matrix in compressed columns, each column sorted, strongest first, with the firings on outliers behind
all others: one activation of huge norm would otherwise be the strongest firing of every latent that fires on it.
Tables, examples, quantiles, histograms and explanations are computed from it, and nothing else is stored. The monitor
writes it beside the SAE as `latents.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from monitor.evaluation.compatibility import refuse_unknown_bounds
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import (
    DEFAULT_MEMORY,
    MemoryLimits,
    NormBounds,
    activations_by_hook,
    in_stream,
    passes,
)
from trainer.saes.inference import InferenceSae
from trainer.state.durable import new_file

SAME_DIRECTION = 0.9
"""Cosine of a latent's decoder rows in two snapshots from which on it is the same latent."""
TOP_TOKENS = 8
OUTLIER_FACTOR = 3.0
"""A position is an outlier where the median latent that fires there is so many times its own USUAL activation."""
USUAL = 0.9
"""The quantile of a latent's activations that is taken for the usual strength of a strong one."""
LEAST_FIRING = 4
"""Latents that must fire on a position before their median says anything."""
GONE = (OSError, SafetensorError)
"""Errors of reading a snapshot that is retired meanwhile."""


@dataclass(frozen=True)
class LatentActivations:
    """The arrays above, in memory or mapped from a file."""

    ids: np.ndarray
    shown: np.ndarray
    streamed: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    values: np.ndarray
    born: np.ndarray
    outliers: np.ndarray

    @property
    def d_sae(self) -> int:
        return len(self.born)

    @property
    def context(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def rows(self) -> int:
        """Number of tokens that the SAE reads."""
        return int(self.streamed.sum())

    @cached_property
    def firings(self) -> np.ndarray:
        """Number of firings of each latent, int64 [d_sae]."""
        return np.diff(self.starts)

    @cached_property
    def density(self) -> np.ndarray:
        """Share of tokens on which each latent fires, float64 [d_sae]."""
        return self.firings / max(1, self.rows)

    @cached_property
    def strongest(self) -> np.ndarray:
        """Each latent's activation farthest from zero, float32 [d_sae]; 0 for a silent latent.

        One on an outlier counts for a latent that fires on nothing else.
        """
        fires = self.firings > 0
        strongest = np.zeros(self.d_sae, np.float32)
        strongest[fires] = self.values[self.starts[:-1][fires]]
        return strongest

    @cached_property
    def top_positions(self) -> np.ndarray:
        """Where each latent fires most strongly, int64 [d_sae, TOP_TOKENS]; −1 where there are fewer firings."""
        firings = self.starts[:-1, None] + np.arange(TOP_TOKENS)
        exists = firings < self.starts[1:, None]
        top_positions = np.full(firings.shape, -1, np.int64)
        top_positions[exists] = self.positions[firings[exists]]
        return top_positions

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, values) of one latent, strongest first; those on outliers last."""
        column = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.positions[column], self.values[column]

    def outlier_count(self, latent: int) -> int:
        """Number of a latent's firings on outliers: the last ones of `of`."""
        return int(self.outliers.ravel()[self.of(latent)[0]].sum())

    def documents(self, separators: Collection[int]) -> np.ndarray:
        """The number of the document that each position belongs to, int64 [windows, context].

        A document ends with a token of `separators`, such as EOS, and with a window that is padded. One that is cut
        in two by the end of a shard, or of its part of a chat, counts as two.
        """
        ends = np.isin(self.ids, np.fromiter(separators, np.uint32, len(separators))) & self.shown
        ends[:, 0] = False  # the BOS of the window
        ends[:, -1] |= ~self.shown[:, -1]
        numbers = np.cumsum(ends.ravel()) - ends.ravel()
        return numbers.reshape(self.ids.shape)

    def save(self, path: Path) -> None:
        """Writes the file, in full or not at all."""
        with new_file(path) as temporary:
            save_file({name: torch.from_numpy(getattr(self, name)) for name in self.__dataclass_fields__}, temporary)
            temporary.chmod(0o644)


def load_decoder(folder: Path) -> Tensor:
    """W_dec [d_sae, d_out] of the SAE in a folder of a snapshot, mapped. Raises one of GONE."""
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        return file.get_tensor("W_dec").float()


def load_latents(path: Path) -> LatentActivations:
    """Maps the file: one latent needs a few pages of it. Raises one of GONE."""
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    if "outliers" not in arrays:  # earlier releases knew none
        arrays["outliers"] = np.zeros(arrays["streamed"].shape, bool)
    return LatentActivations(**arrays)


def gather_latents(
    model: LanguageModel,
    windows: Windows,
    sae: InferenceSae,
    norm_bounds: NormBounds | None = None,
    after_pass: Callable[[], None] = lambda: None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> LatentActivations:
    """Encodes `windows`, one pass of the language model after the other, until there are `memory.firings`.

    An SAE that is not sparse (yet) reads less text. `born` is 0 throughout. Raises EvaluationError for the bound of a
    hook that the model lacks.
    """
    bounds = dict(norm_bounds or {})
    refuse_unknown_bounds([hook.name for hook in model.hooks], bounds)
    activations: list[tuple[Tensor, Tensor, Tensor]] = []
    streamed: list[Tensor] = []
    context = windows.ids.shape[1]
    count = windows_before = 0
    for batch in passes(model, windows, memory):
        if count >= memory.firings:
            break
        outputs = activations_by_hook(model, batch)
        is_streamed = in_stream(outputs, batch.kept, bounds)
        x = torch.cat([outputs[hook][is_streamed].float() for hook in sae.hooks.reads], 1)
        positions = is_streamed.flatten().nonzero().squeeze(1) + windows_before * context
        row, latent, value = encode_sparse(sae, x, memory)
        activations.append((latent, positions.cpu()[row].int(), value))
        count += len(value)
        streamed.append(is_streamed.cpu())
        windows_before += len(batch.tokens)
        after_pass()
    latent, position, value = (torch.cat(parts) for parts in zip(*activations, strict=True))
    return _by_latent(windows, torch.cat(streamed), latent, position, value, sae.W_enc.shape[1])


def encode_sparse(sae: InferenceSae, x: Tensor, memory: MemoryLimits = DEFAULT_MEMORY) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, value) of all activations of latents on x [rows, d_in].

    Dense latents are held for `memory.latents` elements at a time.
    """
    parts = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0))]
    step = memory.batch(sae.W_enc.shape[1])
    for start in range(0, len(x), step):
        latents = sae.encode(x[start : start + step])
        row, latent = latents.nonzero(as_tuple=True)
        parts.append((row.cpu() + start, latent.int().cpu(), latents[row, latent].cpu()))
    row, latent, value = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return row, latent, value


def _by_latent(
    windows: Windows, streamed: Tensor, latent: Tensor, position: Tensor, value: Tensor, d_sae: int
) -> LatentActivations:
    """Sorts activations by latent, then by how far they are from zero, those on outliers last."""
    order = value.abs().argsort(descending=True, stable=True)
    order = order[latent[order].argsort(stable=True)]
    starts = torch.zeros(d_sae + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(latent, minlength=d_sae).cumsum(0)
    latent, position, value = latent[order], position[order], value[order]
    outliers = find_outliers(starts, latent, position, value, streamed.numel())
    if outliers.any():
        order = (2 * latent.long() + outliers[position.long()]).argsort(stable=True)
        position, value = position[order], value[order]
    return LatentActivations(
        ids=windows.ids[: len(streamed)].astype(np.uint32),
        shown=~windows.padded[: len(streamed)],
        streamed=streamed.numpy(),
        starts=starts.numpy(),
        positions=position.numpy().astype(np.uint32),
        values=value.numpy(),
        born=np.zeros(d_sae, np.int64),
        outliers=outliers.view(streamed.shape).numpy(),
    )


def find_outliers(starts: Tensor, latent: Tensor, position: Tensor, value: Tensor, count: int) -> Tensor:
    """Which of `count` positions are outliers, bool [count].

    `latent`, `position` and `value` are activations sorted by latent, strongest first; `starts` are the places of the
    latents among them. A latent that fires on little is usually as strong as at its strongest, so that it makes no
    position an outlier.
    """
    firings = starts.diff()
    places = starts[:-1] + ((1 - USUAL) * firings).long()
    usual = torch.zeros(len(firings))
    usual[firings > 0] = value[places[firings > 0]].abs()
    ratio = value.abs() / usual[latent.long()]
    order = ratio.argsort(stable=True)
    order = order[position[order].argsort(stable=True)]
    counts = torch.bincount(position, minlength=count)
    medians = counts.cumsum(0) - counts + (counts - 1) // 2
    is_outlier = counts >= LEAST_FIRING
    is_outlier[is_outlier.clone()] = ratio[order][medians[is_outlier]] > OUTLIER_FACTOR
    return is_outlier


def births(W_dec: Tensor, tokens: int, before: tuple[Tensor, np.ndarray] | None) -> np.ndarray:
    """`born` of a snapshot at `tokens`, from its W_dec [d_sae, d_out] and (W_dec, born) of the one before it.

    A latent whose decoder row has turned is a new latent. Without an earlier snapshot, or with another shape, all are.
    """
    born = np.full(len(W_dec), tokens, np.int64)
    if before is not None and before[0].shape == W_dec.shape:
        is_same = torch.cosine_similarity(before[0], W_dec, dim=1) >= SAME_DIRECTION
        born = np.where(is_same.cpu().numpy(), before[1], born)
    return born
