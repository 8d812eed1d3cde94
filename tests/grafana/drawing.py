"""Dashboards drawn by Grafana's own packages: in Node, what each panel shows; in Chromium, how it looks.

    describe     the panels of a dashboard, without a browser
    draw         pictures of dashboards, and the panels as a person reads them
    faults       what is wrong with a panel

python -m tests.grafana.drawing RECORDING.json.gz FOLDER [--mode light]    writes a picture of each dashboard
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, sync_playwright

from monitor.grafana.generate import FOLDER

HERE = Path(__file__).parent
SET_UP = ".venv-grafana/ready"
"""What `make` sets up, and touches last."""
PACKAGES = (HERE.parents[1] / SET_UP).parent / "node_modules"
BUNDLE = PACKAGES.parent / "build"
ENVIRONMENT = os.environ | {"NODE_PATH": str(PACKAGES)}
LOADERS = ("--loader:.svg=dataurl", "--loader:.woff2=dataurl", "--loader:.ttf=empty")
"""What becomes of files that Grafana's components import."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREEN = {"width": 1920, "height": 930}
"""What a screen of 1080 lines leaves under browser and header: 24 rows of 38 pixels."""
SITE = "http://dashboards.test/"
PATIENCE_SECONDS = 300
"""How long a dashboard may take to be drawn, on a machine that does much else."""
NEVER = re.compile(r"No data|must be in ascending order|Unable to find field|Only one frame|NaN|undefined|Infinity")
"""What no panel may say."""


@dataclass(frozen=True)
class Value:
    """A number of a stat panel."""

    name: str
    text: str
    color: str


@dataclass(frozen=True)
class Curve:
    """A series of a panel, and a bucket of a heat map."""

    name: str
    color: str
    points: int
    """Values that can be drawn."""


@dataclass(frozen=True)
class Panel:
    """What a panel shows."""

    title: str
    type: str
    message: str | None
    """What it says in place of a drawing; None when it draws."""
    values: tuple[Value, ...] = ()
    curves: tuple[Curve, ...] = ()
    ticks: tuple[tuple[str, ...], ...] = ()
    """Labels of each axis; in Chromium only."""
    words: str = ""
    """All text of the panel; in Chromium only."""
    has_curves: bool = True
    """Whether something in the colour of a curve is drawn; False in Chromium only."""


def missing_packages() -> str | None:
    """Why nothing can be described here; None if it can."""
    if shutil.which("node") is None:
        return "node is not installed, so no dashboard is drawn here: apt-get install nodejs npm"
    if not (HERE.parents[1] / SET_UP).is_file():
        return f"Grafana's packages are not installed, so no dashboard is drawn here: make {SET_UP}"
    return None


