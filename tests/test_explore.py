"""Latents for a reader, on an SAE whose latents are planted: each fires on one known word."""

from __future__ import annotations

import re
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from monitor.evaluation.follow import Evaluator
from monitor.evaluation.latents.activations import LatentActivations, births, gather_latents, load_latents
from monitor.evaluation.latents.examples import example_at
from monitor.evaluation.latents.explorer import Explorer
from monitor.evaluation.latents.logit_lens import LogitLens
from monitor.evaluation.latents.search import DensityRange, LatentSearch, SearchError
from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import NGram
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.latent_pages import latent_page
from monitor.metrics import MonitorMetrics
from monitor.run_directory import LATENTS, NotFoundError
from monitor.settings import MonitorSettings
from producer.common.metrics import new_registry
from producer.common.run_file import read_run_file
from producer.corpus import open_corpus
from producer.corpus.held_out import held_out_windows
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel
from producer.lm.passes import MemoryLimits
from producer.settings import CorpusSettings
from tests.small_reading import DENSE, HOOK, VALUE, WORDS, planted_sae, read_run, run_file, small_model, tokens_of
from tests.small_run import publish_snapshot
from trainer.saes.inference import load_sae
from trainer.snapshot import retire, supersede_after
from trainer.state.durable import remove_folder

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
    sae = load_sae(folder / "run" / "snapshots" / "000000002000" / "planted", model.device)
    sae.encode = lambda x: torch.stack([x[:, 0], (x[:, 1] - 1).relu()], 1)  # type: ignore[method-assign]
    latents = gather_latents(model, windows, sae)
    for latent in range(2):
        assert (np.diff(np.abs(latents.of(latent)[1])) <= 0).all()
    assert (latents.of(0)[1] < 0).any()


def test_an_sae_that_is_not_sparse_reads_less_text(folder: Path, model: LanguageModel, windows: Windows):
    """Whole windows, until there are enough activations; densities are shares of the tokens that it read."""
    sae = load_sae(folder / "run" / "snapshots" / "000000002000" / "planted", model.device)
    latents = gather_latents(model, windows, sae, memory=MemoryLimits(logits=1, firings=1))
    assert len(latents.ids) < len(windows) and len(latents.values) >= 1
    assert latents.rows == windows.kept[: len(latents.ids)].sum()


def test_positions_do_not_depend_on_passes(folder: Path, model: LanguageModel, windows: Windows):
    """One window at a time, and three rows of all latents at a time, is what all at once is."""
    sae = load_sae(folder / "run" / "snapshots" / "000000002000" / "planted", model.device)
    some = Windows(windows.ids[:4], windows.kept[:4], windows.padded[:4])
    at_once = gather_latents(model, some, sae)
    little = MemoryLimits(logits=1, latents=3 * len(planted_sae(model).weights["threshold"]))
    in_parts = gather_latents(model, some, sae, memory=little)
    assert in_parts.streamed.tolist() == at_once.streamed.tolist()
    assert len(at_once.values) and in_parts.starts.tolist() == at_once.starts.tolist()
    for latent in range(at_once.d_sae):
        one, other = (
            {position: round(float(value), 3) for position, value in zip(*latents.of(latent), strict=True)}
            for latents in (at_once, in_parts)
        )
        assert one == other


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
    row = explorer.table("planted", "index", descending=False).latents[0]
    assert row.index == 0 and row.top_tokens == [" import"]
    assert row.strongest == pytest.approx(VALUE, rel=1e-4) and row.norm == pytest.approx(1.0)
    assert row.firings == round(row.density * explorer.open("planted").latents.rows)
    example = row.example
    assert example is not None and example.tokens[example.at] == " import"
    assert example.values[example.at] == row.strongest


@pytest.mark.parametrize("descending", [True, False])
def test_table_is_sorted_with_silent_latents_last(explorer: Explorer, descending: bool):
    """Whatever the order is: who never fired has no density to compare."""
    *rows, last = explorer.table("planted", "density", descending).latents
    densities = [row.density for row in rows]
    assert densities == sorted(densities, reverse=descending)
    assert last.index == SILENT and last.example is None


