"""Evaluation: on a tiny random language model, with SAEs whose effect on it is known."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from prometheus_client import CollectorRegistry

from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.evaluator import Baseline, evaluate
from monitor.evaluation.follow import Evaluator, Stopped
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from monitor.summary import complete_summary
from producer.common.run_file import read_run_file
from producer.corpus import open_corpus
from producer.corpus.held_out import NoHeldOutText, held_out_windows
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import DEFAULT_MEMORY, MemoryLimits, in_stream
from producer.packing import pack_activations
from producer.settings import CorpusSettings
from tests.small_model import HOOK, WIDTH, WORDS, load_model, write_model
from tests.small_run import Export, finish_run, identity_sae, publish_snapshot, write_text_run
from trainer.report import DENSITY_EDGES
from trainer.saes.inference import load_sae
from trainer.snapshot import retire

MLP_OUT = "blocks.1.hook_mlp_out"
WIRED = [MLP_OUT, "blocks.1.hook_resid_mid", HOOK, "blocks.1.hook_resid_pre"]
"""Hooks for SAEs of several, not in the order in which the model computes them."""
MORE = ("ce_mean_ablation", "ce_recovered_mean_ablation", "cosine", "norm_ratio", "shrinkage", "density")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> LanguageModel:
    return load_model(model_folder)


@pytest.fixture(scope="session")
def wired(model_folder: Path) -> LanguageModel:
    """The same model with the hooks of WIRED."""
    return load_model(model_folder, WIRED)


@pytest.fixture
def windows() -> Windows:
    """Five windows of eight tokens, BOS first; the last two tokens of the last window are padding."""
    ids = np.random.default_rng(0).integers(2, WORDS + 2, (5, 8))
    ids[:, 0] = 0
    padded = np.zeros((5, 8), bool)
    padded[-1, -2:] = True
    return Windows(ids, kept=(ids != 0) & ~padded, padded=padded)


@pytest.fixture
def run_file(model_folder: Path, tmp_path: Path) -> Path:
    """A run on a few small shards of text, a quarter of them held out, with no snapshot yet."""
    monitor = "port = 0\nservice_port = 0\npoll_seconds = 0.1\nevaluation_tokens = 100"
    return write_text_run(tmp_path, model_folder, monitor, run="demo")


# --- The numbers -----------------------------------------------------------------------------------------------------


def test_ce_clean_is_the_models_own_loss(model: LanguageModel, model_folder: Path, windows: Windows, tmp_path: Path):
    """The same mean that transformers computes from labels, with padding ignored."""
    labels = torch.from_numpy(np.where(windows.padded, -100, windows.ids))
    own = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        loss = float(own(torch.from_numpy(windows.ids), labels=labels).loss)
    assert _evaluate(model, windows, tmp_path, gain=1.0)["ce_clean"] == pytest.approx(loss, rel=1e-5)


def test_a_perfect_copy_loses_nothing(model: LanguageModel, windows: Windows, tmp_path: Path):
    """x_hat = x: no loss, all recovered, the same distribution, no variance unexplained."""
    result = _evaluate(model, windows, tmp_path, gain=1.0)
    assert result["ce_delta"] == pytest.approx(0, abs=1e-5)
    assert result["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert result["kl"] == pytest.approx(0, abs=1e-5)
    assert result["fvu"] == pytest.approx(0, abs=1e-9)
    assert result["l0"] == WIDTH  # each element is either positive or negative


def test_zero_recovers_nothing(model: LanguageModel, windows: Windows, tmp_path: Path):
    """x_hat = 0 is zero ablation itself, so nothing is recovered."""
    result = _evaluate(model, windows, tmp_path, gain=0.0)
    assert abs(result["ce_zero"] - result["ce_clean"]) > 0.1
    assert result["ce_recovered"] == pytest.approx(0, abs=1e-9)
    assert result["kl"] > 0.1


def test_numbers_agree_with_a_direct_computation(model: LanguageModel, windows: Windows, tmp_path: Path):
    """x_hat = x / 2, spliced in by hand: the same CE, KL and FVU, counted over the same positions."""
    result = _evaluate(model, windows, tmp_path, gain=0.5)
    ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    clean = model.logits(ids).log_softmax(-1)[:, :-1]
    half = model.logits(ids, {HOOK: lambda x: torch.where(mask[..., None], x / 2, x)}).log_softmax(-1)[:, :-1]
    real = torch.from_numpy(~windows.padded[:, 1:])
    ce = [-p.gather(-1, ids[:, 1:, None])[..., 0][real].mean().item() for p in (clean, half)]
    x = model.activations(ids)[0][mask].double()
    assert result["ce_delta"] == pytest.approx(ce[1] - ce[0], abs=1e-6)
    assert result["kl"] == pytest.approx((clean.exp() * (clean - half)).sum(-1)[real].mean().item(), abs=1e-6)
    assert result["fvu"] == pytest.approx(float((x / 2).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
    assert (result["rows"], result["predictions"]) == (5 * 7 - 2, 5 * 7 - 2)


def test_a_perfect_copy_has_the_same_direction_and_size(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Cosine, ratio of norms and shrinkage are 1, and mean ablation is undone as zero ablation is."""
    result = _evaluate(model, windows, tmp_path, gain=1.0)
    for name in ("cosine", "norm_ratio", "shrinkage"):
        assert result[name] == pytest.approx(1, abs=1e-6), name
    assert result["ce_recovered_mean_ablation"] == pytest.approx(1, abs=1e-3)


