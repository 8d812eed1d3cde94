"""Each kind of corpus through real processes that are killed: every activation that should be, once, by its name."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from monitor.cli.compare import main
from monitor.comparison import SameWidth, compare
from producer.common.run_file import read_run_file
from producer.corpus import open_text
from producer.settings import ProducerSettings
from producer.wire import held_out_shards
from tests.small_chats import chat_tokenizer, write_chat_model
from tests.small_processes import Start, small_processes, tokens_in_checkpoint, wait_until
from trainer.snapshot import read_manifest, snapshot_names

CONTEXT = 32
RUN = f"""
[run]
directory = "DIR/run"
threads = 1
[stream]
endpoint = "ipc://DIR/stream"
dtype = "float32"
heartbeat_seconds = 0.2
dead_seconds = 1.5
[model]
name = "DIR/model"
hooks = ["blocks.0.hook_resid_post"]
device = "cpu"
dtype = "float32"
batch_windows = 16
[corpus]
CORPUS
context = {CONTEXT}
epochs = 2
outlier_factor = 0.0
[buffer]
rows = 4000
[optimizer]
batch = 64
matmul = "float32"
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 32
k = 4
[snapshots]
every_tokens = 1000000
[checkpoint]
every_seconds = 0.2
[monitor]
trainer_port = 0
producer_port = 0
"""


def write_chats(folder: Path, count: int = 120) -> None:
    """Two files of conversations of many lengths, one of them ShareGPT's."""
    for name, keys, roles in (
        ("a", ("role", "content"), ("user", "assistant")),
        ("b", ("from", "value"), ("human", "gpt")),
    ):
        lines = []
        for number in range(count):
            turns = [(roles[turn % 2], f"{number} " * (1 + (number * 7 + turn) % 9)) for turn in range(2 + number % 3)]
            lines.append({"conversations": [dict(zip(keys, turn, strict=True)) for turn in turns]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_texts(folder: Path, count: int = 150) -> None:
    """Documents of 1 to 90 tokens."""
    lines = [json.dumps({"text": "0123456789"[number % 7 :] * (1 + number * 7 % 9)}) + "\n" for number in range(count)]
    (folder / "a.jsonl").write_text("".join(lines))


def write_mixture(folder: Path) -> None:
    """Conversations, documents apart and documents in a row, in folders of their own."""
    for name, write, count in (("chat", write_chats, 25), ("apart", write_texts, 60), ("packed", write_texts, 60)):
        (folder / name).mkdir()
        write(folder / name, count)


MIXTURE = """kind = "mixture"
mixture = [
    {name = "chat", kind = "chat", paths = ["DIR/data/chat"], roles = ["assistant"], shard_bytes = 500, weight = 2},
    {name = "apart", kind = "jsonl", paths = ["DIR/data/apart"], packing = "separate", shard_bytes = 500},
    {name = "packed", kind = "jsonl", paths = ["DIR/data/packed"], shard_bytes = 300, held_out = 0.2, weight = 1.5},
]
"""
JSONL = 'kind = "jsonl"\npaths = ["DIR/data"]\nshard_bytes = 1500\n'
CORPORA: dict[str, tuple[Callable[[Path], None], str]] = {
    "chat": (write_chats, 'kind = "chat"\npaths = ["DIR/data"]\nroles = ["assistant"]\nshard_bytes = 1500'),
    "separate": (write_texts, JSONL + 'packing = "separate"\npositions = ["2:"]'),
    "separate_masked": (write_texts, JSONL + 'packing = "separate_masked"'),
    "mixture": (write_mixture, MIXTURE),
}
"""What is written into DIR/data, and the lines of [corpus]."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with small_processes(tmp_path, SECONDS_PER_STEP="0.03") as start:
        yield start


def names(shard: Any, window: Any, position: Any) -> np.ndarray:
    """One number for each name."""
    return (np.asarray(shard, np.int64) * 10_000 + window) * CONTEXT + position


def expected_names(run_file: Path) -> np.ndarray:
    """The name of each position that should be streamed in two epochs, read without any process."""
    text = open_text(read_run_file(ProducerSettings, run_file, []).corpus)
    held_out = held_out_shards(text.shards, text.held_out)
    return np.concatenate(
        [
            names(shard, *np.nonzero(text.windows(shard, epoch, chat_tokenizer()).kept))
            for epoch in range(2)
            for shard in range(text.shards)
            if shard not in held_out
        ]
    )


def expected_shares(run_file: Path) -> dict[str, int]:
    """Tokens of each corpus of a mixture in two epochs, added up shard by shard."""
    text = open_text(read_run_file(ProducerSettings, run_file, []).corpus)
    counts: Counter[str] = Counter()
    for epoch in range(2):
        for shard in range(text.shards if text.shares else 0):
            part, number = text.find(shard, epoch)
            counts[part.name] += int(part.windows(number, chat_tokenizer()).kept.sum())
    return counts


@pytest.mark.long
@pytest.mark.timeout(1200)  # eight processes are started, one after the other
@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_killed_run_trains_each_name_exactly_once(
    start: Start, tmp_path: Path, kind: str, deterministic: bool
) -> None:
    """Two epochs; a producer and the trainer are killed in the first. Of a mixture, each corpus has its exact share."""
    write, lines = CORPORA[kind]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    write_chat_model(tmp_path / "model")
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.replace("CORPUS", lines).replace("DIR", str(tmp_path)))
    expected = np.sort(expected_names(run_file))
    mode = f"run.deterministic={str(deterministic).lower()}"

    trainer, victim = start("trainer", mode), start("producer", mode)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > 0 or trainer.poll() is not None, 240)
    victim.kill()
    start("producer", mode)
    before = tokens_in_checkpoint(tmp_path)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > before or trainer.poll() is not None, 240)
    assert trainer.poll() is None, "the run ended before it could be killed"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait(120)

    assert start("trainer", mode).wait(120) == 0
    shard, window, position = np.fromfile(tmp_path / "rows", np.int32).reshape(-1, 3).T
    np.testing.assert_array_equal(np.sort(names(shard, window, position)), expected)
    report = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["stream"]["tokens_by_corpus"] == expected_shares(run_file)


def train_on(model: Path, folder: Path, steps: int) -> Path:
    """Trains the language model of a folder for a few steps, and saves it as a training run does."""
    tokenizer = chat_tokenizer()
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    ids = torch.tensor([tokenizer("0123456789" * 3, add_special_tokens=False)["input_ids"]])
    for _ in range(steps):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_killed_run_follows_a_model_under_training(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints come while it runs; each name is trained once, under one revision, which snapshots tell.

    `compare` names the checkpoints of the first snapshot and the last, and shows how far latents turned between them.
    """
    (tmp_path / "data").mkdir()
    write_texts(tmp_path / "data")
    model = write_chat_model(tmp_path / "model")
    run_file = tmp_path / "run.toml"
    small_shards = JSONL.replace("1500", "300")  # many are leased one after the other
    run_file.write_text(RUN.replace("CORPUS", small_shards).replace("DIR", str(tmp_path)))
    expected = np.sort(expected_names(run_file))
    options = (
        f"model.watch={tmp_path}/out", "snapshots.every_tokens=2000", "snapshots.keep=100", "buffer.rows=2048",
        "optimizer.learning_rate=0.05", "optimizer.warmup_tokens=64",  # so that latents move in a few steps
    )  # fmt: skip

    trainer, victim = start("trainer", *options), start("producer", *options)
    snapshots = tmp_path / "run" / "snapshots"
    wait_until(lambda: len(snapshot_names(tmp_path / "run")) > 0 or trainer.poll() is not None, 240)
    first = train_on(model, tmp_path / "out" / "checkpoint-5", 5)
    wait_until(lambda: "checkpoint checkpoint-5" in (tmp_path / "trainer.log").read_text(), 240)
    victim.kill()
    start("producer", *options)
    before = tokens_in_checkpoint(tmp_path)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > before or trainer.poll() is not None, 240)
    assert trainer.poll() is None, "the run ended before it could be killed"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait(30)
    train_on(first, tmp_path / "out" / "checkpoint-10", 5)

    assert start("trainer", *options).wait(400) == 0
    shard, window, position = np.fromfile(tmp_path / "rows", np.int32).reshape(-1, 3).T
    np.testing.assert_array_equal(np.sort(names(shard, window, position)), expected)
    streams = [read_manifest(snapshots / name).run["stream"] for name in snapshot_names(tmp_path / "run")]
    revisions = list(dict.fromkeys(stream.get("revision", "") for stream in streams))
    assert (revisions[0], revisions[-1]) == ("", "checkpoint-10")  # checkpoint-5 may be overtaken by the restart
    assert sum(streams[-1]["tokens_by_revision"].values()) == len(expected)

    folders = [snapshots / name for name in snapshot_names(tmp_path / "run")]
    comparison = compare(folders[0], folders[-1])
    assert comparison.revisions == ("its first weights", "checkpoint-10")
    latents = comparison.saes["topk"].latents
    assert isinstance(latents, SameWidth) and latents.same_index.mean is not None
    assert latents.same_index.mean < 0.999, "decoder rows followed the model"
    assert main([str(folders[0]), str(folders[-1])]) == 0
    assert "trained on checkpoint-10 of the language model" in capsys.readouterr().out
