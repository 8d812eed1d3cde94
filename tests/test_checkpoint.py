"""What is on disk after anything: checkpoints and snapshots are whole or absent, and resuming changes no bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from producer.wire import Hello, Hook
from tests.small_run import by_key, checkpoint_of, identity_sae, publish_snapshot, small_checkpoint
from trainer.parallel.ranks import latent_cuts
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError, file_sha256, pin, retire, snapshot_names, supersede_after, unpin, verify
from trainer.state.checkpoint import CheckpointError, FileRecord, load_newest, save, save_shard, shard_name
from trainer.state.durable import sweep
from trainer.state.format import (
    Checkpoint,
    LatentRange,
    OptimizerState,
    SaeTensors,
    StatisticsState,
    WhiteningState,
    has_latent_rows,
)
from trainer.stream.buffer import Batch
from trainer.training.resuming import roster_of
from trainer.training.run import Run

ROOT = Path(__file__).parent.parent

TENSORS = {
    "weights": torch.linspace(-1, 1, 12).view(3, 4),
    "half": torch.tensor([1.0, -0.0, 3.1415926], dtype=torch.bfloat16),
    "steps": torch.tensor(7.0),
    "counts": torch.tensor([2**40, -1]),
    "bits": torch.tensor([255, 0], dtype=torch.uint8),
    "empty": torch.zeros(0),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Checkpoints


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    """Every tensor bit for bit, numbers beyond 64 bits too."""
    small = small_checkpoint(1234, parameters=TENSORS, run="θ")
    state = replace(small.document.run, scales=[0.1, 1e-300])
    saved = replace(small, document=replace(small.document, run=state, buffer_random={"state": 2**127 + 1}))
    assert save(tmp_path, saved, keep=2).name == "000000001234-000001"
    loaded = load_newest(tmp_path)

    assert loaded is not None
    assert loaded.document == saved.document
    tensors, theirs = by_key(loaded.tensors.saes), by_key(saved.tensors.saes)
    assert tensors.keys() == theirs.keys() >= {f"small/parameters/{name}" for name in TENSORS}
    for key, tensor in theirs.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    """Neither an empty run directory nor an empty folder is an error."""
    assert load_newest(tmp_path) is None
    (tmp_path / "checkpoint").mkdir()
    assert load_newest(tmp_path) is None


def test_the_newest_is_the_last_written_not_the_longest_trained(tmp_path: Path) -> None:
    """A run resumed from 1,000 tokens overtakes what was written at 3,000 before the crash."""
    for tokens in (1000, 3000, 2000):
        save(tmp_path, small_checkpoint(tokens), keep=5)

    assert names(tmp_path / "checkpoint") == [
        "000000001000-000001", "000000002000-000003", "000000003000-000002",
    ]  # fmt: skip
    assert load_newest(tmp_path).tokens == 2000  # type: ignore[union-attr]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """checkpoint.keep counts complete ones; the folder holds nothing else."""
    for number in range(5):
        save(tmp_path, small_checkpoint(number), keep=2)

    assert names(tmp_path / "checkpoint") == ["000000000003-000004", "000000000004-000005"]


def test_what_is_not_a_complete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Half a checkpoint, an operator's copy, a stray folder; what a killed writer left is swept."""
    good = save(tmp_path, small_checkpoint(1000, step=1), keep=2)
    folder = good.parent
    shutil.copytree(good, folder / "000000002000-000002")
    (folder / "000000002000-000002" / "complete.json").unlink()
    shutil.copytree(good, folder / "old-backup")
    shutil.copytree(good, folder / ".tmp-99-000000003000-000003")

    assert load_newest(tmp_path).document.run.step == 1  # type: ignore[union-attr]
    assert names(folder) == ["000000001000-000001", "000000002000-000002", "old-backup"]
    assert save(tmp_path, small_checkpoint(1500), keep=2).name == "000000001500-000002"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, damage: Any) -> None:
    """It is never resumed from, nor silently passed over: the sentence says what to remove, and that helps."""
    save(tmp_path, small_checkpoint(1000, step=1), keep=2)
    newest = save(tmp_path, small_checkpoint(2000, step=2), keep=2)
    damage(newest / name)

    with pytest.raises(CheckpointError) as error:
        load_newest(tmp_path)
    assert name in str(error.value)
    assert f"remove {newest} to resume from the checkpoint before it" in str(error.value)
    shutil.rmtree(newest)
    assert load_newest(tmp_path).document.run.step == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state.json": 3}', "\x00\xff"])