def describe(dashboard: Path, recording: Path) -> list[Panel]:
    """The panels of a dashboard as Grafana's library prepares them. Raises RuntimeError with Node's error."""
    command = ["node", str(HERE / "describe.js"), str(dashboard), str(recording)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return [as_panel(one) for one in json.loads(process.stdout)]


def as_panel(shown: dict[str, Any]) -> Panel:
    return Panel(
        title=shown["title"],
        type=shown["type"],
        message=shown["message"],
        values=tuple(Value(**one) for one in shown.get("values", ())),
        curves=tuple(Curve(**one) for one in shown.get("curves", ())),
        ticks=tuple(tuple(label for label in axis if label) for axis in shown.get("ticks", ())),
        words=shown.get("words", ""),
        has_curves=shown.get("hasCurves", True),
    )


def draw(dashboards: dict[str, Path], recording: Path, folder: Path, mode: str = "dark") -> dict[str, list[Panel]]:
    """Draws dashboards in Chromium, `mode` dark or light; their pictures are put into `folder`, by name."""
    bundle()
    answers = json.loads(gzip.decompress(recording.read_bytes()))
    drawn = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, dashboard in dashboards.items():
            page = browser.new_page(viewport=SCREEN)
            page.route("**/*", serve)
            page.add_init_script(f"Object.assign(window, {json.dumps({'mode': mode, 'recording': answers})})")
            page.add_init_script(f"window.dashboard = {dashboard.read_text()}")
            drawn[name] = look(page)
            page.screenshot(path=folder / f"grafana-{name}.png")
            page.close()
        browser.close()
    return drawn


def bundle() -> None:
    """Makes one script, and one style sheet, of page.jsx and the packages that it imports."""
    production = '--define:process.env.NODE_ENV="production"'
    esbuild = [
        str(PACKAGES / ".bin" / "esbuild"),
        str(HERE / "page.jsx"),
        "--bundle",
        f"--outfile={BUNDLE / 'page.js'}",
    ]
    subprocess.run([*esbuild, *LOADERS, production, "--log-level=warning"], check=True, env=ENVIRONMENT)


def look(page: Page) -> list[Panel]:
    """Waits until the dashboard is drawn, and reads it. Raises RuntimeError with what went wrong in the page."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(PATIENCE_SECONDS * 1000)
    page.goto(SITE)
    page.wait_for_function("['drawn', 'failed'].includes(document.title)")
    errors += page.evaluate("window.failure ? [window.failure] : []")
    if errors:
        raise RuntimeError("\n".join(errors))
    return [as_panel(one) for one in page.evaluate(READ)]


READ = """() => drawn.map((panel) => {
    const place = document.querySelector(`[data-panel="${panel.id}"]`);
    const canvas = place.querySelector('canvas');
    const pixels = canvas ? canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data : [];
    const channels = (color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    const colors = (panel.curves ?? []).map((curve) => channels(curve.color));
    const isNear = (at) => ([r, g, b]) =>
        Math.abs(pixels[at] - r) + Math.abs(pixels[at + 1] - g) + Math.abs(pixels[at + 2] - b) < 30;
    let hasCurves = [...place.querySelectorAll('rect')].some((cell) => cell.getAttribute('fill-opacity') > 0.1);
    for (let at = 0; at < pixels.length && !hasCurves; at += 4) {
        hasCurves = pixels[at + 3] > 200 && colors.some(isNear(at));
    }
    return { ...panel, words: place.innerText, hasCurves };
})"""


def serve(route: Route) -> None:
    """Answers with the page, its script and style, and Grafana's icons; nothing is asked of anyone else."""
    path = route.request.url.removeprefix(SITE).partition("?")[0]
    icon = PACKAGES / "@grafana" / "ui" / "dist" / path
    if path == "":
        route.fulfill(content_type="text/html", body=PAGE)
    elif path in ("page.js", "page.css"):
        route.fulfill(path=BUNDLE / path)
    elif path.startswith("public/") and icon.is_file():
        route.fulfill(path=icon)
    else:
        route.fulfill(status=404)


PAGE = """<!doctype html><meta charset="utf-8"><title></title><link rel="stylesheet" href="page.css">
<body style="margin: 0"><div id="root"></div><script src="page.js"></script>"""


def faults(panel: Panel, definition: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a panel, in words; `definition` is its JSON in the dashboard."""
    defaults = definition.get("fieldConfig", {}).get("defaults", {})
    texts = [panel.message or "", panel.words, *(value.text for value in panel.values)]
    for text in texts:
        if unwanted := NEVER.search(text):
            yield f"says {unwanted[0]!r}"
    if panel.message is not None and panel.message != defaults.get("noValue"):
        yield f"does not draw: {panel.message}"
    words = set(mapped_words(defaults.get("mappings", [])))
    if len(words) > 1:
        yield from (f"shows {value.text!r}, not one of its words" for value in panel.values if value.text not in words)
    for axis in panel.ticks:
        if len(set(axis)) < len(axis):
            yield f"two ticks have one label: {' '.join(axis)}"
    if panel.message is None and any(curve.points > 1 for curve in panel.curves) and not panel.has_curves:
        yield "draws no curve"
    names, colors = [[getattr(curve, key) for curve in panel.curves] for key in ("name", "color")]
    if panel.type != "heatmap" and len(set(names)) != len(set(colors)):
        yield "has two curves of one colour"


def mapped_words(mappings: list[dict[str, Any]]) -> Iterator[str]:
    """The texts that mappings put in the place of values."""
    for mapping in mappings:
        results = mapping["options"].values() if mapping["type"] == "value" else [mapping["options"]["result"]]
        yield from (result["text"] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("dark", "light"), default="dark")
    options = parser.parse_args()
    boards = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
    for name, panels in draw(boards, options.recording, options.folder, options.mode).items():
        definitions = json.loads(boards[name].read_text())["panels"]
        for panel, definition in zip(panels, definitions, strict=True):
            for fault in faults(panel, definition):
                print(f"{name}: {panel.title} {fault}")


if __name__ == "__main__":
    main()
