"""What our evaluation and SAELens' make of the same SAEs, on the demo LM and the same tokens. Run by `make peers`.

SAELens runs the language model in TransformerLens. Where no token is special, the two measure the same:

    ours           SAELens
    ce_clean       ce_loss_without_sae
    ce_sae         ce_loss_with_sae
    ce_zero        ce_loss_with_ablation
    ce_recovered   ce_loss_score
    1 − fvu        explained_variance (not its explained_variance_legacy, a mean of ratios)
    cosine         cossim
    norm_ratio     l2_ratio
    l0             l0
    density, dead  feature_density
    kl             kl_div_with_sae without each window's last position, which has no next token; ours counts as CE does

Where some are (BOS, separators), both leave them in place. But SAELens counts no prediction that is made *at* a special
token, and we do; and its zero ablation sets special tokens to zero, too, which ours leaves. So the numbers of its
report differ, and those of the positions that both count are compared. Ours alone: mean ablation, ce_delta. Its
relative_reconstruction_bias is our shrinkage without the mean taken off. SAEBench's core evaluation, which descends
from SAELens', and its sparse probing were not run: the package is not in the peers' environment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from monitor.evaluation.evaluator import Baseline, evaluate
from producer.corpus import open_corpus
from producer.corpus.rendering.windows import Windows, windows_of
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings, ModelSettings
from tests.peers.compare import Peers
from tests.peers.family import READ, ROOT, Zoo
from trainer.saes.inference import load_sae

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

NAMES = ("topk", "jumprelu", "relu-l1", "gated")
LM = ROOT / "producer/demo_lm"
WINDOWS = 12
SAME = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "ce_recovered": "ce_loss_score",
    "cosine": "cossim",
    "norm_ratio": "l2_ratio",
    "l0": "l0",
}
Theirs = tuple[dict[str, Any], dict[str, Tensor]]
"""(its report, values by position)"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(ModelSettings(name=str(LM), hooks=[READ], device="cpu", dtype="float32"), whole=True)


@pytest.fixture(scope="module")
def plain(model: LanguageModel) -> Windows:
    """Windows without any special token."""
    return _windows(model, special=False)


@pytest.fixture(scope="module")
def special(model: LanguageModel) -> Windows:
    """Windows with BOS in front and separators in between."""
    return _windows(model, special=True)


@pytest.fixture(scope="module")
def theirs(
    peers: Peers, zoo: Zoo, plain: Windows, special: Windows, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], Theirs]:
    """SAELens' numbers by SAE and whether the windows have special tokens."""
    folder, jobs = tmp_path_factory.mktemp("evaluated"), {}
    for has_special, windows in ((False, plain), (True, special)):
        tokens = folder / f"tokens-{has_special}.safetensors"
        save_file({"tokens": torch.from_numpy(windows.ids)}, tokens)
        for name in NAMES:
            jobs[name, has_special] = {
                "folder": str(zoo.folder(name)),
                "model": str(LM),
                "tokens": str(tokens),
                "special": not has_special,
                "out": str(folder / f"{name}-{has_special}.safetensors"),
            }
    answers = peers.evaluate(list(jobs.values()))
    return {key: (answer, load_file(job["out"])) for (key, job), answer in zip(jobs.items(), answers, strict=True)}


@pytest.fixture(scope="module")
def ours(model: LanguageModel, zoo: Zoo, plain: Windows, special: Windows) -> dict[tuple[str, bool], dict[str, Any]]:
    numbers = {}
    for has_special, windows in ((False, plain), (True, special)):
        saes = [load_sae(zoo.folder(name), model.device) for name in NAMES]
        results = evaluate(model, windows, saes, Baseline())
        numbers |= {(name, has_special): result.as_json() for name, result in results.items()}
    return numbers


@pytest.mark.parametrize("name", NAMES)
def test_the_same_quantities_are_the_same_numbers(
    name: str, ours: dict[tuple[str, bool], dict[str, Any]], theirs: dict[tuple[str, bool], Theirs]
) -> None:
    """To what float32 and another order of sums leave; a latent at its threshold may fall either way."""
    mine, (report, by_position) = ours[name, False], theirs[name, False]
    for here, there in SAME.items():
        assert mine[here] == pytest.approx(report[there], rel=1e-4), here
    assert 1 - mine["fvu"] == pytest.approx(report["explained_variance"], abs=1e-4)
    assert mine["kl"] == pytest.approx(float(by_position["kl_div_with_sae"][:, :-1].mean()), rel=1e-3)
    density = by_position["feature_density"]
    assert mine["dead_latents"] == pytest.approx(int((density == 0).sum()), abs=1)
    assert mine["dense_latents"] == pytest.approx(int((density > 0.1).sum()), abs=1)
    assert mine["rows"] == WINDOWS * 128


@pytest.mark.parametrize("name", NAMES)
def test_beside_special_tokens_the_positions_differ_and_nothing_else(
    name: str,
    special: Windows,
    ours: dict[tuple[str, bool], dict[str, Any]],
    theirs: dict[tuple[str, bool], Theirs],
) -> None:
    """SAELens' values by position, counted where we count them, are ours; its report counts fewer."""
    mine, (report, by_position) = ours[name, True], theirs[name, True]
    assert mine["ce_clean"] == pytest.approx(float(by_position["ce_loss_without_sae"].mean()), rel=1e-4)
    assert mine["ce_sae"] == pytest.approx(float(by_position["ce_loss_with_sae"].mean()), rel=1e-4)
    assert mine["kl"] == pytest.approx(float(by_position["kl_div_with_sae"][:, :-1].mean()), rel=1e-3)
    mask = torch.from_numpy(special.kept[:, :-1])
    assert not mask.all()
    assert report["ce_loss_with_sae"] == pytest.approx(float(by_position["ce_loss_with_sae"][mask].mean()), rel=1e-5)
    for here, there in (("cosine", "cossim"), ("norm_ratio", "l2_ratio"), ("l0", "l0")):
        assert mine[here] == pytest.approx(report[there], rel=1e-4), here
    assert 1 - mine["fvu"] == pytest.approx(report["explained_variance"], abs=1e-4)


def _windows(model: LanguageModel, special: bool) -> Windows:
    """The first held-out windows that are full and have special tokens beyond BOS, or have none at all."""
    settings = CorpusSettings(kind="stdlib", context=128, prepend_bos=special)
    corpus = open_corpus(settings)
    windows = windows_of(corpus.documents(corpus.held_out_shards[0]), model.tokenizer, settings)
    specials = (~windows.kept).sum(1)
    is_suitable = ~windows.padded.any(1) & ((specials > 1) if special else (specials == 0))
    return Windows(*(part[is_suitable][:WINDOWS] for part in (windows.ids, windows.kept, windows.padded)))
