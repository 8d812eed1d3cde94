"""What a Prometheus answers to the queries of the dashboards, as Grafana asks them: a file that panels are drawn from.

python -m tests.grafana.recording http://127.0.0.1:9090 FILE.json.gz --runs demo other --seconds 900
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.grafana.generate import DASHBOARDS, FOLDER

RECORDED = Path(__file__).parent / "recorded.json.gz"
"""The answers that the quick tests read: of two runs of the demo."""
ROUND_STEPS = (5, 10, 15, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
"""Seconds between the points of a curve that Grafana may ask for; none is below the interval between scrapes."""
MOST_POINTS = 200
"""Points of a curve, so that a recording stays small. Grafana asks for about one per pixel."""
SCRAPE_SECONDS = 5


@dataclass(frozen=True)
class Question:
    """A query of a panel, with its variables."""

    expr: str
    is_instant: bool
    """Asked for the last moment alone, as the numbers at the top of a dashboard are."""

    @property
    def key(self) -> str:
        """Its name in a recording."""
        return f"{'now ' * self.is_instant}{self.expr}"


def dashboards(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The dashboards' JSON, by name."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in DASHBOARDS}


def questions() -> Iterator[Question]:
    """Those of all panels of all dashboards."""
    for board in dashboards().values():
        for panel in board["panels"]:
            yield from questions_of(panel)


def questions_of(panel: dict[str, Any]) -> list[Question]:
    """Those of one panel."""
    return [Question(target["expr"], bool(target.get("instant"))) for target in panel["targets"]]


def is_recorded(panel: dict[str, Any], recording: dict[str, Any]) -> bool:
    """Whether a query of the panel is in a recording: a new panel's are not, before the next one is made."""
    return any(question.key in recording["answers"] for question in questions_of(panel))


def read(path: Path) -> dict[str, Any]:
    """The recording in a file."""
    return json.loads(gzip.decompress(path.read_bytes()))


def substitute(expr: str, runs: Sequence[str], step: float = SCRAPE_SECONDS) -> str:
    """The query as Grafana sends it: with the chosen runs, all SAEs, and the interval of rates."""
    chosen = "|".join(re.escape(run) for run in runs)
    values = {
        "$run": f"({chosen})" if len(runs) > 1 else chosen,
        "$sae": ".*",
        "$__rate_interval": f"{max(step + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS):g}s",
    }
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    return expr


def record(prometheus: str, runs: Sequence[str], seconds: float, end: float | None = None) -> dict[str, Any]:
    """All answers over the last `seconds` before `end`, a time in seconds since the Unix epoch; now without one."""
    step = next((step for step in ROUND_STEPS if step >= seconds / MOST_POINTS), ROUND_STEPS[-1])
    last = math.floor((end or time.time()) / step) * step
    first = last - math.floor(seconds / step) * step
    answers: dict[str, Any] = {}
    for question in questions():
        query = substitute(question.expr, runs, step)
        if question.is_instant:
            series = ask(prometheus, "query", query=query, time=last)
            answers[question.key] = [{"metric": one["metric"], "values": [one["value"]]} for one in series]
        else:
            answers[question.key] = ask(prometheus, "query_range", query=query, start=first, end=last, step=step)
    return {"runs": list(runs), "from": first, "to": last, "step": step, "answers": answers}


def ask(prometheus: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """The series that Prometheus returns. Raises HTTPError for a query that it refuses."""
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)["data"]["result"]


def write(recording: dict[str, Any], path: Path) -> None:
    """Writes a recording, gzipped; the same recording gives the same bytes."""
    text = json.dumps(recording, separators=(",", ":"), sort_keys=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("prometheus")
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--end", type=float)
    options = parser.parse_args()
    write(record(options.prometheus, options.runs, options.seconds, options.end), options.file)


if __name__ == "__main__":
    main()
