"""A whole run's state: several hooks, what it publishes, how it resumes, and that it really learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from producer.corpus import SyntheticCorpus, open_corpus
from producer.settings import CorpusSettings, ModelSettings, RunSettings, SyntheticSettings
from producer.wire import Hello, Hook
from trainer.buffer import Batch
from trainer.ledger import Ledger, Limits
from trainer.optimizer import RowAdam
from trainer.settings import BufferSettings, OptimizerSettings, SaeSettings, TrainerSettings
from trainer.snapshot import forget_after, snapshot_names
from trainer.train import Run, written
from trainer.trainee import Trainee

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp_out"]


def two_hooks(directory: Path) -> Run:
    settings = TrainerSettings(
        run=RunSettings(directory=str(directory)),
        model=ModelSettings(name="m", hooks=HOOKS),
        buffer=BufferSettings(rows=256),
        optimizer=OptimizerSettings(batch=32, matmul="float32", learning_rate=1e-2, warmup_tokens=0),
        sae=[
            SaeSettings(name="first", architecture="topk", hook=HOOKS[0], d_sae=16, k=2),
            SaeSettings(name="second", architecture="jumprelu", hook=HOOKS[1], d_sae=24, target_l0=3.0),
        ],
    )
    hooks = [Hook(name=HOOKS[0], module="a", width=4), Hook(name=HOOKS[1], module="b", width=6)]
    return Run(settings, hello(hooks))


def hello(hooks: list[Hook], **facts: Any) -> Hello:
    return Hello(
        producer="p", session="s", name="n", fingerprint="f", shards=4, held_out=0.0, context=8, hooks=hooks,
        dtype="float32", chunk_rows=8, norm_bounds=None, provenance=facts,
    )  # fmt: skip


def batches(count: int) -> list[Batch]:
    torch.manual_seed(0)
    names = np.zeros(32, np.int64)
    return [Batch([torch.randn(32, 4) + 1, 5 * torch.randn(32, 6)], names, names) for _ in range(count)]


def test_each_sae_learns_its_own_hook(tmp_path: Path) -> None:
    """Two SAEs of other widths from one batch; the rows handed in are left as they were."""
    run = two_hooks(tmp_path)
    some = batches(3)
    before = [x.clone() for x in some[0].x]
    run.initialise(some[0].x)
    for batch in some:
        run.learn(batch)

    assert [trainee.sae.d_in for trainee in run.trainees] == [4, 6]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, some[0].x, strict=True))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """State, restore, and the same batches give the same bits as never having stopped."""
    some = batches(8)
    whole = two_hooks(tmp_path)
    whole.initialise(some[0].x)
    for batch in some[:4]:
        whole.learn(batch)
    document, tensors = whole.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    resumed = two_hooks(tmp_path)
    resumed.restore(document, tensors)
    for batch in some[4:]:
        whole.learn(batch)
        resumed.learn(batch)

    ours, theirs = resumed.state()[1], whole.state()[1]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_trainers_own_file_says_which_hooks_are_streamed() -> None:
    """A first producer with the same hooks in another order would train each SAE on the other's rows: refused."""
    hooks = [Hook(name=name, module="m", width=4) for name in HOOKS]
    limits = Limits(1024, 0, 1, 1.0, 10.0, 120.0, expected={"hooks": HOOKS})
    ledger = Ledger(limits, "run", "incarnation", ["ipc://x"])

    assert ledger.hello(hello(hooks[::-1]), 0.0)[0].message.kind == "REJECT"
    assert ledger.hello(hello(hooks), 0.0)[0].message.kind == "WELCOME"


def test_a_refusal_names_the_fact_behind_the_fingerprint() -> None:
    """Not two hashes: what differs, with both values."""
    hooks = [Hook(name="h", module="m", width=4)]
    ledger = Ledger(Limits(1024, 0, 1, 1.0, 10.0, 120.0), "run", "incarnation", ["ipc://x"])
    ledger.hello(hello(hooks, model_dtype="bfloat16"), 0.0)
    other = hello(hooks, model_dtype="float32").model_copy(update={"fingerprint": "g", "producer": "q", "session": "t"})
    (refusal,) = ledger.hello(other, 0.0)

    assert "model_dtype differs: this run streams bfloat16, the producer float32" in str(refusal.message)


