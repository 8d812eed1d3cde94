"""A whole run's state: several hooks, what it publishes, how it resumes. That it learns: test_ground_truth."""

from __future__ import annotations

import threading
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from producer.settings import ModelSettings, RunSettings
from producer.wire import Hello, Hook
from tests.small_run import by_key
from tests.small_training import Silent
from trainer.app import early_end
from trainer.control.commands import handle
from trainer.control.requests import Inbox
from trainer.phases import RunPhase
from trainer.report import StreamReport
from trainer.saes.settings import SaeSettings
from trainer.settings import BufferSettings, OptimizerSettings, SnapshotSettings, TrainerSettings
from trainer.snapshot import snapshot_names, supersede_after
from trainer.stream.buffer import Batch
from trainer.stream.intake import BufferReport
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.ledger.phase import StreamPhase
from trainer.stream.ledger.shards import Quarantine, QuarantinedShard
from trainer.training.loop import Loop, next_batch_size, try_to_write
from trainer.training.publishing import _metadata, _numbers, summary
from trainer.training.roster import Roster, restore_roster
from trainer.training.run import NoVariance, Run, scale_of

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.mlp_out"]


def two_hooks(directory: Path) -> Run:
    settings = TrainerSettings(
        run=RunSettings(directory=str(directory)),
        model=ModelSettings(name="m", hooks=HOOKS),
        buffer=BufferSettings(rows=256),
        optimizer=OptimizerSettings(batch=32, matmul="float32", learning_rate=1e-2, warmup_tokens=0),
        sae=[
            SaeSettings.of(name="first", architecture="topk", hook=HOOKS[0], d_sae=16, k=2),
            SaeSettings.of(name="second", architecture="jumprelu", hook=HOOKS[1], d_sae=24, target_l0=3.0),
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
    """Two SAEs of other widths from one batch; the activations handed in are left as they were."""
    run = two_hooks(tmp_path)
    some = batches(3)
    before = [x.clone() for x in some[0].x]
    run.initialise(some[0].x)
    for batch in some:
        run.train_step(batch)

    assert [sae_trainer.sae.d_in for sae_trainer in run.sae_trainers] == [4, 6]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, some[0].x, strict=True))


def test_each_hook_has_its_own_scale_for_good(tmp_path: Path) -> None:
    """Activations of hook 1 are five times as large; an SAE that joins when all have grown changes nothing."""
    run, sample = two_hooks(tmp_path), batches(1)[0].x
    run.initialise(sample)
    assert run.scales is not None
    before = dict(run.scales)
    assert before[HOOKS[0]] == pytest.approx(5 * before[HOOKS[1]], rel=0.2)
    run.attach(SaeSettings.of(name="late", architecture="topk", hook=HOOKS[0], d_sae=16, k=2), 0)
    run.initialise([3 * x for x in sample])

    assert run.scales == before


def test_two_saes_of_one_kind_begin_apart(tmp_path: Path) -> None:
    """Each has a number of its own in the run, which seeds its weights; one that has left is not stepped into."""
    same = {"architecture": "topk", "hook": HOOKS[0], "d_sae": 16, "k": 2}
    run = two_hooks(tmp_path)
    run.attach(SaeSettings.of(name="a", **same), 0)
    b = run.attach(SaeSettings.of(name="b", **same), 0)
    run.initialise(batches(1)[0].x)
    assert not torch.equal(run.sae_trainers[-2].sae.W_enc, run.sae_trainers[-1].sae.W_enc)
    run.detach(run.roster.find("a"))
    for name in ("c", "d"):
        run.attach(SaeSettings.of(name=name, **same), 0)

    assert b in run.sae_trainers
    assert [member.number for member in run.roster.members] == [0, 1, 3, 4, 5]


