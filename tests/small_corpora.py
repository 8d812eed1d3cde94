"""One small text in the layout of each kind of corpus; `python -m tests.small_corpora` writes tests/data/corpora anew.

texts/00.txt …      a document each                                     kind text
texts.jsonl         a document in each line                             kind jsonl
texts.parquet       a document in each row, in row groups of four       kind parquet
tokens.npy          their ids by the demo's tokenizer, EOS between      kind tokens
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "data" / "corpora"
SOURCES = ("docs/security.md", "docs/deterministic.md", "docs/exports.md")
"""Pages of this repository whose sections are the documents."""
LEAST = 200
"""Characters of a document."""


def sections() -> list[str]:
    """The sections of those pages, as they are when this is called."""
    pages = [(ROOT / name).read_text("utf-8") for name in SOURCES]
    parts = [part.strip() for page in pages for part in re.split(r"^#+ ", page, flags=re.MULTILINE)]
    return [part for part in parts if len(part) > LEAST]


def demo_tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(ROOT / "producer" / "demo_lm")


def write_corpora(folder: Path, documents: list[str]) -> Path:
    """Writes the documents in every layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / "texts" / f"{number:02}.txt").write_text(text, "utf-8")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    pq.write_table(pa.table({"text": documents}), folder / "texts.parquet", row_group_size=4)
    tokenizer = demo_tokenizer()
    ids: list[int] = []
    for tokens in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.eos_token_id] * bool(ids) + tokens
    np.save(folder / "tokens.npy", np.array(ids, np.uint16))
    return folder


if __name__ == "__main__":
    print(write_corpora(FOLDER, sections()))
