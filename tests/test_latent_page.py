"""What the page of one latent adds to its examples: texts tried on it, latents that fire with it, notes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from monitor.evaluation.latents.coactivation import coactive_latents
from monitor.evaluation.latents.explorer import Explorer
from monitor.evaluation.latents.intervention import Intervener
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app
from monitor.notes import Note, NoteError, Notes, parse_note
from producer.common.metrics import new_registry
from producer.lm.model import LanguageModel
from tests.small_reading import DENSE, HOOK, VALUE, WORDS, read_run, small_model

TOKEN = "a-token-of-sixteen-letters"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TEXT = "we import a class"
IMPORT = WORDS.index(" import")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent-page")


@pytest.fixture(scope="module")
def explorer(folder: Path, model: LanguageModel) -> Explorer:
    return read_run(folder, model)


@pytest.fixture
def client(folder: Path, explorer: Explorer) -> TestClient:
    return TestClient(make_app(folder / "run", new_registry(), handle=ExplorerHandle(explorer)))


@pytest.fixture
def writer(folder: Path, explorer: Explorer) -> TestClient:
    """A client of a monitor that asks for a token, and shows it."""
    app = make_app(folder / "run", new_registry(), token=TOKEN, handle=ExplorerHandle(explorer))
    return TestClient(app, headers=HEADERS)


# --- Texts that are tried --------------------------------------------------------------------------------------------


def test_a_text_is_read_by_one_latent(explorer: Explorer):
    """Its activation on each token, and nothing of the model's predictions."""
    tried = explorer.try_text("planted", IMPORT, TEXT)
    assert tried.tokens[tried.values.index(max(tried.values))] == " import"
    assert max(tried.values) == pytest.approx(VALUE, rel=1e-4) and tried.effect is None
    assert sum(value > 0 for value in tried.values) == 1 and not tried.is_cut


def test_ablation_is_what_the_model_says_without_the_latent(explorer: Explorer, model: LanguageModel):
    """Logits with value · W_dec taken away by hand at the one token on which it fires; tokens before see nothing."""
    effect = explorer.try_text("planted", IMPORT, TEXT, "ablate").effect
    source = explorer.open("planted")
    windows = explorer._reader.windows(TEXT)
    ids = torch.from_numpy(windows.ids[:, : int((~windows.padded[0]).sum())])
    place = model.tokenizer.convert_ids_to_tokens(ids[0].tolist()).index("Ġimport")

    def without(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, place] -= VALUE * source.decoder_row(IMPORT)
        return x

    before, after = (model.logits(ids, change)[0].log_softmax(-1) for change in ({}, {HOOK: without}))
    kl = (before.exp() * (before - after)).sum(1)
    assert effect is not None and effect.kl[-1] == pytest.approx(float(kl[-1]), rel=1e-2)
    assert effect.kl[0] == 0.0 and max(effect.kl) > 0
    best = effect.next_tokens[0]
    assert best.after == pytest.approx(float(after[-1].exp().max()), rel=1e-3)


def test_steering_changes_what_comes_next(explorer: Explorer):
    """More with more strength, nothing with none; the other way with less than none."""
    kl = [sum(explorer.try_text("planted", IMPORT, TEXT, "steer", strength).effect.kl) for strength in (0, 0.1, 1, -1)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[0] < kl[1] < kl[2] and kl[3] > kl[1]


def test_a_long_text_is_cut(explorer: Explorer):
    """To one window of corpus.context tokens: the cost of a question is bounded."""
    tried = explorer.try_text("planted", IMPORT, "import " * 200, "ablate")
    assert tried.is_cut and len(tried.tokens) <= 16


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("text=", 400, "expected 1 to 4,000"),
        ("text=we import&mode=break", 400, "expected ablate or steer"),
        ("text=we import&mode=steer&strength=1e9", 400, "expected -100 to 100"),
        ("text=we import&mode=steer&strength=nan", 400, "strength = 'nan': expected a number"),
        ("text=we import&mode=ablate&at=99", 400, "tokens 0 to"),
    ],
)
def test_what_cannot_be_tried_is_told(client: TestClient, query: str, status: int, words: str):
    """The value and what would do, as everywhere; on the page in the place of the answer."""
    answer = client.get(f"/v1/latents/planted/0/try?{query}")
    assert answer.status_code == status and words in answer.json()["error"]
    page = client.get(f"/latents/planted/0?{query}")
    assert page.status_code == 200 and ("Not shown" in page.text) == (query != "text=")