def test_a_raised_budget_brings_a_finished_sae_back() -> None:
    """The run file says more tokens than the checkpoint: it is at work again; with the same, it stays finished."""
    of = lambda tokens: SaeSettings.of(name="a", architecture="topk", d_sae=16, k=2, tokens=tokens)  # noqa: E731
    roster = Roster.of([of(1000)])
    roster.members[0].ended = True

    assert restore_roster(roster.state(), [of(1000)], Path()).is_finished
    assert not restore_roster(roster.state(), [of(2000)], Path()).is_finished


@pytest.mark.parametrize(("trained_tokens", "rows"), [(0, 32), (64, 32), (96, 4), (100, 0), (128, 0)])
def test_the_last_batch_fills_the_budget(tmp_path: Path, trained_tokens: int, rows: int) -> None:
    """Of 100 tokens, in batches of 32, four are left for the last one."""
    settings = two_hooks(tmp_path).settings
    budget = settings.model_copy(update={"run": RunSettings(directory=str(tmp_path), tokens=100)})

    assert next_batch_size(budget, trained_tokens) == rows
    assert next_batch_size(settings, trained_tokens) == 32


def test_each_sae_is_told_with_its_own_numbers(tmp_path: Path) -> None:
    """Not with another's, and an averaged copy with none that were measured on the weights it is a mean of."""
    run = two_hooks(tmp_path)
    run.attach(SaeSettings.of(name="both", architecture="topk", hooks=HOOKS, d_sae=16, k=5, ema_tokens=1000), 0)
    run.initialise(batches(1)[0].x)
    for batch in batches(3):
        run.train_step(batch)
    assert run.scales is not None
    trained = {sae_trainer.settings.name: sae_trainer.report(run.scales) for sae_trainer in run.publishable}
    reports = {
        calibrated.name: _numbers(calibrated, trained[calibrated.sae_trainer.settings.name])
        for calibrated in run.calibrated(batches(1)[0].x, tmp_path, {})
    }

    assert {name: numbers["hook"] for name, numbers in reports.items()} == {
        "first": HOOKS[0], "second": HOOKS[1], "both": HOOKS[0], "both-ema": HOOKS[0],
    }  # fmt: skip
    for sae in trained.values():
        assert (reports[sae.name]["l0"], reports[sae.name]["fvu"]) == (sae.l0, sae.fvu)
    assert len({numbers["fvu"] for numbers in reports.values()}) == 4
    assert {reports["both-ema"][name] for name in ("l0", "mse", "fvu", "shrinkage", "dead_latents")} == {None}


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """State, restore, and the same batches give the same bits as never having stopped."""
    some = batches(8)
    whole = two_hooks(tmp_path)
    whole.initialise(some[0].x)
    for batch in some[:4]:
        whole.train_step(batch)
    state, tensors = deepcopy(whole.state())
    resumed = two_hooks(tmp_path)
    resumed.restore(state, tensors)
    for batch in some[4:]:
        whole.train_step(batch)
        resumed.train_step(batch)

    ours, theirs = by_key(resumed.state()[1]), by_key(whole.state()[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_trainers_own_file_says_which_hooks_are_streamed() -> None:
    """A first producer with the hooks in another order would train each SAE on the other's activations: refused."""
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


def test_snapshots_of_a_lineage_that_died_are_moved_away(tmp_path: Path) -> None:
    """A trainer that resumes from an older checkpoint never came from the newer snapshots; they are not deleted."""
    for name in ("000000001000", "000000002000", "000000003000"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        (tmp_path / "snapshots" / name / "manifest.json").write_text("{}")
    (folder,) = supersede_after(tmp_path, 2500)

    assert folder == tmp_path / "snapshots" / "superseded" / "000000003000" and (folder / "manifest.json").exists()
    assert snapshot_names(tmp_path) == ["000000001000", "000000002000"]
    assert (tmp_path / "snapshots" / "LATEST").read_text() == "000000002000\n"


def test_a_full_disk_does_not_end_training() -> None:
    """What safetensors and the file system raise is told and survived."""
    from safetensors.torch import save_file

    assert not try_to_write("snapshot", lambda: save_file({"x": torch.zeros(4)}, "/proc/no/such/place"))
    assert not try_to_write("snapshot", lambda: Path("/proc/no/such/place").write_text(""))
    assert try_to_write("snapshot", lambda: None)


class Snapshots(Loop):
    """A loop that only counts: batches of a hundred tokens, and when it would publish."""

    def __init__(self, run: Run, intake: Any) -> None:
        self.stop = threading.Event()
        super().__init__(run.settings, run.roster, intake, Inbox(self.stop), Silent(), handle)
        self.published: list[int] = []
        self.begin(run)

    def report(self) -> None: ...

    def publish(self) -> list[str]:
        self.published.append(self.tokens)
        return []


def test_a_trainer_restarted_more_often_than_it_publishes_publishes_all_the_same(tmp_path: Path) -> None:
    """every_tokens = 1000, and a restart after every 300 tokens: a snapshot at 1000 and one at 2000."""
    run = two_hooks(tmp_path)
    run.settings = run.settings.model_copy(update={"snapshots": SnapshotSettings(every_tokens=1000)})
    intake = SimpleNamespace(tokens_trained=0, mark_trained=lambda batch: setattr(intake, "tokens_trained", batch))
    run.train_step = lambda batch: None  # type: ignore[method-assign]
    published_at = []
    for _ in range(8):
        loop = Snapshots(run, intake)
        for _ in range(3):
            loop._step(run, intake.tokens_trained + 100)
            loop._report_and_publish()
        published_at += loop.published

    assert published_at == [1000, 2000]


# Scales


def test_the_scale_makes_an_elements_variance_one() -> None:
    """1 and 3 in each of two columns: variance 1 about a mean of 2, whatever the mean."""
    x = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert scale_of(x) == scale_of(x + 1000) == 1.0
    assert scale_of(4 * x) == 0.25


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 4), "there is 1 activation when training begins"),
        (torch.zeros(9, 4), r"the first 9 activations do not vary \(their rms is 0\)"),
        (torch.full((1000, 4), 0.1), r"the first 1,000 activations do not vary \(their rms is 0.1\)"),
        (torch.full((9, 4), 0.1) + 1e-8 * torch.randn(9, 4), "do not vary"),  # rounding alone
        (torch.tensor([[1e-44], [0.0]]), "do not vary"),  # their scale would be infinite
    ],
)
def test_activations_that_do_not_vary_are_refused(tmp_path: Path, x: torch.Tensor, reason: str) -> None:
    """With the hook's name, before any weight is drawn from them."""
    run = two_hooks(tmp_path)
    with pytest.raises(NoVariance, match=f"model.hooks = '{HOOKS[1]}': .*{reason}"):
        run.initialise([torch.randn(9, 4), x])
    assert run.scales is None and len(run.lacking_weights) == 2