def test_a_damaged_list_of_files_is_refused_too(tmp_path: Path, text: str) -> None:
    """complete.json itself may be what the disk lost."""
    newest = save(tmp_path, small_checkpoint(), keep=2)
    (newest / "complete.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"complete\.json is damaged"):
        load_newest(tmp_path)


def rewrite(folder: Path, **changes: Any) -> None:
    """Gives a checkpoint other values at the top of its document, and right hashes."""
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in folder.glob("state.*")}
    (folder / "complete.json").write_text(json.dumps(files))


@pytest.mark.parametrize("version", [2, 99, None, "3"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, version: Any) -> None:
    """With both formats and what to do."""
    rewrite(save(tmp_path, small_checkpoint(), keep=2), format=version)

    with pytest.raises(CheckpointError, match=rf"has format {version!r}, this version reads 6: resume with"):
        load_newest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": "many"}, "step: Input should be a valid integer"),
        ({"saes": {"small": {"tokens": 3}}}, "saes.small.variance: Field required"),
        ({"ledger": None}, "ledger: Input should be"),
        ({"ledger": {"run": "r"}}, "ledger.seed: Field required"),
        ({"roster": {"members": [{"number": 0}], "joined": 1}}, "roster.members.0.settings: Field required"),
    ],
)
def test_a_document_that_lacks_something_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """The key is named, and what to do."""
    save(tmp_path, small_checkpoint(), keep=2)
    rewrite(newest := save(tmp_path, small_checkpoint(), keep=2), **changes)

    with pytest.raises(CheckpointError) as error:
        load_newest(tmp_path)
    assert problem in str(error.value)
    assert f"remove {newest} to resume from the checkpoint before it" in str(error.value)


def test_a_checkpoint_without_the_tensors_of_an_sae_is_refused(tmp_path: Path) -> None:
    """Its document says that there is one."""
    folder = save(tmp_path, small_checkpoint(), keep=2)
    save_file({"sae/small/parameters/W_enc": torch.zeros(2)}, folder / "state.safetensors")
    rewrite(folder)

    with pytest.raises(CheckpointError, match="tensor sae/small/statistics/tokens is missing"):
        load_newest(tmp_path)


def test_a_checkpoint_of_the_first_releases_is_migrated(tmp_path: Path) -> None:
    """They counted no breaches of the ledger's invariants."""
    folder = save(tmp_path, small_checkpoint(), keep=2)
    ledger = json.loads((folder / "state.json").read_text())["ledger"]
    del ledger["breaches"]
    rewrite(folder, format=3, ledger=ledger)

    assert load_newest(tmp_path).document.ledger.breaches == {}  # type: ignore[union-attr]


# Shards of latents


LATENTS = 8


def test_the_format_knows_which_parameters_belong_to_no_latent() -> None:
    """A version of the format has these: with others, rank 0's file would lack tensors that readers look for there."""
    assert SHARED_PARAMETERS == ("b_dec", "W_skip")


