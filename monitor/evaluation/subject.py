"""An SAE that is to be evaluated, and whether it fits the language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from monitor.evaluation.passes import recording
from producer.lm.model import LanguageModel
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import InferenceSae
from trainer.snapshot import read_sae


@dataclass(frozen=True)
class Subject:
    """One SAE to be evaluated."""

    name: str
    sae: InferenceSae

    @property
    def hooks(self) -> SaeHooks:
        """The hooks it reads and writes."""
        return self.sae.hooks

    @property
    def d_sae(self) -> int:
        return self.sae.W_enc.shape[1]

    def input(self, activations: dict[str, Tensor]) -> Tensor:
        """x [n, d_in] from the activations [n, width] of each hook."""
        return torch.cat([activations[hook] for hook in self.hooks.reads], 1)


def load_subject(folder: Path, device: torch.device) -> Subject:
    """The SAE of one folder, on the language model's device. Raises SnapshotError when there is none."""
    cfg, weights = read_sae(folder)
    sae = InferenceSae(cfg, {name: torch.from_numpy(array).float().to(device) for name, array in weights.items()})
    return Subject(folder.name, sae)


def why_incompatible(model: LanguageModel, subject: Subject) -> str | None:
    """Why this SAE cannot be spliced into the model; None when it can."""
    widths = {hook.name: hook.width for hook in model.hooks}
    for verb, hooks, size in (
        ("reads", subject.hooks.reads, subject.sae.W_enc.shape[0]),
        ("writes", subject.hooks.writes, subject.sae.W_dec.shape[1]),
    ):
        if not set(hooks) <= widths.keys() or sum(widths[hook] for hook in hooks) != size:
            model_hooks = ", ".join(f"{name} ({width})" for name, width in widths.items())
            return (
                f"sae {subject.name!r} {verb} {size} numbers at {', '.join(map(repr, hooks))}; the model's hooks "
                f"are {model_hooks}: the run file's [model] is not the one of this snapshot"
            )
    if not subject.hooks.is_transcoder:
        return None
    order = _order_of_hooks(model)
    (target,), last = subject.hooks.writes, max(subject.hooks.reads, key=order.index)
    if order.index(target) < order.index(last):
        return (
            f"sae {subject.name!r} reads {last!r}, which the model computes after {target!r}, the hook that the SAE "
            "writes: spliced in, it would read what it has changed itself. Its l0 and fvu in training stand"
        )
    return None


def _order_of_hooks(model: LanguageModel) -> list[str]:
    """The model's hooks in the order in which a pass computes them, by a pass over one token."""
    activations: dict[str, Tensor] = {}
    model.logits(torch.zeros(1, 1, dtype=torch.int64), recording([hook.name for hook in model.hooks], activations))
    return list(activations)