def test_table_is_searched_by_token_and_by_number(explorer: Explorer):
    """A part of a token will do, in capitals too; a number is a latent."""
    indices = lambda search: [row.index for row in explorer.table("planted", search=search).latents]  # noqa: E731
    assert WORDS.index(" class") in indices("CLAS") and WORDS.index(" return") not in indices("CLAS")
    assert indices("3") == [3]
    assert indices("99") == [] == indices("nowhere")


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("import sys", [" import"]),  # several tokens
        ("import, 0", [" import"]),
        ("import, class", []),  # latent 6, which fires on both, has neither among its eight strongest firings
        ('"import "', [" import"]),
        ("/import (sys|never)/", [" import"]),
        ("/\\bCLASS\\b/", [" class"]),
    ],
)
def test_table_is_searched_by_text(explorer: Explorer, search: str, words: list[str]):
    """By the held-out text that a latent's strongest firings are in; terms between commas hold together."""
    sparse = {row.index for row in explorer.table("planted", search=search).latents} - {DENSE}
    assert sparse == {WORDS.index(word) for word in words}


def test_table_is_narrowed_by_density(explorer: Explorer):
    """Silent latents, and the one that fires on most words."""
    indices = lambda density: [row.index for row in explorer.table("planted", density=density).latents]  # noqa: E731
    assert indices("0:0") == [SILENT]
    densest = explorer.open("planted").latents.density.max()
    assert indices(f"{densest}:1") == [DENSE]


def test_a_search_that_takes_too_long_is_given_up(explorer: Explorer):
    """An expression whose time doubles with each character of the text."""
    with pytest.raises(SearchError, match=r"takes more than 0.1 s"):
        LatentSearch(explorer._texts, seconds=0.1).matching(
            explorer.open("planted"), "/(.|.|.)*(.|.|.)*(.|.|.)*\\Z\\A/", DensityRange()
        )


def test_table_comes_in_pages(explorer: Explorer):
    """Three pages of three, the last with what is left; each latent on one of them."""
    pages = [explorer.table("planted", "index", False, offset=offset, limit=3) for offset in (0, 3, 6)]
    assert [row.index for page in pages for row in page.latents] == list(range(len(WORDS) + 1))
    assert {page.matching for page in pages} == {len(WORDS) + 1}


def test_the_first_latents_of_an_sae_come_first(tmp_path: Path, model: LanguageModel):
    """Where snapshots come faster than they are looked at, there would be none until the end."""
    follower = Evaluator(
        read_run_file(MonitorSettings, str(run_file(tmp_path)), []), MonitorMetrics(new_registry()), threading.Event()
    )
    inputs = follower._load()
    folders = [publish_snapshot(tmp_path / "run", tokens, [planted_sae(model)]) for tokens in (1000, 2000, 3000)]
    for folder in folders[:2]:  # neither is the newest
        follower._process(inputs, folder.name)
    assert [(folder / "planted" / LATENTS).is_file() for folder in folders] == [True, False, False]


# --- One latent ------------------------------------------------------------------------------------------------------


def test_contexts_show_the_text_around_a_firing(explorer: Explorer, model: LanguageModel):
    """Tokens put together are the text of the window, without BOS; values stand where the word stands."""
    examples = explorer.latent("planted", 0).contexts
    for example in examples:
        firing = [token for token, value in zip(example.tokens, example.values, strict=True) if value]
        assert set(firing) == {" import"}
        assert example.tokens[example.at] == " import"
        assert model.tokenizer.bos_token not in "".join(example.tokens)
    assert any("import os, import sys" in "".join(example.tokens) for example in examples)


def test_the_same_text_is_shown_once(explorer: Explorer):
    """The corpus repeats four lines: contexts count the repetitions instead of filling the page with them."""
    latent = explorer.latent("planted", 0)
    assert len(latent.contexts) < latent.firings
    assert max(example.times for example in latent.contexts) == 8


