"""How far a latent's effect reaches: the effective number of logits that change when it is ablated.

After Gao et al. (2406.04093, §4.5, "sparsity of downstream effects"). At a position where the latent is active, what it
writes, value · W_dec[latent], is taken away; all else stays, the SAE's error included. The logits there and at
the POSITIONS − 1 positions after it change by Δ [positions, vocabulary]. A shift that all logits of a position share
changes no probability, so each position's median is taken off; the mean would turn one changed logit into four.

    ablation_effects        (Σ|Δ|)² / ΣΔ²: n when n of all those logits change by the same amount, mean over latents
    ablation_effects_ratio  the same as a share of positions · vocabulary; the paper's number

Of a fixed sample of the latents that fire on held-out text, each at one random position. A model of few bits rounds
small changes of its logits away, or up: numbers of bfloat16 and of float32 do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from monitor.evaluation.latents.activations import LatentActivations
from producer.lm.model import LanguageModel
from producer.lm.passes import Replacement, windows_in_memory
from trainer.saes.inference import InferenceSae
from trainer.snapshot import finite

POSITIONS = 16


@dataclass(frozen=True)
class _Cases:
    """Activations of latents to be ablated, each in a window of its own."""

    latent: Tensor
    tokens: Tensor
    """[cases, context]"""
    position: Tensor
    """Position in its window at which the latent is active."""
    value: Tensor


def ablation_effects(
    model: LanguageModel,
    sae: InferenceSae,
    latents: LatentActivations,
    count: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """The two numbers above, over a sample of `count` latents; None where none of them changes anything.

    `between` is called after each pass.
    """
    numbers = [
        effective_number(changes)
        for cases in _cases(latents, count, windows_in_memory(model, latents.context), model.device)
        for changes in _changes(model, sae, cases, between)
    ]
    effective = [number for number in numbers if number is not None]
    effects = float(np.mean(effective)) if effective else None
    return {
        "ablation_effects": effects,
        "ablation_effects_ratio": None if effects is None else effects / (POSITIONS * model.vocabulary),
    }


def effective_number(changes: Tensor) -> float | None:
    """(Σ|Δ|)² / ΣΔ² of changes [positions, vocabulary], each position's median taken off.

    None when nothing is left of them, and when one is not finite.
    """
    changes = changes.double()
    changes = changes - changes.median(-1, keepdim=True).values
    squares = float(changes.square().sum())
    return finite(float(changes.abs().sum()) ** 2 / squares) if squares else None


def _cases(latents: LatentActivations, count: int, batch: int, device: torch.device) -> Iterator[_Cases]:
    """Latents in a random order that is always the same, each at one of its positions with enough text behind it."""
    random = np.random.default_rng(0)
    has_text_behind = np.zeros_like(latents.shown)
    has_text_behind[:, : -POSITIONS + 1] = latents.shown[:, POSITIONS - 1 :]
    has_text_behind = has_text_behind.ravel()
    sample: list[tuple[int, int, float]] = []
    for latent in random.permutation(np.flatnonzero(latents.firings)):
        if len(sample) == count:
            break
        positions, values = latents.of(int(latent))
        candidates = np.flatnonzero(has_text_behind[positions])
        if len(candidates):
            index = random.choice(candidates)
            sample.append((int(latent), int(positions[index]), float(values[index])))
    for start in range(0, len(sample), batch):
        latent, flat_position, value = zip(*sample[start : start + batch], strict=True)
        window, position = np.divmod(np.array(flat_position), latents.context)
        yield _Cases(
            torch.tensor(latent, device=device),
            torch.from_numpy(latents.ids[window].astype(np.int64)).to(device),
            torch.from_numpy(position).to(device),
            torch.tensor(value, device=device),
        )


def _changes(model: LanguageModel, sae: InferenceSae, cases: _Cases, between: Callable[[], None]) -> Tensor:
    """Logits with the latent less logits without it, float32 [cases, POSITIONS, vocabulary]."""
    case = torch.arange(len(cases.position), device=cases.position.device)
    positions = cases.position[:, None] + torch.arange(POSITIONS, device=cases.position.device)

    def forward(replacements: Mapping[str, Replacement]) -> Tensor:
        logits = model.logits(cases.tokens, replacements)[case[:, None], positions].float()
        between()
        return logits

    def without(contribution: Tensor, activations: Tensor) -> Tensor:
        result = activations.clone()
        result[case, cases.position] -= contribution.to(activations.dtype)
        return result

    widths = {hook.name: hook.width for hook in model.hooks}
    contributions = cases.value[:, None] * sae.W_dec[cases.latent]
    parts = contributions.split([widths[hook] for hook in sae.hooks.writes], 1)
    ablated = {hook: partial(without, part) for hook, part in zip(sae.hooks.writes, parts, strict=True)}
    return forward({}) - forward(ablated)
