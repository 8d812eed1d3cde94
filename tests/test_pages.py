"""The pages as they are sent: what stands in them, what they refuse, and what they never let through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from monitor.evaluation.latents.explorer import Explorer
from monitor.evaluation.results import Evaluation
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.html import STATIC, density_share, percentage, shaded, visible
from monitor.http.live_page import PALETTE, headline, measure_rows
from monitor.http.service import make_app
from producer.common.metrics import new_registry
from tests.small_reading import WORDS, read_run, small_model
from tests.small_run import publish_snapshot, start_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    return read_run(folder, small_model())


@pytest.fixture
def client(folder: Path, explorer: Explorer) -> TestClient:
    return TestClient(make_app(folder / "run", new_registry(), handle=ExplorerHandle(explorer)))


def test_the_page_has_its_table_as_it_is_sent(client: TestClient):
    """Without any script: rows, links to the latents, and what was asked for in the address."""
    page = client.get("/?sae=planted&search=import").text
    assert 'href="/latents/planted/0"' in page and 'value="import"' in page
    assert f'href="/latents/planted/{WORDS.index(" self")}"' not in page


def test_headings_sort_the_other_way_round(client: TestClient):
    """The column that is sorted by says so, and its link turns the order."""
    page = client.get("/?order=density&descending=1").text
    heading = page.split('aria-sort="descending"')[1].split("</th>")[0]
    assert 'data-order="density"' in heading and 'data-descending="0"' in heading and "↓" in heading


def test_a_latents_page_shows_all_there_is(client: TestClient):
    """Contexts, effects, neighbours, past, and the n-gram; scripts come from here alone."""
    answer = client.get("/latents/planted/0")
    for words in ("Where it fires most", "promotes", "Nearest latents", "In the run's snapshots", "best n-gram"):
        assert words in answer.text
    assert "script-src 'self'" in answer.headers["content-security-policy"]


def test_an_export_stands_alone(client: TestClient):
    """One file: no script, no link and nothing to be fetched; the name says what it is."""
    answer = client.get("/latents/planted/0/export")
    assert answer.headers["content-disposition"] == 'attachment; filename="planted-0-000000002000.html"'
    assert "<script" not in answer.text.replace("&lt;script", "")
    assert not re.search(r'(src|href)="(?!data:)', answer.text)
    assert "exported by Sluice" in answer.text and "Where it fires most" in answer.text


def test_text_of_the_corpus_is_no_markup(client: TestClient):
    """It holds <script>alert(1)</script>, which every page shows and none runs."""
    for address in ("/", "/latents/planted/0", "/latents/planted/0/export"):
        page = client.get(address).text
        assert "&lt;" in page and "<script>al" not in page
    assert "<img" not in client.get("/parts/fires?sae=planted&text=<img src=x> import").text


def test_what_is_asked_wrongly_is_told(client: TestClient):
    """Status, the value, and what would do; as JSON."""
    for address, status, words in (
        ("/v1/latents/planted?order=beauty", 400, "index, density, strongest, norm, age"),
        ("/v1/latents/planted?offset=-7", 400, "offset = '-7'"),
        ("/v1/latents/planted?limit=-1", 400, "at least 1"),
        ("/v1/latents/planted?limit=" + "9" * 5000, 200, ""),
        ("/v1/latents/planted?search=" + "9" * 5000, 200, ""),
        ("/v1/latents/..%2f000000001000%2fplanted", 404, ""),
        ("/v1/latents/planted/fires?text=", 400, "expected 1 to 4,000"),
        ("/v1/latents/planted/99", 404, "latents 0 to 6, not 99"),
        ("/latents/other/0", 404, "'planted'"),
        ("/static/../live_page.py", 404, ""),
        ("/static/style.css", 404, "live_page.js"),
    ):
        answer = client.get(address)
        assert answer.status_code == status and words in answer.json().get("error", "")


def test_a_script_that_reads_page_after_page_comes_to_an_end(client: TestClient):
    """Beyond the last latent there is none; the page for people shows the last ones all the same."""
    sizes = [
        len(client.get(f"/v1/latents/planted?order=index&limit=3&offset={offset}").json()["latents"])
        for offset in (0, 3, 6, 9, 900)
    ]
    assert sizes == [3, 3, 1, 0, 0]


def test_a_text_with_a_token_that_the_model_lacks_is_told(client: TestClient, explorer: Explorer, monkeypatch):
    """Id, token and place, with the status of a question that cannot be answered."""
    monkeypatch.setattr(explorer._model, "vocabulary", 500)
    answer = client.get("/v1/latents/planted/fires?text=we import a zebra")
    assert answer.status_code == 400
    assert re.match(r"window 0, position \d+: token id \d+ \('.*'\) is unknown to", answer.json()["error"])


def test_people_are_told_on_a_page(client: TestClient):
    """What programs get as JSON, wherever people go; the words of the address are no markup there."""
    for address in ("/latents/<b>x/0", "/nothing", "/v2", "/favicon.ico"):
        answer = client.get(address, headers={"Accept": "text/html"})
        assert answer.status_code == 404 and "<h1" in answer.text and "<b>x" not in answer.text
    for_programs = client.get("/v1/nothing", headers={"Accept": "text/html"})
    assert "/v1/latents" in for_programs.json()["error"] and "/v1/history" in for_programs.json()["error"]


@pytest.mark.parametrize(("address", "query"), [("/latents/planted", "?sae=planted"), ("/latents", "")])
def test_a_shortened_address_leads_to_the_table(client: TestClient, address: str, query: str):
    """As people do who cut a latent's address."""
    answer = client.get(address, follow_redirects=False)
    assert answer.status_code == 307 and answer.headers["location"] == f"/{query}#latents"