def test_lower_quantiles_are_where_they_say(explorer: Explorer):
    """Around that quantile of the dense latent's activations; none for what stands among the strongest already."""
    values = explorer.open("planted").latents.of(DENSE)[1]
    lower = explorer.latent("planted", DENSE).lower
    assert [band.quantile for band in lower] == [0.75, 0.5, 0.25, 0.05]
    for band in lower:
        middle = np.median([example.value for example in band.contexts])
        assert (values < middle).mean() <= band.quantile + 0.02
        assert (values <= middle).mean() >= band.quantile - 0.02
    assert explorer.latent("planted", SILENT).lower == []


def test_a_latent_promotes_what_it_writes(explorer: Explorer):
    """The token whose unembedding is its decoder row; about the mean, so that something is suppressed as well."""
    for index, word in enumerate(WORDS):
        latent = explorer.latent("planted", index)
        assert latent.promoted is not None and latent.suppressed is not None
        strongest = (latent.suppressed if index == 2 else latent.promoted)[0]  # latent 2 has turned round
        assert strongest.token == word
        assert latent.promoted[0].logit > 0 > latent.suppressed[0].logit


def test_nearest_latents_are_those_of_like_direction(explorer: Explorer):
    """The dense latent writes nearly what latent 0 writes."""
    nearest = explorer.latent("planted", 0).nearest
    assert nearest[0].index == DENSE and nearest[0].cosine == pytest.approx(0.995, abs=0.01)
    assert 0 not in [near.index for near in nearest]


def test_a_latents_past_shows_when_it_turned(explorer: Explorer):
    """Latent 2 turned between the snapshots, so it is new; latent 0 is as old as the first of them."""
    turned, unchanged = explorer.latent("planted", 2), explorer.latent("planted", 0)
    assert [round(then.cosine, 3) for then in turned.past] == [-1.0, 1.0]
    assert [then.tokens for then in unchanged.past] == [1000, 2000]
    assert (turned.age, unchanged.age) == (0, 1000)


def test_a_latent_is_explained_by_its_word(explorer: Explorer):
    """The n-gram is the word, and holds on the other half of the text."""
    expected = NGram(pattern=[" return"], precision=1.0, recall=1.0, f1=1.0)
    assert explorer.latent("planted", 1).explanation == expected


def test_a_past_is_told_where_nobody_looked(folder: Path, explorer: Explorer, model: LanguageModel):
    """Directions and firing rates in training are in every snapshot; the rest, where latents were measured."""
    publish_snapshot(folder / "run", 1500, [planted_sae(model)])
    try:
        past = explorer.latent("planted", 2).past
        assert [(then.tokens, then.density is None) for then in past] == [
            (1000, False), (1500, True), (2000, False),
        ]  # fmt: skip
        assert [round(then.cosine) for then in past] == [-1, -1, 1]
        assert past[1].training_density == pytest.approx(planted_sae(model).firing_rate[2])
    finally:
        shutil.rmtree(folder / "run" / "snapshots" / "000000001500")


def test_a_crosscoder_promotes_what_it_writes_last(explorer: Explorer, model: LanguageModel):
    """Its decoder row is as wide as its hooks together; what it writes at the last of them goes to the logits."""
    lens, W_dec = LogitLens(model), explorer.open("planted").weights["W_dec"]
    crosscoder_row = torch.cat([W_dec[1], W_dec[0]])
    effect, expected = lens.effect(HOOK, crosscoder_row), lens.effect(HOOK, W_dec[0])
    assert effect is not None and expected is not None and torch.equal(effect, expected)


