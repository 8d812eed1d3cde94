"""A language model under training: checkpoints are found whole, and every activation has one revision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from monitor.comparison import compare
from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.lm.revisions import FIRST, Revision, first_settings, newest_checkpoint, settings_of
from producer.settings import CorpusSettings, ModelSettings, ProducerSettings, RunSettings
from producer.sources.language_model import LanguageModelSource
from producer.wire import Chunk, Heartbeat, Lease, pack_bits
from tests.small_chats import write_chat_model
from tests.small_run import ledger_through_json, publish_snapshot
from tests.small_stream import CHUNK_ROWS, CONTEXT, hello_of, named_source
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.ledger.resume import ledger_state, restore_ledger

HOOK = "blocks.0.hook_resid_post"


def write_checkpoint(model: Path, folder: Path, factor: float) -> Path:
    """The model with its embedding scaled, without a tokenizer, as a training run saves it."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(factor)
    network.save_pretrained(folder)
    return folder


# Checkpoints in a folder


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """By number, so that 1000 comes after 999; a file that is still being written does not count."""
    model = write_chat_model(tmp_path / "model")
    out = tmp_path / "out"
    assert newest_checkpoint(out) == FIRST
    for name in ("checkpoint-999", "checkpoint-1000", "checkpoint-2000"):
        shutil.copytree(model, out / name)
    weights = out / "checkpoint-2000" / "model.safetensors"
    data = weights.read_bytes()
    for part in (b"", data[:5], data[:100], data[:-1]):
        weights.write_bytes(part)
        assert newest_checkpoint(out) == Revision(1000, "checkpoint-1000")
    weights.write_bytes(data)
    (out / "checkpoint-2000" / "config.json").unlink()
    assert newest_checkpoint(out) == Revision(1000, "checkpoint-1000")
    shutil.copy(model / "config.json", out / "checkpoint-2000")
    newest = newest_checkpoint(out, Revision(1000, "checkpoint-1000"))
    assert newest == Revision(2000, "checkpoint-2000")
    assert newest_checkpoint(out, newest) == newest


def test_a_checkpoint_of_several_files_needs_all_of_them(tmp_path: Path) -> None:
    """The index names the files."""
    folder = tmp_path / "step-5"
    shutil.copytree(write_chat_model(tmp_path / "model"), folder)
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((tensors[:3], tensors[3:])):
        save_file(dict(part), folder / f"part-{number}.safetensors")
        index |= {name: f"part-{number}.safetensors" for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert newest_checkpoint(tmp_path).name == "step-5"
    (folder / "part-1.safetensors").unlink()
    assert newest_checkpoint(tmp_path) == FIRST


def test_settings_of_a_revision(tmp_path: Path) -> None:
    """On the hub it is a revision; below a folder, a folder; of a watched folder, a checkpoint that must be there."""
    on_hub = ModelSettings(name="EleutherAI/pythia-70m", hooks=[HOOK], revisions=["step1", "step2"])
    assert first_settings(on_hub).revision == "step1" and settings_of(on_hub, "step2").revision == "step2"
    local = ModelSettings(name=str(tmp_path), hooks=[HOOK], revisions=["a", "b"])
    assert settings_of(local, "b").name == str(tmp_path / "b")
    watching = ModelSettings(name="gpt2", hooks=[HOOK], watch=str(tmp_path))
    assert settings_of(watching, "") == watching
    with pytest.raises(ModelError, match=r"checkpoint checkpoint-7 is gone or incomplete.*keep more of its last"):
        settings_of(watching, "checkpoint-7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"watch": "out", "revisions": ["a"]}, "model.revisions and model.watch exclude each other"),
        ({"watch": "out", "revision": "main"}, "model.revision and model.watch exclude each other"),
    ],
)
def test_one_way_to_revisions(changes: dict[str, Any], message: str) -> None:
    """Which weights are read has one source."""
    with pytest.raises(ValueError, match=message):
        ModelSettings(name="gpt2", hooks=[HOOK], **changes)


