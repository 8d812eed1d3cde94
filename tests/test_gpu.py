"""The same numbers on a CUDA GPU: kernels, gradients, training, packing, evaluation, a run of real processes.

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

from monitor.evaluation.ablation import ablation_effects
from monitor.evaluation.evaluator import Baseline, evaluate
from monitor.evaluation.latents.activations import gather_latents
from monitor.evaluation.probing import LabelledTexts, probe_accuracy
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from tests.small_model import HOOK, WIDTH, load_model, write_model
from tests.small_run import by_key, checkpoint_of, identity_sae, publish_snapshot
from tests.small_saes import (
    FAMILY,
    UNSCALED,
    dead_latents,
    dense_loss,
    learn,
    make,
    publish_sae,
    rows_of,
    sae_trainer_of,
    settings_of,
)
from tests.small_stream import Producing, hello_of, stream_settings
from tests.test_checkpoint import batches, fresh_run
from tests.test_checkpoint import learn as learn_run
from tests.test_produce import LeaseResult, Tensors, Trainer, finish, tensors
from trainer.kernels.select import exceeding, largest, largest_of, positive, topk
from trainer.kernels.sparse import Entries, occurrences
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import load_sae
from trainer.saes.selftest import check
from trainer.saes.settings import SaeSettings
from trainer.settings import OptimizerSettings
from trainer.snapshot import snapshot_names, verify
from trainer.state.checkpoint import load_newest, save
from trainer.state.format import SaeTensors
from trainer.training.sae_trainer import SaeTrainer
from trainer.training.statistics import Statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda")
CPU = torch.device("cpu")

LEARNERS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 8},
    "batchtopk": {"architecture": "batchtopk", "k": 8},
    "matryoshka": {"architecture": "batchtopk", "k": 8, "matryoshka": [64, 256]},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 8.0},
    "relu": {"architecture": "relu", "sparsity_weight": 1.0},
    "tied": {"architecture": "tied", "sparsity_weight": 1.0},
    "gated": {"architecture": "gated", "sparsity_weight": 1.0},
}
"""Large enough to learn something that takes a GPU."""


@pytest.fixture(params=[2.0, 0.0], ids=["sparse", "dense"])
def dense_above(request: pytest.FixtureRequest) -> float:
    """Sparse or dense latents, whatever the fraction that is active."""
    return float(request.param)


def entries_to(device: torch.device, entries: Entries) -> Entries:
    return Entries(entries.start.to(device), entries.column.to(device), entries.value.to(device), entries.columns)


def same(ours: Tensor, theirs: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=rtol, atol=atol)


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    """Distance in units of the length: Adam makes a whole step of a gradient that is mere rounding here and there."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_products_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """multiply, sample, transpose, sums, segments: with rows and columns that are empty, and columns in no order."""
    torch.manual_seed(0)
    pre_acts = torch.randn(65, 512, dtype=dtype) - 1
    pre_acts[4] = -5.0
    pre_acts[:, 9] = -5.0
    W, X = torch.randn(512, 33, dtype=dtype), torch.randn(65, 33, dtype=dtype)
    for entries in (positive(pre_acts, 2.0), largest(pre_acts, 7), largest(pre_acts, 7, magnitude=True)):
        assert isinstance(entries, Entries)
        there = entries_to(GPU, entries)
        by_column, by_column_there = entries.transpose(), there.transpose()
        parts, parts_there = entries.split((100, 512)), there.split((100, 512))

        same(there.multiply(W.to(GPU)), entries.multiply(W))
        same(there.sample(X.to(GPU), W.to(GPU)), (X @ W.T)[entries.row(), entries.column])
        assert torch.equal(by_column_there.order.cpu(), by_column.order)
        assert torch.equal(by_column_there.start.cpu(), by_column.start)
        same(by_column_there.multiply(there.value, X.to(GPU)), by_column.multiply(entries.value, X))
        same(by_column_there.sums(there.value), by_column.sums(entries.value))
        for name in ("start", "column", "value"):
            assert torch.equal(getattr(parts_there, name).cpu(), getattr(parts, name))


def test_no_entries_at_all() -> None:
    """A batch on which nothing fires is a batch like others."""
    empty = Entries(
        torch.zeros(4, dtype=torch.int64, device=GPU), torch.zeros(0, dtype=torch.int64, device=GPU),
        torch.zeros(0, device=GPU), 8,
    )  # fmt: skip
    W = torch.randn(8, 5, device=GPU)

    assert not empty.multiply(W).any()
    assert len(empty.sample(torch.randn(3, 5, device=GPU), W)) == 0
    assert not empty.transpose().sums(empty.value).any()
    assert not empty.transpose().multiply(empty.value, torch.randn(3, 5, device=GPU)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_selected_is_what_the_cpu_selects(dtype: torch.dtype, dense_above: float) -> None:
    """The grouped top-k, the entries above zero, the largest of a batch, and how often each latent is among them."""
    torch.manual_seed(0)
    values = torch.randn(50, 4096).to(dtype)
    best, index = topk(values.to(GPU), 32)
    of_batch, of_batch_there = (largest_of(exceeding(x, 1.0), 1600) for x in (values, values.to(GPU)))
    here, there = positive(values, dense_above), positive(values.to(GPU), dense_above)

    assert torch.equal(best.sort(1).values.cpu(), topk(values, 32)[0].sort(1).values)
    assert torch.equal(values.to(GPU).gather(1, index), best)
    assert torch.equal(there.dense().cpu(), here.dense())
    assert torch.equal(there.firings().cpu(), here.firings())
    assert torch.equal(of_batch_there.dense().cpu(), of_batch.dense())


def test_occurrences_are_a_bincount() -> None:
    """Of all indices, or of some."""
    index, mask = torch.randint(100, (5000,)), torch.rand(5000) < 0.5

    assert torch.equal(occurrences(index.to(GPU), 100).cpu(), torch.bincount(index, minlength=100))
    some = occurrences(index.to(GPU), 100, mask.to(GPU)).cpu()
    assert torch.equal(some, torch.bincount(index[mask], minlength=100))


# Gradients


@pytest.mark.parametrize("number_dead", [0, 6])
@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_equal_dense_autograd(kind: str, number_dead: int, dense_above: float) -> None:
    """Loss and every gradient to 1e-9 in float64, all of it on the GPU."""
    sae, x, y = make(kind)
    sae.dense_above = dense_above
    sae.parameters = {name: value.to(GPU) for name, value in sae.parameters.items()}
    x, y, dead = x.to(GPU), y.to(GPU), dead_latents(number_dead).to(GPU)
    ours = sae.gradients(x, y, dead, 0.7)
    parameters = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    loss = dense_loss(sae, parameters, x, y, dead, 0.7)
    loss.backward()

    torch.testing.assert_close(sum(ours.loss.values()), loss.detach(), rtol=1e-9, atol=0)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(ours.of[name], parameter.grad, rtol=1e-9, atol=1e-9 * float(parameter.grad.norm()))


@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_in_float32_are_those_of_the_cpu(kind: str, dense_above: float) -> None:
    """No TF32 or other shortcut where digits matter; and the same bits each time."""
    sae, x, y = make(kind, torch.float32)
    sae.dense_above = dense_above
    expected = sae.gradients(x, y, dead_latents())
    sae.parameters = {name: value.to(GPU) for name, value in sae.parameters.items()}
    first, second = (sae.gradients(x.to(GPU), y.to(GPU), dead_latents().to(GPU)) for _ in range(2))

    same(first.y_hat, expected.y_hat, rtol=1e-4)
    for name, grad in expected.of.items():
        same(first.of[name], grad, rtol=1e-3, atol=1e-5)
        assert torch.equal(first.of[name], second.of[name])


# Training


def learner_on(device: torch.device, kind: str, dtype: torch.dtype = torch.float32) -> SaeTrainer:
    settings = SaeSettings.of(name="s", d_sae=256, revive_tokens=4096, dead_tokens=4096, **LEARNERS[kind])
    optimizer = OptimizerSettings(learning_rate=3e-3, warmup_tokens=4096)
    return SaeTrainer(settings, optimizer, SaeHooks(("a",), ("a",)), {"a": 32}, device, dtype)


def truth(rows: int, seed: int) -> Tensor:
    """Sparse sums of 64 fixed directions, mean square 1: what an SAE can learn."""
    directions = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, 64, generator=generator) < 0.08
    x = (torch.rand(rows, 64, generator=generator) * active) @ directions
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_sae_learns_on_the_gpu(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The unexplained variance falls, every number of the report is one, and what is published passes its self-test."""
    sae_trainer = learner_on(GPU, kind, dtype)
    sae_trainer.initialise({"a": truth(4096, 1)}, UNSCALED)
    losses = []
    for step in range(200):
        sae_trainer.step({"a": truth(1024, 2 + step).to(GPU)})
        if not 10 <= step < 190:
            losses.append(sae_trainer.report(UNSCALED).loss["reconstruction"])
    report = sae_trainer.report(UNSCALED)
    sae_trainer.calibrate(sae_trainer.sae, {"a": truth(4096, 1000)})
    transform, rate = sae_trainer.input_transform({"a": 0.5}), sae_trainer.statistics.firing_rate()
    folder = publish_sae(tmp_path, sae_trainer.sae, transform, rate, truth(512, 1) / 0.5).parent

    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sae_trainer.skipped_steps == 0
    assert all(map(math.isfinite, (report.l0, report.mse, report.fvu, report.shrinkage, report.grad_norm)))
    assert sum(report.density) == 256
    assert report.dead_latents is not None
    if sae_trainer.sae.unit_decoder:
        same(sae_trainer.sae.W_dec.norm(dim=1), torch.ones(256))
    verify(folder)


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_gpu_learns_what_the_cpu_learns(kind: str) -> None:
    """From the same start on the same rows, weights stay close for some steps: clipping, Adam, unit norms and all."""
    here, there = learner_on(CPU, kind), learner_on(GPU, kind)
    for sae_trainer, device in ((here, CPU), (there, GPU)):
        sae_trainer.initialise({"a": truth(4096, 1)}, UNSCALED)
        for step in range(5):
            sae_trainer.step({"a": truth(1024, 2 + step).to(device)})

    for name, value in here.sae.parameters.items():
        assert relative_distance(there.sae.parameters[name], value) < 0.01
    assert here.report(UNSCALED).fvu == pytest.approx(there.report(UNSCALED).fvu, rel=1e-3)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("kind", FAMILY)
