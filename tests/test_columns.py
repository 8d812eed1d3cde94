"""What a column may hold besides text: lists of texts, token ids, fields of other columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from producer.corpus import CorpusError, open_corpus
from producer.corpus.rendering.windows import windows_of
from producer.settings import CorpusSettings
from tests.small_chats import chat_tokenizer

TEXTS = ["one two", "three", "a text that does not fit into one window"]


def write(folder: Path, form: str, records: list[dict[str, Any]]) -> CorpusSettings:
    if form == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return CorpusSettings(kind=form, paths=[str(folder)], context=16)  # type: ignore[arg-type]


def documents(settings: CorpusSettings, column: str) -> list[Any]:
    return list(open_corpus(settings.model_copy(update={"column": column})).documents(0))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_of_texts_and_nested_columns(tmp_path: Path, form: str) -> None:
    """Each text of a list is a document; a path leads into columns, and null above its end is no document."""
    records = [{"parts": TEXTS[:2], "meta": {"body": TEXTS[0]}}, {"parts": [TEXTS[2], None], "meta": None}]
    settings = write(tmp_path, form, records)
    assert documents(settings, "parts") == TEXTS
    assert documents(settings, "meta.body") == TEXTS[:1]
    with pytest.raises(CorpusError, match=r"corpus\.column = 'meta\.title': meta is .*name"):
        documents(settings, "meta.title")


@pytest.mark.parametrize("packing", ["pack", "separate", "separate_masked"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_token_ids_give_the_windows_of_their_text(tmp_path: Path, form: str, packing: str) -> None:
    """Bit for bit, however documents are packed."""
    tokenizer = chat_tokenizer()
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    records = [{"text": text, "input_ids": tokens} for text, tokens in zip(TEXTS, ids, strict=True)]
    settings = write(tmp_path, form, records).model_copy(update={"packing": packing})
    text, tokens = (windows_of(documents(settings, column), tokenizer, settings) for column in ("text", "input_ids"))
    for name in ("ids", "kept", "padded", "positions"):
        np.testing.assert_array_equal(getattr(text, name), getattr(tokens, name))


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    settings = write(tmp_path, "jsonl", [{"input_ids": [3, 50_000]}])
    with pytest.raises(CorpusError, match="the corpus holds id 50000, but the tokenizer has"):
        windows_of(documents(settings, "input_ids"), chat_tokenizer(), settings)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_zstd_files_are_read_as_gzip_files_are(tmp_path: Path, kind: str) -> None:
    """Never cut; several frames follow each other, and a damaged file says so."""
    pa = pytest.importorskip("pyarrow")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS] if kind == "jsonl" else TEXTS
    frames = [pa.compress(line.encode(), codec="zstd", asbytes=True) for line in lines]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    settings = CorpusSettings(kind=kind, paths=[str(tmp_path)], shard_bytes=10)  # type: ignore[arg-type]
    corpus = open_corpus(settings)
    assert corpus.shards == 1
    assert list(corpus.documents(0)) == (TEXTS if kind == "jsonl" else ["".join(TEXTS)])
    with pytest.raises(CorpusError, match=r"in one document, over corpus\.max_document_bytes = 9"):
        list(open_corpus(settings.model_copy(update={"max_document_bytes": 9})).documents(0))
    path.write_bytes(b"".join(frames)[:-3])
    with pytest.raises(CorpusError, match=r"a\.jsonl\.zst.*damaged zstd file"):
        list(open_corpus(settings).documents(0))