@pytest.mark.parametrize(("has_bos", "tokens"), [(True, [11, 12]), (False, [10, 11, 12])])
def test_the_first_token_is_shown_unless_it_is_a_bos(model: LanguageModel, has_bos: bool, tokens: list[int]):
    """A stream without BOS has the first position, and its text begins there."""
    streamed = np.array([[not has_bos, True, True, False]])
    latents = LatentActivations(
        ids=np.array([[10, 11, 12, 13]], np.uint32), shown=np.array([[True, True, True, False]]), streamed=streamed,
        starts=np.array([0, 1]), positions=np.array([2], np.uint32), values=np.array([5.0], np.float32),
        born=np.zeros(1, np.int64), outliers=np.zeros((1, 4), bool),
    )  # fmt: skip
    texts = Texts(model.tokenizer)
    context = example_at(latents, texts, latent=0, firing=0)
    assert context.tokens == texts.pieces(tokens)
    assert context.values == [0.0] * (len(tokens) - 1) + [5.0]
    assert (context.at, context.cut_before, context.cut_after) == (len(tokens) - 1, False, False)


def test_only_what_reaches_the_residual_stream_promotes_tokens(explorer: Explorer, model: LanguageModel):
    """A query of the same width is no part of it."""
    row = explorer.open("planted").decoder_row(0)
    assert LogitLens(model).effect(HOOK, row) is not None
    assert LogitLens(model, residual_hooks=("hook_mlp_out",)).effect(HOOK, row) is None


def test_module_of_the_streams_width_promotes_tokens(explorer: Explorer):
    """What a module at a path adds goes to the logits; a module's input and the queries of attention do not."""
    row = explorer.open("planted").decoder_row(0)
    path = "model.layers.0.self_attn.o_proj"
    hooks = [path, f"{path}:input", "blocks.0.attn.hook_q", "blocks.0.hook_attn_out", "blocks.0.mlp.hook_post"]
    lens = LogitLens(small_model(*hooks))
    effect, expected = lens.effect(path, row), lens.effect("blocks.0.hook_attn_out", row)
    assert effect is not None and expected is not None and torch.equal(effect, expected)
    assert all(lens.effect(hook, row) is None for hook in (hooks[1], hooks[2], hooks[4]))


def test_a_silent_latent_has_a_page_too(explorer: Explorer):
    """With nothing to show, but what it would do."""
    latent = explorer.latent("planted", SILENT)
    assert latent.contexts == [] and latent.histogram.counts == [] and latent.explanation is None
    assert latent.promoted is not None and latent.promoted[0].token == " socket"


# --- By text ---------------------------------------------------------------------------------------------------------


def test_a_text_shows_which_latents_fire_where(explorer: Explorer):
    """Each word's latent on its word, the strongest first; the words with punctuation belong to other tokens."""
    firings = explorer.fires("planted", "we import a class and return")
    assert "".join(firings.tokens).strip() == "we import a class and return"
    values = {latent.index: latent.values for latent in firings.latents}
    for word in (" import", " class", " return"):
        places = [place for place, value in enumerate(values[WORDS.index(word)]) if value]
        assert places == [firings.tokens.index(word)]
    assert firings.firing == len(values) and WORDS.index(" self") not in values


def test_a_text_shows_which_latents_fire_on_one_token(explorer: Explorer):
    """The other ones are left out."""
    tokens = explorer.fires("planted", "we import a class").tokens
    firings = explorer.fires("planted", "we import a class", at=tokens.index(" class"))
    indices = [latent.index for latent in firings.latents]
    assert WORDS.index(" class") in indices and WORDS.index(" import") not in indices


@pytest.mark.parametrize(("text", "at"), [("", None), ("  \n", None), ("x" * 5000, None), ("we import", 99)])
def test_a_text_that_cannot_be_searched_by_is_refused(explorer: Explorer, text: str, at: int | None):
    """Empty, far too long, or asked about a token that it does not have."""
    with pytest.raises(ValueError, match=r"expected 1 to 4,000|tokens 0 to"):
        explorer.fires("planted", text, at)


def test_special_tokens_alone_are_no_text(explorer: Explorer, model: LanguageModel):
    """No SAE is shown them."""
    with pytest.raises(ValueError, match="special tokens are left out"):
        explorer.fires("planted", model.tokenizer.bos_token)