def test_a_restored_sae_trainer_goes_on(kind: str, whitening: bool) -> None:
    """Through host memory and back: Adam's count of steps must be where its fused kernel looks for it."""
    if whitening and ("coder" in kind or kind == "repair"):
        pytest.skip("whitening is for autoencoders of one hook")
    settings = settings_of(kind, ema_tokens=200, whitening=whitening)
    batches = [{hook: rows.to(GPU) for hook, rows in rows_of(settings, 64, seed).items()} for seed in range(6)]
    whole, resumed = sae_trainer_of(settings, device="cuda"), sae_trainer_of(settings, device="cuda")
    whole.initialise(rows_of(settings, 512, 0), UNSCALED)
    learn(whole, batches[:3])
    document, tensors = whole.state()
    resumed.restore(
        document, SaeTensors.from_keys({key: value.cpu().clone() for key, value in tensors.by_key().items()})
    )
    for sae_trainer in (whole, resumed):
        learn(sae_trainer, batches[3:])

    theirs = whole.state()[1].by_key()
    for name, value in resumed.state()[1].by_key().items():
        assert value.device == theirs[name].device
        assert relative_distance(value, theirs[name]) < 1e-4


@pytest.mark.parametrize("revive", ["resample", "none"])
def test_latents_start_anew_on_the_gpu(revive: str) -> None:
    """Resampling and the last resort: the rows drawn lie on the host, the weights do not."""
    settings = settings_of("relu l1", revive=revive, revive_tokens=128, reinitialise_tokens=192)
    sae_trainer = sae_trainer_of(settings, device="cuda")
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    sae_trainer.sae.b_enc[:4] = -50.0
    before = sae_trainer.sae.W_enc[:4].clone()
    learn(
        sae_trainer, [{hook: rows.to(GPU) for hook, rows in rows_of(settings, 64, seed).items()} for seed in range(5)]
    )

    assert (sae_trainer.sae.W_enc[:4] != before).any(1).all()
    assert float(sae_trainer.sae.b_enc[:4].min()) > -1.0