def test_snapshots_of_a_lineage_that_died_are_forgotten(tmp_path: Path) -> None:
    """A trainer that resumes from an older checkpoint never came from the newer snapshots."""
    for name in ("000000001000", "000000002000", "000000003000"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        (tmp_path / "snapshots" / name / "manifest.json").write_text("{}")
    forget_after(tmp_path, 2500)

    assert snapshot_names(tmp_path) == ["000000001000", "000000002000"]
    assert (tmp_path / "snapshots" / "LATEST").read_text() == "000000002000\n"


def test_a_full_disk_does_not_end_training() -> None:
    """What safetensors and the file system raise is told and survived."""
    from safetensors.torch import save_file

    assert not written("snapshot", lambda: save_file({"x": torch.zeros(4)}, "/proc/no/such/place"))
    assert not written("snapshot", lambda: Path("/proc/no/such/place").write_text(""))
    assert written("snapshot", lambda: None)


# Ground truth -----------------------------------------------------------------------------------------------------


def truth(features: int, shards: int) -> tuple[SyntheticCorpus, torch.Tensor]:
    settings = SyntheticSettings(d_in=64, features=features, active=3.0, decay=0.99, shards=shards, shard_windows=64)
    corpus = open_corpus(CorpusSettings(kind="synthetic", synthetic=settings))
    assert isinstance(corpus, SyntheticCorpus)
    return corpus, torch.from_numpy(np.concatenate([corpus.rows(shard) for shard in range(shards)]))


def learned(sae: SaeSettings, rows: torch.Tensor, spoil: bool = False, steps: int = 1500) -> Trainee:
    optimizer = OptimizerSettings(learning_rate=3e-3, warmup_tokens=50_000, cooldown=0.2)
    trainee = Trainee(sae, optimizer, 64, 0, torch.device("cpu"), torch.float32)
    rows = rows * float((64 / rows.square().sum(1).mean()).sqrt())
    trainee.initialise(rows[:32768], torch.Generator().manual_seed(0))
    if spoil:
        trainee.sae.parameters["W_enc"][64:] *= 0.01
        trainee.optimizer = RowAdam(trainee.sae.parameters, optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        trainee.step(rows[torch.randint(len(rows), (512,), generator=generator)], 512 * step, 512 * steps)
    return trainee


def recovered(trainee: Trainee, corpus: SyntheticCorpus) -> torch.Tensor:
    """For each true direction the largest cosine with a decoder row."""
    directions = torch.from_numpy(corpus.directions).float()
    return (directions @ trainee.sae.parameters["W_dec"].T).amax(1)


TOPK = SaeSettings(name="topk", architecture="topk", d_sae=256, k=3, dead_tokens=50_000)
WIDE_JUMPRELU = SaeSettings(
    name="jumprelu",
    architecture="jumprelu",
    d_sae=256,
    target_l0=2.0,
    bandwidth=2.0,
    initial_threshold=1.0,
    dead_tokens=50_000,
)


@pytest.mark.parametrize("settings", [TOPK, WIDE_JUMPRELU], ids=lambda sae: sae.architecture)
def test_the_true_features_are_found(settings: SaeSettings) -> None:
    """128 directions superposed in 64 dimensions (Sharkey et al.): all are found by twice as many latents."""
    corpus, rows = truth(features=128, shards=8)
    trainee = learned(settings, rows)
    found = recovered(trainee, corpus)

    assert found.mean() > 0.98
    assert found.min() > 0.9
    assert trainee.statistics.summary().fvu < 0.12


def test_random_directions_find_nothing() -> None:
    """The control of the test above: without learning the mean best cosine is below 0.4."""
    corpus, rows = truth(features=128, shards=2)
    settings = SaeSettings(name="topk", architecture="topk", d_sae=256, k=3)

    assert recovered(learned(settings, rows, steps=0), corpus).mean() < 0.4


def test_auxk_rescues_latents_that_were_born_dead() -> None:
    """Half the encoder shrunk a hundredfold (algorithms.md §7b): with AuxK the features are found, without it not."""
    corpus, rows = truth(features=128, shards=8)

    def rescued(weight: float) -> tuple[float, float]:
        settings = SaeSettings(
            name="topk", architecture="topk", d_sae=128, k=3, dead_tokens=20_000, k_aux=32, aux_weight=weight
        )
        trainee = learned(settings, rows, spoil=True)
        return float(recovered(trainee, corpus).mean()), (trainee.statistics.dead(20_000) or 0) / 128

    helped, plain = rescued(1 / 32), rescued(0.0)
    assert helped[0] > 0.95
    assert helped[1] < 0.05
    assert plain[0] < 0.9
    assert plain[1] > 0.2