def shared_sae() -> SaeTensors:
    """An SAE with everything that a checkpoint may hold, all of its latents different."""
    rows, vector = torch.arange(3.0 * LATENTS).view(LATENTS, 3), torch.arange(1.0, 4.0)
    parameters = {"W_enc": rows, "b_enc": rows[:, 0].clone(), "b_dec": vector, "W_skip": vector.outer(vector)}
    moments = {name: value + 0.5 for name, value in parameters.items()}
    counts = torch.arange(LATENTS)
    statistics = StatisticsState(7, vector, counts, counts.double(), vector.double(), -vector.double(), torch.ones(6))
    whitening = WhiteningState(vector, vector.outer(vector), -vector.outer(vector))
    averages = {name: -value for name, value in parameters.items()}
    return SaeTensors(
        parameters, OptimizerState(4, {"exp_avg": moments, "exp_avg_sq": averages}), statistics, averages, whitening
    )


def rows_of(sae: SaeTensors, latents: range) -> SaeTensors:
    """The part of a rank."""
    held = slice(latents.start, latents.stop)
    tensors = {key: value[held] if has_latent_rows(key) else value for key, value in sae.by_key().items()}
    return SaeTensors.from_keys({key: value.clone() for key, value in tensors.items()})


def save_over_ranks(directory: Path, ranks: int) -> Path:
    """A checkpoint as `ranks` ranks write it."""
    cuts = latent_cuts(LATENTS, ranks, unit=1)
    parts = [rows_of(shared_sae(), range(*cut)) for cut in pairwise(cuts)]
    small = small_checkpoint()
    ranges = [LatentRange(shard_name(rank, ranks), *cut) for rank, cut in enumerate(pairwise(cuts))]
    document = replace(small.document, latents={"small": ranges} if ranks > 1 else {})

    @contextmanager
    def write_shards(folder: Path) -> Iterator[dict[str, FileRecord]]:
        records: dict[str, FileRecord] = {}
        yield records
        for rank, part in enumerate(parts[1:], 1):
            name = shard_name(rank, ranks)
            records[name] = save_shard(folder / name, {"small": part})

    tensors = replace(small.tensors, saes={"small": parts[0]})
    return save(directory, Checkpoint(document, tensors), 2, write_shards)


@pytest.mark.parametrize("written", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_reads_what_any_other_has_written(tmp_path: Path, written: int) -> None:
    """Each reads the rows of its latents, wherever they are, and everything that belongs to no latent."""
    save_over_ranks(tmp_path, written)
    whole = load_newest(tmp_path)
    assert whole is not None
    for key, value in shared_sae().by_key().items():
        assert torch.equal(whole.tensors.saes["small"].by_key()[key], value), key

    for ranks in (1, 2, 3, 5, 8):
        for cut in pairwise(latent_cuts(LATENTS, ranks, unit=1)):
            latents = range(*cut)
            part = load_newest(tmp_path, lambda _, latents=latents: lambda *_: latents)
            assert part is not None
            for key, value in rows_of(shared_sae(), latents).by_key().items():
                assert torch.equal(part.tensors.saes["small"].by_key()[key], value), (ranks, key)


def test_a_shard_that_is_damaged_missing_or_left_out_is_named(tmp_path: Path) -> None:
    """The files of all ranks are compared with their hashes, and their ranges with each other."""
    folder = save_over_ranks(tmp_path, 4)
    shard = folder / shard_name(2, 4)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"latents-00002-of-00004.safetensors is damaged"):
        load_newest(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"latents-00002-of-00004.safetensors is missing"):
        load_newest(tmp_path)

    document = json.loads((folder / "state.json").read_text())
    del document["latents"]["small"][2]
    rewrite(folder, latents=document["latents"])
    with pytest.raises(CheckpointError, match="the latents of sae small are not each in one file: 0 to 2 in state"):
        load_newest(tmp_path)