def test_a_sentence_stays_in_the_address(client: TestClient):
    """The page is sent with what fires on it, below a heading of its own, and with a mistake where there is one."""
    page = client.get("/?sae=planted&text=we import a class&at=1").text
    assert "<h3>Latents that fire on one token of this text</h3>" in page and 'id="firings-table"' in page
    assert ">we import a class</textarea>" in page and "<h3>All latents</h3>" in page
    assert "the text has tokens 0 to" in client.get("/?sae=planted&text=we import&at=99").text


def test_a_search_that_cannot_be_understood_is_told(client: TestClient):
    """On the page beside the table's place, and to programs with a status."""
    answer = client.get("/v1/latents/planted?search=/(/")
    assert answer.status_code == 400 and "/(/ is no regular expression" in answer.json()["error"]
    assert "Not understood" in client.get("/?search=/(/").text
    answer = client.get("/v1/latents/planted?density=2:1")
    assert answer.status_code == 400 and "expected LOW:HIGH" in answer.json()["error"]


def test_counts_of_silent_latents_are_told_apart(client: TestClient):
    """Three are on the page, of texts of different length: one paragraph names them."""
    page = client.get("/").text
    assert page.count("<b>dead</b> ones were silent in training") == 1
    assert "silent on these" in page


def test_all_headings_of_columns_are_headings(client: TestClient):
    """For those who hear a table: each has words, and says that it is a column's."""
    for address in ("/", "/latents/planted/0", "/?text=import"):
        headings = re.findall(r"<th[ >].*?</th>", client.get(address).text, re.DOTALL)
        assert headings and all('scope="col"' in heading for heading in headings)
        assert all(re.sub(r"<[^>]*>", "", heading).strip() for heading in headings)


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, #rrggbb (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_told_from_their_grounds(theme: str):
    """Text 4.5, and curves, edges and the ring of the focus 3, as WCAG asks."""
    blocks = (STATIC / "style.css").read_text().split("color-scheme: dark;")
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[0] if theme == "light" else blocks[1]))
    for ground in (colours["card"], colours["paper"]):
        for name in ("edge", "mark"):
            assert contrast(colours[name], ground) >= 3, (name, ground)
        assert min(contrast(colour, ground) for colour in PALETTE) >= 3
    for ground in (colours["card"], colours["paper"], colours["soft"]):
        for name in ("ink", "dim", "gold", "good", "bad", "blue"):
            assert contrast(colours[name], ground) >= 4.5, (name, ground)


def test_a_finished_run_tells_when_it_ended_and_how_long_it_took():
    """And has no empty line where the bottleneck stood."""
    report = {"time": 1_700_000_000.0, "tokens": 5, "saes": []}
    summary = {"tokens": 5, "seconds": 600.0, "tokens_per_second": 0.5, "outcome": "finished"}
    finished = headline({"state": "finished", "report": report, "summary": summary, "settings": None})
    assert ("10 min", "of training") in finished.facts
    assert finished.note == "Its last report is of 2023-11-14 22:13 UTC."