def test_a_checkpoint_moves_between_gpu_and_cpu(tmp_path: Path) -> None:
    """Written by a run on a GPU, resumed on a CPU, and back: the same bits."""
    on_gpu = fresh_run(tmp_path, optimizer={"batch": 64, "matmul": "float32", "device": "cuda"})
    on_gpu.initialise(batches(1)[0].x)
    learn_run(on_gpu, batches(4))
    save(tmp_path, checkpoint_of(on_gpu), keep=2)
    saved = load_newest(tmp_path)
    assert saved is not None
    for device in ("cpu", "cuda"):
        resumed = fresh_run(tmp_path, optimizer={"batch": 64, "matmul": "float32", "device": device})
        resumed.restore(saved.document.run, saved.tensors.saes)
        theirs = by_key(saved.tensors.saes)
        for key, value in by_key(resumed.state()[1]).items():
            assert torch.equal(value.cpu(), theirs[key].cpu())
        learn_run(resumed, batches(2))
        assert resumed.step == 6
        saved = load_newest(tmp_path)
        assert saved is not None


def test_statistics_are_those_of_the_cpu(dense_above: float) -> None:
    """The same sums, counts and bins from the same batches."""
    here, there = (Statistics(64, torch.zeros(8, device=device)) for device in (CPU, GPU))
    for seed in range(5):
        torch.manual_seed(seed)
        x, x_hat, pre_acts = torch.randn(500, 8), torch.randn(500, 8), torch.randn(500, 64) - 1
        here.update(x, x_hat, largest(pre_acts, 6, dense_above=dense_above))
        there.update(x.to(GPU), x_hat.to(GPU), largest(pre_acts.to(GPU), 6, dense_above=dense_above))

    assert torch.equal(there.tokens_since_fired.cpu(), here.tokens_since_fired)
    same(there.firings, here.firings, rtol=1e-12)
    assert vars(there.summary()) == pytest.approx(vars(here.summary()), rel=1e-5)
    assert there.density() == here.density()
    assert there.count_dead(1000) == here.count_dead(1000)


