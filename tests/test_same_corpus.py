"""The same text by any kind of corpus gives the same activations, bit for bit: each layout, and each way of packing."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from producer.common.run_file import read_run_file
from producer.corpus import open_text
from producer.corpus.rendering.windows import Windows
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings
from tests.small_corpora import FOLDER, ROOT, demo_tokenizer

RUN_FILE = ROOT / "deploy" / "files.toml"
TEXTS = [path.read_text("utf-8") for path in sorted((FOLDER / "texts").iterdir())]
KINDS: dict[str, dict[str, Any]] = {
    "jsonl": {"kind": "jsonl", "paths": ["texts.jsonl"]},
    "parquet": {"kind": "parquet", "paths": ["one_group.parquet"]},
    "tokens": {"kind": "tokens", "paths": ["tokens.npy"]},
    "packed jsonl": {"kind": "jsonl", "paths": ["texts.jsonl.gz"]},
    "ids in jsonl": {"kind": "jsonl", "paths": ["ids.jsonl"], "column": "input_ids"},
    "lists of texts": {"kind": "jsonl", "paths": ["lists.jsonl"], "column": "parts"},
    "nested column": {"kind": "jsonl", "paths": ["lists.jsonl"], "column": "meta.texts"},
}
"""[corpus] of each layout of the same documents, in one shard."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    settings = ModelSettings(name="demo", hooks=["blocks.1.hook_resid_post"], device="cpu", dtype="float32")
    return load_language_model(settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of tests/data/corpora, and other layouts made of them."""
    pq = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("corpora")
    for path in FOLDER.glob("*.*"):
        (folder / path.name).symlink_to(path)
    pq.write_table(pq.read_table(FOLDER / "texts.parquet"), folder / "one_group.parquet")
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress((FOLDER / "texts.jsonl").read_bytes()))
    ids = demo_tokenizer()(TEXTS, add_special_tokens=False)["input_ids"]
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": tokens}) + "\n" for tokens in ids))
    lists = [{"parts": part, "meta": {"texts": part}} for part in (TEXTS[:3], TEXTS[3:])]
    (folder / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lists))
    return folder


def activations_of(model: LanguageModel, windows: Windows) -> Tensor:
    """The streamed activations of all windows, in order."""
    padding = torch.from_numpy(windows.padded)
    x = model.activations(torch.from_numpy(windows.ids), padding if windows.padded.any() else None)[0]
    return x[torch.from_numpy(windows.kept)]


def windows_of_shards(model: LanguageModel, **settings: Any) -> Iterator[Windows]:
    text = open_text(CorpusSettings.model_validate({"held_out": 0.0, "context": 64} | settings))
    return (text.windows(shard, 0, model.tokenizer) for shard in range(text.shards))


@pytest.mark.parametrize("layout", KINDS)
def test_any_layout_gives_the_activations_of_the_text(model: LanguageModel, folder: Path, layout: str) -> None:
    """One shard of all documents, as files of text have it."""
    (expected,) = windows_of_shards(model, kind="text", paths=[str(FOLDER / "texts")])
    settings = KINDS[layout] | {"paths": [str(folder / name) for name in KINDS[layout]["paths"]]}
    (windows,) = windows_of_shards(model, **settings)
    for name in ("ids", "kept", "padded"):
        np.testing.assert_array_equal(getattr(windows, name), getattr(expected, name))
    assert torch.equal(activations_of(model, windows), activations_of(model, expected))


def test_a_document_packed_alone_is_a_separate_one(model: LanguageModel) -> None:
    """Packing has nothing to put beside it."""
    for path in sorted((FOLDER / "texts").iterdir()):
        (one,) = windows_of_shards(model, kind="text", paths=[str(path)])
        (other,) = windows_of_shards(model, kind="text", paths=[str(path)], packing="separate")
        for name in ("ids", "kept", "padded"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert torch.equal(activations_of(model, one), activations_of(model, other)), path.name


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "tokens"])
def test_the_example_s_commands_read_what_they_name(model: LanguageModel, kind: str, monkeypatch: Any) -> None:
    """Each override of deploy/files.toml opens several shards, some of them held out."""
    monkeypatch.chdir(ROOT)
    commands = {"text": []} | {
        match[1]: [f"corpus.kind={match[1]}", f"corpus.paths={match[2]}"]
        for match in re.finditer(r"corpus\.kind=(\w+) +'corpus\.paths=(\S+)'", RUN_FILE.read_text())
    }
    text = open_text(read_run_file(ProducerSettings, RUN_FILE, commands[kind]).corpus)
    held_out = text.parts[0].corpus.held_out_shards
    assert held_out and text.shards > len(held_out) + 1
    assert sum(int(text.windows(shard, 0, model.tokenizer).kept.sum()) for shard in range(text.shards)) > 4000