def test_a_rank_that_cannot_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The one before it stays the newest, and nothing is left of the other."""
    before = save_over_ranks(tmp_path, 2)

    @contextmanager
    def full_disk(_: Path) -> Iterator[dict[str, FileRecord]]:
        yield {}
        raise OSError("rank 1: no space left on the disk")

    with pytest.raises(OSError, match="rank 1"):
        save(tmp_path, small_checkpoint(), 2, full_disk)
    assert names(tmp_path / "checkpoint") == [before.name]


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from tests.small_run import identity_sae, publish, small_checkpoint
from trainer.state.checkpoint import save

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
directory = Path(sys.argv[1])
sae = identity_sae("large")
sae.weights["W_enc"] = np.zeros((256, 256), np.float32)
for write in (
    lambda: save(directory, small_checkpoint(2000, parameters={"large": torch.zeros(1 << 16)}), 2),
    lambda: save(directory, small_checkpoint(2000, run="x" * (1 << 17)), 2),
    lambda: publish(directory, 2000, [sae], {}),
):
    try:
        write()
    except OSError as error:
        print("OSError")
"""


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """An OSError, which the training loop survives; the older checkpoint and snapshot stay, no half one appears."""
    save(tmp_path, small_checkpoint(1000, step=1), keep=1)
    publish_snapshot(tmp_path, 1000)
    process = run_python(FULL_DISK, tmp_path)

    assert process.stdout.split() == ["OSError"] * 3, process.stderr
    assert names(tmp_path / "checkpoint") == ["000000001000-000001"]
    assert names(tmp_path / "snapshots") == ["000000001000", "LATEST"]
    assert load_newest(tmp_path).document.run.step == 1  # type: ignore[union-attr]


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests.small_run import small_checkpoint
from trainer.state.checkpoint import load_newest, save

torch.set_num_threads(1)
directory, number = Path(sys.argv[1]), 0
(directory / "other").mkdir()
began = time.monotonic()
save(directory / "other", small_checkpoint(parameters={"x": torch.zeros(50_000)}), 1)
two_saves = 2 * (time.monotonic() - began)  # on a busy machine each takes long
for _ in range(25):
    child = os.fork()
    if not child:
        while True:
            number += 1
            save(directory, small_checkpoint(number, number, {"x": torch.full((50_000,), float(number))}), 1)
    time.sleep(random.uniform(0.0, two_saves))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = load_newest(directory)
    if saved is not None:
        step = saved.document.run.step
        assert step >= number, (step, number)
        assert (saved.tensors.saes["small"].parameters["x"] == step).all(), step
        number = step
        assert all((path / "complete.json").exists() for path in (directory / "checkpoint").iterdir())
print(number)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Twenty-five kills at random: what is loaded is whole, of one instant and never older than before."""
    process = run_python(KILLED_AT_RANDOM, tmp_path)

    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 0


# A run, through the disk


def settings_for(directory: Path, **changes: Any) -> TrainerSettings:
    saes = [
        {"name": "top", "architecture": "topk", "d_sae": 32, "k": 4, "revive_tokens": 128},
        {"name": "jump", "architecture": "jumprelu", "d_sae": 24, "target_l0": 4.0, "revive_tokens": 128},
    ]
    return TrainerSettings.model_validate(
        {
            "run": {"directory": str(directory)},
            "corpus": {"kind": "synthetic", "context": 8, "synthetic": {"d_in": 6, "features": 8, "shards": 4}},
            "optimizer": {"batch": 64, "matmul": "float32", "learning_rate": 0.01, "warmup_tokens": 256},
            "sae": saes,
        }
        | changes
    )


STREAM = Hello(
    producer="p", session="s", name="n", fingerprint="f", shards=4, held_out=0.0, context=8,
    hooks=[Hook(name="synthetic", module="synthetic", width=6)], dtype="bfloat16", chunk_rows=8, norm_bounds=None,
    provenance={},
)  # fmt: skip


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    names = np.zeros(64, np.int64)
    return [Batch([torch.randn(64, 6, generator=generator).to(torch.bfloat16)], names, names) for _ in range(count)]


def learn(run: Run, some: list[Batch]) -> None:
    for batch in some:
        run.train_step(batch)


def fresh_run(directory: Path, **changes: Any) -> Run:
    return Run(settings_for(directory, **changes), STREAM)


def test_a_run_resumed_from_disk_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Ten steps, or five, the disk and five more: the same weights, moments and statistics."""
    all_batches = batches(10)
    whole = fresh_run(tmp_path)
    whole.initialise(all_batches[0].x)
    learn(whole, all_batches[:5])
    save(tmp_path, checkpoint_of(whole), keep=2)
    learn(whole, all_batches[5:])

    resumed = fresh_run(tmp_path)
    saved = load_newest(tmp_path)
    assert saved is not None
    resumed.restore(saved.document.run, saved.tensors.saes)
    resumed.initialise(all_batches[3].x)  # what the loop does next; it must not begin anew
    learn(resumed, all_batches[5:])

    assert resumed.state()[0] == whole.state()[0]
    our_tensors, their_tensors = by_key(resumed.state()[1]), by_key(whole.state()[1])
    assert our_tensors.keys() == their_tensors.keys()
    assert [name for name in our_tensors if not torch.equal(our_tensors[name], their_tensors[name])] == []


