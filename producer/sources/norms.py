"""The norm beyond which an activation is an outlier, from the median of the first ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch

from producer.lm.errors import ModelError, non_finite_message
from producer.settings import HEAVY_NORM
from producer.sources.base import Source

log = logging.getLogger("sluice.producer")

BOUND_TOKENS = 4096
"""Tokens whose norms give the median. Not a forward pass: the bound must not depend on how large one is."""


def norm_bounds(source: Source, shards: Iterable[int], factor: float) -> list[float] | None:
    """Returns per hook `factor` times the median norm in the corpus' first windows; None when nothing is dropped.

    Attention sinks have a hundred times the usual norm; a bound from the median hardly notices them. Raises ModelError
    for a hook whose median is 0, or that gives what is not finite.
    """
    if not factor:
        return None
    for shard in shards:
        windows = source.windows(shard)
        indices = np.flatnonzero(windows.kept.any(1))[: max(1, BOUND_TOKENS // source.context)]
        if len(indices):
            norms = [
                [
                    x.float().norm(dim=-1).cpu().numpy()[windows.kept[batch]]
                    for x in source.activations(shard, windows, batch)
                ]
                for batch in np.array_split(indices, -(-len(indices) // source.batch_windows))
            ]
            by_hook = {
                hook.name: np.concatenate(parts)
                for hook, parts in zip(source.hooks, zip(*norms, strict=True), strict=True)
            }
            bounds = {hook: factor * _median_norm(source, hook, parts) for hook, parts in by_hook.items()}
            for hook, bound in bounds.items():
                log.info("%s: %s", hook, describe_norms(by_hook[hook], bound))
            return list(bounds.values())
    return None


def describe_norms(norms: np.ndarray, bound: float) -> str:
    """The distribution of the norms of a hook's first activations, and what of it FVU will mostly be about.

    Activations of norm up to `bound` are streamed. Those among them beyond HEAVY_NORM times the median are heavy.
    """
    median = float(np.median(norms))
    streamed = norms[norms <= bound]
    heavy = streamed[streamed > HEAVY_NORM * median]
    tenth, most = np.quantile(norms, [0.1, 0.9])
    text = f"norms: median {median:.4g}, from {tenth:.4g} to {most:.4g} in 80%, largest {norms.max():.4g}"
    text += f"; {len(norms) - len(streamed):,} of {len(norms):,} are beyond the bound {bound:.4g} and dropped"
    if not len(heavy):
        return text
    share = float(np.square(heavy, dtype=np.float64).sum() / np.square(streamed, dtype=np.float64).sum())
    return (
        f"{text}; {len(heavy) / len(streamed):.2%} of the others are over {HEAVY_NORM:g} × the median and hold "
        f"{share:.0%} of the sum of squares: FVU in all is as much about them; the evaluation shows it without them "
        "(fvu_typical)"
    )


def _median_norm(source: Source, hook: str, norms: np.ndarray) -> float:
    """Returns the median. Raises ModelError where no bound can be made of it."""
    setting = f"model.hooks = {hook!r}"
    if not np.isfinite(norms).all():
        name, dtype = (
            source.facts.get(fact, default) for fact, default in (("model", "the source"), ("model_dtype", "float32"))
        )
        raise ModelError(f"{setting}: {non_finite_message(str(name), str(dtype))}")
    median = float(torch.from_numpy(norms).median())
    if median == 0:
        zeros = int((norms == 0).sum())
        raise ModelError(
            f"{setting}: {zeros:,} of the first {len(norms):,} activations are zero, so that their median norm, which "
            "corpus.outlier_factor counts from, is 0; hook another place, if this module was zeroed or pruned, or set "
            "corpus.outlier_factor = 0"
        )
    return median
