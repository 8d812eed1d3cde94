"""What is told of latents, on an SAE whose latents are planted: each fires on one word that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import monitor.latents
from monitor.evaluate import load_subject
from monitor.explore import Explorer, Texts
from monitor.held_out import held_out_windows
from monitor.latents import births, gather_latents
from monitor.run_directory import NotThere
from monitor.settings import MonitorSettings
from producer.activations import LanguageModel
from producer.corpus import open_corpus
from producer.settings import read_run_file
from producer.tokens import Windows
from tests.small_reading import DENSE, VALUE, WORDS, read_run, small_model, tokens_of

SILENT = WORDS.index(" socket")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reading")


@pytest.fixture(scope="module")
def explorer(folder: Path, model: LanguageModel) -> Explorer:
    return read_run(folder, model)


@pytest.fixture
def windows(folder: Path, explorer: Explorer, model: LanguageModel) -> Windows:
    settings = read_run_file(MonitorSettings, str(folder / "run.toml"), [])
    return held_out_windows(open_corpus(settings.corpus), model.tokenizer, settings.corpus, 2000)


# --- All activations, by latent --------------------------------------------------------------------------------------


def test_a_latent_is_stored_wherever_its_word_stands(explorer: Explorer, model: LanguageModel, windows: Windows):
    """And nowhere else, with the value it has there."""
    latents = explorer.open("planted").latents
    for index, token in enumerate(tokens_of(model)):
        places = np.flatnonzero((windows.ids == token) & windows.kept)
        positions, values = latents.of(index)
        assert sorted(positions) == places.tolist()
        assert np.allclose(values, VALUE, rtol=1e-4)
    assert latents.rows == windows.kept.sum()
    assert latents.density[0] == (windows.ids[windows.kept] == tokens_of(model)[0]).mean()


def test_activations_come_strongest_first(folder: Path, model: LanguageModel, windows: Windows):
    """Each latent's, also where some are negative: strong means far from zero."""
    subject = load_subject(folder / "run" / "snapshots" / "000000002000" / "planted", model.device)
    subject.sae.encode = lambda x: torch.stack([x[:, 0], (x[:, 1] - 1).relu()], 1)  # type: ignore[method-assign]
    latents = gather_latents(model, windows, subject)
    for latent in range(2):
        assert (np.diff(np.abs(latents.of(latent)[1])) <= 0).all()
    assert (latents.of(0)[1] < 0).any()


def test_an_sae_that_is_not_sparse_is_shown_less_text(
    folder: Path, model: LanguageModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
):
    """Whole windows, until there are enough activations; what is told of density refers to what was shown."""
    monkeypatch.setattr(monitor.latents, "MOST_ACTIVATIONS", 1)
    monkeypatch.setattr(monitor.passes, "LOGITS_IN_MEMORY", 1)
    subject = load_subject(folder / "run" / "snapshots" / "000000002000" / "planted", model.device)
    latents = gather_latents(model, windows, subject)
    assert len(latents.ids) < len(windows) and len(latents.values) >= 1
    assert latents.rows == windows.kept[: len(latents.ids)].sum()


def test_a_latent_that_turns_is_born_again():
    """The first kept its direction, the second turned by 90 degrees, the third has none and never had."""
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    now = torch.tensor([[2.0, 0.1], [0.0, 1.0], [0.0, 0.0]])
    assert births(now, 500, (before, np.array([100, 200, 300]))).tolist() == [100, 500, 500]
    assert births(now, 500, None).tolist() == [500, 500, 500]
    assert births(now, 500, (before[:2], np.array([100, 200]))).tolist() == [500, 500, 500]


# --- The table -------------------------------------------------------------------------------------------------------


def test_table_tells_of_each_latent(explorer: Explorer):
    """Density, strongest activation, length of the decoder row, age, and the word it fires on, with an example."""
    line = explorer.table("planted", "index", descending=False)["latents"][0]
    assert line["index"] == 0 and line["top_tokens"] == [" import"]
    assert line["strongest"] == pytest.approx(VALUE, rel=1e-4) and line["norm"] == pytest.approx(1.0)
    assert line["firings"] == round(line["density"] * explorer.open("planted").latents.rows)
    example = line["example"]
    assert example["tokens"][example["at"]] == " import" and example["values"][example["at"]] == line["strongest"]


@pytest.mark.parametrize("descending", [True, False])
def test_table_is_sorted_with_silent_latents_last(explorer: Explorer, descending: bool):
    """Whatever the order is: who never fired has no density to compare."""
    found = explorer.table("planted", "density", descending)["latents"]
    densities = [line["density"] for line in found[:-1]]
    assert densities == sorted(densities, reverse=descending)
    assert found[-1]["index"] == SILENT and found[-1]["example"] is None


def test_table_is_searched_by_token_and_by_number(explorer: Explorer):
    """A part of a token will do, in capitals too; a number is a latent."""
    indices = lambda search: [line["index"] for line in explorer.table("planted", search=search)["latents"]]  # noqa: E731
    assert WORDS.index(" class") in indices("CLAS") and WORDS.index(" return") not in indices("CLAS")
    assert indices("3") == [3]
    assert indices("99") == [] == indices("nowhere")


def test_table_comes_in_pages(explorer: Explorer):
    """Three pages of three, the last with what is left; each latent on one of them."""
    pages = [explorer.table("planted", "index", False, offset=offset, limit=3) for offset in (0, 3, 6)]
    assert [line["index"] for page in pages for line in page["latents"]] == list(range(len(WORDS) + 1))
    assert {page["matching"] for page in pages} == {len(WORDS) + 1}


# --- One latent ------------------------------------------------------------------------------------------------------


