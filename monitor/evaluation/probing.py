"""How well a few latents predict labels that a person gave: k-sparse probing.

After Gurnee et al. (2305.01610) as SAEBench does it for SAEs ("sparse probing", 2503.09532). Each text becomes the mean
of its latents over its tokens. Each label stands against all others, with as many texts on either side, so that a guess
is right half the time; one half of them is for fitting, the other for testing. The k latents whose means differ most
between the two sides, on the half for fitting, are put into a logistic regression. `probe_accuracy` is its accuracy on
the half for testing, mean over labels, by k; `dense` is the same of all of x, what the model itself knows.

What differs from SAEBench: the texts are the user's, cut to one window of corpus.context tokens (there 128), and
columns are brought to unit variance, so that one penalty suits them all (there they stay as they are).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.evaluation.errors import EvaluationError
from producer.corpus import CorpusError
from producer.corpus.rendering.windows import Windows, join_windows, select_windows, separated, windows_of
from producer.corpus.sources.jsonl import read_records
from producer.lm.model import LanguageModel
from producer.lm.passes import DEFAULT_MEMORY, NormBounds, activations_by_hook, in_stream, passes
from producer.settings import CorpusSettings
from trainer.saes.inference import InferenceSae

SPARSITIES = (1, 2, 5)
MIN_TEXTS = 8
"""Texts of a label; with fewer a test says nothing."""
PENALTY = 1e-2
"""On half the squares of the weights, beside the mean loss of a text."""
STEPS = 200


@dataclass(frozen=True)
class LabelledTexts:
    """One window of each text, and the label that a person gave it."""

    windows: Windows
    labels: np.ndarray
    """str [windows]"""


def read_labelled_texts(path: Path, tokenizer: Any, settings: CorpusSettings) -> LabelledTexts:
    """Reads a file of JSON lines, {"text": …, "label": …}, as a corpus of jsonl is read; it may be a .gz file.

    Raises EvaluationError for one that cannot be used.
    """
    texts, labels = [], []
    try:
        for place, record in read_records(path, settings):
            text, label = _parse(record, place)
            windows = windows_of([text], tokenizer, separated(settings))
            if len(windows) and windows.kept[0].any():
                texts.append(select_windows(windows, slice(1)))
                labels.append(label)
    except (OSError, CorpusError) as error:
        raise EvaluationError(f"monitor.probe_file = {str(path)!r} cannot be read: {error}") from None
    counts = Counter(labels)
    if len(counts) < 2 or min(counts.values()) < MIN_TEXTS:
        found_labels = ", ".join(f"{label!r} {count}" for label, count in sorted(counts.items())) or "none"
        raise EvaluationError(
            f"{path} must have two labels or more with {MIN_TEXTS} texts or more each; it has: {found_labels}"
        )
    return LabelledTexts(join_windows(texts), np.array(labels))


def _parse(record: dict[str, Any], place: str) -> tuple[str, str]:
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str) or not isinstance(label, str | int):
        raise EvaluationError(f'{place}: expected {{"text": "…", "label": "…"}}, found {str(record)[:60]}')
    return text, str(label)


def probe_accuracy(
    model: LanguageModel,
    sae: InferenceSae,
    texts: LabelledTexts,
    norm_bounds: NormBounds | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy on texts not fitted to, by k of SPARSITIES and `dense`.

    Holds d_sae numbers for each text. `between` is called after each pass and each probe.
    """
    x, latents, is_used = _text_means(model, sae, texts.windows, dict(norm_bounds or {}), between)
    labels = texts.labels[is_used]
    for label in np.unique(texts.labels):
        if (count := int((labels == label).sum())) < 2:
            raise EvaluationError(
                f"monitor.probe_file: {count} texts labelled {str(label)!r} have a token that is in the stream, whose "
                "norm bounds drop the others; expected two or more: give the monitor the model and hooks that the "
                "producers have"
            )
    return accuracy_by_k(x, latents, labels, between)


def accuracy_by_k(
    x: Tensor, latents: Tensor, labels: np.ndarray, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The same from x [texts, d_in], latents [texts, d_sae] and labels [texts]."""
    accuracies: dict[str, list[float]] = {}
    for label in np.unique(labels):
        fit, test = split_sides(labels == label)
        truth = torch.from_numpy(labels == label).to(x.device)
        difference = (latents[fit][truth[fit]].mean(0) - latents[fit][~truth[fit]].mean(0)).abs()
        best = difference.topk(min(max(SPARSITIES), latents.shape[1])).indices
        inputs = {str(k): latents[:, best[:k]] for k in SPARSITIES} | {"dense": x}
        for name, columns in inputs.items():
            accuracy = fitted_accuracy(columns[fit], truth[fit], columns[test], truth[test])
            accuracies.setdefault(name, []).append(accuracy)
            between()
    return {name: float(np.mean(values)) for name, values in accuracies.items()}


def _text_means(
    model: LanguageModel, sae: InferenceSae, windows: Windows, bounds: NormBounds, between: Callable[[], None]
) -> tuple[Tensor, Tensor, np.ndarray]:
    """(x, latents, is_used): means over each text's tokens, float32 [texts, d]; texts without a token are not used."""
    x_means, latent_means, is_used = [], [], []
    for batch in passes(model, windows):
        activations = activations_by_hook(model, batch)
        streamed = in_stream(activations, batch.kept, bounds)
        for text, positions in enumerate(streamed):
            is_used.append(bool(positions.any()))
            if is_used[-1]:
                x = sae.input({hook: activations[hook][text][positions].float() for hook in sae.hooks.reads})
                parts = x.split(DEFAULT_MEMORY.batch(sae.d_sae))
                latents = torch.stack([sae.encode(part).sum(0) for part in parts]).sum(0)
                latent_means.append(latents / len(x))
                x_means.append(x.mean(0))
        between()
    if not x_means:
        return torch.zeros(0), torch.zeros(0), np.array(is_used, bool)
    return torch.stack(x_means), torch.stack(latent_means), np.array(is_used, bool)


def split_sides(is_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fit, test): as many texts with the label as without, half of both in each; always the same ones."""
    random = np.random.default_rng(0)
    sides = [random.permutation(np.flatnonzero(side)) for side in (is_label, ~is_label)]
    count = min(map(len, sides))
    return (
        np.concatenate([side[: count // 2] for side in sides]),
        np.concatenate([side[count // 2 : count // 2 * 2] for side in sides]),
    )


def fitted_accuracy(fit: Tensor, fit_truth: Tensor, test: Tensor, test_truth: Tensor) -> float:
    """Accuracy on `test` of a logistic regression fitted to `fit`, both [texts, columns]."""
    centre, scale = fit.mean(0), fit.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    weights = fit_logistic((fit - centre) / scale, fit_truth)
    return float((((test - centre) / scale @ weights > 0) == test_truth).double().mean())


def fit_logistic(x: Tensor, truth: Tensor) -> Tensor:
    """Weights [columns] of the penalised logistic regression on x [texts, columns] of mean 0, without an intercept.

    None is needed: each side has half of the texts.
    """
    weights = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")
    target = truth.to(x.dtype)

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, target)
        total = error + PENALTY / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()
