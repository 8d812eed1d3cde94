"""The pages in a real browser: they open, move, sort, search and are left by the keyboard, without an error."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.evaluation.latents.explorer import Explorer
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app, start_service
from monitor.runs.service import make_runs_app
from producer.common.metrics import new_registry
from tests.small_reading import WORDS, read_run, small_model
from tests.test_runs import add_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]

OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_SECONDS = 60.0
"""A machine that is busy with something else is no fault of the page."""
playwright.expect.set_options(timeout=1000 * PATIENCE_SECONDS)
SHIFT = """() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => { for (const entry of list.getEntries()) sum += entry.value; })
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 200);
})"""
"""The sum of all layout shifts since the page was opened, as browsers measure them; 0.1 and less counts as good."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    return read_run(folder, small_model())


@pytest.fixture(scope="module")
def address(folder: Path, explorer: Explorer) -> Iterator[str]:
    port, close = start_service(
        make_app(folder / "run", new_registry(), handle=ExplorerHandle(explorer)), "127.0.0.1", 0, lambda: False
    )
    yield f"http://127.0.0.1:{port}"
    close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


def new_page(browser, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(1000 * PATIENCE_SECONDS)
    return page


@pytest.fixture
def page(browser, address: str) -> Iterator:
    """The live page; whatever the browser complains of fails the test."""
    page = new_page(browser, viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    until(page, "typeof Plotly !== 'undefined'")
    yield page
    page.close()
    assert complaints == []


def until(page, expression: str) -> None:
    """Waits for the page; its policy lets nobody evaluate strings in it, not even Playwright's own waiting."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"still not so: {expression}"
        page.wait_for_timeout(50)


def report(folder: Path, tokens: int, fvu: float) -> None:
    sae = {"name": "planted", "fvu": fvu, "l0": 3.0, "dead_latents_ratio": 0.0, "density": [0] * 14}
    line = {"time": 0.0, "tokens": tokens, "tokens_per_second": 5.0, "state": "training", "saes": [sae]}
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def test_curves_and_headline_move_while_the_run_does(page, folder: Path):
    """A report that the trainer appends is a point of the curve and a number above it, without a reload."""
    points = "document.querySelector('#chart-training-fvu').data?.[0]?.y.at(-1)"
    page.evaluate("window.stayed = true")
    for tokens, fvu in ((1000, 0.5), (4321, 0.25)):
        report(folder, tokens, fvu)
        until(page, f"{points} === {fvu}")
        playwright.expect(page.locator("#headline")).to_contain_text(f"{tokens:,}")
    assert page.evaluate("window.stayed")
    assert page.locator("#chart-held-out-ce_delta .scatterlayer .trace").count() == 1


def test_nothing_jumps_while_the_page_fills(page, folder: Path):
    """Curves and parts come into places that are kept for them."""
    report(folder, 5000, 0.2)
    page.wait_for_selector("#chart-training-fvu .trace", state="attached")
    assert page.evaluate(SHIFT) < 0.02


def test_headings_sort_the_table(page):
    """By latent, upwards; again, downwards; the address can be sent to others."""
    column = page.locator("#latents-table tbody tr td:first-child")
    page.click("th a[data-order=index]")
    page.wait_for_selector("th[aria-sort=ascending] a[data-order=index]")
    assert column.all_inner_texts() == [str(index) for index in range(len(WORDS) + 1)]
    page.click("th a[data-order=index]")
    page.wait_for_selector("th[aria-sort=descending] a[data-order=index]")
    assert column.first.inner_text() == str(len(WORDS))
    page.reload()
    assert column.first.inner_text() == str(len(WORDS))


def test_search_as_one_types(page):
    """The table follows; what is not found is said; the slash goes there."""
    page.keyboard.press("/")
    page.keyboard.type("import")
    until(page, "document.querySelectorAll('#latents-table tbody tr').length < 4")
    assert "import" in page.inner_text("#latents-table tbody tr:first-child")
    page.keyboard.type("zzz")
    page.wait_for_selector("#table .empty")
    assert "No such latent" in page.inner_text("#table")


def test_a_sentence_shows_its_latents(page):
    """Shaded where they fire; a token chosen leaves those that fire on it."""
    page.fill("#text", "we import a class")
    page.keyboard.press("Enter")
    page.wait_for_selector("#firings-table")
    shaded = page.locator(f'#firings-table tr[data-href="/latents/planted/{WORDS.index(" class")}"] .t')
    assert shaded.all_inner_texts() == [" class"]
    page.click("#firings a[data-at]:has-text('import')")
    page.wait_for_selector("#firings a.at")
    assert page.locator(f'#firings-table tr[data-href="/latents/planted/{WORDS.index(" class")}"]').count() == 0
    page.click("#firings-table a")
    page.wait_for_selector("h2:text('Where it fires most')")
    page.go_back()
    page.wait_for_selector("#firings a.at")
    page.click("#clear")
    until(page, "document.querySelector('#firings').innerText === ''")
    assert "text=" not in page.url


def test_sorting_by_keyboard_keeps_the_focus(page):
    """The next Tab goes on from the heading that was chosen."""
    page.focus("a[data-order=density]")
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort] a[data-order=density]")
    assert page.evaluate("document.activeElement.dataset.order") == "density"


def test_shading_shows_in_forced_colours_and_in_print(browser, address: str):
    """A strong token differs from a weak one where the system chooses the colours, and printers keep the shade."""
    page = new_page(browser, forced_colors="active")
    page.goto(f"{address}/latents/planted/0")
    background = "getComputedStyle(document.querySelector('.example .t')).backgroundColor"
    assert page.evaluate(background) != page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.evaluate("getComputedStyle(document.querySelector('.example .t')).forcedColorAdjust") == "none"
    page.emulate_media(media="print", forced_colors="none")
    assert page.evaluate("getComputedStyle(document.querySelector('.example .t')).printColorAdjust") == "exact"
    page.close()


def test_values_of_tokens_by_keyboard_and_by_tap(browser, address: str):
    """The arrow keys in a text lead from value to value, and stay on this latent; a tap shows the same."""
    page = new_page(browser)
    page.goto(f"{address}/latents/planted/0")
    page.wait_for_load_state("load")
    page.focus(".example .text")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token-value") == "import: 10"
    page.keyboard.press("Escape")
    assert page.locator("#token-value").count() == 0
    page.click(".example .t")
    assert page.inner_text("#token-value") == "import: 10" and page.url.endswith("/planted/0")
    page.close()


def test_a_text_is_tried_on_a_latent(page, address: str):
    """Read, then steered with; the next token after the one that is chosen; a reload keeps all of it."""
    page.goto(f"{address}/latents/planted/0")
    page.wait_for_load_state("load")
    page.fill("#try-text", "we import a class")
    page.click("#try-form button")
    playwright.expect(page.locator("#tried")).to_contain_text("fires on 1 of 4 tokens")
    assert page.is_disabled("#try-strength")
    page.select_option("#try-mode", "steer")
    page.fill("#try-strength", "2")
    page.click("#try-form button")
    page.wait_for_selector("#effect-table")
    page.click("#tried a[data-at='1']")
    page.wait_for_selector("#tried a[data-at='1'].at")
    page.reload()
    page.wait_for_selector("#effect-table")
    assert page.input_value("#try-mode") == "steer" and page.input_value("#try-strength") == "2"


def test_a_note_is_written_with_the_token(browser, explorer: Explorer, folder: Path):
    """In the browser that has shown it; the next reader sees it."""
    app = make_app(folder / "run", new_registry(), token="a-token-of-sixteen-letters", handle=ExplorerHandle(explorer))
    port, close = start_service(app, "127.0.0.1", 0, lambda: False)
    page = new_page(browser)
    page.goto(f"http://127.0.0.1:{port}/latents/planted/0?token=a-token-of-sixteen-letters")
    page.wait_for_selector("#note-form")
    page.wait_for_load_state("load")
    page.fill("#note-form input[name=label]", "imports")
    page.check("#note-form input[name=is_bookmarked]")
    page.click("#note-form button")
    playwright.expect(page.locator("#note-saved")).to_have_text("saved")
    page.goto(f"http://127.0.0.1:{port}/?marked=bookmark")
    assert page.locator("#latents-table tbody tr").count() == 1 and "imports" in page.inner_text("#latents-table")
    page.close()
    close()
    (folder / "run" / "notes.json").unlink()


TICKS = "[...document.querySelectorAll('#chart-training-fvu .ytick text')].map((tick) => tick.textContent)"


def test_a_logarithmic_axis_has_numbers(page, folder: Path):
    """At least two in any range, also when one has zoomed in."""
    report(folder, 5500, 0.2)
    until(page, f"{TICKS}.length > 0")
    for high, low in ((0.95, 0.55), (0.047, 0.022), (0.48, 0.21), (0.9, 0.03), (0.029, 0.021)):
        page.evaluate(
            "(range) => Plotly.relayout('chart-training-fvu', {'yaxis.range': range.map(Math.log10)})", [low, high]
        )
        until(page, f"{TICKS}.filter(Boolean).length >= 2")


def test_a_chart_without_values_has_no_axis(page, folder: Path):
    """A run younger than dead_tokens: nothing is measured, which is said."""
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        sae = {"name": "planted", "fvu": 0.1, "l0": 3.0, "dead_latents_ratio": None, "density": [0] * 14}
        line = {"time": 0.0, "tokens": 10, "tokens_per_second": 5.0, "state": "training", "saes": [sae]}
        file.write(json.dumps(line) + "\n")
    chart = page.locator("#chart-training-dead_latents_ratio")
    playwright.expect(chart.locator(".annotation")).to_have_text("nothing measured yet")
    assert chart.locator(".ytick").count() == 0


def test_firing_rates_are_a_histogram(page, folder: Path):
    """Bars are as wide as their bins, from edge to edge, and as high as latents per decade."""
    density = [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 5, 2]  # 3 from 10^-3 to 10^-2.5, 5 from 10^-0.5 on, 2 silent
    sae = {"name": "planted", "fvu": 0.1, "l0": 3.0, "dead_latents_ratio": 0.0, "density": density}
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"time": 1.0, "tokens": 6000, "tokens_per_second": 5.0, "saes": [sae]}) + "\n")
    until(page, "document.querySelector('#chart-density').data?.[0]?.y.includes(6)")
    bars = page.evaluate(
        "(({x, y, width}) => x.map((low, i) => [low, width[i] / 0.9, y[i]]))"
        "(document.querySelector('#chart-density').data[0])"
    )
    shown = [[round(part, 6) for part in bar] for bar in bars if bar[2]]
    assert shown == [[-10, 1, 2], [-3, 0.5, 6], [-0.5, 0.5, 10]]


def test_curves_have_a_legend_and_leave_as_files(page, folder: Path):
    """A name hides its curve in all charts; CSV has the points, PNG the picture."""
    report(folder, 7000, 0.125)
    until(page, "document.querySelector('#chart-training-fvu').data?.[0]?.y.at(-1) === 0.125")
    page.click("#legend button:has-text('planted')")
    until(page, "document.querySelector('#chart-training-fvu').data.length === 0")
    page.click("#legend button:has-text('planted')")
    until(page, "document.querySelector('#chart-training-fvu').data.length === 1")
    with page.expect_download() as csv:
        page.click("button[aria-label='FVU as CSV']")
    lines = Path(csv.value.path()).read_text().splitlines()
    assert lines[0] == "curve,tokens,FVU" and lines[-1] == "planted,7000,0.125"
    with page.expect_download() as png:
        page.click("button[aria-label='FVU as PNG']")
    assert png.value.suggested_filename == "run-training-fvu.png"
    assert Path(png.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.select_option("#x-axis", "time")
    until(page, "document.querySelector('#chart-training-fvu').layout.xaxis.type === 'date'")


@pytest.fixture(scope="module")
def runs_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs, one of which is evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    add_run(folder / "a", k=32, ce_delta=0.5)
    add_run(folder / "b", k=64, l0=8.0, fvu=0.125)
    port, close = start_service(make_runs_app([folder]), "127.0.0.1", 0, lambda: False)
    yield f"http://127.0.0.1:{port}"
    close()


def test_runs_are_drawn_over_each_other(browser, runs_address: str):
    """One curve for each SAE of each run, and a frontier through the best of them."""
    page = new_page(browser, viewport={"width": 1400, "height": 900})
    page.goto(runs_address)
    until(page, "document.querySelector('#chart-training-fvu')?.data?.length === 2")
    names = page.evaluate("document.querySelector('#chart-training-fvu').data.map((trace) => trace.name)")
    assert sorted(names) == ["a/small", "b/small"]
    frontier = page.evaluate("document.querySelector('#chart-frontier-fvu').data.map(({ name, x, y }) => [name, x, y])")
    assert frontier == [["frontier", [4], [0.25]], ["a/small", [4], [0.25]], ["b/small", [8], [0.125]]]
    page.click("#legend button:has-text('b/small')")
    until(page, "document.querySelector('#chart-training-fvu').data.length === 1")
    page.close()


def test_axe_finds_nothing_on_the_page_of_runs(browser, runs_address: str):
    """On phones, tablets and desktops."""
    check_with_axe(browser, runs_address)


WIDTHS = (400, 800, 1440)


def check_with_axe(browser, address: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    for width, scheme in zip(WIDTHS, ("light", "dark", "light"), strict=True):
        page = new_page(browser, viewport={"width": width, "height": 900}, bypass_csp=True, color_scheme=scheme)
        page.goto(address)
        page.wait_for_load_state("load")
        violations = axe.run(page).response["violations"]
        page.close()
        assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == [], width


@pytest.mark.parametrize(
    "path", ["/", "/?text=we import a class", "/latents/planted/0?text=we import&mode=ablate", "/nothing"]
)
def test_axe_finds_nothing(browser, address: str, path: str):
    """On phones, tablets and desktops, light and dark."""
    check_with_axe(browser, address + path)


def test_a_latent_is_opened_and_left_by_keyboard(page, address: str):
    """Down, enter; its page; right to its neighbour; up to the table again."""
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("h2:text('Where it fires most')")
    page.wait_for_load_state("load")  # and its script listens to keys
    index = int(page.url.rsplit("/", 1)[1])
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"{address}/latents/planted/{(index + 1) % (len(WORDS) + 1)}")
    page.keyboard.press("u")
    page.wait_for_selector("#latents-table")


def test_light_and_dark(page):
    """As the machine is set until somebody chooses; the choice is kept."""
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.keyboard.press("t")
    dark = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.click("#theme")
    assert page.evaluate(ground) == light


def test_a_monitor_that_is_gone_is_said_to_be(browser, folder: Path, explorer: Explorer):
    """The page stays and says so, and goes on when the monitor is back."""
    port, close = start_service(
        make_app(folder / "run", new_registry(), handle=ExplorerHandle(explorer)), "127.0.0.1", 0, lambda: False
    )
    page = new_page(browser)
    page.goto(f"http://127.0.0.1:{port}")
    until(page, "document.querySelector('#headline').dataset.html")
    close()
    connection = page.locator("#connection")
    playwright.expect(connection).to_have_text("The monitor does not answer.")
    for _ in range(3):
        page.fill("#text", "we import")
        page.keyboard.press("Enter")
        page.wait_for_selector("#firings .error")
    assert page.locator("#firings .error").count() == 1
    _, close = start_service(
        make_app(folder / "run", new_registry(), handle=ExplorerHandle(explorer)), "127.0.0.1", port, lambda: False
    )
    playwright.expect(connection).to_have_text("")
    page.keyboard.press("Enter")
    page.wait_for_selector("#firings-table")
    page.close()
    close()


def test_an_export_opens_from_a_file(browser, address: str, tmp_path: Path):
    """In a browser that is offline: all of it is there."""
    page = new_page(browser)
    page.goto(f"{address}/latents/planted/0")
    with page.expect_download() as download:
        page.click("text=export")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    page.context.set_offline(True)
    page.goto(f"file://{path}")
    assert "Where it fires most" in page.inner_text("main") and page.locator(".example .t.at").count() > 0
    page.close()


def test_a_page_opened_before_the_first_snapshot_fills_itself(
    browser, explorer: Explorer, folder: Path, tmp_path: Path
):
    """The usual way to begin: SAEs to choose from and the table come by themselves, once there is something to read."""
    handle = ExplorerHandle()
    app = make_app(tmp_path / "run", new_registry(), handle=handle)
    port, close = start_service(app, "127.0.0.1", 0, lambda: False)
    page = new_page(browser)
    page.goto(f"http://127.0.0.1:{port}")
    until(page, "document.querySelector('#headline').dataset.html")
    assert "No snapshot yet" in page.inner_text("#table")
    shutil.copytree(folder / "run", tmp_path / "run")
    handle.explorer = Explorer(tmp_path / "run", explorer._model, explorer._corpus)
    page.wait_for_selector("#latents-table")
    assert page.input_value("#sae") == "planted"
    page.close()
    close()


def test_a_narrow_window_loses_nothing(browser, address: str):
    """Neither beyond the edge nor hidden: the way to neighbours and the export stay."""
    page = new_page(browser, viewport={"width": 400, "height": 800})
    for path in ("/", "/latents/planted/0"):
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.is_visible("text=export") and page.is_visible("#next")
    page.goto(address)
    assert page.is_visible(".sections a:text('Latents')")
    page.close()


def test_the_way_back_leads_to_the_table_as_it_was(page, address: str):
    """Search and order are still there."""
    page.fill("#search", "import")
    page.wait_for_url("**search=import**")
    page.click("#latents-table tbody tr:first-child a")
    page.wait_for_selector("h2:text('Where it fires most')")
    page.wait_for_load_state("load")  # and its script listens to keys
    page.keyboard.press("u")
    page.wait_for_selector("#latents-table")
    assert page.input_value("#search") == "import"
