"""Latents as Neuronpedia's API takes them: the body of `POST /api/feature/upload-batch`, as its package sends it.

    {"modelId": …, "source": "LAYER-SET", "features": [{"index", "density", "topLogits", "bottomLogits", "activations",
    "explanations"}, …]}

Texts are given as one string per token. A group's interval is quantileMin to quantileMax, and quantileFraction the
share of tokens in it; the strongest firings have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from monitor.export.latents.dashboards import Dashboard, SequenceGroup, TokenEffect

DIGITS = 4
"""Digits behind the point of an activation."""


@dataclass(frozen=True)
class NeuronpediaSource:
    """Where latents stand in Neuronpedia."""

    model_id: str
    """Such as gpt2-small."""
    layer: int
    set_name: str
    """Such as res-someone."""

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set_name}"


def upload_batch(source: NeuronpediaSource, dashboards: Iterable[Dashboard]) -> dict[str, Any]:
    """The document of one batch; Neuronpedia takes 128 latents at most."""
    return {"modelId": source.model_id, "source": source.id, "features": [_feature(one) for one in dashboards]}


def _feature(dashboard: Dashboard) -> dict[str, Any]:
    logits = dashboard.logits
    return {
        "index": dashboard.index,
        "density": dashboard.density,
        "activations": [activation for group in dashboard.groups for activation in _activations(group)],
        "explanations": [],
        "topLogits": None if logits is None else _logits(logits.promoted),
        "bottomLogits": None if logits is None else _logits(logits.suppressed),
    }


def _activations(group: SequenceGroup) -> list[dict[str, Any]]:
    is_interval = group.share is not None
    return [
        {
            "tokens": sequence.tokens,
            "values": [round(value, DIGITS) for value in sequence.values],
            "quantileMax": group.high if is_interval else None,
            "quantileMin": group.low if is_interval else None,
            "quantileFraction": group.share,
        }
        for sequence in group.sequences
    ]


def _logits(effects: list[TokenEffect]) -> list[dict[str, Any]]:
    return [{"token": one.token, "value": round(one.effect, DIGITS)} for one in effects]