def test_a_paused_run_rests(tmp_path: Path) -> None:
    """It asks for no activations: the intake here could give none."""
    run = two_hooks(tmp_path)
    run.roster.paused = True
    loop = Snapshots(run, SimpleNamespace(tokens_trained=100, phase=StreamPhase.OPEN, stream=run.stream))
    threading.Timer(0.3, loop.stop.set).start()

    assert loop.train() is RunPhase.PAUSED
    assert loop.published == []


def test_a_report_tells_of_the_time_since_the_one_before(tmp_path: Path) -> None:
    """A tenth of a second of rest is no part of a step; steps are told once; a pause is no training time.

    The rate is over the last half minute, so that it is not 0 between two steps of a slow run.
    """
    run = two_hooks(tmp_path)
    run.initialise(batches(1)[0].x)
    run.train_step = lambda batch: None  # type: ignore[method-assign]
    intake = SimpleNamespace(
        tokens_trained=0,
        mark_trained=lambda tokens: setattr(intake, "tokens_trained", intake.tokens_trained + tokens),
        buffer_report=lambda: BufferReport(RunPhase.TRAINING, 7, 9, 0.5),
        stream_report=StreamReport,
    )
    loop = Loop(run.settings, run.roster, intake, Inbox(threading.Event()), Silent(), handle)  # type: ignore[arg-type]
    loop.begin(run)
    start = time.monotonic()
    loop._step(run, 32)  # type: ignore[arg-type]
    longest_step = time.monotonic() - start
    time.sleep(0.1)
    loop.report()
    first = loop.last_report
    loop.report()
    second, training_seconds = loop.last_report, run.seconds
    assert first is not None and second is not None
    run.roster.paused = True
    time.sleep(0.05)
    loop.report()

    assert (first.tokens, first.buffer_rows, first.buffer_capacity_rows, first.data_wait_seconds) == (32, 7, 9, 0.5)
    assert 0 < first.tokens_per_second <= 320 and first.step_seconds <= longest_step
    assert (second.tokens, second.step_seconds) == (32, 0)
    assert 0 < second.tokens_per_second <= first.tokens_per_second
    assert training_seconds >= 0.1 and run.seconds == training_seconds