@pytest.mark.parametrize(
    "change",
    [{"d_sae": 33}, {"k": 5}, {"name": "other"}, {"hook": "synthetic"}],
    ids=lambda change: next(iter(change)),
)
def test_a_run_file_with_other_saes_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Weights are never put where they do not belong; the sentence shows both."""
    document = checkpoint_of(fresh_run(tmp_path)).document
    saes = [sae.model_dump(exclude_none=True) for sae in settings_for(tmp_path).sae]

    with pytest.raises(CheckpointError, match="Restore the file, or start a new run directory"):
        roster_of(document, settings_for(tmp_path, sae=[saes[0] | change, saes[1]]))
    with pytest.raises(CheckpointError, match=r'disagree: sae "jump" is in the checkpoint alone\. Restore'):
        roster_of(document, settings_for(tmp_path, sae=saes[:1]))
    with pytest.raises(CheckpointError, match=r'disagree: sae "top": d_sae is 33 in the run file and 32 in the check'):
        roster_of(document, settings_for(tmp_path, sae=[saes[0] | {"d_sae": 33}, saes[1]]))


def test_the_first_report_after_a_resume_has_the_learning_rate(tmp_path: Path) -> None:
    """A run that is paused or waits reports before its first step: 384 of 640 tokens, cooled down from 320 on."""
    run = fresh_run(tmp_path, run={"directory": str(tmp_path), "tokens": 640}, **COOLED)
    run.initialise(batches(1)[0].x)
    learn(run, batches(6))
    resumed = fresh_run(tmp_path, run={"directory": str(tmp_path), "tokens": 640}, **COOLED)
    resumed.restore(*run.state())

    assert resumed.scales is not None and resumed.scales == run.scales
    rates = [sae_trainer.report(resumed.scales).learning_rate for sae_trainer in resumed.sae_trainers]
    assert rates == pytest.approx([0.008, 0.008])
    learn(run, batches(1))
    assert run.sae_trainers[0].learning_rate == pytest.approx(0.008), "it is the rate of the next step"


COOLED = {"optimizer": {"batch": 64, "matmul": "float32", "learning_rate": 0.01, "warmup_tokens": 64, "cooldown": 0.5}}


def test_what_may_change_of_a_run_file_is_taken_from_it(tmp_path: Path) -> None:
    """A learning rate, for one; an SAE whose budget was raised goes back to work."""
    run = fresh_run(tmp_path)
    run.roster.members[0].ended = run.roster.members[1].ended = True
    document = checkpoint_of(run).document
    saes = [sae.model_dump(exclude_none=True) for sae in run.settings.sae]
    changed = [saes[0] | {"learning_rate": 0.5}, saes[1] | {"tokens": 100_000}]
    roster = roster_of(document, settings_for(tmp_path, sae=changed))

    assert roster.members[0].settings.learning_rate == 0.5
    assert [member.ended for member in roster.members] == [True, False]


def test_a_resumed_run_keeps_its_number_format(tmp_path: Path) -> None:
    """optimizer.matmul = "auto" measures the machine; the checkpoint's choice stands wherever the run goes on."""
    run = fresh_run(tmp_path, optimizer={"batch": 64, "matmul": "bfloat16"})
    run.initialise(batches(1)[0].x)
    resumed = fresh_run(tmp_path)
    resumed.restore(*run.state())

    assert {sae_trainer.sae.matmul_dtype for sae_trainer in resumed.sae_trainers} == {torch.bfloat16}