@pytest.mark.parametrize(
    "sae", ["../000000001000/planted", "/snapshots/000000001000/planted", "x" * 400, "planted/.", ""]
)
def test_a_name_is_no_path(folder: Path, explorer: Explorer, sae: str):
    """Only what a manifest names is opened, whatever the name leads to."""
    with pytest.raises(NotFoundError):
        explorer.table(f"{folder}/run{sae}" if sae.startswith("/") else sae)


def test_a_snapshot_may_be_retired_while_many_ask(folder: Path, model: LanguageModel, tmp_path: Path):
    """Each of them is answered, or told that it is gone."""
    shutil.copytree(folder / "run", tmp_path / "run")
    explorer = Explorer(tmp_path / "run", model, CorpusSettings(context=16))
    faults: list[BaseException] = []

    def asks(number: int) -> None:
        try:
            for _ in range(20):
                with suppress(NotFoundError):
                    explorer.latent("planted", number % 7)
                    explorer.table("planted")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=asks, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    remove_folder(tmp_path / "run" / "snapshots" / "000000002000")
    remove_folder(tmp_path / "run" / "snapshots" / "000000001000")
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_snapshot_published_again_is_looked_at_again(model: LanguageModel, tmp_path: Path):
    """A trainer that went back to a checkpoint may come to the same number of tokens with other weights."""
    settings = read_run_file(MonitorSettings, str(run_file(tmp_path)), [])
    handle = ExplorerHandle()
    follower = Evaluator(settings, MonitorMetrics(new_registry()), threading.Event(), handle)
    for turned in ((), (0,)):
        folder = publish_snapshot(tmp_path / "run", 1000, [planted_sae(model, turned=turned)])
        follower.look()
        assert follower.is_up_to_date() and (folder / "planted" / "evaluation.json").exists()
        assert handle.explorer is not None
        latent = handle.explorer.latent("planted", 0)
        effects = latent.suppressed if turned else latent.promoted
        assert effects is not None and effects[0].token == WORDS[0]
        supersede_after(tmp_path / "run", 500)


def test_births_are_followed_through_snapshots_that_nobody_looked_at(model: LanguageModel, tmp_path: Path):
    """Latent 0 turns at 2000, which is passed over: at 3000 it is a thousand tokens old, the others two thousand."""
    settings = read_run_file(MonitorSettings, str(run_file(tmp_path)), [])
    for tokens, turned in ((1000, ()), (2000, (0,)), (3000, (0,))):
        publish_snapshot(tmp_path / "run", tokens, [planted_sae(model, turned=turned)])
    handle = ExplorerHandle()
    follower = Evaluator(settings, MonitorMetrics(new_registry()), threading.Event(), handle)
    follower.look()
    assert handle.explorer is not None
    assert [handle.explorer.latent("planted", latent).age for latent in (0, 1)] == [1000, 2000]
    retire(tmp_path / "run", keep=1)
    publish_snapshot(tmp_path / "run", 4000, [planted_sae(model, turned=(0,))])
    retire(tmp_path / "run", keep=1)
    follower.look()
    assert [handle.explorer.latent("planted", latent).age for latent in (0, 1)] == [2000, 3000]


def test_births_are_followed_by_a_trainer_that_went_back(model: LanguageModel, tmp_path: Path):
    """Looked at up to 3000, it resumes from 1000 and comes to 1500, where latent 0 has turned: it is born there."""
    settings = read_run_file(MonitorSettings, str(run_file(tmp_path)), [])
    handle = ExplorerHandle()
    follower = Evaluator(settings, MonitorMetrics(new_registry()), threading.Event(), handle)
    for tokens in (1000, 3000):
        publish_snapshot(tmp_path / "run", tokens, [planted_sae(model)])
        follower.look()
    supersede_after(tmp_path / "run", 1000)
    publish_snapshot(tmp_path / "run", 1500, [planted_sae(model, turned=(0,))])
    follower.look()
    assert handle.explorer is not None and not follower.has_failed()
    assert [handle.explorer.latent("planted", latent).age for latent in (0, 1)] == [0, 500]