def test_a_model_that_predicts_nothing_has_no_effect(explorer: Explorer, model: LanguageModel):
    """An encoder: its latents can be read, and that is said."""
    intervener = Intervener(replace(model, predicts=False), explorer._texts, explorer._reader)
    source = explorer.open("planted")
    assert intervener.try_text(source, IMPORT, TEXT).effect is None
    with pytest.raises(ValueError, match="does not predict the next token"):
        intervener.try_text(source, IMPORT, TEXT, "ablate")


def test_the_page_is_sent_with_what_was_tried(client: TestClient):
    """Without a script: the address has the text, the mode and the token."""
    page = client.get(f"/latents/planted/{IMPORT}?text={TEXT}&mode=steer&strength=2&at=1").text
    assert "steered with strength 2" in page and 'id="effect-table"' in page
    assert 'id="effect-table"' not in client.get(f"/latents/planted/{IMPORT}").text
    answer = client.get(f"/v1/latents/planted/{IMPORT}/try?text={TEXT}&mode=ablate").json()
    assert answer["effect"]["mode"] == "ablate" and len(answer["effect"]["kl"]) == len(answer["tokens"])


# --- Beside other latents, and in time -------------------------------------------------------------------------------


def test_latents_that_fire_together(explorer: Explorer):
    """phi is the correlation of firing, as numpy has it; the dense latent fires with each word."""
    latents = explorer.open("planted").latents
    fires = np.zeros((latents.d_sae, latents.streamed.size))
    for latent in range(latents.d_sae):
        fires[latent, latents.of(latent)[0]] = 1
    fires = fires[:, latents.streamed.ravel()]
    index, together, phi = coactive_latents(latents, IMPORT)[0]
    assert index == DENSE and together == fires[IMPORT].sum()
    assert phi == pytest.approx(np.corrcoef(fires[IMPORT], fires[DENSE])[0, 1], rel=1e-6)
    assert coactive_latents(latents, WORDS.index(" socket")) == []  # it never fires


def test_a_latent_has_its_place_among_all(client: TestClient):
    """Density and norm of the latents that fire; where all norms are one, the strongest activation."""
    scatter = client.get(f"/v1/latents/planted/{IMPORT}").json()["scatter"]
    assert len(scatter["density"]) == len(WORDS) and scatter["own_density"] in scatter["density"]
    assert scatter["by"] == "strongest" and scatter["own_value"] == pytest.approx(VALUE, rel=1e-4)
    page = client.get(f"/latents/planted/{IMPORT}").text
    assert "Among all latents" in page and "All norms are the same." in page


def test_an_older_snapshot_of_a_latent_has_its_page(client: TestClient):
    """It says so, leads to the newest, and its neighbours are of the same snapshot."""
    newest = client.get("/latents/planted/2").text
    assert "/latents/planted/2?snapshot=000000001000" in newest and "This is an older snapshot" not in newest
    older = client.get("/latents/planted/2?snapshot=000000001000").text
    assert "This is an older snapshot" in older and 'href="/latents/planted/3?snapshot=000000001000"' in older
    assert client.get("/latents/planted/2/export?snapshot=000000001000").status_code == 200


# --- Notes -----------------------------------------------------------------------------------------------------------


