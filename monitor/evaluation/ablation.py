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

from monitor.evaluation.evaluator import Subject
from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.passes import windows_in_memory
from producer.lm.model import LanguageModel
from trainer.snapshot import finite

POSITIONS = 16


@dataclass(frozen=True)
class _Cases:
    """Activations to be ablated, each in a window of its own."""

    latent: Tensor
    tokens: Tensor
    """[cases, context]"""
    place: Tensor
    value: Tensor


def ablation_effects(
    model: LanguageModel,
    subject: Subject,
    latents: LatentActivations,
    sampled: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """The two numbers above over at most `sampled` latents; None when none of them changes anything.

    `between` is called after each pass.
    """
    found = [
        effective_number(changes)
        for cases in _cases(latents, sampled, windows_in_memory(model, latents.context), model.device)
        for changes in _changes(model, subject, cases, between)
    ]
    told = [number for number in found if number is not None]
    effects = float(np.mean(told)) if told else None
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


def _cases(latents: LatentActivations, sampled: int, at_a_time: int, device: torch.device) -> Iterator[_Cases]:
    """Latents in a random order that is always the same, each at one of its positions with text enough behind it."""
    random = np.random.default_rng(0)
    enough = np.zeros_like(latents.shown)
    enough[:, : -POSITIONS + 1] = latents.shown[:, POSITIONS - 1 :]
    enough = enough.ravel()
    chosen: list[tuple[int, int, float]] = []
    for latent in random.permutation(np.flatnonzero(latents.firings)):
        if len(chosen) == sampled:
            break
        positions, values = latents.of(int(latent))
        there = np.flatnonzero(enough[positions])
        if len(there):
            pick = random.choice(there)
            chosen.append((int(latent), int(positions[pick]), float(values[pick])))
    for start in range(0, len(chosen), at_a_time):
        latent, position, value = zip(*chosen[start : start + at_a_time], strict=True)
        window, place = np.divmod(np.array(position), latents.context)
        yield _Cases(
            torch.tensor(latent, device=device),
            torch.from_numpy(latents.ids[window].astype(np.int64)).to(device),
            torch.from_numpy(place).to(device),
            torch.tensor(value, device=device),
        )


def _changes(model: LanguageModel, subject: Subject, cases: _Cases, between: Callable[[], None]) -> Tensor:
    """Logits with the latent less logits without it, float32 [cases, POSITIONS, vocabulary]."""
    row = torch.arange(len(cases.place), device=cases.place.device)
    seen = cases.place[:, None] + torch.arange(POSITIONS, device=cases.place.device)

    def forward(replace: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        logits = model.logits(cases.tokens, replace)[row[:, None], seen].float()
        between()
        return logits

    def without(written: Tensor, activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[row, cases.place] -= written.to(activation.dtype)
        return changed

    widths = {hook.name: hook.width for hook in model.hooks}
    written = cases.value[:, None] * subject.sae.W_dec[cases.latent]
    parts = written.split([widths[hook] for hook in subject.hooks.writes], 1)
    ablated = {hook: partial(without, part) for hook, part in zip(subject.hooks.writes, parts, strict=True)}
    return forward({}) - forward(ablated)