def test_of_a_long_past_the_newest_is_shown(folder: Path, model: LanguageModel):
    """Where there is room for one snapshot of two."""
    explorer = Explorer(folder / "run", model, CorpusSettings(context=16), snapshots_shown=1)
    assert [then.tokens for then in explorer.latent("planted", 0).past] == [2000]


def test_negative_latents_are_strong_too(folder: Path, explorer: Explorer, model: LanguageModel, tmp_path: Path):
    """Of an SAE that keeps signs: sorted, ranked and shaded by how far from zero they are."""
    shutil.copytree(folder / "run", tmp_path / "run")
    latents = tmp_path / "run" / "snapshots" / "000000002000" / "planted" / LATENTS
    positive = load_latents(latents)
    values = np.where(np.arange(len(positive.values)) % 2 == 0, -positive.values, positive.values)
    replace(positive, values=values).save(latents)
    signed = Explorer(tmp_path / "run", model, CorpusSettings(context=16))
    strongest = [abs(row.strongest) for row in signed.table("planted", "strongest").latents]
    assert strongest == sorted(strongest, reverse=True)
    page = latent_page(signed.latent("planted", 0))
    depths = [float(depth) for depth in re.findall(r"--a:([-.0-9]+)", page)]
    assert set(depths) == {1.0} and 'neg"' in page


def test_what_is_not_there_is_named(explorer: Explorer):
    """Another SAE, another snapshot, a latent beyond the last."""
    with pytest.raises(NotFoundError, match=r"'other'.*'planted'"):
        explorer.table("other")
    with pytest.raises(NotFoundError, match="the newest are in 000000002000"):
        explorer.table("planted", snapshot="000000009999")
    with pytest.raises(NotFoundError, match="latents 0 to 6, not 7"):
        explorer.latent("planted", 7)


# --- Tokens as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve 🦓 zebras", "  four\n    spaces", "日本語 and 한국어"])
def test_pieces_put_together_are_the_text(model: LanguageModel, text: str):
    """Also where a character takes several tokens: the last of them shows it, none shows half of it."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    pieces = Texts(model.tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one \ufffd two", ["one", " ", "", "", "\ufffd", " two"]),
        ("\ufffd\ufffd", ["", "", "\ufffd", "", "", "\ufffd"]),
        ("é\ufffd", ["", "é", "", "", "\ufffd"]),
    ],
)
def test_a_replacement_character_of_the_text_is_a_character(model: LanguageModel, text: str, pieces: list[str]):
    """U+FFFD takes three bytes, as any other of its kind: the last of them shows it, and what follows stays apart."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert Texts(model.tokenizer).pieces(ids) == pieces


def test_bytes_that_make_no_character_are_shown_where_they_are(model: LanguageModel):
    """Half a euro sign is one U+FFFD at its last byte, not at the word behind it; lone bytes are one each."""
    half, lone = (model.tokenizer.convert_tokens_to_ids(list(byte_tokens)) for byte_tokens in ("âĤ", "Ģ¿"))
    after = model.tokenizer.encode(" import", add_special_tokens=False)
    assert Texts(model.tokenizer).pieces([*half, *after]) == ["", "\ufffd", " import"]
    assert Texts(model.tokenizer).pieces([*lone, *after]) == ["\ufffd", "\ufffd", " import"]


def test_tokenizers_that_fall_back_on_bytes_have_whole_characters():
    """As Llama 2's: what its vocabulary lacks is one token for each byte."""
    vocabulary = {"<unk>": 0, "é": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer.encode("é\ufffdé🦓", add_special_tokens=False)
    assert Texts(tokenizer).pieces(ids) == ["é", "", "", "\ufffd", "é", "", "", "", "🦓"]


def test_spaces_are_kept_where_a_tokenizer_takes_the_first_off():
    """As Llama-2's and Mistral's do: ▁import is another token than import, and looks like another one."""
    backend = Tokenizer(models.WordLevel({"▁import": 0, "import": 1, "▁a": 2, "a": 3, "<unk>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = Texts(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (texts.of(0), texts.of(1)) == (" import", "import")
    assert texts.pieces([0, 2, 1]) == [" import", " a", "import"]