def test_a_run_that_ends_before_its_target_says_so(tmp_path: Path) -> None:
    """With the share that was trained, why, and what to do; a run that reached it says nothing."""
    run = two_hooks(tmp_path)
    settings = run.settings.model_copy(update={"run": RunSettings(directory=str(tmp_path), tokens=100_000)})
    assert early_end(settings, 8641, run.roster) == (
        "the run ended after 8,641 of run.tokens = 100,000 tokens (9%): the data is used up: raise corpus.epochs, or "
        "name more text, for more"
    )
    assert early_end(settings, 100_000, run.roster) is None and early_end(run.settings, 5, run.roster) is None


def test_metadata_name_no_hook_dataset_or_position_that_is_not_meant(tmp_path: Path) -> None:
    """A crosscoder has no one hook, a sentence is no dataset, and what was never trained on stands beside."""
    settings = two_hooks(tmp_path).settings
    crosscoder = SaeSettings.of(name="cross", architecture="topk", hooks=HOOKS, d_sae=16, k=2)
    settings = settings.model_copy(update={"sae": [settings.sae[0], crosscoder]})
    hooks = [Hook(name=HOOKS[0], module="a:input", width=4), Hook(name=HOOKS[1], module="b", width=6)]
    run = Run(settings, hello(hooks, corpus="files of text; 2 shards", exclude_special=True))
    run.initialise(batches(1)[0].x)
    run.train_step(batches(1)[0])
    facts = {"id": "r", "stream": {"norm_bounds": {HOOKS[0]: 10.0}}}
    first, cross = (_metadata(run, *one, facts) for one in zip(run.publishable, run.reports(), strict=True))

    assert (first["hook_name"], first["hf_hook_name"]) == (HOOKS[0], "a:input")
    assert (cross["hook_name"], cross["hf_hook_name"]) == (None, None)
    assert (cross["hook_names"], cross["hf_hook_names"]) == (HOOKS, ["a:input", "b"])
    assert (first["dataset_path"], first["corpus"]) == (None, "files of text; 2 shards")
    assert first["not_trained_on"] == {"special_tokens": True, "norms_over": {HOOKS[0]: 10.0}}


def test_the_summary_tells_what_was_quarantined(tmp_path: Path) -> None:
    """Beside what was trained on, each under its own name."""
    run = two_hooks(tmp_path)
    quarantine = Quarantine((QuarantinedShard(epoch=0, shard=3, rows=8, reason="torn"),), ratio=0.5)
    intake = SimpleNamespace(tokens_trained=100, quarantine=lambda: quarantine)
    document = summary(run, intake, SimpleNamespace(tokens=100, saes=[]), None)  # type: ignore[arg-type]

    assert {name: document[name] for name in ("tokens", "rows_trained", "rows_set_aside", "quarantined_ratio")} == {
        "tokens": 100, "rows_trained": 100, "rows_set_aside": 8, "quarantined_ratio": 0.5,
    }  # fmt: skip
    assert document["shards_set_aside"] == [{"epoch": 0, "shard": 3, "rows": 8, "reason": "torn"}]