def test_a_note_is_kept_in_the_run(folder: Path, writer: TestClient, client: TestClient):
    """Label, note and bookmark, with the snapshot and the time; the table and the page show them, the export too."""
    body = {"label": "  import   statements ", "note": "fires <b>late</b>", "is_bookmarked": True}
    note = writer.put("/v1/notes/planted/0", json=body).json()["note"]
    assert note["label"] == "import statements" and note["snapshot"] == "000000002000" and note["changed"]
    assert json.loads((folder / "run" / "notes.json").read_text())["notes"] == {"planted": {"0": note}}
    assert client.get("/v1/notes").json() == {"notes": {"planted": {"0": note}}, "is_writable": False}
    for address in ("/latents/planted/0", "/latents/planted/0/export"):
        assert "import statements" in client.get(address).text and "<b>late" not in client.get(address).text
    table = client.get("/parts/latents?sae=planted&marked=bookmark").text
    assert "★" in table and table.count("<tr data-href") == 1
    assert writer.put("/v1/notes/planted/0", json={}).json()["note"] is None
    assert client.get("/v1/notes").json()["notes"] == {}


def test_notes_are_written_with_the_token_alone(writer: TestClient, client: TestClient, folder: Path):
    """Where none is asked for, nobody can write; where one is, it must be shown. Everything else is read only."""
    answer = client.put("/v1/notes/planted/0", json={"label": "x"})
    assert answer.status_code == 403 and "set monitor.token_file" in answer.json()["error"]
    assert writer.put("/v1/notes/planted/0", json={"label": "x"}, headers={"Authorization": ""}).status_code == 401
    assert not (folder / "run" / "notes.json").exists() or "x" not in (folder / "run" / "notes.json").read_text()
    for address in ("/v1/run", "/v1/snapshots", "/latents/planted/0", "/v1/notes"):
        assert writer.put(address, json={}).status_code == 405
    assert "Labels, notes and bookmarks are written where" in client.get("/latents/planted/0").text
    assert 'id="note-form"' in writer.get("/latents/planted/0").text


@pytest.mark.parametrize(
    ("address", "body", "status", "words"),
    [
        ("planted/0", b'{"label": 5}', 400, "label: expected text"),
        ("planted/0", json.dumps({"note": "x" * 4001}).encode(), 400, "at most 4,000 characters"),
        ("planted/0", b'{"text": "x"}', 400, "unknown key 'text'"),
        ("planted/0", b"[]", 400, ""),
        ("planted/0", b'{"note": "' + b"x" * 70_000 + b'"}', 413, "shorten it"),
        ("planted/99", b"{}", 404, "latents 0 to 6, not 99"),
        ("other/0", b"{}", 404, "'planted'"),
    ],
)
def test_a_note_that_cannot_be_kept_is_refused(
    writer: TestClient, address: str, body: bytes, status: int, words: str
):  # fmt: skip
    """The key, the value and what is expected."""
    answer = writer.put(f"/v1/notes/{address}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and words in answer.json()["error"]


def test_a_form_of_another_site_writes_nothing(writer: TestClient):
    """Only JSON is taken, which browsers send to other sites after asking first."""
    answer = writer.put("/v1/notes/planted/0", content="label=x", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_notes_of_a_later_version_are_not_lost(tmp_path: Path):
    """Nor a damaged file: both are read as empty, and nothing is written over them."""
    for text in ('{"format": 2, "notes": {}}', '{"form'):
        (tmp_path / "notes.json").write_text(text)
        notes = Notes(tmp_path)
        assert notes.all() == {}
        with pytest.raises(NoteError, match="move it away"):
            notes.write("topk", 1, parse_note({"label": "x"}, "000000001000"))
        assert (tmp_path / "notes.json").read_text() == text


def test_notes_of_two_writers_both_stay(tmp_path: Path):
    """Each reads the file anew before it writes; an empty note removes the old one."""
    first, second = Notes(tmp_path), Notes(tmp_path)
    first.write("topk", 1, Note(label="a"))
    second.write("topk", 2, Note(label="b"))
    first.write("topk", 1, Note())
    assert second.of_sae("topk") == {2: Note(label="b")}