# The producer


@dataclass
class Busy(Tensors):
    """Activations that are still being computed when they are handed over, and whose memory is used again at once."""

    device = GPU

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        self.forwarded.append(indices.tolist())
        # Copies of pageable memory wait for all work before them: they come first, so that the products are under way.
        index, here = torch.from_numpy(indices).to(GPU), [x.to(GPU) for x in self.x]
        slow = torch.ones(2048, 2048, device=GPU)
        for _ in range(30):
            slow = slow @ slow / 2048
        with torch.inference_mode():
            return [x[index] * slow[0, 0] for x in here]


def chunks_of(endpoint: str, source: Tensors, dtype: str) -> LeaseResult:
    trainer = Trainer(endpoint)
    producer = Producing(stream_settings(endpoint, dtype=dtype), source, hello_of(source, dtype))
    trainer.welcome(norm_bounds=[10.0, 10.0])
    messages = trainer.lease()
    finish(trainer, producer)
    trainer.close()
    return messages


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


# The monitor


def test_an_evaluation_on_the_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    """All numbers of an SAE, and what is told of its latents, with the language model on either device."""
    lm = write_model(tmp_path / "lm")
    exported = identity_sae("half", WIDTH, HOOK, gain=0.5)
    exported.weights["threshold"] = np.linspace(0, 2, 2 * WIDTH, dtype=np.float32)
    folder = publish_snapshot(tmp_path, 1, [exported]) / "half"
    there, here = (_evaluation(load_model(lm, device=device), folder) for device in ("cuda", "cpu"))
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert there[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), name


def _evaluation(model: LanguageModel, folder: Path) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(2, 42, (40, 24))
    windows = Windows(ids, kept=ids > 4, padded=np.zeros_like(ids, bool))
    sae = load_sae(folder, model.device)
    latents = gather_latents(model, windows, sae)
    texts = LabelledTexts(windows, np.array(["a", "b"] * 20))
    return {
        **evaluate(model, windows, [sae], Baseline())["half"].as_json(),
        **ablation_effects(model, sae, latents, count=12),
        "probe_accuracy": probe_accuracy(model, sae, texts),
    }


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
    trainer_log = (tmp_path / "log").read_text()

    assert codes == [0, 0], trainer_log
    assert "Traceback" not in trainer_log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows_trained"] == 150_000
    assert summary["rows_set_aside"] == 0
    # The same run on a CPU ends at 0.126 and 0.168.
    for name, most in {"topk": 0.16, "jumprelu": 0.21}.items():
        assert summary["saes"][name]["fvu"] < most
        check(tmp_path / "run" / "snapshots" / snapshot_names(tmp_path / "run")[-1] / name)
