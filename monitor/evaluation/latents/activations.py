"""What every latent of one SAE did on held-out text: all its activations, stored by latent.

    ids        uint32 [windows, context]  the text, as token ids
    shown      bool   [windows, context]  positions that are text, not padding
    streamed   bool   [windows, context]  positions that the SAE was shown: no BOS, no special token, no outlier
    starts     int64  [d_sae + 1]         latent i's activations are starts[i]:starts[i + 1] of the next two:
    positions  uint32 [activations]       where it fired, window · context + place, and
    values     float32 [activations]      how strongly, in the units of the raw activations
    born       int64  [d_sae]             tokens trained when the latent was first seen with its present direction

A sparse matrix in compressed columns, each column sorted, strongest first: tables, contexts, quantiles, histograms and
explanations are read off it, and nothing else is kept. The monitor writes it beside the SAE as `latents.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from monitor.evaluation.evaluator import Subject
from monitor.evaluation.passes import DEFAULT_MEMORY, MemoryLimits, NormBounds, in_stream, passes, refuse_unknown_bounds
from producer.corpus.windows import Windows
from producer.lm.model import LanguageModel
from trainer.state.durable import new_file

SAME_DIRECTION = 0.9
"""Cosine of a decoder row with the one before it from which on it counts as the same latent."""
TOP_TOKENS = 8
GONE = (OSError, SafetensorError)
"""What reading a snapshot raises that is retired meanwhile."""


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

    @property
    def d_sae(self) -> int:
        return len(self.born)

    @property
    def context(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def rows(self) -> int:
        """Rows that the SAE was shown."""
        return int(self.streamed.sum())

    @cached_property
    def firings(self) -> np.ndarray:
        """How often each latent fired, int64 [d_sae]."""
        return np.diff(self.starts)

    @cached_property
    def density(self) -> np.ndarray:
        """Share of rows on which each latent fired, float64 [d_sae]."""
        return self.firings / max(1, self.rows)

    @cached_property
    def strongest(self) -> np.ndarray:
        """Each latent's strongest activation, float32 [d_sae]; 0 where it never fired."""
        fired = self.firings > 0
        found = np.zeros(self.d_sae, np.float32)
        found[fired] = self.values[self.starts[:-1][fired]]
        return found

    @cached_property
    def top_ids(self) -> np.ndarray:
        """The tokens where each latent fired most strongly, int64 [d_sae, TOP_TOKENS]; −1 where there are fewer."""
        places = self.starts[:-1, None] + np.arange(TOP_TOKENS)
        there = places < self.starts[1:, None]
        found = np.full(places.shape, -1, np.int64)
        found[there] = self.ids.ravel()[self.positions[places[there]]]
        return found

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, values) of one latent, strongest first."""
        chosen = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.positions[chosen], self.values[chosen]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        with new_file(path) as temporary:
            save_file({name: torch.from_numpy(getattr(self, name)) for name in self.__dataclass_fields__}, temporary)
            temporary.chmod(0o644)


def load_decoder(folder: Path) -> Tensor:
    """W_dec [d_sae, d_out] of the SAE in a folder of a snapshot, mapped. Raises OSError when it is gone."""
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        return file.get_tensor("W_dec").float()


def load_latents(path: Path) -> LatentActivations:
    """Mapped, not read: a look at one latent touches a few pages of the file. Raises OSError when it is gone."""
    with safe_open(path, "pt") as file:
        return LatentActivations(**{name: file.get_tensor(name).numpy() for name in file.keys()})  # noqa: SIM118


def gather_latents(
    model: LanguageModel,
    windows: Windows,
    subject: Subject,
    norm_bounds: NormBounds | None = None,
    between: Callable[[], None] = lambda: None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> LatentActivations:
    """Shows the SAE all `windows`, or as many as `memory.firings` allow; `born` is 0 throughout.

    Raises EvaluationError for a bound of a hook that the model lacks. `between` is called after each pass.
    """
    bounds = dict(norm_bounds or {})
    hooks = [hook.name for hook in model.hooks]
    refuse_unknown_bounds(hooks, bounds)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    streamed: list[Tensor] = []
    context = windows.ids.shape[1]
    count = seen_windows = 0
    for tokens, kept, _ in passes(model, windows, memory):
        if count >= memory.firings:
            break
        seen = dict(zip(hooks, model.activations(tokens), strict=True))
        shown = in_stream(seen, kept, bounds)
        x = torch.cat([seen[hook][shown].float() for hook in subject.hooks.reads], 1)
        places = shown.flatten().nonzero().squeeze(1) + seen_windows * context
        row, latent, value = active(subject, x, memory)
        found.append((latent, (places.cpu()[row]).int(), value))
        count += len(value)
        streamed.append(shown.cpu())
        seen_windows += len(tokens)
        between()
    latent, position, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _by_latent(windows, torch.cat(streamed), latent, position, value, subject.sae.W_enc.shape[1])


def active(subject: Subject, x: Tensor, memory: MemoryLimits = DEFAULT_MEMORY) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent, value) of everything that is active on rows x [rows, d_in], some rows of all latents at a time."""
    found = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0))]
    step = memory.batch(subject.sae.W_enc.shape[1])
    for start in range(0, len(x), step):
        latents = subject.sae.encode(x[start : start + step])
        row, latent = latents.nonzero(as_tuple=True)
        found.append((row.cpu() + start, latent.int().cpu(), latents[row, latent].cpu()))
    row, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, latent, value


def _by_latent(
    windows: Windows, streamed: Tensor, latent: Tensor, position: Tensor, value: Tensor, d_sae: int
) -> LatentActivations:
    order = value.abs().argsort(descending=True, stable=True)
    order = order[latent[order].argsort(stable=True)]
    starts = torch.zeros(d_sae + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(latent, minlength=d_sae).cumsum(0)
    return LatentActivations(
        ids=windows.ids[: len(streamed)].astype(np.uint32),
        shown=~windows.padded[: len(streamed)],
        streamed=streamed.numpy(),
        starts=starts.numpy(),
        positions=position[order].numpy().astype(np.uint32),
        values=value[order].numpy(),
        born=np.zeros(d_sae, np.int64),
    )


def births(W_dec: Tensor, tokens: int, before: tuple[Tensor, np.ndarray] | None) -> np.ndarray:
    """`born` of a snapshot taken at `tokens`, from W_dec [d_sae, d_out] and (W_dec, born) of the one before it.

    A latent whose decoder row has turned away from what it was is a new one. Without an earlier snapshot, and where
    the sizes differ, all are new.
    """
    born = np.full(len(W_dec), tokens, np.int64)
    if before is not None and before[0].shape == W_dec.shape:
        same = torch.cosine_similarity(before[0], W_dec, dim=1) >= SAME_DIRECTION
        born = np.where(same.cpu().numpy(), before[1], born)
    return born