# Snapshots


def test_a_published_snapshot_can_be_verified(tmp_path: Path) -> None:
    """Its manifest names every file with its hash, and LATEST names it."""
    folder = publish_snapshot(tmp_path, 1000, id="run")
    manifest = verify(folder)

    files = ("cfg.json", "sae_weights.safetensors", "selftest.safetensors", "sparsity.safetensors")
    assert {file.path for file in manifest.files} == {f"small/{name}" for name in files}
    assert (manifest.tokens, manifest.run) == (1000, {"id": "run"})
    assert (tmp_path / "snapshots" / "LATEST").read_text() == "000000001000\n"


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_snapshot_does_not_verify(tmp_path: Path, damage: Any) -> None:
    """The file is named."""
    folder = publish_snapshot(tmp_path, 1000)
    damage(folder / "small" / "sae_weights.safetensors")

    with pytest.raises(SnapshotError, match=r"sae_weights\.safetensors is missing or differs"):
        verify(folder)


def test_old_snapshots_are_retired(tmp_path: Path) -> None:
    """The newest stay, whole; of the others nothing is left."""
    for tokens in (1000, 2000, 3000, 4000):
        publish_snapshot(tmp_path, tokens)
    retire(tmp_path, keep=2)

    assert names(tmp_path / "snapshots") == ["000000003000", "000000004000", "LATEST"]
    for name in snapshot_names(tmp_path):
        verify(tmp_path / "snapshots" / name)


def test_the_last_snapshot_of_an_sae_that_left_is_not_retired(tmp_path: Path) -> None:
    """There is no other copy of it."""
    publish_snapshot(tmp_path, 1000, [identity_sae("left"), identity_sae("small")])
    publish_snapshot(tmp_path, 2000, [identity_sae("left"), identity_sae("small")])
    for tokens in (3000, 4000, 5000):
        publish_snapshot(tmp_path, tokens)
    retire(tmp_path, keep=2)

    assert snapshot_names(tmp_path) == ["000000002000", "000000004000", "000000005000"]


def test_milestones_and_pinned_snapshots_are_not_retired(tmp_path: Path) -> None:
    """The first at or after each multiple of keep_every_tokens, and what a person has pinned, as often as one looks."""
    for tokens in (900, 1900, 2100, 2900, 4100, 4900, 5100):
        publish_snapshot(tmp_path, tokens)
        if tokens == 2900:
            pin(tmp_path, "000000002900")
        retire(tmp_path, keep=1, keep_every_tokens=2000)
    assert snapshot_names(tmp_path) == ["000000002100", "000000002900", "000000004100", "000000005100"]

    unpin(tmp_path, "000000002900")
    retire(tmp_path, keep=1, keep_every_tokens=2000)
    assert snapshot_names(tmp_path) == ["000000002100", "000000004100", "000000005100"]


def test_a_pinned_snapshot_survives_a_return_to_an_older_checkpoint(tmp_path: Path) -> None:
    """What was trained after the checkpoint is forgotten, but not what a person holds on to, nor what comes new."""
    for tokens in (1000, 2000, 3000):
        publish_snapshot(tmp_path, tokens)
    pin(tmp_path, "000000003000")
    supersede_after(tmp_path, 1500)
    assert snapshot_names(tmp_path) == ["000000001000", "000000003000"]

    publish_snapshot(tmp_path, 1900)
    retire(tmp_path, keep=1)
    assert snapshot_names(tmp_path) == ["000000001900", "000000003000"]


