"""What the compared SAEs read: a language model, one of its hooks, and its text."""

from __future__ import annotations

from dataclasses import dataclass

from producer.settings import CorpusSettings, ModelSettings


@dataclass(frozen=True)
class Subject:
    """Activations of one hook, and sizes that suit them."""

    name: str
    model: ModelSettings
    """With one hook."""
    corpus: CorpusSettings
    train_rows: int
    held_out_rows: int
    """Of the validation part and the test part together; the halves come from different shards of held-out text."""
    lm_rows: int
    """Rows of the test part on which the language model reads reconstructions."""

    @property
    def hook(self) -> str:
        return self.model.hooks[0]


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "demo",
            ModelSettings(name="producer/demo_lm", hooks=["blocks.1.hook_resid_post"]),
            CorpusSettings(kind="stdlib"),
            train_rows=3_000_000,
            held_out_rows=60_000,
            lm_rows=20_000,
        ),
        Subject(
            "smollm2",
            ModelSettings(name="models/smollm2", hooks=["blocks.15.hook_resid_post"]),
            CorpusSettings(kind="stdlib", context=128),
            train_rows=1_000_000,
            held_out_rows=80_000,
            lm_rows=8_000,
        ),
    )
}
"""By name. The folder models/smollm2 comes from `python -m producer fetch-example smollm2 models/smollm2`."""