def test_a_deterministic_run_cannot_wait_for_checkpoints() -> None:
    """When one comes is chance; a list of revisions is not."""
    run, model = RunSettings(deterministic=True), {"name": "gpt2", "hooks": [HOOK], "dtype": "float32"}
    with pytest.raises(ValueError, match=r"run.deterministic and model.watch exclude each other"):
        ProducerSettings(run=run, model=ModelSettings(**model, watch="out"))
    ProducerSettings(run=run, model=ModelSettings(**model, revisions=["a", "b"]))


# The producer


def weight_count(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.network.module.parameters())


def test_a_producer_reads_the_revision_that_it_is_asked_for(tmp_path: Path) -> None:
    """Its activations are those of that checkpoint alone, with a norm bound of its own, and back again."""
    model = write_chat_model(tmp_path / "model")
    write_checkpoint(model, tmp_path / "out" / "checkpoint-1", 3.0)
    (tmp_path / "text.txt").write_text("some text of a few words\n" * 20)
    settings = ModelSettings(name=str(model), hooks=[HOOK], device="cpu", dtype="float32", batch_windows=4,
                             watch=str(tmp_path / "out"))  # fmt: skip
    corpus = CorpusSettings(kind="text", paths=[str(tmp_path / "text.txt")], context=16, held_out=0.0)
    source = LanguageModelSource(ProducerSettings(model=settings, corpus=corpus))
    assert source.facts["model_revisions"] == "followed"
    assert source.find_newest() == Revision(1, "checkpoint-1")
    windows = source.windows(0)
    indices = np.arange(4)

    def activations(revision: str) -> torch.Tensor:
        source.use_revision(revision)
        return source.activations(0, windows, indices)[0]

    first, first_bounds = activations(""), source.revision_bounds
    first_model = source.model
    second, second_bounds = activations("checkpoint-1"), source.revision_bounds
    alone = load_language_model(settings_of(settings, "checkpoint-1"), tokenizer=source.model.tokenizer)
    assert weight_count(first_model) == 0 < weight_count(source.model), "memory holds one checkpoint"
    assert torch.equal(second, alone.activations(torch.from_numpy(windows.ids[indices]))[0])
    assert not torch.equal(first, second) and torch.equal(first, activations(""))
    assert first_bounds is not None and second_bounds is not None and second_bounds[0] > 1.5 * first_bounds[0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """The stream's widths and ids are the run's."""
    model = write_chat_model(tmp_path / "model")
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    network.resize_token_embeddings(len(network.get_input_embeddings().weight) - 1)
    network.save_pretrained(tmp_path / "out" / "checkpoint-1")
    (tmp_path / "text.txt").write_text("a few words\n" * 20)
    settings = ModelSettings(name=str(model), hooks=[HOOK], device="cpu", dtype="float32", batch_windows=4,
                             watch=str(tmp_path / "out"))  # fmt: skip
    corpus = CorpusSettings(kind="text", paths=[str(tmp_path / "text.txt")], context=16, held_out=0.0)
    source = LanguageModelSource(ProducerSettings(model=settings, corpus=corpus))
    windows, indices = source.windows(0), np.arange(4)
    before = source.activations(0, windows, indices)[0].clone()
    with pytest.raises(ModelError, match=r"it is of another model|belongs to another model|tokenizer"):
        source.use_revision("checkpoint-1")
    assert weight_count(source.model) == 0, "the run's model made room for the checkpoint"
    source.use_revision("")
    assert torch.equal(source.activations(0, windows, indices)[0], before)


# The trainer


def ledger_with(epochs: int = 1, revisions: tuple[str, ...] = (), is_watching: bool = True) -> Ledger:
    limits = Limits(
        capacity=16 * CHUNK_ROWS, seed=0, epochs=epochs, heartbeat_seconds=1.0, dead_seconds=10.0, stall_seconds=60.0,
        revisions=revisions, watches_checkpoints=is_watching,
    )  # fmt: skip
    return Ledger(limits, "run", "start", ["ipc://unused"])


def leases_of(ledger: Ledger, now: float = 0.0) -> list[Lease]:
    return [send.message for send in ledger.tick(now) if isinstance(send.message, Lease)]


def send_chunk(ledger: Ledger, session: str, lease: Lease, number: int) -> int:
    """Two windows of a lease arrive and are trained; returns the shard's serial."""
    chunk = Chunk(
        number=number, incarnation="start", shard=lease.shard, epoch=lease.epoch, attempt=lease.attempt,
        first_window=0, windows=2, rows=CHUNK_ROWS, kept=pack_bits(np.ones(CHUNK_ROWS, bool)), outliers=b"",
    )  # fmt: skip
    accepted, _ = ledger.chunk(session, chunk, CHUNK_ROWS * 4 * 4, 0.0)
    assert accepted is not None
    ledger.mark_trained(np.full(CHUNK_ROWS, accepted.serial), accepted.position)
    return accepted.serial


def test_shards_are_leased_with_the_newest_checkpoint_and_keep_it() -> None:
    """What has begun stays with its revision, through a restart too; an untouched shard takes the newest one."""
    assert CONTEXT * 2 == CHUNK_ROWS
    ledger = ledger_with()
    hello = hello_of(named_source(), revision="checkpoint-1", revision_number=1)
    ledger.hello(hello, 0.0)
    begun, untouched = leases_of(ledger)
    assert (begun.revision, untouched.revision) == ("checkpoint-1", "checkpoint-1")
    serial = send_chunk(ledger, hello.session, begun, 1)
    ledger.heartbeat(hello.session, Heartbeat(progress=1, revision="checkpoint-2", revision_number=2), 0.0)
    ledger.heartbeat(hello.session, Heartbeat(progress=2, revision="checkpoint-1", revision_number=1), 0.0)
    assert "checkpoint checkpoint-2" in ledger.failures.pop_notices()[-1]

    books, bits = ledger_state(ledger)
    restored = ledger_with()
    restore_ledger(restored, ledger_through_json(books), bits)
    restored.incarnation = "start"
    again = hello.model_copy(update={"session": "again", "revision": "", "revision_number": 0})
    restored.hello(again, 0.0)
    leases = {lease.shard: lease for lease in leases_of(restored)}
    assert leases[begun.shard].revision == "checkpoint-1" and leases[untouched.shard].revision == "checkpoint-2"
    assert restored.shards.open[serial].revision == "checkpoint-1"
    send_chunk(restored, "again", leases[untouched.shard], 1)
    assert dict(restored.shards.revisions.tokens) == {"checkpoint-1": CHUNK_ROWS, "checkpoint-2": CHUNK_ROWS}
    assert restored.shards.revisions.last_trained == "checkpoint-2"


def test_each_epoch_has_the_next_of_a_list_of_revisions() -> None:
    """The last one stays; what producers report of folders is not asked for."""
    revisions = ledger_with(revisions=("a", "b"), is_watching=False).shards.revisions
    assert [revisions.of_epoch(epoch) for epoch in range(4)] == ["a", "b", "b", "b"]
    assert not revisions.report("checkpoint-9", 9)


def test_a_model_that_does_not_change_has_no_revisions() -> None:
    """A report of a checkpoint changes nothing where the run file watches none."""
    ledger = ledger_with(is_watching=False)
    hello = hello_of(named_source(), revision="checkpoint-1", revision_number=1)
    ledger.hello(hello, 0.0)
    lease, _ = leases_of(ledger)
    assert lease.revision == ""
    send_chunk(ledger, hello.session, lease, 1)
    assert ledger.shards.revisions.last_trained is None


# The comparison


def test_compare_tells_the_revisions_of_both_sides(tmp_path: Path) -> None:
    """From the manifests; a run of one model has none."""
    folders = [
        publish_snapshot(tmp_path / "run", tokens, stream={"revision": name})
        for tokens, name in ((1, ""), (2, "checkpoint-9"))
    ]
    assert compare(*folders).as_json()["revisions"] == ["its first weights", "checkpoint-9"]
    assert compare(folders[0] / "small", folders[1] / "small").revisions == ("its first weights", "checkpoint-9")
    early = publish_snapshot(tmp_path / "early", 1, stream={"model_revisions": "followed"})
    assert compare(early, folders[1]).revisions == ("its first weights", "checkpoint-9")
    plain = [publish_snapshot(tmp_path / "plain", tokens) for tokens in (1, 2)]
    assert "revisions" not in compare(*plain).as_json()
