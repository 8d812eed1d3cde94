"""Text into windows, by kind of corpus: tokens per second of processor time, on one core.

Every kind reads the same documents, the sources of Python's standard library, in shards of the default size. Processor
time, since reading is one thread's work, and other processes do not count.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from producer.corpus import open_corpus
from producer.corpus.rendering.windows import windows_of
from producer.settings import CorpusSettings
from tests.benchmarks.measure import Options, Result
from tests.small_chats import CHATML
from tests.small_corpora import demo_tokenizer

CONTEXT = 256
MEGABYTES = 4


def run(options: Options) -> Iterator[Result]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = CHATML
    with tempfile.TemporaryDirectory() as folder:
        kinds = write(Path(folder), tokenizer, (1 if options.quick else 4 * MEGABYTES) * 250_000)
        contenders = {name: reading(kind, tokenizer) for name, kind in kinds.items()}
        yield Result("Text into windows", "tokens/s of one core").take_turns(options.rounds, contenders)


def reading(settings: dict[str, Any], tokenizer: Any) -> Callable[[], float]:
    """A contender: tokens per second of processor time."""
    corpus_settings = CorpusSettings.model_validate({"held_out": 0.0, "context": CONTEXT} | settings)

    def measure() -> float:
        corpus = open_corpus(corpus_settings)
        began, tokens = time.process_time(), 0
        for shard in range(corpus.shards):
            windows = windows_of(corpus.documents(shard), tokenizer, corpus_settings)
            tokens += int((~windows.padded).sum())
        return tokens / (time.process_time() - began)

    return measure


def write(folder: Path, tokenizer: Any, size: int) -> dict[str, dict[str, Any]]:
    """Writes about `size` bytes of text in each layout; returns [corpus] of each kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus = open_corpus(CorpusSettings(kind="stdlib", held_out=0.0))
    texts: list[str] = []
    for shard in range(corpus.shards):
        texts += [document for document in corpus.documents(shard) if isinstance(document, str) and document]
        if sum(map(len, texts)) > size:
            break
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:05}.txt").write_text(text)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lines = [{"text": text, "input_ids": tokens} for text, tokens in zip(texts, ids, strict=True)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = [[{"role": "user", "content": text[:200]}, {"role": "assistant", "content": text[200:]}] for text in texts]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=64)
    np.save(folder / "a.npy", np.array([token for tokens in ids for token in tokens], np.uint16))
    path = str(folder)
    jsonl = {"kind": "jsonl", "paths": [f"{path}/a.jsonl"]}
    return {
        "text": {"kind": "text", "paths": [f"{path}/texts"]},
        "jsonl": jsonl,
        "jsonl, separate": jsonl | {"packing": "separate"},
        "jsonl, separate_masked": jsonl | {"packing": "separate_masked"},
        "jsonl, column of ids": jsonl | {"column": "input_ids"},
        "parquet": {"kind": "parquet", "paths": [f"{path}/a.parquet"]},
        "tokens": {"kind": "tokens", "paths": [f"{path}/a.npy"]},
        "chat": {"kind": "chat", "paths": [f"{path}/chats.jsonl"]},
        "chat, one role": {"kind": "chat", "paths": [f"{path}/chats.jsonl"], "roles": ["assistant"]},
    }
