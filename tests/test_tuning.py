"""Tuning: its gradient, its text, a tuning from beginning to end, killed and resumed, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor
from torch.nn.functional import kl_div

from monitor.evaluation.evaluator import Baseline, evaluate
from monitor.evaluation.follow import Evaluator
from monitor.evaluation.results import read_evaluation
from monitor.metrics import MonitorMetrics
from monitor.run_directory import is_finished
from monitor.settings import MonitorSettings
from producer.common.parsing import read_object
from producer.common.run_file import read_run_file
from producer.corpus import open_text
from producer.corpus.held_out import held_out_text
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import MemoryLimits
from tests import dense_reference as reference
from tests.small_language_models import load, tiny
from tests.small_model import HOOK, WORDS
from tests.small_tuning import D_SAE, FAMILY, finished_run, sae_settings
from trainer.__main__ import main
from trainer.saes import registry
from trainer.saes.inference import load_sae
from trainer.saes.selftest import check
from trainer.snapshot import WEIGHTS, read_manifest, snapshot_names, verify
from trainer.tuning.downstream import Downstream
from trainer.tuning.options import Loss, TuningError, TuningOptions
from trainer.tuning.quality import measure_quality
from trainer.tuning.session import TuningSession
from trainer.tuning.source import read_run, read_source
from trainer.tuning.text import Cursor, TuningText

NEVER = threading.Event()


def some_windows(count: int = 5, context: int = 10) -> Windows:
    """Random text behind a BOS, the end of the last window padded."""
    ids = np.random.default_rng(0).integers(2, WORDS + 2, (count, context))
    ids[:, 0] = 0
    padded = np.zeros_like(ids, dtype=bool)
    padded[-1, 7:] = True
    kept = ~padded
    kept[:, 0] = False
    return Windows(ids, kept, padded)


# The gradient ---------------------------------------------------------------------------------------------------------


MIDDLE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def precise_model() -> LanguageModel:
    """A random GPT-2 of four blocks in float64, whose norms do not round to float32 as a Llama's do."""
    model = load(tiny("gpt2"), MIDDLE, whole=True)
    model.network.module.double()
    model.network.dtype = torch.float64
    return model