def test_who_has_the_parts_is_not_sent_them_again(client: TestClient):
    """The page asks every two seconds, and mostly nothing has changed."""
    answer = client.get("/parts")
    again = client.get("/parts", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content


def test_latents_are_there_as_json(client: TestClient):
    """What the pages show, for programs."""
    assert client.get("/v1/latents").json() == {
        "saes": [{"name": "planted", "snapshot": "000000002000"}],
        "why_not": None,
    }
    table = client.get("/v1/latents/planted?order=index&descending=0&limit=2").json()
    assert [line["index"] for line in table["latents"]] == [0, 1]
    latent = client.get("/v1/latents/planted/0").json()
    assert latent["top_tokens"] == [" import"]
    assert latent.keys() == {
        *("index", "density", "firings", "strongest", "norm", "age", "top_tokens", "sae", "snapshot", "d_sae", "rows"),
        *("hook", "target", "architecture", "explanation", "contexts", "lower", "histogram", "written_at", "promoted"),
        *("suppressed", "nearest", "past", "coactive", "scatter", "newest", "outliers"),
    }
    assert latent["contexts"][0].keys() == {
        "value",
        "times",
        "at",
        "cut_before",
        "cut_after",
        "tokens",
        "values",
        "is_outlier",
    }
    assert client.get("/v1/latents/planted/0?snapshot=000000001000").json()["age"] == 0
    assert client.get("/v1/latents/planted/fires?text=we import").json()["firing"] == 2
    assert [point for point in client.get("/v1/history").json()["evaluations"]["planted"]["tokens"]] == [1000, 2000]


def test_before_the_model_is_loaded_the_page_says_so(tmp_path: Path):
    """The page is there all the same; programs are told to ask again."""
    run, handle = start_run(tmp_path / "run"), ExplorerHandle()
    client = TestClient(make_app(run, new_registry(), handle=handle))
    assert "No snapshot yet" in client.get("/").text
    publish_snapshot(run, 1000)
    assert "still being loaded" in client.get("/").text
    answer = client.get("/v1/latents/small")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    page = client.get("/latents/small/0", headers={"Accept": "text/html"})
    assert "is still being loaded.</p>" in page.text  # with one full stop
    handle.disable("monitor.evaluate is false.")
    assert "monitor.evaluate is false." in client.get("/").text


def test_a_run_that_does_not_exist_yet_has_a_page(tmp_path: Path):
    """Every part says what will stand there."""
    page = TestClient(make_app(tmp_path / "nowhere", new_registry())).get("/").text
    for words in ("waiting for the trainer", "None yet", "No snapshot yet", "None published yet"):
        assert words in page


def test_numbers_are_short_and_never_zero_when_unknown():
    """A dash is no number, and a small share is not rounded to nothing."""
    assert [percentage(value) for value in (None, 0, 0.00042, 0.05, 0.42)] == ["–", "0 %", "0.042 %", "5 %", "42 %"]
    assert [density_share(value) for value in (0, 1e-7, 1)] == [0.0, 0.0, 1.0]


def test_tokens_are_shaded_by_their_activation():
    """Half as strong, half as deep; a negative one on another ground; what is silent has none."""
    html = shaded(["a", "<b", "c\n", "d"], [0.0, 2.0, -4.0, 0.0], 4.0, at=3)
    assert html.startswith("a<span") and "&lt;b" in html
    assert re.findall(r'class="([^"]*)" style="--a:([^"]*)"', html) == [
        ("t", "0.50"),
        ("t neg", "1.00"),
        ("t at", "0.00"),
    ]
    assert visible("a\n        b") == 'a<i class="nl">↵</i>  b'


def test_everything_measured_is_on_the_page(client: TestClient):
    """All numbers of evaluation.json, a column for each SAE; what nobody measured takes no row."""
    page = client.get("/").text
    table = page.split("all measures on held-out text")[1].split("</table>")[0]
    for words in ("CE recovered, against mean ablation", "cosine of x and x_hat", "silent latents", "F1 of n-grams"):
        assert words in table
    assert "probe accuracy" not in table
    evaluation = Evaluation(values={"l0": 3.25, "probe_accuracy": {"1": 0.75, "dense": 0.9}})
    assert [(row.title, row.cells) for row in measure_rows([evaluation, None])] == [
        ("L0", ["3.2", "–"]),
        ("probe accuracy by k: 1", ["75.0%", "–"]),
        ("probe accuracy by k: dense", ["90.0%", "–"]),
    ]