def test_contexts_show_the_text_around_a_firing(explorer: Explorer, model: LanguageModel):
    """Tokens put together are the text of the window, without BOS; values stand where the word stands."""
    contexts = explorer.latent("planted", 0)["contexts"]
    for context in contexts:
        fired = [token for token, value in zip(context["tokens"], context["values"], strict=True) if value]
        assert set(fired) == {" import"}
        assert context["tokens"][context["at"]] == " import"
        assert model.tokenizer.bos_token not in "".join(context["tokens"])
    assert any("import os, import sys" in "".join(context["tokens"]) for context in contexts)


def test_the_same_text_is_shown_once(explorer: Explorer):
    """The corpus repeats four lines: contexts count the repetitions instead of filling the page with them."""
    contexts = explorer.latent("planted", 0)["contexts"]
    assert len(contexts) < explorer.latent("planted", 0)["firings"]
    assert max(context["times"] for context in contexts) > 1


def test_lower_quantiles_are_lower(explorer: Explorer):
    """Of the dense latent, whose activations differ; with few firings there are no quantiles to speak of."""
    lower = explorer.latent("planted", DENSE)["lower"]
    assert [band["quantile"] for band in lower] == [0.9, 0.75, 0.5, 0.25, 0.05]
    means = [np.mean([context["value"] for context in band["contexts"]]) for band in lower]
    assert means == sorted(means, reverse=True)
    assert explorer.latent("planted", SILENT)["lower"] == []


def test_a_latent_promotes_what_it_writes(explorer: Explorer):
    """The token whose unembedding is its decoder row; about the mean, so that something is suppressed as well."""
    for index, word in enumerate(WORDS):
        found = explorer.latent("planted", index)
        end = "suppressed" if index == 2 else "promoted"  # it has turned round
        assert found[end][0]["token"] == word
        assert found["promoted"][0]["logit"] > 0 > found["suppressed"][0]["logit"]


def test_nearest_latents_are_those_of_like_direction(explorer: Explorer):
    """The dense latent writes nearly what latent 0 writes."""
    nearest = explorer.latent("planted", 0)["nearest"]
    assert nearest[0]["index"] == DENSE and nearest[0]["cosine"] == pytest.approx(0.995, abs=0.01)
    assert 0 not in [line["index"] for line in nearest]


def test_a_latents_past_shows_when_it_turned(explorer: Explorer):
    """Latent 2 turned between the snapshots, so it is new; latent 0 is as old as the first of them."""
    turned, kept = explorer.latent("planted", 2), explorer.latent("planted", 0)
    assert [round(then["cosine"], 3) for then in turned["past"]] == [-1.0, 1.0]
    assert [then["tokens"] for then in kept["past"]] == [1000, 2000]
    assert (turned["age"], kept["age"]) == (0, 1000)


def test_a_latent_is_explained_by_its_word(explorer: Explorer):
    """The n-gram is the word, and holds on the other half of the text."""
    assert explorer.latent("planted", 1)["explanation"] == {
        "pattern": [" return"], "precision": 1.0, "recall": 1.0, "f1": 1.0,
    }  # fmt: skip


def test_a_silent_latent_has_a_page_too(explorer: Explorer):
    """With nothing to show, but what it would do."""
    found = explorer.latent("planted", SILENT)
    assert found["contexts"] == [] and found["histogram"]["counts"] == [] and found["explanation"] is None
    assert found["promoted"][0]["token"] == " socket"


# --- By text ---------------------------------------------------------------------------------------------------------


def test_a_text_shows_which_latents_fire_where(explorer: Explorer):
    """Each word's latent on its word, the strongest first; the words with punctuation belong to other tokens."""
    found = explorer.fires("planted", "we import a class and return")
    assert "".join(found["tokens"]).strip() == "we import a class and return"
    fired = {line["index"]: line["values"] for line in found["latents"]}
    for word in (" import", " class", " return"):
        values = fired[WORDS.index(word)]
        assert [place for place, value in enumerate(values) if value] == [found["tokens"].index(word)]
    assert found["firing"] == len(fired) and WORDS.index(" self") not in fired


def test_a_text_shows_which_latents_fire_on_one_token(explorer: Explorer):
    """The other ones are left out."""
    found = explorer.fires("planted", "we import a class")
    there = explorer.fires("planted", "we import a class", at=found["tokens"].index(" class"))
    assert WORDS.index(" class") in [line["index"] for line in there["latents"]]
    assert WORDS.index(" import") not in [line["index"] for line in there["latents"]]


@pytest.mark.parametrize(("text", "at"), [("", None), ("  \n", None), ("x" * 5000, None), ("we import", 99)])
def test_a_text_that_cannot_be_searched_by_is_refused(explorer: Explorer, text: str, at: int | None):
    """Empty, far too long, or asked about a token that it does not have."""
    with pytest.raises(ValueError, match=r"expected 1 to 4,000|tokens 0 to"):
        explorer.fires("planted", text, at)


def test_what_is_not_there_is_named(explorer: Explorer):
    """Another SAE, another snapshot, a latent beyond the last."""
    with pytest.raises(NotThere, match=r"'other'.*'planted'"):
        explorer.table("other")
    with pytest.raises(NotThere, match="000000001000, 000000002000"):
        explorer.table("planted", snapshot="000000009999")
    with pytest.raises(NotThere, match="latents 0 to 6, not 7"):
        explorer.latent("planted", 7)


# --- Tokens as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve 🦓 zebras", "  four\n    spaces", "日本語 and 한국어"])
def test_pieces_put_together_are_the_text(model: LanguageModel, text: str):
    """Also where a character takes several tokens: the last of them shows it, none shows half of it."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    pieces = Texts(model.tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
