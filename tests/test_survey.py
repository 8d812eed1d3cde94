"""A look at shards before the run: too large ones are refused, and unlike ones that a buffer will not mix are told."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from producer.corpus import CorpusError, open_text
from producer.corpus.survey import survey_shards
from producer.settings import CorpusSettings
from tests.small_stream import hello_of, named_source
from trainer.stream.mixing import mixing_advice

WORDS = [f"word{number}" for number in range(200)]


def text_of(folder: Path, vocabularies: list[list[str]], **settings: Any) -> Any:
    """A corpus whose shards are files of 2000 random words, each of its own vocabulary."""
    random = Random(0)
    for number, words in enumerate(vocabularies):
        (folder / f"{number}.txt").write_text(" ".join(random.choices(words, k=2000)))
    options = {"kind": "text", "paths": [str(folder)], "shard_bytes": 20_000, "held_out": 0.0} | settings
    return open_text(CorpusSettings(**options))


def test_shards_of_one_text_are_alike_and_those_of_many_are_not(tmp_path: Path) -> None:
    """The same vocabulary in each; half of it of its own; all of it."""
    own = [[f"{shard}x{number}" for number in range(200)] for shard in range(4)]
    results = []
    for name, vocabularies in {
        "same": [WORDS] * 4, "half": [WORDS[:100] + words[:100] for words in own], "own": own,
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        survey = survey_shards(text_of(tmp_path / name, vocabularies))
        assert survey.tokens is not None and 2500 < survey.tokens < 4000 and survey.unlikeness is not None
        results.append(survey.unlikeness)
    assert results[0] < 0.05 < 0.35 < results[1] < 0.65 < results[2] == 1.0


def test_a_shard_larger_than_memory_is_refused_at_the_start(tmp_path: Path) -> None:
    """With what it takes, what is free, and what to set."""
    text = text_of(tmp_path, [WORDS] * 2)
    with pytest.raises(
        CorpusError, match=r"shard \d holds about .* of which 100 kB are free. Lower corpus.shard_bytes"
    ):
        survey_shards(text, free_bytes=1e5)


def test_a_shard_beyond_the_streams_names_is_refused_at_the_start(tmp_path: Path) -> None:
    """A lease names 67 million positions at most: here a thousand."""
    text = text_of(tmp_path, [WORDS] * 2)
    with pytest.raises(CorpusError, match=r"tokens, and a shard may have 1,000. Lower corpus.shard_bytes = 20000"):
        survey_shards(text, max_positions=1000)


@pytest.mark.parametrize(
    ("capacity", "measured", "is_told"),
    [
        (4000, {"shard_tokens": 2000, "shard_unlikeness": 0.5}, True),
        (8000, {"shard_tokens": 2000, "shard_unlikeness": 0.5}, False),
        (4000, {"shard_tokens": 2000, "shard_unlikeness": 0.05}, False),
        (4000, {"shard_tokens": None, "shard_unlikeness": None}, False),
        (4000, {}, False),
    ],
)
def test_unlike_shards_that_the_buffer_cannot_mix_are_told(
    capacity: int, measured: dict[str, Any], is_told: bool
) -> None:
    """Two shards in the buffer: 4 bytes a token and a quarter of the buffer make shard_bytes."""
    advice = mixing_advice(hello_of(named_source(), provenance=measured), capacity)
    assert (advice is not None) == is_told
    if advice is not None:
        assert "holds 2 of them" in advice and "corpus.shard_bytes = 4000" in advice and "buffer.rows to 8000" in advice
