"""The same numbers on a CUDA GPU: kernels, gradients, training, the producer's packing, a run of real processes.

Run by `make gpu`; everywhere else each test is skipped with its reason. Where an operation has float64, dense autograd
in float64 is the judge; where a sum may be taken in another order, float32 is compared with a tolerance.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from producer.tokens import Windows
from tests.small_stream import Producing, hello_of, stream_settings
from tests.test_checkpoint import batches, fresh_run, learn
from tests.test_produce import Sent, Tensors, Trainer, finish, tensors
from tests.test_saes import NOBODY, dense_loss, make, some_dead
from trainer.checkpoint import load_newest, save
from trainer.kernels.sparse import (
    Entries,
    multiply,
    occurrences,
    positive_entries,
    sample,
    topk,
    topk_entries,
    transpose,
)
from trainer.saes.inference import check, export
from trainer.settings import OptimizerSettings, SaeSettings
from trainer.snapshot import publish, snapshot_names, verify
from trainer.statistics import Statistics
from trainer.trainee import Trainee

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda")
CPU = torch.device("cpu")

TOPK: dict[str, Any] = {"architecture": "topk", "k": 8}
JUMPRELU: dict[str, Any] = {"architecture": "jumprelu", "target_l0": 8.0}


def entries_to(device: torch.device, entries: Entries) -> Entries:
    return Entries(entries.start.to(device), entries.column.to(device), entries.value.to(device), entries.columns)


def same(ours: Tensor, theirs: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=rtol, atol=atol)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Distance in units of the length: Adam makes a whole step of a gradient that is mere rounding here and there."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_products_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """multiply, sample, transpose, sums: with rows and columns that are empty, and columns in no order in a row."""
    torch.manual_seed(0)
    pre_acts = torch.randn(65, 512, dtype=dtype) - 1
    pre_acts[4] = -5.0
    pre_acts[:, 9] = -5.0
    W, X = torch.randn(512, 33, dtype=dtype), torch.randn(65, 33, dtype=dtype)
    for entries in (positive_entries(pre_acts), topk_entries(pre_acts, 7)):
        there = entries_to(GPU, entries)
        by_column, by_column_there = transpose(entries), transpose(there)

        same(multiply(there, W.to(GPU)), multiply(entries, W))
        same(sample(there, X.to(GPU), W.to(GPU)), (X @ W.T)[entries.row(), entries.column])
        assert torch.equal(by_column_there.order.cpu(), by_column.order)
        assert torch.equal(by_column_there.start.cpu(), by_column.start)
        same(by_column_there.multiply(there.value, X.to(GPU)), by_column.multiply(entries.value, X))
        same(by_column_there.sums(there.value), by_column.sums(entries.value))


def test_no_entries_at_all() -> None:
    """A batch on which nothing fires is a batch like others."""
    empty = Entries(
        torch.zeros(4, dtype=torch.int64, device=GPU), torch.zeros(0, dtype=torch.int64, device=GPU),
        torch.zeros(0, device=GPU), 8,
    )  # fmt: skip
    W = torch.randn(8, 5, device=GPU)

    assert not multiply(empty, W).any()
    assert len(sample(empty, torch.randn(3, 5, device=GPU), W)) == 0
    assert not transpose(empty).sums(empty.value).any()
    assert not transpose(empty).multiply(empty.value, torch.randn(3, 5, device=GPU)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_selected_is_what_the_cpu_selects(dtype: torch.dtype) -> None:
    """The grouped top-k, the entries above zero, and how often each latent is among them."""
    torch.manual_seed(0)
    values = torch.randn(50, 4096).to(dtype)
    (best, index), positive = topk(values.to(GPU), 32), positive_entries(values.to(GPU))
    on_cpu = positive_entries(values)

    assert torch.equal(best.sort(1).values.cpu(), topk(values, 32)[0].sort(1).values)
    assert torch.equal(values.to(GPU).gather(1, index), best)
    for name in ("start", "column", "value"):
        assert torch.equal(getattr(positive, name).cpu(), getattr(on_cpu, name))
    counted = occurrences(positive.column, 4096, positive.value > 1)
    assert torch.equal(counted.cpu(), torch.bincount(on_cpu.column[on_cpu.value > 1], minlength=4096))


# Gradients


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("dead", [NOBODY, some_dead()], ids=lambda d: f"{int(d.sum())} dead")
def test_gradients_equal_dense_autograd(architecture: str, dead: Tensor) -> None:
    """Every parameter's gradient, and the loss, to 1e-9 in float64, all of it on the GPU."""
    sae, x = make(architecture)
    sae.parameters = {name: value.to(GPU) for name, value in sae.parameters.items()}
    x, dead = x.to(GPU), dead.to(GPU)
    ours = sae.gradients(x, dead)
    params = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    loss = dense_loss(sae, params, x, dead)
    loss.backward()

    torch.testing.assert_close(sum(ours.loss.values()), loss.detach(), rtol=1e-9, atol=0)
    for name, param in params.items():
        assert param.grad is not None
        torch.testing.assert_close(ours.of[name], param.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_gradients_in_float32_are_those_of_the_cpu(architecture: str) -> None:
    """No TF32 or other shortcut where digits matter; and the same bits each time."""
    sae, x = make(architecture, torch.float32)
    expected = sae.gradients(x, some_dead())
    sae.parameters = {name: value.to(GPU) for name, value in sae.parameters.items()}
    first, second = (sae.gradients(x.to(GPU), some_dead().to(GPU)) for _ in range(2))

    same(first.x_hat, expected.x_hat, rtol=1e-4)
    for name, grad in expected.of.items():
        same(first.of[name], grad, rtol=1e-3, atol=1e-5)
        assert torch.equal(first.of[name], second.of[name])


# Training


def trainee_on(device: torch.device, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Trainee:
    settings = SaeSettings(name="s", d_sae=256, revive_tokens=4096, dead_tokens=4096, **options)
    optimizer = OptimizerSettings(learning_rate=3e-3, warmup_tokens=4096)
    return Trainee(settings, optimizer, 32, 0, device, dtype)


def truth(rows: int, seed: int) -> Tensor:
    """Sparse sums of 64 fixed directions, mean square 1: what an SAE can learn."""
    directions = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, 64, generator=generator) < 0.08
    x = (torch.rand(rows, 64, generator=generator) * active) @ directions
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("options", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_sae_learns_on_the_gpu(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """The unexplained variance falls, every number of the report is one, and what is published passes its self-test."""
    trainee = trainee_on(GPU, options, dtype)
    trainee.initialise(truth(4096, 1), torch.Generator().manual_seed(0))
    fvu = []
    for step in range(200):
        trainee.step(truth(1024, 2 + step).to(GPU), 1024 * step, None)
        if not 10 <= step < 190:
            fvu.append(trainee.report(1.0).loss["reconstruction"])
    report = trainee.report(1.0)
    exported = export(trainee.sae, 0.5, trainee.statistics.firing_rate(), truth(512, 1) / 0.5, {}, {})
    folder = publish(tmp_path, 1000, [exported], {}, check)

    assert sum(fvu[-10:]) < 0.5 * sum(fvu[:10])
    assert trainee.skipped_steps == 0
    assert all(map(math.isfinite, (report.l0, report.mse, report.fvu, report.shrinkage, report.grad_norm)))
    assert sum(report.density) == 256
    assert report.dead_latents is not None
    same(trainee.sae.parameters["W_dec"].norm(dim=1), torch.ones(256))
    verify(folder)


@pytest.mark.parametrize("options", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_the_gpu_learns_what_the_cpu_learns(options: dict[str, Any]) -> None:
    """From the same start on the same rows, weights stay close for some steps: clipping, Adam, unit norms and all."""
    here, there = trainee_on(CPU, options), trainee_on(GPU, options)
    for trainee in (here, there):
        trainee.initialise(truth(4096, 1), torch.Generator().manual_seed(0))
        for step in range(5):
            trainee.step(truth(1024, 2 + step).to(trainee.sae.parameters["b_dec"].device), 1024 * step, None)

    for name, value in here.sae.parameters.items():
        assert apart(there.sae.parameters[name], value) < 0.01
    assert here.report(1.0).fvu == pytest.approx(there.report(1.0).fvu, rel=1e-3)


@pytest.mark.parametrize("options", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_a_restored_trainee_goes_on(options: dict[str, Any]) -> None:
    """Through host memory and back: Adam's count of steps must be where its fused kernel looks for it."""
    whole = trainee_on(GPU, options)
    whole.initialise(truth(4096, 1), torch.Generator().manual_seed(0))
    for step in range(6):
        if step == 3:
            document, tensors = whole.state()
            tensors = {name: value.cpu().clone() for name, value in tensors.items()}
        whole.step(truth(512, step).to(GPU), 512 * step, None)
    resumed = trainee_on(GPU, options)
    resumed.restore(document, tensors)
    for step in range(3, 6):
        resumed.step(truth(512, step).to(GPU), 512 * step, None)

    theirs = whole.state()[1]
    for name, value in resumed.state()[1].items():
        assert apart(value, theirs[name]) < 1e-4


def test_a_checkpoint_moves_between_gpu_and_cpu(tmp_path: Path) -> None:
    """Written by a run on a GPU, resumed on a CPU, and back: the same bits."""
    on_gpu = fresh_run(tmp_path, optimizer={"batch": 64, "matmul": "float32", "device": "cuda"})
    on_gpu.initialise(batches(1)[0].x)
    learn(on_gpu, batches(4))
    save(tmp_path, 256, *on_gpu.state(), keep=2)
    saved = load_newest(tmp_path)
    assert saved is not None
    for device in ("cpu", "cuda"):
        resumed = fresh_run(tmp_path, optimizer={"batch": 64, "matmul": "float32", "device": device})
        resumed.restore(*saved)
        for name, value in resumed.state()[1].items():
            assert torch.equal(value.cpu(), saved[1][name])
        learn(resumed, batches(2))
        assert resumed.step == 6
        saved = load_newest(tmp_path)
        assert saved is not None


def test_statistics_are_those_of_the_cpu() -> None:
    """The same sums, counts and bins from the same batches."""
    here, there = (Statistics(64, torch.zeros(8, device=device)) for device in (CPU, GPU))
    for seed in range(5):
        torch.manual_seed(seed)
        x, x_hat, pre_acts = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 64) - 1
        here.update(x, x_hat, topk_entries(pre_acts, 6))
        there.update(x.to(GPU), x_hat.to(GPU), entries_to(GPU, topk_entries(pre_acts, 6)))

    assert torch.equal(there.tokens_since_fired.cpu(), here.tokens_since_fired)
    same(there.firings, here.firings, rtol=1e-12)
    assert vars(there.summary()) == pytest.approx(vars(here.summary()), rel=1e-5)
    assert there.density() == here.density()
    assert there.dead(1000) == here.dead(1000)


# The producer


@dataclass
class Busy(Tensors):
    """Activations that are still being computed when they are handed over, and whose memory is used again at once."""

    device = GPU

    def activations(self, shard: int, windows: Windows, chosen: np.ndarray) -> list[Tensor]:
        self.forwarded.append(chosen.tolist())
        slow = torch.ones(2048, 2048, device=GPU)
        for _ in range(30):
            slow = slow @ slow / 2048
        with torch.inference_mode():
            index = torch.from_numpy(chosen).to(GPU)
            return [x.to(GPU)[index] * slow[0, 0] for x in self.x]


def chunks_of(endpoint: str, source: Tensors, dtype: str) -> Sent:
    hand = Trainer(endpoint)
    producer = Producing(stream_settings(endpoint, dtype=dtype), source, hello_of(source, dtype))
    hand.welcome(norm_bounds=[10.0, 10.0])
    sent = hand.lease()
    finish(hand, producer)
    hand.close()
    return sent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_packed_beside_the_next_pass_are_those_of_the_cpu(tmp_path: Path, dtype: str) -> None:
    """Byte for byte, while the language model's stream goes on: same rows, same outliers, same numbers."""
    on_cpu = tensors(64, widths=(96, 160), context=32, batch_windows=4)
    on_cpu.x[1][5, 7] = 100.0
    on_gpu = Busy(on_cpu.x, on_cpu.kept, batch_windows=4)
    here = chunks_of(f"ipc://{tmp_path}/here", on_cpu, dtype)
    there = chunks_of(f"ipc://{tmp_path}/there", on_gpu, dtype)

    assert [chunk.kept for chunk in there.chunks] == [chunk.kept for chunk in here.chunks]
    assert [chunk.outliers for chunk in there.chunks] == [chunk.outliers for chunk in here.chunks]
    assert there.payloads == here.payloads
    assert there.end == here.end
    assert there.positions(32, "outliers") == [5 * 32 + 7]


# Everything


@pytest.mark.timeout(300)
def test_a_run_of_real_processes_on_the_gpu(tmp_path: Path) -> None:
    """The demo's language model and both SAEs on the GPU: both processes end well, and the SAEs have learned."""
    overrides = [
        f"run.directory={tmp_path}/run", f"stream.endpoint=ipc://{tmp_path}/stream", "run.tokens=150_000",
        "buffer.rows=32768", "optimizer.batch=1024", "optimizer.warmup_tokens=10_000", "snapshots.every_tokens=60_000",
        "checkpoint.every_seconds=1.0", "model.device=cuda", "optimizer.device=cuda",
        "monitor.trainer_port=0", "monitor.producer_port=0",
    ]  # fmt: skip
    log = open(tmp_path / "log", "w")  # noqa: SIM115 (the children keep it)
    processes = [
        subprocess.Popen([sys.executable, "-m", what, "deploy/demo.toml", *overrides], cwd=ROOT, stdout=log, stderr=log)
        for what in ("trainer", "producer")
    ]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = (tmp_path / "log").read_text()

    assert codes == [0, 0], told
    assert "Traceback" not in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows_trained"] == 150_000
    assert summary["rows_set_aside"] == 0
    for name in ("topk", "jumprelu"):
        assert summary["saes"][name]["fvu"] < 0.8
        check(tmp_path / "run" / "snapshots" / snapshot_names(tmp_path / "run")[-1] / name)
