"""Prompts about one latent, after Paulo et al. (2410.13928), and how answers are read.

The explainer sees texts in which the latent's tokens stand between << and >>, as Bills et al. (2023, "Language models
can explain neurons in language models") show activations beside tokens, and says in a sentence what they share. The
scorer sees that sentence and numbered texts, and answers with a list of 0 and 1:

    detection  in which texts does the latent fire? Nothing is marked.
    fuzzing    in which texts are the marked tokens those on which it fires?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_EXPLANATION = 180
"""Characters."""
SHARE_MARKED = 0.3
"""A token is marked from this share of the latent's strongest activation in the text on."""


@dataclass(frozen=True)
class Example:
    """A text, with the latent's activation on each of its tokens."""

    tokens: list[str]
    values: list[float]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Example:
        return cls(record["tokens"], record["values"])

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def active(self) -> list[int]:
        """The tokens on which it fires, those far weaker than the strongest left out."""
        strongest = max(map(abs, self.values), default=0.0)
        return [place for place, value in enumerate(self.values) if value and abs(value) >= SHARE_MARKED * strongest]

    def marked(self, places: Sequence[int] | None = None) -> str:
        """The text with << and >> around each of `places`, or around the tokens on which the latent fires."""
        marks = set(self.active if places is None else places)
        return "".join(f"<<{token}>>" if place in marks else token for place, token in enumerate(self.tokens))


def explanation_prompt(examples: Sequence[Example]) -> str:
    texts = "\n".join(f"{number}. {_on_one_line(example.marked())}" for number, example in enumerate(examples, 1))
    return (
        "A unit of a neural network that reads text fires on the tokens between << and >> in these texts:\n\n"
        f"{texts}\n\n"
        "What do these tokens, or the text before them, have in common? Be specific. Do not mention the marks. Answer "
        f"with one phrase of at most {LONGEST_EXPLANATION} characters, nothing else."
    )


def detection_prompt(explanation: str, texts: Sequence[str]) -> str:
    return (
        f"A unit of a neural network fires on this: {explanation}\n\nIn which of these texts does it fire?\n\n"
        f"{_numbered(texts)}\n\n{_ask_for_list(len(texts))}"
    )


def fuzzing_prompt(explanation: str, texts: Sequence[str]) -> str:
    return (
        f"A unit of a neural network fires on this: {explanation}\n\nIn which of these texts are the tokens between << "
        f"and >> those on which it fires?\n\n{_numbered(texts)}\n\n{_ask_for_list(len(texts))}"
    )


def read_explanation(answer: str) -> str:
    """The first line of an answer, without quotes."""
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    return lines[0].strip("\"'“”").strip()[:LONGEST_EXPLANATION] if lines else ""


def read_list(answer: str, count: int) -> list[bool] | None:
    """The last list of `count` zeros and ones in an answer; None where there is none."""
    for match in reversed(re.findall(r"\[([01,\s]*)\]", answer)):
        digits = re.findall(r"[01]", match)
        if len(digits) == count:
            return [digit == "1" for digit in digits]
    return None


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {_on_one_line(text)}" for number, text in enumerate(texts, 1))


def _on_one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _ask_for_list(count: int) -> str:
    return f"Answer with a list of {count} numbers, 1 for yes and 0 for no, such as [1, 0, …], nothing else."