def dense_latents(s: Any, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Latents from the equations of each architecture, differentiable."""
    read = x - params["b_dec"]
    pre_acts = read @ params["W_enc"].T + params["b_gate" if s.architecture == "gated" else "b_enc"]
    if s.architecture == "topk":
        return reference.keep_largest(pre_acts, s.k)
    if s.architecture == "batchtopk":
        flat = pre_acts.relu().flatten()
        index = flat.topk(len(x) * s.k).indices
        return torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(pre_acts)
    if s.architecture == "jumprelu":
        return reference.Jump.apply(pre_acts, params["threshold"], s.bandwidth, True)
    if s.architecture == "gated":
        return (pre_acts > 0) * ((read @ params["W_enc"].T) * params["r_mag"].exp() + params["b_mag"]).relu()
    return pre_acts.relu()


def dense_divergence(model: LanguageModel, windows: Windows, kept: Tensor, x_hat: Tensor) -> Tensor:
    """KL by plain autograd: a forward hook of torch on block 1 of the transformers model, all windows at a time."""
    ids = torch.from_numpy(windows.ids)
    network: Any = model.network.module

    def replace_output(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = x.masked_scatter(kept[..., None], x_hat)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    clean = network(input_ids=ids).logits
    handle = network.transformer.h[1].register_forward_hook(replace_output)
    spliced = network(input_ids=ids).logits
    handle.remove()
    real = ~torch.from_numpy(windows.padded)
    predicted = real[:, :-1] & real[:, 1:]
    q, p = (logits[:, :-1][predicted].log_softmax(-1) for logits in (spliced, clean))
    return kl_div(q, p, log_target=True, reduction="sum") / int(predicted.sum())


@pytest.mark.parametrize("loss", ["kl", "kl+mse"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_the_gradient_is_that_of_plain_autograd(precise_model: LanguageModel, architecture: str, loss: Loss) -> None:
    """Through a real model and the whole SAE, in float64: every gradient to 1e-9, a window at a time or all at once."""
    settings = sae_settings(architecture, revive="none")
    torch.manual_seed(0)
    sae = registry.get(architecture)(settings, (precise_model.hooks[0].width,))
    windows = some_windows()
    downstream = Downstream(precise_model, MIDDLE, {}, loss, scale=0.5, memory=MemoryLimits(logits=1))
    x = 0.5 * downstream.read(windows)
    sae.initialise(x.float(), x.float(), torch.Generator().manual_seed(1))
    sae.parameters = {
        name: value.double() + 0.05 * torch.randn_like(value.double()) for name, value in sae.parameters.items()
    }
    sae.matmul_dtype = torch.float64
    sae.output_loss = downstream
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    ours = sae.gradients(x, x, dead, 0.7)

    params = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    x_hat = dense_latents(settings, params, x) @ params["W_dec"] + params["b_dec"]
    kl = dense_divergence(precise_model, windows, torch.from_numpy(windows.kept), x_hat / 0.5)
    mse = (x - x_hat).square().sum() / (len(x) * sae.variance)
    alpha = (mse / kl).detach()
    beside = reference.loss(settings, params, x, x, sae.variance, dead, 0.7) - mse
    total = beside + (alpha * kl if loss == "kl" else 0.5 * (mse + alpha * kl))
    total.backward()

    assert downstream.kl == pytest.approx(float(kl.detach()), rel=1e-9)
    torch.testing.assert_close(sum(ours.loss.values()), total.detach(), rtol=1e-9, atol=1e-12)
    for name, parameter in params.items():
        assert parameter.grad is not None
        scale = float(parameter.grad.norm())
        torch.testing.assert_close(ours.of[name], parameter.grad, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize(
    ("architecture", "hook"),
    [
        ("gpt2", "blocks.1.hook_resid_mid"),  # replaced in place
        ("gpt_neox", "blocks.1.hook_resid_post"),
        ("falcon", "blocks.1.hook_resid_post"),  # writes into its residual stream
        ("qwen3", "blocks.1.hook_mlp_out"),
        ("llama", "blocks.1.attn.hook_q"),
        ("mamba", "blocks.1.hook_resid_post"),
    ],
)
def test_logits_can_be_differentiated_in_every_family(architecture: str, hook: str) -> None:
    """By what was put in the place of an activation, and by no parameter."""
    model = load(tiny(architecture), hook, whole=True)
    tokens = torch.arange(4, 10)[None]
    x = model.activations(tokens)[0].clone().requires_grad_()
    logits = model.logits(tokens, {hook: lambda _: x}, gradients=True)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)

    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.network.module.parameters())


# Measures and text ----------------------------------------------------------------------------------------------------


def test_quality_is_what_the_monitor_measures(tmp_path: Path) -> None:
    """ΔCE, KL, FVU and L0 of both agree, on windows with padding and an activation beyond the bound of the norm."""
    run, model = finished_run(tmp_path / "a", sae_settings("topk"))
    sae = load_sae(run / "snapshots" / snapshot_names(run)[-1] / "small")
    windows = some_windows()
    bounds = {HOOK: float(model.activations(torch.from_numpy(windows.ids))[0].norm(dim=-1).max()) - 1e-3}
    ours = measure_quality(model, windows, sae, bounds)
    theirs = evaluate(model, windows, [sae], Baseline(), bounds)["small"]

    assert ours.activations == theirs.rows
    for name in ("ce_clean", "ce_sae", "ce_delta", "kl", "fvu", "l0"):
        assert getattr(ours, name) == pytest.approx(theirs.values[name], rel=1e-6)


def test_the_text_is_mixed_and_held_out_windows_are_never_in_it(tmp_path: Path) -> None:
    """Two epochs: every training window comes twice, none that is held out; from any cursor the same goes on."""
    run, model = finished_run(tmp_path / "a", sae_settings("topk"), steps=0)
    text = open_text(read_run(run, []).corpus)
    corpus = text.parts[0].corpus

    def rows(shards: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids) for shard in shards for ids in text.windows(shard, 0, model.tokenizer).ids.tolist()]

    held_out, training = set(rows(corpus.held_out_shards)), rows(corpus.training_shards)
    batches: list[tuple[Windows, Cursor]] = []
    tuning_text = TuningText(text, model.tokenizer, seed=0, windows=7)
    for windows, cursor in tuning_text.batches(Cursor()):
        batches.append((windows, cursor))
        if sum(len(each) for each, _ in batches) == 2 * len(training):
            break
    seen = [tuple(ids) for windows, _ in batches for ids in windows.ids.tolist()]
    rest = tuning_text.batches(batches[4][1])

    assert held_out and not held_out & set(seen)
    assert sorted(seen) == sorted(2 * training)
    assert seen[: len(training)] != seen[len(training) :] and seen[: len(training)] != training
    for windows, cursor in batches[5:8]:
        again, behind = next(rest)
        assert np.array_equal(again.ids, windows.ids) and behind == cursor


# A tuning -------------------------------------------------------------------------------------------------------------


def tuning_options(run: Path, tokens: int = 1920, loss: Loss = "kl+mse", rate: float = 3e-3) -> TuningOptions:
    return TuningOptions("small", snapshot_names(run)[-1], tokens, loss, rate, batch=64, evaluation_tokens=300)


def session(
    run: Path, to: Path, stop: threading.Event = NEVER, save_seconds: float = 1e9, **options: Any
) -> TuningSession:
    source = read_source(run, read_run(run, []), "small", None)
    to.mkdir(exist_ok=True, parents=True)
    return TuningSession(source, tuning_options(run, **options), to, stop, save_seconds)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in ("topk", "relu") else [pytest.mark.long]) for name in FAMILY],
)
def test_tuning_lowers_the_divergence_at_the_same_l0(tmp_path: Path, architecture: str) -> None:
    """Every architecture; the result is a run directory with a snapshot that passes its self-test."""
    run, model = finished_run(tmp_path / "a", sae_settings(architecture))
    result = session(run, tmp_path / "tuned").run()
    assert result is not None
    (name,) = snapshot_names(tmp_path / "tuned")
    folder = tmp_path / "tuned" / "snapshots" / name
    cfg = read_object(folder / "small" / "cfg.json")

    assert result.after.kl < 0.95 * result.before.kl
    assert result.after.l0 == pytest.approx(result.before.l0, rel=0.1)
    verify(folder)
    check(folder / "small")
    assert result.folder == folder / "small"
    assert cfg["metadata"]["tuned"] == {
        "from": {"run": "abc", "snapshot": snapshot_names(run)[-1], "sae": "small"},
        "loss": "kl+mse", "tokens": 1920, "learning_rate": 3e-3, "batch": 64,
    }  # fmt: skip
    assert int(name) == int(snapshot_names(run)[-1]) + result_tokens(tmp_path / "tuned")
    begun_with = read_manifest(run / "snapshots" / snapshot_names(run)[-1])
    assert read_manifest(folder).run["stream"] == begun_with.run["stream"]
    held_out = held_out_text(open_text(read_run(run, []).corpus), model.tokenizer, 300).windows
    assert measure_quality(model, held_out, load_sae(folder / "small"), {}) == result.after


def result_tokens(directory: Path) -> int:
    return int(read_object(directory / "summary.json")["rows_trained"])


class StopAfter(threading.Event):
    """Is set at the n-th question, or raises an error there as a kill would end the process.

    It is asked once for each batch of held-out windows, which is one here, and before each step.
    """

    def __init__(self, questions: int, error: BaseException | None = None) -> None:
        super().__init__()
        self._questions, self._error = questions, error

    def is_set(self) -> bool:
        self._questions -= 1
        if self._questions == 0 and self._error is not None:
            raise self._error
        return self._questions <= 0


@pytest.mark.parametrize("architecture", ["batchtopk", "relu"])
def test_a_tuning_that_was_stopped_and_killed_ends_with_the_same_bits(tmp_path: Path, architecture: str) -> None:
    """Stopped after 4 steps, killed after 6 more of which all but the last were saved, then left alone."""
    run, _ = finished_run(tmp_path / "a", sae_settings(architecture))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert session(run, whole, tokens=660).run() is not None
    assert session(run, parts, StopAfter(6), tokens=660).run() is None
    with pytest.raises(SystemExit):
        session(run, parts, StopAfter(7, SystemExit()), save_seconds=0.0, tokens=660).run()
    assert session(run, parts, tokens=660).run() is not None

    ends = [path / "snapshots" / snapshot_names(path)[-1] / "small" / WEIGHTS for path in (whole, parts)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert len(list((parts / "tuning").iterdir())) == 1


def test_a_tuning_goes_on_with_its_own_options_only(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path / "a", sae_settings("topk"))
    assert session(run, tmp_path / "tuned", StopAfter(2)).run() is None
    with pytest.raises(TuningError, match=r"tuned holds a tuning with loss kl\+mse: go on with these, choose another"):
        session(run, tmp_path / "tuned", loss="kl").run()


def test_another_text_than_the_run_trained_on_is_refused(tmp_path: Path) -> None:
    """What is held out of one text may have been trained on in the other."""
    run, _ = finished_run(tmp_path / "a", sae_settings("topk"))
    (tmp_path / "a" / "text" / "00.txt").write_text("w1 w2")
    with pytest.raises(TuningError, match="differs from the one that the run was trained on in corpus_fingerprint"):
        session(run, tmp_path / "tuned").run()


def test_the_monitor_and_export_read_a_tuned_run_like_any_other(tmp_path: Path) -> None:
    """Its settings are a run file; its evaluation is the one that the tuning has printed."""
    run, _ = finished_run(tmp_path / "a", sae_settings("batchtopk"))
    result = session(run, tmp_path / "tuned", tokens=320).run()
    assert result is not None
    settings = read_run_file(
        MonitorSettings,
        tmp_path / "tuned" / "settings.toml",
        ["monitor.evaluation_tokens=300", "monitor.latents_tokens=0"],
    )
    Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event()).look()
    evaluation = read_evaluation(result.folder.parent, "small")

    assert is_finished(tmp_path / "tuned")
    assert evaluation is not None and evaluation.values["kl"] == pytest.approx(result.after.kl, rel=1e-6)
    assert main(["export", str(result.folder), "--format", "saelens", "--to", str(tmp_path / "exported")]) == 0


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_tunes_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finished_run(tmp_path / "a", sae_settings("topk"))
    code = main(["tune", str(run), "--sae", "small", "--tokens", "640", "--loss", "kl", "--evaluation-tokens", "300"])
    out = capsys.readouterr().out

    assert code == 0
    for heading in ("before", "after", "ΔCE, nats per token", "KL", "FVU", "L0", "published:"):
        assert heading in out
    assert snapshot_names(run / "tuned" / "small-kl")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nested": ({"matryoshka": [8, 24]}, {}, r"sae \"small\" is nested \(matryoshka\)"),
    "transcoder": ({}, {"hook_name_out": "blocks.1.hook_resid_post"}, r"sae \"small\" is a transcoder"),
    "crosscoder": ({}, {"hook_names": ["a", "b"]}, r"sae \"small\" is a crosscoder"),
    "other": ({}, {"settings": {"architecture": "tied"}}, 'has architecture "tied"; tuning is for topk, batchtopk'),
    "foreign": ({}, {"settings": None}, "holds no settings of a training by Sluice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, metadata, complaint = REFUSED[case]
    run, _ = finished_run(tmp_path / "a", sae_settings("topk", **options), steps=0, **metadata)

    assert main(["tune", str(run), "--sae", "small", "--tokens", "10"]) == 2
    assert complaint.replace("\\", "") in capsys.readouterr().err


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finished_run(tmp_path / "a", sae_settings("topk"), steps=0)
    for arguments, complaint in (
        (["--sae", "other"], 'has an SAE "other"; there are small'),
        (["--sae", "small", "--snapshot", "000000000007"], 'no snapshot "000000000007" in'),
    ):
        assert main(["tune", str(run), *arguments, "--tokens", "10"]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["tune", str(tmp_path), "--sae", "small", "--tokens", "10"]) == 2
    assert "holds no settings.toml" in capsys.readouterr().err
