"""The test of whether an SAE fits the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.evaluation.errors import EvaluationError
from producer.lm.model import LanguageModel
from producer.lm.passes import NormBounds, recording
from trainer.saes.inference import InferenceSae


def why_incompatible(model: LanguageModel, sae: InferenceSae) -> str | None:
    """Why this SAE cannot be spliced into the model; None when it can."""
    widths = {hook.name: hook.width for hook in model.hooks}
    for verb, hooks, size in (
        ("reads", sae.hooks.reads, sae.W_enc.shape[0]),
        ("writes", sae.hooks.writes, sae.W_dec.shape[1]),
    ):
        if not set(hooks) <= widths.keys() or sum(widths[hook] for hook in hooks) != size:
            model_hooks = ", ".join(f"{name} ({width})" for name, width in widths.items())
            return (
                f"sae {sae.name!r} {verb} {size} numbers at {', '.join(map(repr, hooks))}; the model's hooks "
                f"are {model_hooks}: the run file's [model] is not the one of this snapshot"
            )
    if not sae.hooks.is_transcoder or not model.predicts:
        return None
    order = _order_of_hooks(model)
    (target,), last = sae.hooks.writes, max(sae.hooks.reads, key=order.index)
    if order.index(target) < order.index(last):
        return (
            f"sae {sae.name!r} reads {last!r}, which the model computes after {target!r}, the hook that the SAE "
            "writes: spliced in, it would read what it has changed itself. Its l0 and fvu in training stand"
        )
    return None


def refuse_unknown_bounds(hooks: Sequence[str], bounds: NormBounds) -> None:
    """Raises EvaluationError when a bound is of a hook that the model has not."""
    if unknown := sorted(bounds.keys() - set(hooks)):
        raise EvaluationError(
            f"the stream drops activations by their norm at {', '.join(unknown)}, which the run file's model.hooks "
            "lacks; give the monitor the run file that the producers have"
        )


def _order_of_hooks(model: LanguageModel) -> list[str]:
    """The model's hooks in the order in which a pass computes them, by a pass over one token."""
    activations: dict[str, Tensor] = {}
    model.logits(torch.zeros(1, 1, dtype=torch.int64), recording([hook.name for hook in model.hooks], activations))
    return list(activations)
