"""An explanation of a latent by a language model, and its scores (Paulo et al., 2410.13928, §3.3).

Texts are dealt to two halves: the explainer sees one, the scores are of the other. A score is the balanced accuracy,
the mean of the shares of right answers among texts where "yes" and where "no" is right: 0.5 is chance, 1 is perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from monitor.interpretation.endpoint import Endpoint
from monitor.interpretation.prompts import (
    Example,
    detection_prompt,
    explanation_prompt,
    fuzzing_prompt,
    read_explanation,
    read_list,
)

SHOWN = 10
"""Texts that the explainer sees;"""
SCORED = 10
"""texts of each kind that an explanation is scored on."""
BATCH = 5
"""Texts in one question to the scorer."""


@dataclass(frozen=True)
class Interpretation:
    """An explanation and its scores; a score is None where the scorer gave no answer that can be read."""

    explanation: str
    detection: float | None
    fuzzing: float | None
    scored_texts: int
    unread_answers: int
    """Questions to the scorer whose answer was no list."""


def interpret(
    explainer: Endpoint, scorer: Endpoint, firing: Sequence[Example], silent: Sequence[Example]
) -> Interpretation:
    """Explains a latent by texts in which it fires, and scores that on others. Raises EndpointError, or ValueError.

    `firing` may be sorted by strength: every second text goes to either half.
    """
    shown, scored = firing[::2][:SHOWN], firing[1::2][:SCORED]
    if not shown or not scored:
        raise ValueError(f"the latent fires in {len(firing)} texts; at least 2 are needed")
    explanation = read_explanation(explainer.ask(explanation_prompt(shown)))
    if not explanation:
        raise ValueError(f"{explainer.model} gave no explanation")
    random = np.random.default_rng(0)
    texts = [(example.text, True) for example in scored] + [(one.text, False) for one in silent[:SCORED]]
    detection, unread = _score(scorer, explanation, detection_prompt, texts, random)
    marked = [(example.marked(), True) for example in scored[::2]]
    marked += [(example.marked(_others(example, random)), False) for example in scored[1::2]]
    fuzzing, more_unread = _score(scorer, explanation, fuzzing_prompt, marked, random)
    return Interpretation(explanation, detection, fuzzing, len(texts), unread + more_unread)


def _others(example: Example, random: np.random.Generator) -> list[int]:
    """As many tokens as the latent fires on, among those on which it does not."""
    quiet = [place for place, value in enumerate(example.values) if not value and example.tokens[place].strip()]
    count = min(len(quiet), max(1, len(example.active)))
    return sorted(random.choice(quiet, count, replace=False).tolist()) if quiet else []


def _score(
    scorer: Endpoint, explanation: str, prompt: Callable[[str, Sequence[str]], str], texts: Sequence[tuple[str, bool]],
    random: np.random.Generator,
) -> tuple[float | None, int]:  # fmt: skip
    """(balanced accuracy, answers that could not be read), over texts in a random order."""
    texts = [texts[place] for place in random.permutation(len(texts))]
    answers: list[tuple[bool, bool]] = []
    unread = 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        said = read_list(scorer.ask(prompt(explanation, [text for text, _ in batch])), len(batch))
        if said is None:
            unread += 1
        else:
            answers += zip(said, (is_right for _, is_right in batch), strict=True)
    return balanced_accuracy(answers), unread


def balanced_accuracy(answers: Sequence[tuple[bool, bool]]) -> float | None:
    """Of pairs (said, true); None where only one of the two was ever true."""
    shares = []
    for truth in (True, False):
        kind = [said == truth for said, true in answers if true == truth]
        if not kind:
            return None
        shares.append(sum(kind) / len(kind))
    return sum(shares) / 2
