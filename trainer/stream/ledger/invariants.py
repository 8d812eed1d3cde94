"""Invariants: what must hold in a running trainer, checked where that costs nothing.

That each activation is in exactly one place is for the tests to show.
"""

from __future__ import annotations

from collections import Counter

INVARIANTS = ("trained_once", "rows_accounted", "memory_bound")


class Invariants:
    """Counts violations, and keeps a sentence for each. If there is any, it is a bug."""

    def __init__(self) -> None:
        self.violations: Counter[str] = Counter()
        """Number of violations since the run began, by invariant."""
        self._sentences: list[str] = []

    def counts(self) -> dict[str, int]:
        """Violations of every invariant."""
        return dict.fromkeys(INVARIANTS, 0) | self.violations

    def violate(self, invariant: str, sentence: str) -> None:
        self.violations[invariant] += 1
        self._sentences.append(sentence)

    def check_memory(self, buffered: int, credited: int, capacity: int) -> None:
        """Tokens here and tokens that may still come fit into the buffer."""
        if (tokens := buffered + credited) > capacity:
            sentence = f"{tokens} tokens are here or may still come, and there is room for {capacity}"
            self.violate("memory_bound", sentence)

    def check_buffer(self, in_buffer: int, buffered: int) -> None:
        """The buffer holds no more than the ledger counts; a batch that is being trained is in no buffer."""
        if not 0 <= in_buffer <= buffered:
            self.violate("rows_accounted", f"the buffer holds {in_buffer} tokens, the ledger {buffered}")

    def pop_sentences(self) -> list[str]:
        """The violations since the last call."""
        sentences, self._sentences = self._sentences, []
        return sentences
