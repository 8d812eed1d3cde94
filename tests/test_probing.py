"""Sparse probing: labels that one latent tells, labels that nothing tells, and files that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import monitor.evaluation.probing
from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.probing import (
    LabelledTexts,
    accuracy_by_k,
    fit_logistic,
    fitted_accuracy,
    probe_accuracy,
    read_labelled_texts,
    split_sides,
)
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings
from tests.small_model import HOOK, WIDTH, WORDS, load_model, write_model
from tests.small_run import identity_sae, publish_snapshot
from trainer.saes.inference import InferenceSae, load_sae

TEXTS, CONTEXT = 80, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(write_model(tmp_path_factory.mktemp("model")))


def test_a_planted_feature_is_found_by_one_latent(model: LanguageModel):
    """Texts in which a direction of x that one latent reads has a high mean, and texts in which it has a low one."""
    direction = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))).Q[:, 0]
    windows = _windows(200)
    order = (model.activations(torch.from_numpy(windows.ids))[0][:, 1:].mean(1) @ direction).argsort().numpy()
    texts_of_extremes = np.concatenate([order[:40], order[-40:]])
    texts = LabelledTexts(
        Windows(windows.ids[texts_of_extremes], windows.kept[texts_of_extremes], windows.padded[texts_of_extremes]),
        np.array(["low", "high"]).repeat(40),
    )
    accuracy = probe_accuracy(model, _reading(direction), texts)
    assert accuracy["1"] == accuracy["2"] == 1.0
    assert set(accuracy) == {"1", "2", "5", "dense"} and accuracy["dense"] >= 0.9


def test_labels_that_the_text_does_not_tell_are_guessed(model: LanguageModel, tmp_path: Path):
    """Half of the answers are right; texts that were fitted to do not count, or the dense probe would know them."""
    sae = load_sae(publish_snapshot(tmp_path, 1, [identity_sae("s", WIDTH, HOOK)]) / "s", model.device)
    windows = _windows(400)
    accuracy = probe_accuracy(model, sae, LabelledTexts(windows, np.array(["a", "b"] * 200)))
    assert all(0.35 < value < 0.65 for value in accuracy.values()), accuracy


def test_labels_are_told_from_all_others(model: LanguageModel, tmp_path: Path):
    """Three labels, the rarest with 8 texts of a word of its own: as many others stand against it."""
    sae = load_sae(publish_snapshot(tmp_path, 1, [identity_sae("s", WIDTH, HOOK)]) / "s", model.device)
    windows = _windows()
    labels = np.array(["a"] * 8 + ["b"] * 30 + ["c"] * 42)
    for label, token in (("a", 2), ("b", 9), ("c", 17)):
        windows.ids[labels == label, 1:] = token
    accuracy = probe_accuracy(model, sae, LabelledTexts(windows, labels))
    assert accuracy["dense"] == 1.0 and accuracy["5"] >= 0.9


def test_latents_are_chosen_by_the_texts_that_are_fitted_to():
    """One latent tells all labels faintly; another shouts them, but only in the texts that are kept for the test."""
    labels = np.array(["a", "b"] * 20)
    truth = torch.from_numpy(labels == "a").float()
    test = np.intersect1d(*(split_sides(labels == label)[1] for label in "ab"))
    shouts = torch.zeros(len(labels))
    shouts[test] = 100 * truth[test]
    latents = torch.stack([0.1 * truth, shouts, shouts, shouts, shouts, shouts], 1)
    assert accuracy_by_k(latents, latents, labels)["1"] == 1.0


def test_texts_that_the_stream_drops_are_told(model: LanguageModel):
    """Where norm bounds leave a label without texts, it is named, and no accuracy made up."""
    windows, labels = _windows(), np.array(["a", "b"] * (TEXTS // 2))
    sae = _reading(torch.ones(WIDTH))
    with pytest.raises(EvaluationError, match=r"monitor.probe_file: 0 texts labelled 'a' have a token that is in the"):
        probe_accuracy(model, sae, LabelledTexts(windows, labels), {HOOK: 1e-9})


def test_a_probe_is_tested_on_the_other_texts(monkeypatch: pytest.MonkeyPatch):
    """A column that is the number of the text tells which texts a probe has seen: none of those it is tested on."""
    splits: list[tuple[set[float], set[float]]] = []

    def look(fit: Tensor, fit_truth: Tensor, test: Tensor, test_truth: Tensor) -> float:
        splits.append((set(fit[:, 0].tolist()), set(test[:, 0].tolist())))
        return 1.0

    numbers = torch.arange(40.0)[:, None].expand(40, 6)
    monkeypatch.setattr(monitor.evaluation.probing, "fitted_accuracy", look)
    accuracy_by_k(numbers, numbers, np.array(["a", "b"] * 20))
    assert len(splits) == 2 * 4
    assert all(len(fit) == len(test) == 20 and fit.isdisjoint(test) for fit, test in splits)


def test_a_probe_measures_by_the_texts_that_it_was_fitted_to():
    """A column around 0, its sign the label. The texts of the test are all far above 0: all of them have the label."""
    fit, test = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[2.0], [3.0]])
    assert fitted_accuracy(fit, fit[:, 0] > 0, test, torch.tensor([True, True])) == 1.0


def test_texts_that_are_tested_were_not_fitted_to():
    """Of 5 texts with the label and 9 without: two of each side to fit, two other ones to test."""
    is_label = np.arange(14) < 5
    fit, test = split_sides(is_label)
    assert len(set(fit) | set(test)) == len(fit) + len(test) == 8
    assert is_label[fit].sum() == is_label[test].sum() == 2


def test_logistic_regression_is_at_its_optimum():
    """The gradient of the penalised loss is zero there, and the sign of each weight is right."""
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = x[:, 0] - 2 * x[:, 1] + 0.3 * torch.sin(7 * x[:, 2]) > 0
    weights = fit_logistic(x, truth)
    gradient = x.T @ (torch.sigmoid(x @ weights) - truth.double()) / len(x) + 1e-2 * weights
    assert weights[0] > 0 > weights[1]
    assert float(gradient.abs().max()) < 1e-4


def test_a_file_of_texts_is_read(model: LanguageModel, tmp_path: Path):
    """A window each, cut where it is full; a text without tokens is passed over, and labels may be numbers."""
    lines = [{"text": f"w{i} w{i + 1}", "label": i % 2} for i in range(20)] + [{"text": "", "label": 0}]
    lines.append({"text": "w1 " * 50, "label": 1})
    texts = read_labelled_texts(_file(tmp_path, lines), model.tokenizer, CorpusSettings(context=CONTEXT))
    assert texts.labels.tolist() == [str(i % 2) for i in range(20)] + ["1"]
    assert texts.windows.ids.shape == (21, CONTEXT)
    assert texts.windows.kept.sum(1).tolist() == [2] * 20 + [CONTEXT - 1]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([{"text": "w1"}], r"line at byte 0: expected .*label.*found \{"),
        ([{"text": "w1", "label": 0}] * 20, "two labels or more .* it has: '0' 20"),
        ([{"text": "w1", "label": i == 0} for i in range(20)], "8 texts or more each; it has: 'False' 19, 'True' 1"),
        ([], "it has: none"),
    ],
)
def test_files_that_cannot_be_used_say_why(
    lines: list[dict[str, object]], complaint: str, model: LanguageModel, tmp_path: Path
):
    with pytest.raises(EvaluationError, match=complaint):
        read_labelled_texts(_file(tmp_path, lines), model.tokenizer, CorpusSettings(context=CONTEXT))


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz"])
def test_the_file_is_read_as_a_corpus_is(model: LanguageModel, tmp_path: Path, name: str):
    """With a byte order mark, half a character, a line separator inside a text, and packed."""
    lines = [{"text": f"w{i}\u2028w1 \ud83d", "label": i % 2} for i in range(20)]
    text = "\ufeff" + "\n".join(json.dumps(line).replace(r"\u2028", "\u2028") for line in lines)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    texts = read_labelled_texts(tmp_path / name, model.tokenizer, CorpusSettings(context=CONTEXT))
    assert texts.labels.tolist() == [str(i % 2) for i in range(20)]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x28\xb5\x2f\xfd", "texts.jsonl: zstd data"),
        (b'{"text": "\xff"}', "texts.jsonl: not UTF-8 at byte 10"),
        (b'{"text": "a", "label": ' + b"3" * 5000, "line at byte 0: an integer of 5,000 digits"),
        (b'{"text": "' + b"a" * 6000 + b'"}', "line at byte 0: more than 6,000 bytes in one document"),
    ],
)
def test_files_that_no_corpus_could_be_say_why(data: bytes, complaint: str, model: LanguageModel, tmp_path: Path):
    (tmp_path / "texts.jsonl").write_bytes(data)
    settings = CorpusSettings(context=CONTEXT, max_document_bytes=6000)
    with pytest.raises(EvaluationError, match=f"monitor.probe_file = .* cannot be read: .*{complaint}"):
        read_labelled_texts(tmp_path / "texts.jsonl", model.tokenizer, settings)


def test_a_file_that_is_not_there_is_named(model: LanguageModel, tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"probe_file = .*nowhere"):
        read_labelled_texts(tmp_path / "nowhere", model.tokenizer, CorpusSettings(context=CONTEXT))


def _windows(texts: int = TEXTS) -> Windows:
    ids = np.random.default_rng(0).integers(2, WORDS + 2, (texts, CONTEXT))
    ids[:, 0] = 0
    return Windows(ids, kept=ids != 0, padded=np.zeros_like(ids, bool))


def _reading(direction: Tensor) -> InferenceSae:
    """Three latents of which the second reads one direction of x, far from its threshold, and the others nothing."""
    W_enc = torch.zeros(WIDTH, 3)
    W_enc[:, 1] = direction
    weights = {"W_enc": W_enc, "b_enc": torch.tensor([0.0, 100.0, 0.0]), "W_dec": W_enc.T, "b_dec": torch.zeros(WIDTH)}
    cfg = {"architecture": "standard", "metadata": {"hook_name": HOOK}}
    return InferenceSae(cfg, weights, "s")


def _file(folder: Path, lines: list[dict[str, object]]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