def test_superseded_snapshots_take_bounded_room(tmp_path: Path) -> None:
    """Five returns to 1,000 tokens: no start deletes one, and the next retirement keeps the newest two, whole."""
    publish_snapshot(tmp_path, 1000)
    for _ in range(5):
        publish_snapshot(tmp_path, 2000)
        supersede_after(tmp_path, 1000)
    superseded = tmp_path / "snapshots" / "superseded"
    assert names(superseded) == ["000000002000", *(f"000000002000-{number}" for number in range(2, 6))]
    assert snapshot_names(tmp_path) == ["000000001000"]

    retire(tmp_path, keep=2)
    assert names(superseded) == ["000000002000-4", "000000002000-5"]
    for name in names(superseded):
        verify(superseded / name)


def test_a_file_that_is_open_outlives_its_snapshot(tmp_path: Path) -> None:
    """A download that has begun ends well when its snapshot is retired under it."""
    folder = publish_snapshot(tmp_path, 1000)
    publish_snapshot(tmp_path, 2000)
    whole = (folder / "small" / "sae_weights.safetensors").read_bytes()
    with open(folder / "small" / "sae_weights.safetensors", "rb") as file:
        first_bytes = file.read(10)
        retire(tmp_path, keep=1)
        assert not folder.exists()
        assert first_bytes + file.read() == whole


def test_a_snapshot_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """A run resumed just before it publishes the same tokens: readers' hashes stay true, and LATEST is mended."""
    first = publish_snapshot(tmp_path, 1000)
    before = (first / "manifest.json").read_bytes()
    (tmp_path / "snapshots" / "LATEST").write_text("000000000500\n")

    assert publish_snapshot(tmp_path, 1000) == first
    assert (first / "manifest.json").read_bytes() == before
    assert (tmp_path / "snapshots" / "LATEST").read_text() == "000000001000\n"


KILLED_IN_DRAFT = """
import os, signal, sys
from pathlib import Path
from tests.small_run import identity_sae
from trainer.snapshot import new_snapshot

directory, deadly = Path(sys.argv[1]), sys.argv[2]

with new_snapshot(directory, 2000, {}) as draft:
    for name in ("first", "second"):
        identity_sae(name).write(draft)
        assert (draft.folder / name / "sae_weights.safetensors").exists()
        if name == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("deadly", ["first", "second"])
def test_a_publisher_killed_between_files_shows_nothing(tmp_path: Path, deadly: str) -> None:
    """Readers go on seeing the snapshot before; the litter is swept at the next start, and publishing works again."""
    publish_snapshot(tmp_path, 1000)
    process = run_python(KILLED_IN_DRAFT, tmp_path, deadly)

    assert process.returncode == -signal.SIGKILL, process.stderr
    assert snapshot_names(tmp_path) == ["000000001000"]
    assert (tmp_path / "snapshots" / "LATEST").read_text() == "000000001000\n"
    sweep(tmp_path / "snapshots")
    assert names(tmp_path / "snapshots") == ["000000001000", "LATEST"]
    verify(publish_snapshot(tmp_path, 2000))


def test_a_reader_never_sees_half_a_snapshot(tmp_path: Path) -> None:
    """While snapshots come, whatever is listed verifies, and LATEST names one that is there."""
    publish_snapshot(tmp_path, 1)
    stop = threading.Event()

    def write() -> None:
        for tokens in range(2, 40):
            publish_snapshot(tmp_path, tokens)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    contents = set()
    while not stop.is_set():
        newest = snapshot_names(tmp_path)[-1]
        verify(tmp_path / "snapshots" / newest)
        verify(tmp_path / "snapshots" / (tmp_path / "snapshots" / "LATEST").read_text().strip())
        contents.add(newest)
    writer.join()

    assert len(contents) > 1