def test_fit_agrees_with_a_direct_computation(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Each activation has an x_hat of another direction and size: cosine, norms and shrinkage from all at once."""
    sae = _sae(1.0)
    sae.weights["W_dec"] *= np.linspace(0.2, 0.9, 2 * WIDTH, dtype=np.float32)[:, None]
    result = _evaluate_one(model, windows, tmp_path, sae)
    x = model.activations(torch.from_numpy(windows.ids))[0][torch.from_numpy(windows.kept)].double()
    gains = torch.linspace(0.2, 0.9, 2 * WIDTH, dtype=torch.float64)
    x_hat = torch.where(x > 0, gains[:WIDTH], gains[WIDTH:]) * x
    centred, centred_hat = x - x.mean(0), x_hat - x.mean(0)
    assert result["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-6)
    assert result["norm_ratio"] == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-6)
    shrinkage = float(centred_hat.square().sum() / (centred * centred_hat).sum())
    assert result["shrinkage"] == pytest.approx(shrinkage, rel=1e-6)


def test_the_mean_recovers_nothing_of_mean_ablation(model: LanguageModel, windows: Windows, tmp_path: Path):
    """An SAE that gives the mean of all activations, whatever it reads, is mean ablation itself."""
    mask = torch.from_numpy(windows.kept)
    mean = model.activations(torch.from_numpy(windows.ids))[0][mask].mean(0)
    sae = _sae(0.0)
    sae.weights["b_dec"] = mean.numpy()
    sae.cfg["apply_b_dec_to_input"] = False
    result = _evaluate_one(model, windows, tmp_path, sae)
    ce_mean = _cross_entropy(model, windows, {HOOK: _where(mask, mean)})
    assert result["ce_mean_ablation"] == pytest.approx(ce_mean, abs=1e-6)
    assert result["ce_recovered_mean_ablation"] == pytest.approx(0, abs=1e-5)
    assert result["ce_recovered"] != pytest.approx(0, abs=1e-2)
    assert result["fvu"] == pytest.approx(1, abs=1e-6)


def test_latents_are_counted_by_how_often_they_fire(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Thresholds that let one latent fire on one token, one never, and the others on every second token or so."""
    x = model.activations(torch.from_numpy(windows.ids))[0][torch.from_numpy(windows.kept)]
    sae = _sae(1.0)
    sae.weights["threshold"][0] = float(x[:, 0].sort().values[-2])
    sae.weights["threshold"][1] = 1e9
    result = _evaluate_one(model, windows, tmp_path, sae)
    rates = torch.cat([x > 0, x < 0], 1).double().mean(0)
    rates[:2] = torch.tensor([1 / len(x), 0.0])
    assert result["dead_latents"] == result["density"][-1] == int((rates == 0).sum()) >= 1
    assert result["dense_latents"] == int((rates > 0.1).sum()) > 1
    edges = [-math.inf, *DENSITY_EDGES]
    expected = [sum(low < math.log10(rate) <= high for rate in rates if rate > 0) for low, high in pairwise(edges)]
    assert result["density"][:-1] == expected
    assert result["l0"] == pytest.approx(float(rates.sum()))


def test_rows_outside_of_the_stream_stay_clean(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Positions that are not kept or beyond the norm bound are not replaced; without activations there is no FVU."""
    nothing = Windows(windows.ids, np.zeros_like(windows.kept), windows.padded)
    result = _evaluate(model, nothing, tmp_path, gain=0.0)
    assert (result["ce_delta"], result["rows"], result["fvu"], result["ce_recovered"]) == (0.0, 0, None, None)
    norms = model.activations(torch.from_numpy(windows.ids))[0].norm(dim=-1)[torch.from_numpy(windows.kept)]
    bound = float(norms.median())
    assert _evaluate(model, windows, tmp_path, gain=0.0, norm_bound=bound)["rows"] == int((norms <= bound).sum())


def test_passes_do_not_change_the_numbers(model: LanguageModel, windows: Windows, tmp_path: Path):
    """One window at a time, or a few latents at a time, gives what all at once gives."""
    at_once = _evaluate(model, windows, tmp_path, gain=0.5)
    little = MemoryLimits(logits=1, latents=3 * 2 * WIDTH)
    one_by_one = _evaluate(model, windows, tmp_path / "again", gain=0.5, memory=little)
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_delta", "ce_recovered", "kl", "fvu", "l0", *MORE):
        assert one_by_one[name] == pytest.approx(at_once[name], rel=1e-5), name


def test_damage_is_unknown_not_infinite(model: LanguageModel, windows: Windows, tmp_path: Path):
    """An SAE of NaN gives None, which JSON can say."""
    result = _evaluate(model, windows, tmp_path, gain=math.nan)
    assert result["ce_sae"] is None and result["ce_recovered"] is None and result["ce_clean"] > 0


def test_sae_of_another_width_is_refused(model: LanguageModel, windows: Windows, tmp_path: Path):
    """The message names both widths."""
    folder = publish_snapshot(tmp_path, 1, [identity_sae("small", 3, HOOK)]) / "small"
    with pytest.raises(EvaluationError, match=r"reads 3 numbers at .*hook_resid_post \(8\)"):
        _evaluate_folder(model, windows, folder)


# --- SAEs that read one place and write another, or several ----------------------------------------------------------


def test_identity_transcoder_loses_nothing(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """What block 0 hands on is what block 1 is given: copying one to the other changes nothing."""
    result = _evaluate_one(wired, windows, tmp_path, _rewired(_sae(1.0), [HOOK], "blocks.1.hook_resid_pre"))
    assert (result["hook"], result["target"]) == (HOOK, "blocks.1.hook_resid_pre")
    assert result["ce_delta"] == pytest.approx(0, abs=1e-5)
    assert result["fvu"] == pytest.approx(0, abs=1e-9)
    assert result["l0"] == WIDTH


def test_transcoder_is_measured_at_its_target(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """x / 2 of the residual stream in place of the MLP's output, spliced in by hand: the same CE, KL and FVU."""
    result = _evaluate_one(wired, windows, tmp_path, _rewired(_sae(0.5), ["blocks.1.hook_resid_mid"], MLP_OUT))
    ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    y, x = (wired.activations(ids)[WIRED.index(hook)] for hook in (MLP_OUT, "blocks.1.hook_resid_mid"))
    ce = [_cross_entropy(wired, windows, replace) for replace in ({}, {MLP_OUT: _where(mask, x / 2)})]
    assert result["ce_delta"] == pytest.approx(ce[1] - ce[0], abs=1e-6)
    assert result["ce_zero"] == pytest.approx(_cross_entropy(wired, windows, {MLP_OUT: _where(mask, 0 * y)}), abs=1e-6)
    y, x = y[mask].double(), x[mask].double()
    assert result["fvu"] == pytest.approx(float((y - x / 2).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-6)


def test_zero_transcoder_is_zero_ablation_of_its_target(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """Not of the hook it reads."""
    result = _evaluate_one(wired, windows, tmp_path, _rewired(_sae(0.0), [HOOK], MLP_OUT))
    assert result["ce_sae"] == result["ce_zero"] != pytest.approx(result["ce_clean"], abs=0.01)


def test_skip_transcoder_adds_its_linear_part(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """Latents that decode to nothing beside a skip of x: the identity again; half a skip and half a decoder, too."""
    for gain, skip in ((0.0, 1.0), (0.5, 0.5)):
        sae = _rewired(_sae(gain, f"skip{skip}"), [HOOK], "blocks.1.hook_resid_pre")
        sae.weights["W_skip"] = skip * np.eye(WIDTH, dtype=np.float32)
        sae.cfg["architecture"] = "jumprelu_skip_transcoder"
        result = _evaluate_one(wired, windows, tmp_path / str(skip), sae)
        assert result["ce_delta"] == pytest.approx(0, abs=1e-5)
        assert result["fvu"] == pytest.approx(0, abs=1e-9)


def test_transcoder_against_the_stream_is_refused(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """It would read what it has changed itself."""
    folder = publish_snapshot(tmp_path, 1, [_rewired(_sae(1.0), [MLP_OUT], HOOK)]) / "small"
    with pytest.raises(EvaluationError, match=rf"reads '{MLP_OUT}'.* after '{HOOK}'"):
        _evaluate_folder(wired, windows, folder)


def test_identity_crosscoder_loses_nothing(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """All hooks are replaced in one pass, each by its own part of the reconstruction."""
    hooks = [MLP_OUT, HOOK]
    result = _evaluate_one(wired, windows, tmp_path, _rewired(_sae(1.0, d_in=2 * WIDTH), hooks))
    assert result["hooks"] == hooks and "target" not in result
    assert result["ce_delta"] == pytest.approx(0, abs=1e-5)
    assert result["fvu"] == pytest.approx(0, abs=1e-9)
    assert result["fvu_by_hook"] == pytest.approx(dict.fromkeys(hooks, 0.0), abs=1e-9)
    assert result["l0"] == 2 * WIDTH


def test_crosscoder_is_measured_at_all_its_hooks(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """One hook exact, one halved: the reconstructions of clean activations are put in, and every hook weighs alike."""
    hooks = [HOOK, MLP_OUT]
    sae = _rewired(_sae(1.0, d_in=2 * WIDTH), hooks)
    sae.weights["W_dec"][:, WIDTH:] *= 0.5
    result = _evaluate_one(wired, windows, tmp_path, sae)
    ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    x, y = (wired.activations(ids)[WIRED.index(hook)] for hook in hooks)
    spliced = {HOOK: _where(mask, x), MLP_OUT: _where(mask, y / 2)}
    assert result["ce_sae"] == pytest.approx(_cross_entropy(wired, windows, spliced), abs=1e-6)
    nothing = {HOOK: _where(mask, 0 * x), MLP_OUT: _where(mask, 0 * y)}
    assert result["ce_zero"] == pytest.approx(_cross_entropy(wired, windows, nothing), abs=1e-6)
    x, y = (rows[mask].double() / rows[mask].double().square().mean().sqrt() for rows in (x, y))
    variance = [float((rows - rows.mean(0)).square().sum()) for rows in (x, y)]
    error = float((y / 2).square().sum())
    assert result["fvu_by_hook"] == pytest.approx({HOOK: 0.0, MLP_OUT: error / variance[1]}, rel=1e-6)
    assert result["fvu"] == pytest.approx(error / sum(variance), rel=1e-6)
    assert result["norm_ratio"] == pytest.approx((1 + 0.5) / 2, rel=1e-6)
    assert result["cosine"] == pytest.approx(1, rel=1e-6)
    means = [float(rows.mean(0).square().sum()) * len(rows) for rows in (x, y)]
    spread = variance[0] + variance[1] / 4 + means[1] / 4
    assert result["shrinkage"] == pytest.approx(spread / (variance[0] + variance[1] / 2), rel=1e-6)


def test_one_hook_beyond_its_bound_drops_the_row_everywhere(wired: LanguageModel, windows: Windows, tmp_path: Path):
    """As the producer does: an SAE's tokens are decided by all hooks of the stream, also by those it does not read."""
    ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    norms = [wired.activations(ids)[WIRED.index(hook)].norm(dim=-1) for hook in (HOOK, MLP_OUT)]
    bounds = {hook: float(norm[mask].median()) for hook, norm in zip((HOOK, MLP_OUT), norms, strict=True)}
    within = mask & (norms[0] <= bounds[HOOK]) & (norms[1] <= bounds[MLP_OUT])
    folder = publish_snapshot(tmp_path, 1, [_sae(0.0)]) / "small"
    result = _evaluate_folder(wired, windows, folder, bounds)
    assert result["rows"] == int(within.sum()) < int(mask.sum())
    zero = {HOOK: _where(within, torch.zeros(WIDTH))}
    assert result["ce_sae"] == pytest.approx(_cross_entropy(wired, windows, zero), abs=1e-6)


def test_the_mean_of_mean_ablation_is_that_of_the_stream(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Activations beyond the norm bound count in it as little as they are replaced by it."""
    ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    (x,) = model.activations(ids)
    bound = float(x.norm(dim=-1)[mask].median())
    within = mask & (x.norm(dim=-1) <= bound)
    result = _evaluate(model, windows, tmp_path, gain=1.0, norm_bound=bound)
    expected = _cross_entropy(model, windows, {HOOK: _where(within, x[within].mean(0))})
    assert result["ce_mean_ablation"] == pytest.approx(expected, abs=1e-6)
    others = _cross_entropy(model, windows, {HOOK: _where(within, x[mask].mean(0))})
    assert expected != pytest.approx(others, abs=1e-3)


def test_rows_are_dropped_as_the_producer_drops_them():
    """The same positions of the same activations, those included that are not finite."""
    generator = torch.Generator().manual_seed(0)
    activations = {
        hook: torch.randn(3, 8, width, generator=generator).bfloat16() for hook, width in (("a", 4), ("b", 6))
    }
    activations["a"][0, 1] = math.inf
    activations["b"][1, 2] = math.nan
    mask = torch.rand(3, 8, generator=generator) < 0.9
    bounds = {"a": 2.0, "b": 2.5}
    packed, _ = pack_activations(list(activations.values()), mask.numpy(), list(bounds.values()), torch.bfloat16)
    streamed = in_stream(activations, mask, bounds)
    assert np.array_equal(streamed.numpy(), packed) and (packed.sum(), mask.sum()) == (11, 23)


def test_bounds_of_hooks_that_are_not_here_are_refused(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Which tokens the stream had cannot be told without them."""
    folder = publish_snapshot(tmp_path, 1, [_sae(1.0)]) / "small"
    with pytest.raises(EvaluationError, match=f"by their norm at {re.escape(MLP_OUT)}"):
        _evaluate_folder(model, windows, folder, {MLP_OUT: 3.0})


def test_bounds_that_leave_no_row_are_refused(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Nothing would be replaced, and a ΔCE of 0 would look like a perfect SAE."""
    with pytest.raises(
        EvaluationError, match=rf"none of the 33 held-out activations is in the stream, .* beyond 1e-09 at {HOOK}"
    ):
        _evaluate(model, windows, tmp_path, gain=1.0, norm_bound=1e-9)


def test_signed_latents_count_as_active(model: LanguageModel, windows: Windows, tmp_path: Path):
    """Top-k by magnitude gives negative latents; L0 is what is not zero."""
    sae = _sae(0.5)
    sae.cfg.update(architecture="abstopk", k=3)
    assert _evaluate_one(model, windows, tmp_path, sae)["l0"] == 3


# --- The text --------------------------------------------------------------------------------------------------------


def test_held_out_text_is_spread_and_never_trained_on(model: LanguageModel, run_file: Path):
    """Windows come from several held-out shards, with just enough tokens, the same ones every time."""
    settings = _settings(run_file).corpus
    corpus = open_corpus(settings)
    windows = held_out_windows(corpus, model.tokenizer, settings, tokens=100)
    again = held_out_windows(corpus, model.tokenizer, settings, tokens=100)
    assert np.array_equal(windows.ids, again.ids)
    assert 100 <= windows.kept.sum() < 100 + 8 * settings.context
    spread = {
        shard
        for shard in corpus.held_out_shards
        for document in corpus.documents(shard)
        if any(_words(model, row) in str(document) for row in windows.ids)
    }
    assert len(spread) == min(8, len(corpus.held_out_shards)) > 1


def test_scarce_text_is_used_up(model: LanguageModel, run_file: Path):
    """More tokens than there are: all that is held out is taken, and no more."""
    settings = _settings(run_file).corpus
    corpus = open_corpus(settings)
    windows = held_out_windows(corpus, model.tokenizer, settings, tokens=10**6)
    words = sum(len(str(text).split()) for shard in corpus.held_out_shards for text in corpus.documents(shard))
    assert windows.kept.sum() == words


@pytest.mark.parametrize(
    ("shards", "held_out", "advice"),
    [
        (1, [], "0 of the corpus' 1 shards are held out, without any text. Lower corpus.shard_bytes = 1000000."),
        (2, [1], "1 of the corpus' 2 shards is held out, without any text. Lower corpus.shard_bytes = 1000000."),
        (20, [3], "1 of the corpus' 20 shards is held out, without any text; raise corpus.held_out = 0.0625, or check"),
    ],
)
def test_advice_without_held_out_text_is_what_mends_it(
    model: LanguageModel, shards: int, held_out: list[int], advice: str
):
    """A larger fraction of one shard is none: then shards must be smaller."""
    corpus: Any = SimpleNamespace(shards=shards, held_out_shards=held_out, documents=lambda shard: [])
    with pytest.raises(NoHeldOutText) as error:
        held_out_windows(corpus, model.tokenizer, CorpusSettings(kind="text", paths=["a"]), tokens=10)

    assert str(error.value).startswith(advice)


# --- Following a run -------------------------------------------------------------------------------------------------


def test_only_the_newest_snapshot_is_evaluated(run_file: Path):
    """Behind by two, the evaluator skips them; what it finds is on disk and in the metrics."""
    directory = run_file.parent / "demo"
    folders = [publish_snapshot(directory, tokens, [_sae(0.5)]) for tokens in (1000, 2000, 3000)]
    evaluator, registry = _evaluator(run_file)
    evaluator.look()
    assert [(folder / "small" / "evaluation.json").exists() for folder in folders] == [False, False, True]
    evaluation = json.loads((folders[-1] / "small" / "evaluation.json").read_text())
    assert (
        evaluation["snapshot"] == "000000003000" and evaluation["snapshot_tokens"] == 3000 and evaluation["rows"] >= 100
    )
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "small"}) == evaluation["ce_delta"]
    assert registry.get_sample_value("sluice_evaluated_snapshot_tokens", {"sae": "small"}) == 3000
    assert evaluator.is_up_to_date() and not evaluator.has_failed()


def test_what_is_evaluated_is_not_evaluated_again(run_file: Path):
    """A restarted monitor shows the numbers on disk and measures only what is missing."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5)])
    (folder / "small" / "evaluation.json").write_text('{"ce_delta": 0.125}')
    evaluator, registry = _evaluator(run_file)
    evaluator.look()
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "small"}) == 0.125
    evaluation = json.loads((folder / "small" / "evaluation.json").read_text())
    assert evaluation["ce_delta"] == 0.125 and "ce_sae" not in evaluation and "explanation_f1" in evaluation


def test_what_latents_are_worth_joins_the_numbers(run_file: Path):
    """Once they have been looked at: n-grams, ablations, and probes on the labelled texts that the settings name."""
    texts = run_file.parent / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{i % 2} w{i}", "label": i % 2}) + "\n" for i in range(32)))
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(1.0)])
    # Windows of 8 tokens have no room for the 16 positions that an ablation is followed over.
    evaluator, registry = _evaluator(run_file, f"monitor.probe_file={texts}", "corpus.context=32")
    evaluator.look()
    evaluation = json.loads((folder / "small" / "evaluation.json").read_text())
    assert evaluation["ce_delta"] == pytest.approx(0, abs=1e-5)
    assert evaluation["explanation_f1"] == pytest.approx(0.0767, rel=0.02)
    assert evaluation["ablation_effects"] == pytest.approx(84.7, rel=0.02)
    assert evaluation["probe_accuracy"].keys() == {"1", "2", "5", "dense"}
    for name in ("explanation_f1", "ablation_effects_ratio"):
        assert registry.get_sample_value(f"sluice_{name}", {"sae": "small"}) == evaluation[name]
    accuracy = registry.get_sample_value("sluice_probe_accuracy", {"sae": "small", "probe": "dense"})
    assert accuracy == evaluation["probe_accuracy"]["dense"]


def test_a_damaged_sae_is_evaluated_all_the_same(run_file: Path):
    """What it writes is not finite: the numbers that follow from it are not known, and nothing fails."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(math.nan)])
    evaluator, _ = _evaluator(run_file, "corpus.context=32")
    evaluator.look()
    evaluation = json.loads((folder / "small" / "evaluation.json").read_text())
    assert (evaluation["ce_delta"], evaluation["cosine"], evaluation["ablation_effects"]) == (None, None, None)
    assert evaluation["explanation_f1"] == pytest.approx(0.0767, rel=0.02) and not evaluator.has_failed()


def test_evaluation_keeps_to_its_share_of_the_time(run_file: Path):
    """At a tenth it sleeps nine times as long as it computes."""
    directory = run_file.parent / "demo"
    evaluator, _ = _evaluator(run_file, "monitor.evaluation_share=0.1", "monitor.latents_tokens=0")
    evaluator.look()  # loads the model
    folder = publish_snapshot(directory, 1000, [_sae(0.5)])
    began, cpu_seconds = time.monotonic(), time.thread_time()
    evaluator.look()
    assert (folder / "small" / "evaluation.json").exists()
    assert time.thread_time() - cpu_seconds < 0.15 * (time.monotonic() - began)


def test_several_saes_share_the_clean_pass(run_file: Path):
    """Each SAE of a snapshot gets its own numbers; the clean model and zero ablation are the same for all."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(1.0, "good"), _sae(0.0, "bad")])
    evaluator, _ = _evaluator(run_file)
    evaluator.look()
    good, bad = (json.loads((folder / name / "evaluation.json").read_text()) for name in ("good", "bad"))
    assert (good["ce_clean"], good["ce_zero"]) == (bad["ce_clean"], bad["ce_zero"])
    assert good["ce_recovered"] == pytest.approx(1, abs=1e-4) and bad["ce_recovered"] == pytest.approx(0, abs=1e-9)


def test_one_that_cannot_be_spliced_does_not_hold_up_the_rest(run_file: Path, caplog: pytest.LogCaptureFixture):
    """The others get their numbers; this one is named, with the reason, and counts as a failure."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5), _rewired(_sae(0.5, "odd"), [HOOK], MLP_OUT)])
    evaluator, registry = _evaluator(run_file)
    evaluator.look()
    assert (folder / "small" / "evaluation.json").exists()
    assert not (folder / "odd" / "evaluation.json").exists()
    assert f"odd of 000000001000 is not evaluated: sae 'odd' writes {WIDTH} numbers at '{MLP_OUT}'" in caplog.text
    assert evaluator.has_failed() and evaluator.is_up_to_date()
    assert registry.get_sample_value("sluice_evaluation_failures_total") == 1


def test_an_sae_that_is_gone_leaves_the_metrics(run_file: Path):
    """Attached and detached while the run goes on: what is shown is what the newest snapshot holds."""
    directory = run_file.parent / "demo"
    publish_snapshot(directory, 1000, [_sae(0.5), _sae(0.5, "short-lived")])
    evaluator, registry = _evaluator(run_file)
    evaluator.look()
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "short-lived"}) is not None
    publish_snapshot(directory, 2000, [_sae(0.5), _sae(0.5, "small-ema")])
    evaluator.look()
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "short-lived"}) is None
    assert registry.get_sample_value("sluice_ce_delta", {"sae": "small-ema"}) is not None


def test_snapshot_of_another_stream_is_refused_once(run_file: Path, caplog: pytest.LogCaptureFixture):
    """Other text may have been trained on what is held out here: no numbers, a reason, one failure counted."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5)], stream={"corpus_fingerprint": "other"})
    evaluator, registry = _evaluator(run_file)
    evaluator.look()
    evaluator.look()
    assert not (folder / "small" / "evaluation.json").exists()
    assert "differs from the run file in corpus_fingerprint" in caplog.text
    assert registry.get_sample_value("sluice_evaluation_failures_total") == 1
    assert evaluator.has_failed()


def test_the_last_snapshot_of_a_run_does_not_wait_for_an_older_one(run_file: Path):
    """The run ends while an older snapshot is measured: that is given up, and the last one comes next."""
    directory = run_file.parent / "demo"
    older = publish_snapshot(directory, 1000, [_sae(0.5)])

    class Slow(Evaluator):
        def _evaluate(self, inputs: Any, snapshot: Any, saes: Any) -> None:
            if snapshot.folder == older:
                publish_snapshot(directory, 2000, [_sae(0.5)])
                finish_run(directory, 2000)
            super()._evaluate(inputs, snapshot, saes)

    evaluator = Slow(_settings(run_file), MonitorMetrics(CollectorRegistry()), threading.Event())
    evaluator.look()
    assert not evaluator.is_up_to_date() and not (older / "small" / "evaluation.json").exists()
    evaluator.look()
    assert evaluator.is_up_to_date() and not evaluator.has_failed()
    assert (directory / "snapshots" / "000000002000" / "small" / "evaluation.json").exists()


def test_snapshot_retired_under_way_is_no_failure(run_file: Path):
    """Retention may take a snapshot that is about to be measured; the next look takes the newest one."""
    directory = run_file.parent / "demo"
    publish_snapshot(directory, 1000, [_sae(0.5)])

    class Slow(Evaluator):
        def _evaluate(self, inputs: Any, snapshot: Any, saes: Any) -> None:
            publish_snapshot(directory, 2000, [_sae(0.5)])
            retire(directory, keep=1)
            super()._evaluate(inputs, snapshot, saes)

    registry = CollectorRegistry()
    evaluator = Slow(_settings(run_file), MonitorMetrics(registry), threading.Event())
    evaluator.look()
    assert registry.get_sample_value("sluice_evaluation_failures_total") == 0
    assert not evaluator.is_up_to_date()
    evaluator.look()
    assert registry.get_sample_value("sluice_evaluated_snapshot_tokens", {"sae": "small"}) == 2000


def test_a_piece_of_work_is_followed_by_its_rest(run_file: Path):
    """A hundred seconds of work at a share of a quarter: three hundred of rest; none once the run is over."""
    evaluator, _ = _evaluator(run_file, "monitor.evaluation_share=0.25")
    rests: list[float] = []
    evaluator._stop = SimpleNamespace(wait=rests.append)  # type: ignore[assignment]
    for finished in (False, True):
        if finished:
            finish_run(run_file.parent / "demo", 1000)
        evaluator.moved_at = time.monotonic() - 100.0
        evaluator._between()
    assert 300.0 <= rests[0] < 600.0 and rests[1:] == [0.0]


def test_stopping_does_not_wait_for_an_evaluation(run_file: Path):
    """Asked to stop, it leaves after the forward pass it is in, and nothing half done is written."""
    folder = publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5)])
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Evaluator(_settings(run_file), MonitorMetrics(CollectorRegistry()), stop).look()
    assert not (folder / "small" / "evaluation.json").exists()


def test_missing_model_turns_evaluation_off(run_file: Path, caplog: pytest.LogCaptureFixture):
    """The monitor goes on without evaluating, and says why."""
    publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5)])
    evaluator, registry = _evaluator(run_file, "model.name=/nowhere")
    evaluator.look()
    assert registry.get_sample_value("sluice_evaluation_broken") == 1
    assert evaluator.broken is not None and "/nowhere" in evaluator.broken
    assert "no evaluation" in caplog.text


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("corpus.context=64", "corpus.context = 64 is longer than the 32 tokens that"),
        ("model.name=SHORT", "held-out window 0, position 1: token id "),
    ],
)
def test_what_the_model_cannot_do_turns_evaluation_off(
    run_file: Path, model_folder: Path, tmp_path: Path, override: str, reason: str
):
    """With the reason, before anything is measured."""
    shutil.copytree(model_folder, tmp_path / "SHORT")
    override = override.replace("SHORT", str(tmp_path / "SHORT"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "SHORT")
    tokenizer.add_tokens([f"w{number}" for number in range(WORDS, 400)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "SHORT")
    (tmp_path / "text.txt").write_text("\n".join("w399 w1 w2 w3" for _ in range(400)))
    publish_snapshot(run_file.parent / "demo", 1000, [_sae(0.5)])
    evaluator, _ = _evaluator(run_file, override)
    evaluator.look()
    assert evaluator.broken is not None and reason in evaluator.broken


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bidirectional", "does not predict the next token"), ("headless", "has no head that gives logits")],
)
def test_model_without_predictions_is_measured_by_what_is_reconstructed(
    run_file: Path, model_folder: Path, tmp_path: Path, kind: str, reason: str, caplog: pytest.LogCaptureFixture
):
    """The log says what is measured instead: FVU, L0, cosine and density, no CE; and latents have pages."""
    folder = tmp_path / kind
    shutil.copytree(model_folder, folder)
    if kind == "headless":
        transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    sae = _sae(0.5)
    snapshot = publish_snapshot(run_file.parent / "demo", 1000, [sae])
    evaluator, registry = _evaluator(run_file, f"model.name={folder}")
    evaluator.look()
    assert evaluator.broken is None and not evaluator.has_failed()
    assert f"{folder} {reason}: its SAEs are measured by what they reconstruct" in caplog.text
    result = json.loads((snapshot / "small" / "evaluation.json").read_text())
    assert result["fvu"] > 0 and result["cosine"] == pytest.approx(1) and result["norm_ratio"] == pytest.approx(0.5)
    assert result["l0"] == WIDTH and sum(result["density"]) == 2 * WIDTH and "explanation_f1" in result
    assert not [name for name in result if name.startswith(("ce_", "kl", "ablation_", "predictions"))]
    assert registry.get_sample_value("sluice_evaluation_l0", {"sae": "small"}) == WIDTH
    explorer = evaluator._handle.explorer
    assert explorer is not None
    latent = explorer.latent("small", 0)
    assert latent.contexts and latent.promoted is None
    assert explorer.fires("small", "w1 w2 w3").firing


HEAD = "blocks.1.attn.hook_z[1]"
PLACES: dict[str, tuple[str, bool, slice]] = {
    "blocks.1.attn.hook_z": ("model.layers.1.self_attn.o_proj", True, slice(None)),
    HEAD: ("model.layers.1.self_attn.o_proj", True, slice(WIDTH // 2, WIDTH)),
    "blocks.0.attn.hook_q": ("model.layers.0.self_attn.q_proj", False, slice(None)),
    "blocks.0.attn.hook_v": ("model.layers.0.self_attn.v_proj", False, slice(None)),
    "blocks.1.hook_attn_out": ("model.layers.1.self_attn", False, slice(None)),
    "blocks.1.hook_mlp_in": ("model.layers.1.mlp", True, slice(None)),
    "blocks.1.mlp.hook_post": ("model.layers.1.mlp.down_proj", True, slice(None)),
    "hook_embed": ("model.embed_tokens", False, slice(None)),
    "ln_final.hook_normalized": ("model.norm", False, slice(None)),
    "model.layers.1.mlp.up_proj:input": ("model.layers.1.mlp.up_proj", True, slice(None)),
}
"""By hook, the module of the model, whether it is its input, and the channels."""


@pytest.mark.parametrize("hook", PLACES)
def test_reconstruction_takes_the_place_of_exactly_that_activation(
    model_folder: Path, windows: Windows, tmp_path: Path, hook: str
):
    """CE with x_hat = x / 2, and of zero ablation, are those of plain transformers with a forward hook by hand."""
    path, is_input, channels = PLACES[hook]
    model = load_model(model_folder, [hook])
    sae = _rewired(_sae(0.5, d_in=model.hooks[0].width), [hook])
    result = _evaluate_one(model, windows, tmp_path, sae)
    own = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids, kept = torch.from_numpy(windows.ids), torch.from_numpy(windows.kept)
    labels = torch.from_numpy(np.where(windows.padded, -100, windows.ids))

    def loss(gain: float) -> float:
        def change(x: torch.Tensor) -> torch.Tensor:
            result = x.clone()
            result[..., channels] = torch.where(kept[..., None], gain * x, x)[..., channels]
            return result

        def before(module: Any, args: tuple) -> tuple:
            return (change(args[0]), *args[1:])

        def after(module: Any, args: tuple, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        module = own.get_submodule(path)
        handle = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
        with handle, torch.no_grad():
            return float(own(ids, labels=labels).loss)

    assert result["ce_sae"] == pytest.approx(loss(0.5), rel=1e-5)
    assert result["ce_zero"] == pytest.approx(loss(0.0), rel=1e-5)
    assert result["ce_clean"] == pytest.approx(loss(1.0), rel=1e-5)
    assert result["fvu"] > 0 and result["rows"] == 5 * 7 - 2
    assert result["ce_sae"] != pytest.approx(result["ce_clean"], rel=1e-5) or hook == "hook_embed"


def test_summary_is_completed_without_losing_anything(run_file: Path):
    """The evaluation joins what the trainer wrote, and doing it twice changes nothing; averaged copies stay out."""
    directory = run_file.parent / "demo"
    folder = publish_snapshot(directory, 1000, [_sae(0.5)])
    finish_run(directory, 1000)
    complete_summary(directory)
    assert "ce_delta" not in (directory / "summary.json").read_text()
    evaluation = {"ce_clean": 3.0, "ce_sae": 3.5, "ce_delta": 0.5, "ce_recovered": None, "kl": 0.4}
    (folder / "small-ema").mkdir()
    (folder / "small-ema" / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "small" / "evaluation.json").write_text(json.dumps(evaluation | {"rows": 100}))
    complete_summary(directory)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["saes"] == {"small": {"architecture": "jumprelu", "fvu": 0.25, **evaluation}}
    assert summary["seconds"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["monitor.evaluate=false"], "monitor.evaluate is false"),
        (["corpus.held_out=0.0"], "held_out is 0"),
        (["corpus.kind=synthetic", "corpus.synthetic={d_in = 4, features = 8}"], "no language model"),
    ],
)
def test_runs_that_cannot_be_evaluated_say_so(run_file: Path, overrides: list[str], reason: str):
    """Known from the settings, before anything is loaded."""
    assert _settings(run_file).why_not_evaluated() is None
    assert reason in (_settings(run_file, *overrides).why_not_evaluated() or "")


# --- The process -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_monitor_ends_once_the_finished_run_is_evaluated(run_file: Path):
    """--until-evaluated: exit code 0, evaluation.json beside the SAE, and its numbers in summary.json."""
    directory = run_file.parent / "demo"
    publish_snapshot(directory, 1000, [_sae(0.5)])
    finish_run(directory, 1000)
    process = _monitor(run_file, "--until-evaluated")
    _, output = process.communicate(timeout=240)
    summary = json.loads((directory / "summary.json").read_text())
    assert process.returncode == 0, output
    assert {"ce_clean", "ce_sae", "ce_delta", "ce_recovered", "kl"} <= set(summary["saes"]["small"])


def test_monitor_serves_until_it_is_stopped(run_file: Path):
    """It starts before the run has a snapshot, serves it when it comes, and leaves with 0 on SIGTERM."""
    process = _monitor(run_file, "monitor.evaluate=false")
    assert process.stderr is not None
    address = next(match[0] for line in process.stderr if (match := re.search(r"http://[\d.]+:\d+", line)))
    publish_snapshot(run_file.parent / "demo", 1000)
    with urllib.request.urlopen(f"{address}/v1/snapshots/latest?wait=60", timeout=120) as answer:
        assert json.load(answer)["name"] == "000000001000"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0


def test_help_and_faults_answer_at_once(run_file: Path):
    """--help and bad settings do not wait for torch; a fault of the file is exit code 2."""
    helped = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "monitor", "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "--until-evaluated" in helped.stdout
    assert not re.search(r"\| +(torch|transformers|starlette)$", helped.stderr, re.MULTILINE)
    process = subprocess.run(
        [sys.executable, "-m", "monitor", str(run_file), "monitor.prot=1"], capture_output=True, text=True
    )
    assert process.returncode == 2 and "did you mean port?" in process.stderr


# --- Helpers ---------------------------------------------------------------------------------------------------------


def _sae(gain: float, name: str = "small", d_in: int = WIDTH) -> Export:
    return identity_sae(name, d_in, HOOK, gain)


def _rewired(sae: Export, reads: list[str], target: str | None = None) -> Export:
    """The same weights as a transcoder of one hook, or as a crosscoder of several."""
    metadata: dict[str, Any] = {"hook_name": reads[0]}
    if len(reads) > 1:
        metadata["hook_names"] = reads
    if target is not None:
        metadata["hook_name_out"] = target
        sae.cfg["architecture"] = "jumprelu_transcoder"
    sae.cfg["metadata"] = metadata
    return sae


def _evaluate_folder(
    model: LanguageModel,
    windows: Windows,
    folder: Path,
    norm_bounds: dict[str, float] | None = None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> dict[str, Any]:
    """The numbers of the SAE in one folder of a snapshot, as evaluation.json has them."""
    sae = load_sae(folder, model.device)
    return evaluate(model, windows, [sae], Baseline(), norm_bounds, memory=memory)[sae.name].as_json()


def _evaluate_one(model: LanguageModel, windows: Windows, tmp_path: Path, sae: Export) -> dict[str, Any]:
    return _evaluate_folder(model, windows, publish_snapshot(tmp_path, 1, [sae]) / sae.name)


def _evaluate(
    model: LanguageModel,
    windows: Windows,
    tmp_path: Path,
    gain: float,
    norm_bound: float | None = None,
    memory: MemoryLimits = DEFAULT_MEMORY,
) -> dict[str, Any]:
    folder = publish_snapshot(tmp_path / str(gain), 1, [_sae(gain)])
    bounds = None if norm_bound is None else {HOOK: norm_bound}
    return _evaluate_folder(model, windows, folder / "small", bounds, memory)


def _where(mask: torch.Tensor, rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replaces an activation by `rows` where `chosen`."""
    return lambda activation: torch.where(mask[..., None], rows, activation)


def _cross_entropy(model: LanguageModel, windows: Windows, replace: dict[str, Any]) -> float:
    """Mean over all real tokens after the first of a window, which all follow a real one here."""
    ids, real = torch.from_numpy(windows.ids), torch.from_numpy(~windows.padded[:, 1:])
    log_probabilities = model.logits(ids, replace).log_softmax(-1)[:, :-1]
    return -log_probabilities.gather(-1, ids[:, 1:, None])[..., 0][real].mean().item()


def _settings(run_file: Path, *overrides: str) -> MonitorSettings:
    return read_run_file(MonitorSettings, run_file, list(overrides))


def _evaluator(run_file: Path, *overrides: str) -> tuple[Evaluator, CollectorRegistry]:
    logging.getLogger("sluice.monitor").setLevel(logging.INFO)
    registry = CollectorRegistry()
    return Evaluator(_settings(run_file, *overrides), MonitorMetrics(registry), threading.Event()), registry


def _words(model: LanguageModel, ids: np.ndarray) -> str:
    """The longest run of text tokens in a window, as it stands in the text."""
    runs = re.split(r"<s>|</s>", " ".join(model.tokenizer.convert_ids_to_tokens(ids.tolist())))
    return max((run.strip() for run in runs), key=len)


def _monitor(run_file: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "monitor", str(run_file), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
